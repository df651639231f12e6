"""The writer of Redis and Valkey, against a server of our own on a socket that says what the test has it say."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast.guest.writers.program import AbsentError, Request, WriterError
from ballast.guest.writers.redis import Redis, address, read_directives

INFO = {
    "run_id": "aaaa",
    "rdb_bgsave_in_progress": "0",
    "rdb_last_bgsave_status": "ok",
    "rdb_last_save_time": "1700000000",
    "rdb_changes_since_last_save": "3",
    "aof_enabled": "0",
}


class FakeServer:
    """Answers each connection's commands, as many as come; ``info`` and ``refusals`` are the test's to change."""

    def __init__(self, path: Path) -> None:
        self.info = dict(INFO)
        self.save_points = "3600 1"
        self.password = ""
        self.refusals: list[str] = []  # what the next BGSAVEs are answered with
        self.commands: list[list[str]] = []
        self.is_silent = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        is_in = not self.password
        with connection, connection.makefile("rwb", buffering=0) as stream:
            while header := stream.readline():
                words = []
                for _ in range(int(header[1:])):
                    size = int(stream.readline()[1:])
                    words.append(stream.read(size + 2)[:-2].decode())
                self.commands.append(words)
                if self.is_silent:
                    continue
                if words[0] == "AUTH":
                    is_in = words[1] == self.password
                stream.write(self._answer(words) if is_in else b"-NOAUTH Authentication required.\r\n")

    def _answer(self, words: list[str]) -> bytes:
        if words[0] == "INFO":
            text = "# Section\r\n" + "".join(f"{key}:{value}\r\n" for key, value in self.info.items())
            if words[1] == "persistence":
                self.info["rdb_bgsave_in_progress"] = "0"  # it ends when it has been looked at
            return f"${len(text)}\r\n{text}\r\n".encode()
        if words[0] == "CONFIG":
            return f"*2\r\n$4\r\nsave\r\n${len(self.save_points)}\r\n{self.save_points}\r\n".encode()
        if words[0] == "BGSAVE" and self.refusals:
            return f"-ERR {self.refusals.pop(0)}\r\n".encode()
        if words[0] == "BGSAVE":
            self.info["rdb_bgsave_in_progress"] = "1"
            return b"+Background saving started\r\n"
        return b"+OK\r\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path / "sock")
    (tmp_path / "redis.conf").write_text(f"port 0\nunixsocket {tmp_path / 'sock'}\n")
    yield server
    server.stop()


def request(tmp_path: Path, verb: str, deadline_ms: int = 10_000) -> Request:
    config = {"config-files": [f"{tmp_path}/*.conf"]}
    return Request({"verb": verb, "deadline-ms": deadline_ms, "config": config})


def ask(writer: Redis, tmp_path: Path, *verbs: str) -> dict[str, Any]:
    """The answer to the last of the verbs."""
    answer: dict[str, Any] = {}
    for verb in verbs:
        answer = getattr(writer, verb)(request(tmp_path, verb))
    return answer


def test_a_save_begins_after_prepare_and_is_over_before_its_answer(tmp_path: Path, server: FakeServer) -> None:
    ask(Redis(), tmp_path, "identify", "prepare")
    names = [command[0] for command in server.commands]
    assert names.count("BGSAVE") == 1
    assert names[names.index("BGSAVE") :].count("INFO") == 4  # twice two sections: in progress, and over


def test_freeze_tells_what_is_saved(tmp_path: Path, server: FakeServer) -> None:
    detail = ask(Redis(), tmp_path, "identify", "prepare", "freeze")["detail"]
    assert detail["servers"] == [
        {
            "address": str(tmp_path / "sock"),
            "run-id": "aaaa",
            "saved-at-s": 1_700_000_000,
            "changes-since": 3,
            "append-only": False,
        }
    ]


@pytest.mark.parametrize(
    "refusal",
    [
        "Background save already in progress",
        "Another child process is active (AOF?): can't BGSAVE right now. Use BGSAVE SCHEDULE in order to ...",
    ],
)
def test_a_save_that_began_before_is_not_enough(tmp_path: Path, server: FakeServer, refusal: str) -> None:
    server.refusals = [refusal]
    ask(Redis(), tmp_path, "identify", "prepare")
    assert [command[0] for command in server.commands].count("BGSAVE") == 2


def test_what_the_server_says_no_with_is_the_reason(tmp_path: Path, server: FakeServer) -> None:
    server.refusals = ["unknown command 'BGSAVE'"]
    with pytest.raises(WriterError, match="ERR unknown command 'BGSAVE'"):
        ask(Redis(), tmp_path, "identify", "prepare")


def test_a_save_that_failed_is_an_error(tmp_path: Path, server: FakeServer) -> None:
    server.info["rdb_last_bgsave_status"] = "err"
    with pytest.raises(WriterError, match="the save failed"):
        ask(Redis(), tmp_path, "identify", "prepare")


def test_a_restart_between_prepare_and_freeze_is_an_error(tmp_path: Path, server: FakeServer) -> None:
    writer = Redis()
    ask(writer, tmp_path, "identify", "prepare")
    server.info["run_id"] = "bbbb"
    with pytest.raises(WriterError, match="the server was restarted"):
        ask(writer, tmp_path, "freeze")


def test_a_restart_while_frozen_is_told(tmp_path: Path, server: FakeServer) -> None:
    writer = Redis()
    ask(writer, tmp_path, "identify", "prepare", "freeze")
    server.info["run_id"] = "bbbb"
    assert ask(writer, tmp_path, "thaw") == {"held": False, "reason": f"{tmp_path}/sock: the server was restarted"}


def test_a_server_that_ended_while_frozen_is_told(tmp_path: Path, server: FakeServer) -> None:
    writer = Redis()
    ask(writer, tmp_path, "identify", "prepare", "freeze")
    server.stop()
    answer = ask(writer, tmp_path, "thaw")
    assert answer["held"] is False
    assert "refused" in answer["reason"]


def test_it_held_if_it_is_the_same_server(tmp_path: Path, server: FakeServer) -> None:
    assert ask(Redis(), tmp_path, "identify", "prepare", "freeze", "thaw") == {"held": True}


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, server: FakeServer) -> None:
    writer = Redis()
    ask(writer, tmp_path, "identify")
    server.is_silent = True
    with pytest.raises(WriterError, match="did not answer prepare in time"):
        writer.prepare(request(tmp_path, "prepare", deadline_ms=50))


def test_the_password_is_the_servers_own(tmp_path: Path, server: FakeServer) -> None:
    server.password = "open sesame"
    with (tmp_path / "redis.conf").open("a") as file:
        file.write('requirepass "open sesame"\n')
    assert ask(Redis(), tmp_path, "identify", "prepare", "freeze", "thaw") == {"held": True}


def test_of_two_files_for_one_server_one_has_to_fit(tmp_path: Path, server: FakeServer) -> None:
    server.password = "sesame"
    text = (tmp_path / "redis.conf").read_text()
    (tmp_path / "valkey.conf").write_text(f"{text}requirepass sesame\n")
    assert len(ask(Redis(), tmp_path, "identify", "prepare", "freeze")["detail"]["servers"]) == 1
    (tmp_path / "valkey.conf").unlink()
    with pytest.raises(WriterError, match="NOAUTH"):
        ask(Redis(), tmp_path, "identify")


def test_a_server_that_is_told_to_save_nothing_is_left_alone(tmp_path: Path, server: FakeServer) -> None:
    server.save_points = ""
    with pytest.raises(AbsentError, match="is configured to save nothing"):
        ask(Redis(), tmp_path, "identify")
    server.info["aof_enabled"] = "1"
    ask(Redis(), tmp_path, "identify")


def test_a_server_that_is_not_running_is_absent(tmp_path: Path) -> None:
    (tmp_path / "redis.conf").write_text(f"unixsocket {tmp_path / 'sock'}\n")
    with pytest.raises(AbsentError, match="is running"):
        ask(Redis(), tmp_path, "identify")


def test_who_speaks_another_protocol_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        (tmp_path / "redis.conf").write_text(f"unixsocket {tmp_path / 'sock'}\n")

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(WriterError, match="another protocol"):
            ask(Redis(), tmp_path, "identify")
        thread.join()


def test_the_last_directive_counts(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text('# port 1\n\nport 6379\nPORT 6380\nsave ""\nrequirepass "a \\"b\\""\n')
    assert read_directives(tmp_path / "conf") == {"port": ["6380"], "save": [""], "requirepass": ['a "b"']}


@pytest.mark.parametrize(
    ("directives", "where"),
    [
        ({}, ("127.0.0.1", 6379)),
        ({"port": ["6380"]}, ("127.0.0.1", 6380)),
        ({"bind": ["127.0.0.1", "-::1"]}, ("127.0.0.1", 6379)),
        ({"bind": ["*", "-::*"]}, ("127.0.0.1", 6379)),
        ({"bind": ["10.0.0.5"]}, ("10.0.0.5", 6379)),
        ({"bind": ["-::1"]}, ("::1", 6379)),
        ({"unixsocket": ["/run/x.sock"], "port": ["0"]}, "/run/x.sock"),
    ],
)
def test_where_a_server_listens(directives: dict[str, list[str]], where: str | tuple[str, int]) -> None:
    assert address(directives) == where
