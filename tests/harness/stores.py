"""Servers on loopback: a folder over http, with ranges or without, and a relay before a server that spoils answers."""

import http.client
import re
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

BLOCK = 1 << 14


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.answer(self)

    def do_GET(self):
        self.server.answer(self)

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.open = set()

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):  # a reader that went away
        pass


class FileServer(Server):
    """Serves a folder. `got` has the path and the number of bytes of each GET."""

    def __init__(self, folder, *, ranges=True, lists=False):
        super().__init__()
        self.folder, self.ranges, self.lists, self.got = Path(folder), ranges, lists, []

    def answer(self, request):
        path = self.folder / urlsplit(request.path).path.lstrip("/")
        if path.is_dir() and self.lists:
            links = "".join(f'<a href="{name.name}">{name.name}</a>' for name in sorted(path.iterdir()))
            request.send(200, {"Content-Type": "text/html"}, links.encode())
            return
        if not path.is_file():
            request.send(404, {})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{md5(data).hexdigest()}"', "Content-Type": "application/x-tar"}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")) if self.ranges else None
        status, body = 200, data
        if span:
            first, last = int(span[1]), min(int(span[2]), len(data) - 1)
            status, body = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if request.command == "GET":
            self.got.append((path.name, len(body)))
        request.send(status, headers | ({"Content-Length": len(body)}), body)


class Relay(Server):
    """Passes requests on to a server. Each GET takes the next of `faults`: a kind with a number, or None.

    `got` has the path of each GET.
    """

    def __init__(self, url):
        super().__init__()
        self.target, self.faults, self.met, self.got = urlsplit(url), [], [], []
        self.rate = None  # bytes per second
        self.guard = threading.Lock()

    def answer(self, request):
        with closing(http.client.HTTPConnection(self.target.hostname, self.target.port)) as connection:
            connection.request(request.command, request.path, headers=dict(request.headers))
            reply = connection.getresponse()
            body = reply.read()
        with self.guard:
            if request.command == "GET":
                self.got.append(request.path)
            fault = self.faults.pop(0) if request.command == "GET" and self.faults else None
        if fault:
            self.met.append(fault[0])
        headers = {name: value for name, value in reply.getheaders() if name.lower() not in ("connection", "date")}
        if fault and fault[0] == "status":
            request.send(fault[1], {})
            return
        if fault and fault[0] == "truncate":  # a complete answer, and wrong
            body = body[: fault[1]]
            headers["Content-Length"] = len(body)
        if self.rate is None and not (fault and fault[0] == "cut"):
            request.send(reply.status, headers, body)
            return
        command, request.command = request.command, "HEAD"
        request.send(reply.status, headers)
        if command == "GET":
            for at in range(0, len(body), BLOCK):
                if fault and fault[0] == "cut" and at + BLOCK > fault[1]:
                    request.wfile.write(body[at : fault[1]])
                    break
                request.wfile.write(body[at : at + BLOCK])
                if self.rate:
                    time.sleep(BLOCK / self.rate)
        request.close_connection = bool(fault)


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        for connection in list(server.open):  # a client that keeps one open would still be served
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
