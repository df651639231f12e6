"""The writers that ship: programs of their own (packaging/writers), which the agent starts for a freeze."""
