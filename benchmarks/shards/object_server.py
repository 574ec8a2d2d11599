"""A small server in the style of S3, for `remote-throughput`: python -m benchmarks.shards.object_server FOLDER RATE.

It lists, describes and sends the files of a folder as objects, all connections together at no more than RATE bytes per
second (0: no limit). GET /sent-bytes says how many bytes of objects it has sent. It prints its url first.
"""

import re
import sys
import threading
import time
from hashlib import md5
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

BLOCK = 1 << 16


class ObjectServer(ThreadingHTTPServer):
    """One bucket, whose name is ignored."""

    daemon_threads = True

    def __init__(self, folder: Path, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.objects = {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
        self.tags = {name: md5(data, usedforsecurity=False).hexdigest() for name, data in self.objects.items()}
        self.sent, self._rate = 0, rate
        self._free_at, self._lock = 0.0, threading.Lock()

    def wait_for(self, size: int) -> None:
        """Wait until this many bytes more may be sent."""
        with self._lock:
            self.sent += size
            begin = max(self._free_at, time.monotonic())
            self._free_at = end = begin + (size / self._rate if self._rate else 0.0)
        time.sleep(max(0.0, end - time.monotonic()))

    def listing(self, prefix: str) -> bytes:
        """Return the objects below a prefix, as S3 does."""
        entries = "".join(
            f"<Contents><Key>{escape(prefix + name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{self.tags[name]}&quot;</ETag><Size>{len(data)}</Size></Contents>"
            for name, data in self.objects.items()
        )
        head = '<?xml version="1.0" encoding="UTF-8"?>'
        return f"{head}<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query, name = parse_qs(parts.query), parts.path.rpartition("/")[2]
        if "list-type" in query:
            self._send(
                HTTPStatus.OK, self.server.listing(query.get("prefix", [""])[0]), {"Content-Type": "application/xml"}
            )
        elif name == "sent-bytes":
            self._send(HTTPStatus.OK, str(self.server.sent).encode(), {})
        elif name not in self.server.objects:
            self._send(HTTPStatus.NOT_FOUND, b"", {})
        else:
            self._send_object(name)

    def _send_object(self, name: str) -> None:
        data = self.server.objects[name]
        headers = {"ETag": f'"{self.server.tags[name]}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, data[first : last + 1], headers, counted=True)
        else:
            self._send(HTTPStatus.OK, data, headers, counted=True)

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str], *, counted: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(body) if self.command == "GET" else 0, BLOCK):
            block = body[at : at + BLOCK]
            if counted:
                self.server.wait_for(len(block))
            self.wfile.write(block)


if __name__ == "__main__":
    server = ObjectServer(Path(sys.argv[1]), float(sys.argv[2]))
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
