"""An HTTP server of files, which refuses some of them."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class HttpFiles:
    """Files by path, such as "/a.png".

    Attributes:
        base: the URI of "/", without the slash.
        contents: the files.
        refused: the status that a path is answered with; all others are served.
        served_once: paths that are refused with 403 from the second request on.
        requests: how often each path was asked for.
        has_lengths: whether answers have a Content-Length.
    """

    base: str = ""
    contents: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    served_once: set[str] = field(default_factory=set)
    requests: Counter[str] = field(default_factory=Counter)
    has_lengths: bool = True

    def put(self, path: str, content: bytes) -> str:
        """Add a file, and return its URI."""
        self.contents[path] = content
        return self.base + path


@contextmanager
def serve_http() -> Iterator[HttpFiles]:
    """Serve files until the block ends."""
    files = HttpFiles()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            content = self._answer()
            self.wfile.write(content)

        def _answer(self) -> bytes:
            files.requests[self.path] += 1
            found = files.contents.get(self.path)
            status = files.refused.get(self.path, 404 if found is None else 200)
            if self.path in files.served_once and files.requests[self.path] > 1:
                status = 403
            content = found if found is not None and status == 200 else b"no"
            self.send_response(status)
            if files.has_lengths:
                self.send_header("Content-Length", str(len(content)))
            if status == 200:
                self.send_header("ETag", f'"{hash(content):x}"')
            self.end_headers()
            return content

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
