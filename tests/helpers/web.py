"""A web server that serves a directory, and records what it is asked for."""

import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class WebServer(http.server.ThreadingHTTPServer):
    """Serves files; refuses requests without the headers that it wants.

    Attributes:
        asked: the host and the target of each request.
    """

    def __init__(self, root: Path, headers: Mapping[str, str]) -> None:
        asked: list[tuple[str | None, str]] = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept

            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(root))

            def send_head(self):
                target = self.requestline.split(" ")[1]  # `self.path` has fewer leading slashes
                asked.append((self.headers["Host"], target))
                if any(self.headers[name] != value for name, value in headers.items()):
                    return self.send_error(403)
                return super().send_head()

            def log_message(self, *_):
                """Log nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = asked
        self.address = f"127.0.0.1:{self.server_port}"


@contextmanager
def serve_files(root: Path, headers: Mapping[str, str] | None = None) -> Iterator[WebServer]:
    """Serve a directory until the block ends."""
    with WebServer(root, headers or {}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
