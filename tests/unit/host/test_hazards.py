"""Which machines may not be punched, by name."""

from __future__ import annotations

import pytest

from ballast.host.hazards import check_devices, check_network
from ballast.host.machine import NotReclaimable
from ballast.host.monitor import Object

PLAIN = [
    Object("/machine/peripheral/net0", "virtio-net-pci"),
    Object("/machine/peripheral/dimm0", "pc-dimm"),
    Object("/objects/ram", "memory-backend-memfd"),
    Object("/machine/peripheral/balloon", "virtio-balloon-pci"),
]
VSOCK = [
    Object("/machine/peripheral/vsock", "vhost-user-vsock-pci"),
    Object("/machine/peripheral/vsock/virtio-backend", "vhost-user-vsock-device"),
]
ANONYMOUS = [Object("/machine/peripheral-anon/device[1]", "vhost-user-fs-pci")]


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        ([Object("/machine/peripheral/gpu", "vfio-pci")], r"gpu \(vfio-pci\) may have pinned"),
        ([Object("/machine/peripheral-anon/device[3]", "vfio-pci-nohotplug")], r"device\[3\] \(vfio-pci-nohotplug\)"),
        ([Object("/machine/peripheral/d", "x-vfio-user-pci")], r"d \(x-vfio-user-pci\)"),
        ([Object("/machine/peripheral/v", "vhost-vdpa-device-pci")], r"v \(vhost-vdpa-device-pci\)"),
        ([Object("/machine/peripheral/r", "pvrdma")], r"r \(pvrdma\)"),
        ([Object("/objects/iommufd0", "iommufd")], r"iommufd0 \(iommufd\)"),
        ([Object("/objects/sev0", "sev-snp-guest")], r"sev0 \(sev-snp-guest\): memory of a confidential guest"),
        ([Object("/objects/tdx", "tdx-guest")], r"tdx \(tdx-guest\)"),
        (VSOCK, r"vsock \(vhost-user-vsock-pci\) is served by another process.*--safe-vhost-user vsock"),
        (ANONYMOUS, r"device\[1\] \(vhost-user-fs-pci\)"),
        ([Object("/objects/c", "cryptodev-vhost-user")], r"c \(cryptodev-vhost-user\)"),
    ],
)
def test_what_keeps_pages_is_refused(devices: list[Object], problem: str) -> None:
    with pytest.raises(NotReclaimable, match=problem):
        check_devices([*PLAIN, *devices], ["other"])


def test_what_does_not_is_none_of_our_business() -> None:
    check_devices([*PLAIN, *VSOCK, *ANONYMOUS], ["vsock", "device[1]"])


def test_the_hosts_ends_of_network_cards_count() -> None:
    check_network([("n0", "tap"), ("nic", "nic"), ("n1", "vhost-user")], ["n1"])
    with pytest.raises(NotReclaimable, match=r"n1 \(vhost-user\)"):
        check_network([("n1", "vhost-user")], ["n0"])
    with pytest.raises(NotReclaimable, match=r"n1 \(vhost-vdpa\)"):
        check_network([("n1", "vhost-vdpa")], ["n1"])
