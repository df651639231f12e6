"""Ballast keeps a virtual machine steady: an agent in the guest, a controller on the host, one wire between them."""

__version__ = "0.1.0"
