"""Finding a model: local folders, and hub ids with a small hub server on this machine."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from finetune.files.hub import cached_folder, model_folder, require_files, require_on_hub
from finetune.files.tiny import TinyModel, write_tiny

MODEL = "someone/tiny-vl"
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny(folder, TinyModel(layers=1, experts=2, shard_bytes=200_000))
    (folder / "pytorch_model.bin").write_text("another framework's copy")
    return folder


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a snapshot needs."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        path = self.path.partition("?")[0]
        folder, state = self.server.folder, self.server
        if path.startswith("/api/models/someone/gated"):
            return self._refuse(403, "GatedRepo")
        if not path.startswith((f"/api/models/{MODEL}", f"/{MODEL}/resolve/")):
            return self._refuse(401, "RepoNotFound")
        if "/revision/nope" in path:
            return self._refuse(404, "RevisionNotFound")
        if path.startswith("/api/") and "/tree/" in path:
            files = sorted(folder.iterdir())
            listing = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in files]
            return self._send(json.dumps(listing).encode(), "application/json", body)
        if path.startswith("/api/"):
            return self._send(
                json.dumps({"id": MODEL, "sha": COMMIT, "siblings": []}).encode(), "application/json", body
            )
        name = path.rpartition("/")[2]
        if name == state.broken:
            return self._refuse(500, "ServerError")
        state.fetched.append(name) if body else None
        return self._send((folder / name).read_bytes(), "application/octet-stream", body, etag(folder / name))

    def _send(self, content, kind, body, tag=None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(base):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = base
    server.fetched = []
    server.broken = None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_local_folder_is_returned_as_it_is(base):
    assert model_folder(str(base)) == base


def test_a_hub_id_is_fetched_once_and_then_comes_from_the_cache(base, hub, tmp_path):
    folder = model_folder(MODEL, cache=tmp_path, endpoint=hub.url)
    expected = {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert set(hub.fetched) == expected
    hub.fetched.clear()
    assert model_folder(MODEL, cache=tmp_path, endpoint=hub.url) == folder
    assert model_folder(MODEL, revision=COMMIT, cache=tmp_path, endpoint=hub.url) == folder
    assert hub.fetched == []


def test_a_hub_id_is_looked_for_without_its_weights(base, hub, tmp_path, monkeypatch):
    assert cached_folder(MODEL, cache=tmp_path) is None
    require_on_hub(MODEL, endpoint=hub.url)
    assert hub.fetched == ["config.json"]
    folder = model_folder(MODEL, cache=tmp_path, endpoint=hub.url)
    assert cached_folder(MODEL, cache=tmp_path) == folder
    with pytest.raises(ValueError, match="neither a local folder nor a model that you can see on the hub"):
        require_on_hub("someone/else", endpoint=hub.url)
    assert cached_folder("some one/x!", cache=tmp_path) is None
    with pytest.raises(ValueError, match="neither a local folder nor a hub id"):
        require_on_hub("some one/x!", endpoint=hub.url)
    with pytest.raises(ValueError, match="is not in the cache .*, and the hub cannot be reached. Run"):
        require_on_hub("someone/else", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the hub cannot be reached .HF_HUB_OFFLINE is set"):
        require_on_hub(MODEL, endpoint=hub.url)


def test_offline_a_full_cache_is_enough(hub, tmp_path, monkeypatch):
    folder = model_folder(MODEL, cache=tmp_path, endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(MODEL, cache=tmp_path) == folder


def test_offline_an_empty_cache_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = (
        rf"model.path: {MODEL} is not in the cache {tmp_path}, and the hub cannot be reached "
        rf"\(HF_HUB_OFFLINE is set\). Run `hf download {MODEL}` on a machine with network "
        r"access and set HF_HOME to that cache, or give a local folder"
    )
    with pytest.raises(ValueError, match=message):
        model_folder(MODEL, cache=tmp_path)


def test_offline_a_partial_cache_is_an_error_that_names_the_missing_files(hub, tmp_path, monkeypatch):
    snapshot_download(MODEL, cache_dir=tmp_path, endpoint=hub.url, ignore_patterns="*.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"only in part \(.*missing.*model-00001-of-.*cannot be reached to"):
        model_folder(MODEL, cache=tmp_path)


def test_an_unreachable_hub_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not in the cache .*, and the hub cannot be reached. Run"):
        model_folder(MODEL, cache=tmp_path, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("someone/else", None, r"someone/else is neither a local folder nor a model that you can see on the hub: ch"),
        ("someone/gated", None, r"someone/gated is gated: accept its terms on the hub's page"),
        (MODEL, "nope", r"at revision nope: the hub has the model but not this revision; check model.revision"),
        ("some one/x!", None, r"some one/x! is neither a local folder nor a hub id \(owner/name\)"),
    ],
)
def test_models_and_revisions_that_the_hub_lacks_are_named(hub, tmp_path, model, revision, message):
    with pytest.raises(ValueError, match=message):
        model_folder(model, revision=revision, cache=tmp_path, endpoint=hub.url)


def test_an_error_of_the_hub_is_reported(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its attempts
    hub.broken = "config.json"
    with pytest.raises(ValueError, match=rf"{MODEL}.* (could not be fetched from the hub|cannot be reached)"):
        model_folder(MODEL, cache=tmp_path, endpoint=hub.url)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nothing", "~/nothing-here", "Qwen3-VL-4B", "a/b/c"])
def test_a_path_that_is_neither_a_folder_nor_a_hub_id_is_refused(model):
    with pytest.raises(ValueError, match=r"model.path: .* is not a folder; give a folder with a config.json, or a hub"):
        model_folder(model)


def test_a_file_is_not_a_folder(base):
    with pytest.raises(ValueError, match=r"config.json is not a folder"):
        model_folder(str(base / "config.json"))


def test_a_revision_of_a_local_folder_is_not_ignored(base):
    with pytest.raises(ValueError, match=r"model.revision 'v2' does not apply to the local folder"):
        model_folder(str(base), revision="v2")


def test_every_missing_file_is_named_at_once(base, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(base, folder)
    for name in ("preprocessor_config.json", "tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    message = r"lacks preprocessor_config.json, tokenizer.json \(or vocab.json and merges.txt\); a model folder"
    with pytest.raises(ValueError, match=message):
        require_files(folder)
    with pytest.raises(ValueError, match=message):
        model_folder(str(folder))
