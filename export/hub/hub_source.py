"""The Hugging Face hub, or a mirror, as a source: HTTPS, resumed by range, verified by the hub's checksum.

The registry's SHA-256 is of the files on the package index; a hub may carry another build of the same
model. So a hub's file is held to the checksum that the hub itself states (of LFS files: the SHA-256, in
``X-Linked-ETag``), and to the registry's where it states none.
"""

from __future__ import annotations

import os
import re
import time
import urllib.error
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from ...devices.files.safe_write import require_space
from . import web
from .part_file import CHUNK_BYTES, PartFile, part_files, part_path
from .source import Fetched, Job, SourceError, check_content

DEFAULT_ENDPOINT = "https://huggingface.co"
PROBE_SECONDS = 8.0  # an unreachable hub may cost this much, name look-up and all addresses included
MOST_FAILURES = 4  # connections in a row that bring no byte
FIRST_PAUSE_SECONDS = 0.5
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says about a file; ``sha256`` is None where it states no checksum."""

    url: str
    total: int | None
    sha256: str | None
    etag: str


class HubSource:
    """Fetches from ``HF_ENDPOINT``, with ``HF_TOKEN`` if set, unless ``HF_HUB_OFFLINE`` is set."""

    key = "hub"
    label = "Hugging Face hub"

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
        self.token = os.environ.get("HF_TOKEN", "").strip()
        self.offline = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in _TRUE

    def fetch(self, job: Job) -> Fetched:
        """See :class:`.source.Source`."""
        hub = job.entry.hub
        if hub.file is None:
            raise SourceError(f"the registry names no GGUF file in {hub.repo}")
        if self.offline:
            raise SourceError("not asked, HF_HUB_OFFLINE is set")
        if urlsplit(self.endpoint).scheme not in ("http", "https") or not urlsplit(self.endpoint).netloc:
            raise SourceError(f"HF_ENDPOINT is {self.endpoint!r}, not an http(s) address")
        remote = self._probe(f"{self.endpoint}/{quote(hub.repo)}/resolve/main/{quote(hub.file)}")
        total = remote.total or job.entry.bytes
        content = f"{hub.repo} {hub.file} {remote.sha256 or remote.etag} {total}"
        path = part_path(job.target, self.key, content)
        for old in part_files(job.target, self.key):
            if old != path:  # of a file that the hub has replaced since
                old.unlink(missing_ok=True)
        with PartFile(path, total, job.progress) as part:
            require_space(path.parent, part.missing)
            self._fill(part, remote, job)
            if remote.sha256 is not None:
                return check_content(part, remote.sha256, "the hub's checksum")
            return check_content(part, job.entry.sha256, "the registry's, the hub states none")

    def _probe(self, url: str) -> RemoteFile:
        """Asks what the file is, within seconds."""
        try:
            answer = web.within(PROBE_SECONDS,
                                lambda: web.request("HEAD", url, token=self.token, leave_host=False))
            answer.close()
        except urllib.error.HTTPError as error:
            error.close()
            raise SourceError(_refusal(error, url)) from None
        except web.NETWORK_ERRORS as error:
            raise SourceError(f"cannot reach {self.endpoint}: {web.explain(error)}") from None
        except ValueError as error:  # a token or address that cannot be sent
            raise SourceError(f"cannot ask {self.endpoint}: {error}") from None
        etag = (answer.headers.get("x-linked-etag") or answer.headers.get("etag") or "").strip()
        plain = etag.removeprefix("W/").strip('"')
        size = answer.headers.get("x-linked-size") or (answer.headers.get("content-length")
                                                       if answer.status == 200 else None)
        return RemoteFile(url, int(size) if size and size.isdecimal() and int(size) > 0 else None,
                          plain if _SHA256.fullmatch(plain) else None, etag)

    def _fill(self, part: PartFile, remote: RemoteFile, job: Job) -> None:
        """Reads until the part is complete; a connection that breaks is made again where it broke."""
        failures, validator = 0, ""
        while part.missing:
            before = part.done
            try:
                validator = self._read(part, remote, job, validator)
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise SourceError(_refusal(error, remote.url)) from None
                if error.code == 416:
                    part.restart()
                reason = web.explain(error)
            except web.NETWORK_ERRORS as error:
                reason = web.explain(error)
            failures = failures + 1 if part.done <= before else 0
            if failures >= MOST_FAILURES:
                raise SourceError(f"broke off at {part.done} of {part.total} bytes: {reason}")
            if part.missing:
                time.sleep(FIRST_PAUSE_SECONDS * 2**failures)

    def _read(self, part: PartFile, remote: RemoteFile, job: Job, validator: str) -> str:
        """One connection's worth; returns the storage's ETag, which a later one asks to be the same."""
        headers: dict[str, str] = {}
        if part.done:
            headers["Range"] = f"bytes={part.done}-"
            if validator:
                headers["If-Range"] = validator
        answer = web.request("GET", remote.url, token=self.token, headers=headers)
        try:
            start = answer.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
            if part.done and (answer.status != 206 or start != str(part.done)):
                part.restart()  # the server has no ranges, or another file now
                if answer.status == 206:
                    return ""
            while answer.body is not None and part.missing:
                # read1 hands over what is there: nothing is lost when the connection breaks
                chunk = answer.body.read1(min(CHUNK_BYTES, part.missing))
                if not chunk:
                    break
                part.write(chunk)
                job.progress("downloading", part.done, part.total)
        finally:
            answer.close()
        etag = answer.headers.get("etag", "")
        return "" if etag.startswith("W/") else etag


def _refusal(error: urllib.error.HTTPError, url: str) -> str:
    if error.code in (401, 403):
        return f"access refused (status {error.code}) to {url}: set HF_TOKEN to a token that may read it"
    if error.code == 404:
        return f"no such file: {url}"
    return f"status {error.code} for {url}"
