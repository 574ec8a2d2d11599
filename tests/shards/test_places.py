"""Media outside the shards: which may be read, from where and up to what size, and the messages about them."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from media_files import encode, picture
from PIL import Image

from data.format.tar import TarWriter
from data.prepare.audit import AuditOptions, audit_shards
from data.prepare.build import BuildOptions, build_shards
from data.shards import fetch
from data.shards.bytes import Places
from data.shards.fetch import fetch_url
from data.shards.reader import load_index
from launchers.cli import main

PNG = encode(Image.fromarray(picture(40, 60)))


class Server(BaseHTTPRequestHandler):
    """Answers like good and bad servers."""

    def do_GET(self):
        path = self.path.removeprefix("http://example.com")  # the form of a request to a proxy
        self.server.asked.append(path)
        getattr(self, path.strip("/").replace("-", "_"), self.missing)()

    def log_message(self, *_):
        pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def missing(self):
        self.send(404)

    def picture(self):
        self.send(200, PNG, Content_Length=len(PNG))

    def range(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = PNG[first : last + 1]
        self.send(206, part, Content_Length=len(part))

    def short(self):
        self.send(200, PNG[:-20], Content_Length=len(PNG))

    def short_once(self):
        is_first = self.server.asked.count(self.path) == 1
        self.send(200, PNG[:-20] if is_first else PNG, Content_Length=len(PNG))

    def cut_chunk(self):
        self.send(200, b"50\r\nabc", Transfer_Encoding="chunked")

    def huge(self):
        self.send(200, Content_Length=1 << 40)

    def endless(self):
        self.send(200, bytes(1 << 16))

    def status(self):
        self.wfile.write(b"nonsense\r\n\r\n")

    def drip(self):
        self.send(200, Content_Length=100)
        while not self.server.over.wait(0.02):
            self.wfile.write(b"x")
            self.wfile.flush()

    def drip_header(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not self.server.over.wait(0.02):
            self.wfile.write(b"x")
            self.wfile.flush()

    def to_picture(self):
        self.send(302, Location="/picture")

    def to_ftp(self):
        self.send(302, Location="ftp://example.com/x")

    def to_user(self):
        self.send(302, Location="http://user:hunter2@example.com/x")

    def to_inside(self):
        self.send(302, Location="http://10.0.0.1/picture")

    def round(self):
        self.send(307, Location="/round")


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    listening.asked, listening.over = [], threading.Event()
    threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    listening.url = f"http://127.0.0.1:{listening.server_port}"
    yield listening
    listening.over.set()
    listening.shutdown()
    listening.server_close()


def test_bodies_ranges_and_redirects_are_read_completely(server):
    for path in ("picture", "to-picture", "short-once"):
        assert fetch_url(f"{server.url}/{path}", None, allow_private=True) == PNG
    for path in ("range", "picture"):  # "picture" ignores ranges
        assert fetch_url(f"{server.url}/{path}", (10, 5), allow_private=True) == PNG[10:15]
    assert server.asked.count("/short-once") == 2


@pytest.mark.parametrize(
    ("path", "span", "message", "asked"),
    [
        ("none", None, "after 1 attempts: status 404 Not Found", 1),
        ("short", None, f"after 2 attempts: got {len(PNG) - 20} bytes instead of {len(PNG)}", 2),
        ("picture", (len(PNG) - 5, 9), "after 2 attempts: got 5 bytes instead of 9", 2),
        ("picture", (2**70, 1), "after 1 attempts: it has more than 1,073,741,824 bytes", 1),
        ("cut-chunk", None, "after 2 attempts: IncompleteRead", 2),
        ("status", None, "after 2 attempts: BadStatusLine", 2),
        ("huge", None, "after 1 attempts: it has more than 1,073,741,824 bytes; name a file by `path`", 1),
        ("round", None, "after 1 attempts: more than 5 redirects", 6),
        ("to-ftp", None, "after 1 attempts: 'ftp://example.com/x' is no http:// or https:// url", 1),
        ("to-user", None, "after 1 attempts: urls with a user name or password are not fetched", 1),
    ],
)
def test_faults_of_a_server_are_named(server, path, span, message, asked):
    with pytest.raises(ValueError, match=f"cannot fetch {server.url}/{path} {message}"):
        fetch_url(f"{server.url}/{path}", span, allow_private=True, attempts=2)
    assert len(server.asked) == asked


def test_a_body_without_a_length_is_limited_too(server, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1 << 12)
    with pytest.raises(ValueError, match="it has 4,096 bytes or more; name a file by `path` instead"):
        fetch_url(f"{server.url}/endless", None, allow_private=True)


@pytest.mark.parametrize("path", ["drip", "drip-header"])
def test_a_slow_server_is_given_up(server, path):
    with pytest.raises(ValueError, match=f"cannot fetch .*/{path} after . attempts: it took longer than 0.2 s"):
        fetch_url(f"{server.url}/{path}", None, allow_private=True, seconds=0.2)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "10.0.0.1"])
def test_private_addresses_are_used_only_if_allowed(server, host):
    with pytest.raises(ValueError, match=r"is no public address; set data.allow_private_addresses=true"):
        fetch_url(f"http://{host}:{server.server_port}/picture", None)
    assert server.asked == []


def test_a_redirect_obeys_the_same_rule(server, monkeypatch):
    """A proxy belongs to the user and may have any address; here it answers for a public server."""
    monkeypatch.setenv("http_proxy", server.url)
    assert fetch_url("http://example.com/picture", None) == PNG
    with pytest.raises(ValueError, match="10.0.0.1 is 10.0.0.1, which is no public address"):
        fetch_url("http://example.com/to-inside", None)
    for host in ("2130706433", "localhost", "[::1]"):
        with pytest.raises(ValueError, match="is no public address"):
            fetch_url(f"http://{host}:9/picture", None)
    assert server.asked == ["/picture", "/to-inside"]


URLS = {
    "http://h:abc/x": "the url is not one: Port could not be cast",
    "http://127.0.0.1:9/a b": "the url holds a blank or control character",
    "http://user:hunter2@127.0.0.1:9/x?sig=SECRET": "cannot fetch http://***@127.0.0.1:9/x?*** after 1 attempts",
    "http://127.0.0.1:9/x?sig=SECRET": "cannot fetch http://127.0.0.1:9/x?*** after 1 attempts: 127.0.0.1 is",
    "ftp://user:hunter2@h/x?sig=SECRET": "'ftp://***@h/x?***'; only paths, http",
    "http:///x": "'http:///x' is no http:// or https:// url",
}


def image_row(place):
    return {"v": 1, "messages": [{"role": "assistant", "content": "<image>yes"}], "images": [place]}


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_fails_costs_only_its_row_and_shows_no_secret(tmp_path, url):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (image_row(url), GOOD)))
    report = build_shards(rows, tmp_path / "out", BuildOptions(name="t"))
    assert (report.written, report.rejected) == (1, 1)
    shown = (tmp_path / "out/rejects.jsonl").read_text()
    assert URLS[url] in json.loads(shown)["reason"]
    index = load_index(shard_of(tmp_path, {"url": url}))
    assert list(index.problems) == [0]
    for text in (shown, index.problems[0]):
        assert "hunter2" not in text
        assert "SECRET" not in text


GOOD = {"v": 1, "messages": [{"role": "assistant", "content": "yes"}]}


def shard_of(folder, *places):
    with TarWriter(folder / "x.tar") as tar:
        for number, place in enumerate(places):
            tar.add(f"bad{number}.json", json.dumps(image_row(place)).encode())
        tar.add("good.json", json.dumps(GOOD).encode())
    return folder / "x.tar"


def test_missing_or_short_files_cost_only_their_sample(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").write_bytes(PNG)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 40)
    places = [
        ({"path": "pipe"}, "pipe: it is no regular file"),
        ({"path": "/dev/zero"}, "/dev/zero: it is no regular file"),
        ({"path": "."}, "it is no regular file"),
        ({"path": "a.png", "range": [2**70, 1]}, "a.png ends too early"),
        ({"path": "a.png", "range": [0, 2**47]}, "a.png ends too early"),
        ({"path": "hole"}, "hole: 1,099,511,627,776 bytes; at most 4,294,967,296 of a file are read"),
    ]
    shard = shard_of(tmp_path, *(place for place, _ in places))
    problems = load_index(shard).problems
    assert list(problems) == list(range(len(places)))
    for number, (_, message) in enumerate(places):
        assert message in problems[number]
    assert len(list(audit_shards([shard], AuditOptions()))) == len(places)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (*(image_row(place) for place, _ in places), GOOD)))
    assert build_shards(rows, tmp_path / "out", BuildOptions(name="t")).rejected == len(places)


def test_relative_paths_start_at_the_root_and_cannot_leave_it(tmp_path):
    (tmp_path / "media/deep").mkdir(parents=True)
    (tmp_path / "media/deep/a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "media/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "media/inner.png").symlink_to("deep/a.png")
    inside = ["deep/a.png", "deep/../inner.png", str(tmp_path / "media/deep/a.png")]
    outside = ["../secret.png", "link.png", str(tmp_path / "secret.png"), "/etc/hostname"]
    (tmp_path / "shards").mkdir()
    shard = shard_of(tmp_path / "shards", *({"path": path} for path in [*inside, *outside]))
    places = Places(root=tmp_path / "media")
    problems = load_index(shard, places=places).problems
    assert list(problems) == [3, 4, 5, 6]
    assert all("leads out of data.media_root=" in reason for reason in problems.values())
    assert 0 in load_index(shard).problems, "an index of other places is rebuilt"
    assert 0 not in load_index(shard, places=places).problems


def test_an_index_without_outside_media_holds_for_any_places(tmp_path):
    shard = shard_of(tmp_path)
    load_index(shard)
    time = (tmp_path / "x.tar.idx").stat().st_mtime_ns
    load_index(shard, places=Places(root=tmp_path, allow_private=True))
    assert (tmp_path / "x.tar.idx").stat().st_mtime_ns == time


def test_the_flags_of_shards_act_like_the_keys(tmp_path, server, capsys):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.png").write_bytes(PNG)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(image_row(place)) + "\n" for place in ("a.png", f"{server.url}/picture")))
    flags = ["--media-root", str(tmp_path / "media"), "--allow-private-addresses"]
    out = str(tmp_path / "out")
    assert main(["shards", "build", str(rows), "--out", out, "--media", "reference", *flags]) == 0
    for action in ("index", "check"):
        assert main(["shards", action, out, *flags]) == 0
        assert main(["shards", action, out]) == 3
    assert "no public address" in capsys.readouterr().out
