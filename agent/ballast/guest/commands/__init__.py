"""What a peer may ask for: one class for each topic, one method for each command."""
