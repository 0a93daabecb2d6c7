"""An HTTP/1.1 proxy in front of the S3 server that drops, delays and refuses requests in tests.

Requests are forwarded as they were signed, `Host` included: clients sign for the proxy's address.
The proxy adds a feature of AWS that rclone lacks: exclusive creation by `If-None-Match: *`.
"""

import asyncio
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.conftest import S3Server

_MAX_HEAD = 2**20  # bytes


@dataclass(frozen=True)
class Faults:
    """Faults to inject, as shares of all requests.

    Attributes:
        slow_down: answered with 503 instead of being forwarded.
        cut: the connection breaks in the middle of the request's body, or in the middle of the
            response, after the request has had its effect.
        hang: never answered.
        latency: seconds that are added to every request.
        paths: regular expression of the buckets and keys to which the first three are limited.
    """

    slow_down: float = 0
    cut: float = 0
    hang: float = 0
    latency: float = 0
    paths: str = ""


@dataclass
class Hold:
    """Requests that are held back. `clients`: the addresses that they came from."""

    pattern: re.Pattern[str]
    loop: asyncio.AbstractEventLoop
    clients: set[str] = field(default_factory=set)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Let the requests proceed."""
        self.loop.call_soon_threadsafe(self._released.set)

    async def pass_through(self, path: str, client: str) -> None:
        if self.pattern.search(path) and not self._released.is_set():
            self.clients.add(client)
            await self._released.wait()


@dataclass(frozen=True)
class _Head:
    """A request's or a response's first line and headers, unchanged."""

    line: bytes
    headers: tuple[bytes, ...]

    @classmethod
    def parse(cls, head: bytes) -> "_Head":
        line, *headers = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        return cls(line, tuple(headers))

    def header(self, name: bytes) -> bytes | None:
        for line in self.headers:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name:
                return value.strip()
        return None

    def encode(self, *, without: tuple[bytes, ...] = (), adding: tuple[bytes, ...] = ()) -> bytes:
        kept = [x for x in self.headers if x.partition(b":")[0].strip().lower() not in without]
        return b"\r\n".join([self.line, *kept, *adding, b"", b""])

    @property
    def path(self) -> str:
        """Bucket and key of a request."""
        return unquote(urlsplit(self.line.split(b" ")[1].decode()).path).strip("/")


class FaultProxy:
    """The proxy, which runs in a thread inside the `with` block.

    Attributes:
        injected: number of faults by kind.
        requests: number of requests.
        read: bytes read of each file, by bucket and key.
    """

    def __init__(self, server: S3Server, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.server, self.faults, self._host = server, Faults(), host
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self.read: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._clients: set[asyncio.StreamWriter] = set()
        self._out_until = 0.0
        self._holds: list[Hold] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def options(self) -> dict[str, Any]:
        """Storage options for fsspec through the proxy."""
        return self.server.options | {"endpoint_url": self.endpoint}

    @contextmanager
    def injecting(self, faults: Faults) -> Iterator[None]:
        """Inject faults until the block ends."""
        before, self.faults = self.faults, faults
        try:
            yield
        finally:
            self.faults = before

    @contextmanager
    def holding(self, pattern: str) -> Iterator["Hold"]:
        """Hold back requests whose path matches the pattern, until the block ends or `release`."""
        hold = Hold(re.compile(pattern), self._loop)
        self._holds.append(hold)
        try:
            yield hold
        finally:
            hold.release()

    def cut_off(self, seconds: float) -> None:
        """Break every connection, and refuse new ones for this time; return at once."""
        self.injected["outage"] += 1
        self._out_until = time.monotonic() + seconds
        self._loop.call_soon_threadsafe(self._break_connections)

    def _break_connections(self) -> None:
        for writer in self._clients:
            writer.transport.abort()

    async def _run(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(
            self._serve, self._host, 0, limit=_MAX_HEAD, backlog=512
        )
        self._port = listener.sockets[0].getsockname()[1]
        self._started.set()
        await self._stopped.wait()
        listener.close()
        self._break_connections()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a client's requests in turn, until it or a fault ends the connection."""
        if time.monotonic() < self._out_until:
            self.injected["refused connection"] += 1
            writer.transport.abort()
            return
        self._clients.add(writer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._answer(reader, writer):
                    await writer.drain()
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return False if the connection ends with it."""
        head = _Head.parse(await reader.readuntil(b"\r\n\r\n"))
        self.requests += 1
        faults, fault = self.faults, self._draw_fault(head.path)
        is_cut_early = fault == "cut" and self._random.random() < 0.5
        if fault:
            self.injected[fault] += 1
        if head.header(b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(head.header(b"content-length") or 0)
        body = await reader.readexactly(length // 2 if is_cut_early else length)
        if is_cut_early:
            return self._hang_up(writer)
        await asyncio.sleep(faults.latency)
        for hold in self._holds:
            await hold.pass_through(head.path, writer.get_extra_info("peername")[0])
        if fault == "hang":
            while await reader.read(_MAX_HEAD):
                pass
            return False
        if fault == "503":
            answer = _refusal(503, "SlowDown", "Please reduce your request rate.")
        else:
            answer = await self._forward(head, body)
        if head.line.startswith(b"GET"):
            self.read[head.path] += len(answer) - answer.index(b"\r\n\r\n") - 4
        if head.line.startswith(b"HEAD"):
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        if fault == "cut":
            start = answer.index(b"\r\n\r\n") + 4
            writer.write(answer[: (start + len(answer)) // 2] if start < len(answer) else b"")
            return self._hang_up(writer)
        writer.write(answer)
        return True

    def _draw_fault(self, path: str) -> str | None:
        chance, faults = self._random.random(), self.faults
        if not re.search(faults.paths, path):
            return None
        for name, share in (
            ("503", faults.slow_down),
            ("cut", faults.cut),
            ("hang", faults.hang),
        ):
            if chance < share:
                return name
            chance -= share
        return None

    def _hang_up(self, writer: asyncio.StreamWriter) -> bool:
        """Close the connection normally or with a reset, which clients see as different errors."""
        if self._random.random() < 0.5:
            writer.transport.abort()
        return False

    async def _forward(self, head: _Head, body: bytes) -> bytes:
        if head.header(b"if-none-match") != b"*" or head.line.startswith((b"GET", b"HEAD")):
            return await self._ask_server(head, body)
        async with self._locks[head.path]:
            if (self.server.root / head.path).exists():
                return _refusal(
                    *(412, "PreconditionFailed", "At least one precondition did not hold"),
                    detail="<Condition>If-None-Match</Condition>",
                )
            return await self._ask_server(head, body)

    async def _ask_server(self, head: _Head, body: bytes) -> bytes:
        """Forward a request; return the response without its `Connection` header."""
        address = urlsplit(self.server.endpoint)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            hop = (b"connection", b"expect")
            writer.write(head.encode(without=hop, adding=(b"Connection: close",)) + body)
            answer = await reader.read()
        finally:
            writer.close()
        lines, _, content = answer.partition(b"\r\n\r\n")
        return _Head.parse(lines).encode(without=(b"connection",)) + content


def _refusal(status: int, code: str, message: str, *, detail: str = "") -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message>{detail}</Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
