"""The agent as a service of the system."""
