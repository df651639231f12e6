"""The lab: images of Debian guests, guests under QEMU, and a shell in each. Start at guest.py."""
