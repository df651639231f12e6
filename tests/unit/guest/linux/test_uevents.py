"""Uevents as the kernel sends them: bad ones first, then real ones, then what later kernels may add."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.guest.linux.uevents import Uevent, parse_uevent

# Debian 13, Linux 6.12: a block that came online, a port that came with its driver.
ONLINE = (
    b"online@/devices/system/memory/memory33\0ACTION=online\0DEVPATH=/devices/system/memory/memory33\0"
    b"SUBSYSTEM=memory\0SEQNUM=1424\0"
)
PORT = (
    b"add@/devices/pci0000:00/0000:00:03.0/virtio1/virtio-ports/vport1p2\0ACTION=add\0"
    b"DEVPATH=/devices/pci0000:00/0000:00:03.0/virtio1/virtio-ports/vport1p2\0SUBSYSTEM=virtio-ports\0"
    b"MAJOR=245\0MINOR=2\0DEVNAME=vport1p2\0SEQNUM=900\0"
)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0\0\0",
        b"online@/devices/system/memory/memory33",
        ONLINE.replace(b"ACTION=online\0", b""),
        ONLINE.replace(b"DEVPATH=", b"PATH="),
        ONLINE.replace(b"SUBSYSTEM=memory", b"SUBSYSTEM"),
        b"libudev\0\xfe\xed\xca\xfe",
    ],
)
def test_what_is_no_uevent_is_a_value_error(message: bytes) -> None:
    with pytest.raises(ValueError, match="lacks"):
        parse_uevent(message)


def test_what_happened_to_which_device_of_which_subsystem() -> None:
    assert parse_uevent(ONLINE) == Uevent("online", "memory", "memory33")
    assert parse_uevent(PORT) == Uevent("add", "virtio-ports", "vport1p2")


def test_keys_of_later_kernels_and_names_that_are_no_text_are_taken() -> None:
    assert parse_uevent(ONLINE + b"LATER=a=b\0FLAG\0") == parse_uevent(ONLINE)
    odd = ONLINE.replace(b"DEVPATH=/devices/system/memory/memory33", b"DEVPATH=/devices/\xff=\n")
    assert parse_uevent(odd).name.encode(errors="surrogateescape") == b"\xff=\n"


@given(st.binary(max_size=80))
def test_nothing_but_value_error_comes_out_of_any_bytes(message: bytes) -> None:
    try:
        parse_uevent(ONLINE.replace(b"SUBSYSTEM=memory\0", message))
    except ValueError:
        return
