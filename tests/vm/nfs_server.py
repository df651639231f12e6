"""An NFS server of one empty folder, to be mounted and then stopped: python3 nfs_server.py PORT.

As much of NFS 3 and its mount protocol as Linux asks for in a mount(2): RFC 1813, RFC 5531, over TCP on 127.0.0.1.
"""

from __future__ import annotations

import socketserver
import struct
import sys

NFS, MOUNT = 100003, 100005
HANDLE = b"ballast-lab-root"
# type directory, 0755, two links, root's, 4096 bytes used and long, on a device, fileid 1, three times.
ATTRIBUTES = struct.pack(">5I2Q2I2Q6I", 2, 0o755, 2, 0, 0, 4096, 4096, 0, 0, 1, 1, *(0,) * 6)
WITH_ATTRIBUTES = struct.pack(">I", 1) + ATTRIBUTES
OK = struct.pack(">I", 0)


def answer(program: int, procedure: int) -> bytes:
    """The result of a call that succeeds."""
    if procedure == 0:
        return b""
    if program == MOUNT:  # MNT: the handle, and AUTH_SYS as the one flavour
        return OK + struct.pack(">I", len(HANDLE)) + HANDLE + struct.pack(">2I", 1, 1) if procedure == 1 else b""
    results = {
        1: ATTRIBUTES,  # GETATTR
        4: WITH_ATTRIBUTES + struct.pack(">I", 0x1F),  # ACCESS
        18: WITH_ATTRIBUTES + struct.pack(">6QI", *(1 << 20,) * 6, 0),  # FSSTAT
        # FSINFO: sizes of reads, writes and readdirs, largest file, resolution of time, properties
        19: WITH_ATTRIBUTES + struct.pack(">7IQ3I", *(65536, 65536, 512) * 2, 65536, 1 << 40, 0, 1, 0x1B),
        20: WITH_ATTRIBUTES + struct.pack(">6I", 32000, 255, 1, 1, 0, 1),  # PATHCONF
    }
    if procedure in results:
        return OK + results[procedure]
    return struct.pack(">2I", 10004, 0)  # NFS3ERR_NOTSUPP, no attributes


class Connection(socketserver.StreamRequestHandler):
    """One client's calls, in record marking form."""

    def handle(self) -> None:
        while head := self.rfile.read(4):
            call = self.rfile.read(struct.unpack(">I", head)[0] & 0x7FFFFFFF)
            xid, _, _, program, _, procedure = struct.unpack(">6I", call[:24])
            reply = struct.pack(">6I", xid, 1, 0, 0, 0, 0) + answer(program, procedure)
            self.wfile.write(struct.pack(">I", 0x80000000 | len(reply)) + reply)


if __name__ == "__main__":
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", int(sys.argv[1])), Connection) as server:
        server.serve_forever()
