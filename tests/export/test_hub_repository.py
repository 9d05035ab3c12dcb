"""``org/name`` from a stand-in of the Hugging Face hub: what is fetched, what never is, and what is said."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest
from satchel.errors import DownloadError, ModelError, StorageError
from satchel.export.hub import repository
from satchel.export.hub.repository import fetch_folder, is_repository_name
from satchel.export.resolve import find_source, resolve_model
from satchel.export.sources import open_source
from tiny_folders import write_tiny_folder

NAME, COMMIT = "tiny/llama", "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of a folder as the hub does; ``asked`` are the paths of its requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = 200
        self.code = ""
        self.asked: list[tuple[str, str]] = []

    def answer(self, path: str) -> bytes | None:
        """The JSON of an API call."""
        files = [(str(file.relative_to(self.folder)), file.stat().st_size) for file in self.files()]
        if path == f"/api/models/{NAME}" or path == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": name, "size": size} for name, size in files]
            return json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        if path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in files
            ]  # fmt: skip
            return json.dumps(entries).encode()
        return None

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def fetched(self) -> set[str]:
        return {path.split("/", 5)[5] for verb, path in self.asked if verb == "GET" and "/resolve/" in path}


def handler_of(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.respond("HEAD")

        def do_GET(self) -> None:
            self.respond("GET")

        def respond(self, verb: str) -> None:
            path = urlsplit(self.path).path
            hub.asked.append((verb, path))
            data = hub.answer(path) if path.startswith("/api/") else None
            if data is None and "/resolve/" in path:
                file = hub.folder / path.split("/", 5)[5]
                data = file.read_bytes() if file.is_file() else None
            if hub.status != 200 or data is None:
                self.send_response(hub.status if hub.status != 200 else 404)
                if hub.status == 200 or hub.code:
                    self.send_header("X-Error-Code", hub.code or "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if verb == "GET":
                self.wfile.write(data)

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub with one model, and an empty cache of its files."""
    folder = write_tiny_folder(tmp_path / "served", shards=2)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('run!')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    (folder / "consolidated.safetensors").write_bytes(b"another layout of the same")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    running = Hub(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(running))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    try:
        yield running
    finally:
        with contextlib.suppress(AttributeError):
            huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()


def test_only_what_is_read_is_fetched_and_only_once(hub: Hub, tmp_path: Path) -> None:
    lines: list[str] = []
    calls: list[tuple[str, int, int]] = []
    folder = fetch_folder(NAME, progress=lambda *call: calls.append(call), notice=lines.append)
    wanted = {path.name for path in hub.folder.iterdir() if path.suffix in (".json", ".safetensors")}
    assert hub.fetched() == wanted - {"consolidated.safetensors"}
    assert {path.name for path in folder.iterdir()} == hub.fetched()
    assert len(lines) == 1
    assert lines[0].startswith("fetching tiny/llama from the hub: 7 files, ")
    assert calls[-1][1] == calls[-1][2] == sum((folder / name).stat().st_size for name in hub.fetched())
    with open_source(folder) as source:
        assert source.name == "llama"
    hub.asked.clear()
    assert fetch_folder(NAME) == folder
    assert hub.asked == [], "what is there is not asked for again"


def test_a_name_is_a_model(hub: Hub, tmp_path: Path) -> None:
    package = resolve_model(NAME, cache_dir=tmp_path / "cache")
    assert package.spec.layers == 2
    assert package.folder.name.startswith("llama-")


def test_a_folder_of_that_name_goes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_folder(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert find_source(NAME) == Path(NAME)
    assert hub.asked == []


def test_a_fetch_that_was_cut_goes_on(hub: Hub, tmp_path: Path) -> None:
    hidden = max(hub.folder.glob("model-*"), key=lambda path: path.stat().st_size)  # fetched last
    data = hidden.read_bytes()
    answer = hub.answer
    whole = [answer(f"/api/models/{NAME}"), answer(f"/api/models/{NAME}/tree/{COMMIT}")]
    hub.answer = lambda path: whole["/tree/" in path]  # type: ignore[method-assign]
    hidden.unlink()
    with pytest.raises(DownloadError, match=r"tiny/llama is no file or folder here, and the hub could not give it"):
        fetch_folder(NAME)
    hidden.write_bytes(data)
    hub.asked.clear()
    open_source(fetch_folder(NAME)).close()
    assert hub.fetched() == {hidden.name}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", r"tiny/llama is neither a file or folder here nor a model on the hub .*HF_TOKEN"),
        (401, "RepoNotFound", r"nor a model on the hub"),
        (403, "GatedRepo", r"open only to those who accepted its terms on the hub; do so, then set HF_TOKEN"),
        (500, "", r"the hub could not give it"),
    ],
)
def test_a_hub_that_refuses(hub: Hub, status: int, code: str, message: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(DownloadError, match=message) as error:
        fetch_folder(NAME)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"the hub could not give it \(\w+") as error:
        find_source(NAME)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="nor in the hub's cache, and HF_HUB_OFFLINE is set"):
        find_source(NAME)
    assert hub.asked == []


def test_a_model_without_safetensors(hub: Hub) -> None:
    for path in hub.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DownloadError, match=r"has no safetensors, only 'pytorch_model\.bin' and the like"):
        fetch_folder(NAME)
    assert hub.fetched() == set()


def test_a_disk_without_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satchel.devices.files.safe_write.free_bytes", lambda _: 1000)
    with pytest.raises(StorageError, match=r"needed, .* free"):
        fetch_folder(NAME)
    assert hub.fetched() == set()


@pytest.mark.parametrize("name", ["org/name", "Qwen/Qwen2.5-0.5B-Instruct", "a/b_c.d"])
def test_names(name: str) -> None:
    assert is_repository_name(name)


@pytest.mark.parametrize(
    "name",
    ["name", "/org/name", "org/name/x", "./name", "../name", "org/..", "a/b.gguf", "~x/y", "a b/c", "", "a/b\n"],
)
def test_no_names(name: str) -> None:
    assert not is_repository_name(name)


def test_a_missing_path_is_not_looked_for_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nowhere"), "./a/b", "models/x.gguf"):
        with pytest.raises(ModelError, match="does not exist"):
            find_source(missing)
    assert hub.asked == []
    assert repository.WANTED == ("*.safetensors", "*.json", "*.jinja")
