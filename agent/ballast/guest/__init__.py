"""The agent inside the guest (package ballast-agent)."""
