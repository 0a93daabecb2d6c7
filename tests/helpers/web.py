"""A web server that serves a directory, and records what it is asked for."""

import http.server
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path


class WebServer(http.server.ThreadingHTTPServer):
    """Serves files; refuses requests without the headers that it wants.

    Attributes:
        asked: the host and the target of each request.
        refused: statuses by target; all other files are served.
        served_once: targets that are refused with 400 from the second request on.
        has_lengths: whether answers have a Content-Length.
    """

    def __init__(self, root: Path, headers: Mapping[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(root)))
        self.root, self.headers = root, headers
        self.asked: list[tuple[str | None, str]] = []
        self.refused: dict[str, int] = {}
        self.served_once: set[str] = set()
        self.has_lengths = True
        self.address = f"127.0.0.1:{self.server_port}"

    @property
    def requests(self) -> Counter[str]:
        """How often each target was asked for."""
        return Counter(target for _, target in self.asked)

    def put(self, target: str, content: bytes) -> str:
        """Write a file, such as "/a.png", and return its URI."""
        file = self.root / target.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return f"http://{self.address}{target}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    server: WebServer

    def send_head(self):
        target = self.requestline.split(" ")[1]  # `self.path` has fewer leading slashes
        self.server.asked.append((self.headers["Host"], target))
        status = self.server.refused.get(target)
        if target in self.server.served_once and self.server.requests[target] > 1:
            status = 400
        if any(self.headers[name] != value for name, value in self.server.headers.items()):
            status = 403
        return super().send_head() if status is None else self.send_error(status)

    def send_header(self, keyword, value):
        if keyword == "Last-Modified":
            super().send_header("ETag", f'"{value}"')
        if keyword == "Content-Length" and not self.server.has_lengths:
            keyword, value = "Connection", "close"
        super().send_header(keyword, value)

    def log_message(self, *_):
        """Log nothing."""


@contextmanager
def serve_files(root: Path, headers: Mapping[str, str] | None = None) -> Iterator[WebServer]:
    """Serve a directory until the block ends."""
    with WebServer(root, headers or {}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
