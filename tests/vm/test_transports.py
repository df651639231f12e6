"""Who may talk to the agent and how, over vsock and virtio-serial, in a real guest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.guest import Guest, QmpError
from tests.vm.raw import Raw
from tests.vm.unit import mutant, usage

# What a stranger gets: nothing at all, or an answer to its ping.
LOOPBACK_PROBE = """
import socket, sys
peer = socket.socket(socket.AF_VSOCK)
peer.settimeout(20)
peer.connect((int(sys.argv[1]), 640))
try:
    if sys.argv[2] == "talk":
        peer.sendall(b'{"execute": "guest-ping"}\\n')
    print(peer.recv(100).decode() or "closed")
except OSError as error:
    print("closed" if isinstance(error, ConnectionError) else error)
"""
HANDSHAKE = {"guest-sync", "guest-sync-delimited", "guest-ping", "guest-info", "ballast-agent-status"}
SERIAL_PORT = "org.ballast.agent.0"
QUIET_S = 3.0
MOST_TICKS = 1
RECONNECTS = 20
DEADLINE_S = 30.0


# --- vsock: who may come in


@pytest.fixture(scope="module")
def loopback(guest: Guest) -> Iterator[None]:
    """What any user of the guest can bring about, by opening a vsock socket to CID 1."""
    guest.run("modprobe vsock_loopback")
    yield
    guest.run("modprobe -r vsock_loopback")


def knock(guest: Guest, cid: int, manner: str = "talk") -> str:
    return guest.run(["python3", "-c", LOOPBACK_PROBE, str(cid), manner]).stdout.strip()


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("cid", [1, 42], ids=["loopback", "own"])
@pytest.mark.parametrize("manner", ["talk", "listen"])
def test_a_process_of_the_guest_is_closed_before_a_byte_is_read(guest: Guest, cid: int, manner: str) -> None:
    assert knock(guest, cid, manner) == "closed"


@pytest.mark.usefixtures("loopback")
def test_without_the_check_of_the_cid_a_process_of_the_guest_is_answered(guest: Guest) -> None:
    """The test above fails when the check is taken out."""
    with mutant(guest, "ballast/guest/transports/vsock.py", "if cid != _HOST_CID:", "if False:"):
        assert json.loads(knock(guest, 1)) == {"return": {}}
    assert knock(guest, 1) == "closed"


def reason(answer: dict[str, object]) -> object:
    error = answer.get("error")
    return error["data"].get("reason") if isinstance(error, dict) else None


def try_to_freeze(target: str) -> object:
    """The reason why a peer without a token may not freeze; None if it may, and then it is thawed again."""
    with Raw(target) as raw:
        refused = reason(raw.ask("guest-fsfreeze-freeze-list", mountpoints=["/mnt/data0"]))
        raw.ask("guest-fsfreeze-thaw")
    return refused


def test_without_the_token_a_vsock_peer_may_shake_hands_and_nothing_else(vsock: str) -> None:
    with Raw(vsock) as raw:
        info = raw.ask("guest-info")["return"]
        names = {command["name"] for command in info["supported_commands"]}
        assert names > HANDSHAKE
        for name in sorted(names - HANDSHAKE - {"ballast-authenticate"}):
            assert reason(raw.ask(name)) == "unauthenticated", name
        assert raw.ask("guest-sync", id=3) == {"return": 3}
        assert raw.ask("guest-ping") == {"return": {}}
        assert raw.ask("ballast-agent-status")["return"]["protocol"] == 1
        assert raw.exchange(b"") != []


def test_without_the_token_a_vsock_peer_can_freeze_nothing(guest: Guest, vsock: str) -> None:
    assert try_to_freeze(vsock) == "unauthenticated"
    guest.run("touch /mnt/data0/written; sync -f /mnt/data0/written")


def test_without_the_check_of_the_token_a_vsock_peer_can_freeze(guest: Guest, vsock: str) -> None:
    """The test above fails when the check is taken out."""
    check = "if not peer.authenticated and not found.marks.unauthenticated:"
    with mutant(guest, "ballast/guest/dispatch.py", check, "if False:"):
        assert try_to_freeze(vsock) is None
    assert try_to_freeze(vsock) == "unauthenticated"


def test_the_token_opens_the_rest_and_the_third_wrong_one_ends_the_connection(vsock: str, token: str) -> None:
    wrong = [token[:-1], "\ud800é" * 1000, ""]
    with Raw(vsock) as raw:
        assert [reason(raw.ask("ballast-authenticate", token=one)) for one in wrong[:2]] == ["unauthenticated"] * 2
        assert raw.ask("ballast-authenticate", token=token) == {"return": {}}
        assert raw.ask("guest-fsfreeze-status") == {"return": "thawed"}
    with Raw(vsock) as raw:
        assert [reason(raw.ask("ballast-authenticate", token=one)) for one in wrong] == ["unauthenticated"] * 3
        with pytest.raises((EOFError, ConnectionError)):
            raw.ask("ballast-authenticate", token=token)


# --- virtio-serial: a port without connections


def test_without_a_host_on_the_port_the_agent_does_nothing(guest: Guest, serial: str) -> None:
    with Raw(serial) as raw:
        raw.exchange(b"")
    before = usage(guest)
    time.sleep(QUIET_S)  # what is proven here is that in this time nothing happens
    after = usage(guest)
    assert after.cpu_ticks - before.cpu_ticks <= MOST_TICKS
    assert after.descriptors == before.descriptors


def test_the_first_bytes_on_the_port_are_the_first_answer(serial: str) -> None:
    for number in range(RECONNECTS):
        with Raw(serial) as raw:
            assert raw.ask("guest-sync", id=number) == {"return": number}


def test_half_a_request_of_a_host_that_went_is_not_the_next_ones(guest: Guest, serial: str) -> None:
    pid = usage(guest).pid
    for _ in range(RECONNECTS):
        with Raw(serial) as raw:
            raw.send(b'{"execute": "guest-fsfreeze-status", "id": {"half": "')
        with Raw(serial) as raw:
            raw.exchange(b"")
            assert raw.ask("guest-ping") == {"return": {}}
    assert usage(guest).pid == pid


def wait_for_port(guest: Guest, *, there: bool) -> None:
    path = f"/dev/virtio-ports/{SERIAL_PORT}"
    guest.run(f"until test {'' if there else '!'} -e {path}; do udevadm settle; done", timeout_s=DEADLINE_S)


@contextmanager
def unplugged(guest: Guest) -> Iterator[None]:
    guest.qmp("device_del", id="port-ballast")
    wait_for_port(guest, there=False)
    try:
        yield
    finally:
        plug_in(guest)
        wait_for_port(guest, there=True)


def plug_in(guest: Guest) -> None:
    port = {"driver": "virtserialport", "id": "port-ballast", "chardev": "ballast", "name": SERIAL_PORT}
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            guest.qmp("device_add", **port)
        except QmpError as error:  # QEMU lets go of the chardev a moment after it has unplugged the port
            if "already in use" not in str(error) or time.monotonic() > deadline_s:
                raise
        else:
            return


@pytest.mark.parametrize("connected", [False, True], ids=["alone", "with-a-host"])
def test_the_port_is_unplugged_and_plugged_in_again(guest: Guest, serial: str, vsock: str, connected: bool) -> None:
    before = usage(guest)
    with Raw(serial) as raw:
        raw.exchange(b"")
        if not connected:
            raw.close()
        with unplugged(guest), Raw(vsock) as other:
            assert other.ask("guest-ping") == {"return": {}}
    with Raw(serial) as raw:
        raw.exchange(b"")
        assert raw.ask("guest-ping") == {"return": {}}
    after = usage(guest)
    assert (after.pid, after.descriptors) == (before.pid, before.descriptors)
