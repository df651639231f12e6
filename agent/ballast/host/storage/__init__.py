"""Disks of virtual machines: backups, and what is made of them."""
