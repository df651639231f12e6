"""What guest and host say to each other: stdlib only, no sockets, no kernel."""
