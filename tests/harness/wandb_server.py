"""A server on loopback that speaks as much of Weights & Biases' protocol as the client needs to record a run online."""

import gzip
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass
class Received:
    """The data that clients have sent."""

    url: str = ""
    upserts: list[dict[str, Any]] = field(default_factory=list)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))  # by run
    exit_codes: dict[str, int] = field(default_factory=dict)
    preempting: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    committed: int = 0
    keys: set[str] = field(default_factory=set)
    failing: int = 0
    """The number of requests that are still answered with 500."""


@contextmanager
def serving() -> Iterator[Received]:
    """Serve until the context ends."""
    received = Received()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"received": received}))
    received.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: Received

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def handle(self) -> None:
        """Serve a connection; a client that ends resets it."""
        with suppress(ConnectionResetError):
            super().handle()

    def do_PUT(self) -> None:  # noqa: N802  # the base class calls it by this name
        self.received.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:  # noqa: N802
        body = self._body()
        if not self.path.startswith("/sdk/"):  # the client's own statistics, without a key
            self.received.keys.add(self.headers.get("Authorization", ""))
        if self.received.failing:
            self.received.failing -= 1
            self._reply({"error": "try again"}, status=500)
        elif self.path == "/graphql":
            query = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1]
            self._reply({"data": self._answer(name, query.get("variables") or {})})
        elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self._stream(stream[1], json.loads(body))
            self._reply({"limits": {}})
        else:
            self._reply({})

    def _stream(self, run: str, sent: dict[str, Any]) -> None:
        for name, chunk in sent.get("files", {}).items():
            if name == "wandb-history.jsonl":
                rows = self.received.history[run]
                rows[chunk["offset"] :] = map(json.loads, chunk["content"])
        if sent.get("preempting"):
            self.received.preempting.append(run)
        if sent.get("complete"):
            self.received.exit_codes[run] = sent["exitcode"]

    def _answer(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        answers = {
            "Viewer": lambda: {"viewer": {"id": "u", "entity": "team", "username": "u", "flags": "{}"}},
            "RunResumeStatus": lambda: {"model": self._resumed(values)},
            "UpsertBucket": lambda: {"upsertBucket": self._run(values)},
            "CreateRunFiles": lambda: {"createRunFiles": self._files(values)},
            "CreateArtifact": lambda: {"createArtifact": {"artifact": self._artifact(values["input"])}},
            "CreateArtifactManifest": lambda: {"createArtifactManifest": self._manifest()},
            "UpdateArtifactManifest": lambda: {"updateArtifactManifest": self._manifest()},
            "CreateArtifactFiles": lambda: {"createArtifactFiles": self._artifact_files(values["input"])},
            "ArtifactType": lambda: {"project": None},  # there is no artifact of this name yet
            "CommitArtifact": lambda: {"commitArtifact": self._commit()},
        }
        return answers[name]() if name in answers else {}

    def _resumed(self, values: dict[str, Any]) -> dict[str, Any] | None:
        rows = self.received.history.get(values["name"])
        if rows is None:
            return None
        last = json.dumps(rows[-1])
        bucket = {
            "id": values["name"],
            "name": values["name"],
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([last]),
            "eventsTail": "[]",
            "summaryMetrics": last,
            "config": self.received.upserts[-1]["config"],
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"id": "p", "name": "ours", "entity": {"id": "e", "name": "team"}, "bucket": bucket}

    def _run(self, values: dict[str, Any]) -> dict[str, Any]:
        self.received.upserts.append(values)
        project = {"id": "p", "name": values["project"], "entity": {"id": "e", "name": "team"}}
        bucket = {
            "id": values["name"],
            "name": values["name"],
            "displayName": values["displayName"],
            "project": project,
        }
        return {"bucket": bucket | {"config": values["config"], "historyLineCount": 0}, "inserted": True}

    def _files(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.received.url}/upload/{name}"} for name in values["files"]]
        return {"runID": values["run"], "uploadHeaders": [], "files": files}

    def _artifact(self, values: dict[str, Any]) -> dict[str, Any]:
        self.received.artifacts.append(values)
        number = len(self.received.artifacts)
        return {"id": f"artifact-{number}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}

    def _manifest(self) -> dict[str, Any]:
        number = len(self.received.artifacts)
        url = f"{self.received.url}/upload/manifest-{number}.json"
        file = {"id": f"file-{number}", "uploadUrl": url, "uploadHeaders": []}
        return {"artifactManifest": {"id": f"manifest-{number}", "file": file}}

    def _artifact_files(self, values: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in values["artifactFiles"]:
            path = f"{spec['artifactID']}/{spec['name']}"
            url = f"{self.received.url}/upload/{path}"
            node = {"storagePath": path, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": node | {"artifact": {"id": spec["artifactID"]}}})
        return {"files": {"edges": edges}}

    def _commit(self) -> dict[str, Any]:
        self.received.committed += 1
        return {"artifact": {"id": f"artifact-{self.received.committed}", "digest": "0"}}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: Any, *, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
