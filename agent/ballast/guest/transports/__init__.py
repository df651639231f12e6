"""Ways in: each module yields connections, and nothing else."""
