"""The host's side (package ballast-host)."""
