"""A TCP proxy in front of one Redis, which can cut the connections through it, freeze them, and heal."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 64 * 1024


class Proxy:
    """Stands between one process and its Redis. Every connection through it fares the same.

    Cut: connections end at once and new ones do too. Frozen: nothing is closed and nothing gets through, as
    when a switch dies; what was sent meanwhile arrives after `heal`, however late.
    """

    def __init__(self, target: Path) -> None:
        """Listens at once.

        Args:
            target: unix socket of the server.
        """
        self._target = str(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_cut = False
        self._requests = threading.Event()
        self._replies = threading.Event()
        self._trap: tuple[bytes, threading.Event] | None = None
        self.caught = threading.Event()
        """Set once the request that `freeze_at` waits for has come."""
        self.heal()
        self._acceptor = threading.Thread(target=self._accept, name="proxy")
        self._acceptor.start()

    @property
    def url(self) -> str:
        """Where the process finds its Redis."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """End every connection, and each new one."""
        with self._lock:
            self._is_cut = True
            self._end_all()

    def freeze(self) -> None:
        """Let nothing through, in both directions."""
        self._requests.clear()
        self._replies.clear()

    def freeze_at(self, request: bytes, *, answered: bool) -> None:
        """Freeze when a request comes that contains these bytes.

        Args:
            request: part of it.
            answered: True forwards the request and holds its reply; False holds the request itself.
        """
        self._trap = (request, self._replies if answered else self._requests)

    def heal(self) -> None:
        """Let everything through, first what was held."""
        self._is_cut = False
        self._requests.set()
        self._replies.set()

    def close(self) -> None:
        """End every connection and stop listening."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._acceptor.join()
        self._listener.close()
        self.cut()
        self._requests.set()
        self._replies.set()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                server = None if self._is_cut else _connect(self._target)
                if server is None:
                    client.close()
                    continue
                self._sockets |= {client, server}
            thread = threading.Thread(target=self._serve, args=(client, server), name="proxied connection")
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = threading.Thread(target=self._pump, args=(server, client, self._replies), name="replies")
            back.start()
            self._pump(client, server, self._requests)
            back.join()
            with self._lock:
                self._sockets -= {client, server}

    def _pump(self, source: socket.socket, sink: socket.socket, gate: threading.Event) -> None:
        """Forward one direction of one connection until either side ends it."""
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if gate is self._requests:
                    self._spring_trap(data)
                gate.wait()
                sink.sendall(data)
            gate.wait()  # a frozen network does not carry the news of an end either
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _spring_trap(self, data: bytes) -> None:
        if self._trap is not None and self._trap[0] in data:
            self._trap[1].clear()
            self._trap = None
            self.caught.set()

    def _end_all(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _connect(path: str) -> socket.socket | None:
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
    except OSError:
        server.close()
        return None
    return server
