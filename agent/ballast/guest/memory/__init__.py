"""The guest's memory: pressure, demand and memory blocks."""
