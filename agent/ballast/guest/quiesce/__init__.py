"""Freezing and thawing file systems under a lease."""
