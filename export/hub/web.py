"""The little of HTTP that a model hub needs, over urllib: redirects by hand, a short wait for a connection.

urllib alone would follow a redirect and lose the headers of the first answer (which carry the hub's
checksum), and would pass the user's token on to another host. It has one timeout for connecting and
reading; here they differ.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import IO, TypeVar
from urllib.parse import urljoin, urlsplit

CONNECT_SECONDS = 4.0  # per address; a host that is there answers within one round trip
READ_SECONDS = 30.0
MOST_REDIRECTS = 8
_REDIRECTS = {301, 302, 303, 307, 308}

T = TypeVar("T")
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # urllib's, socket's and ssl's errors are OSErrors


class _HTTPConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_SECONDS)


class _HTTPSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_SECONDS)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, request, context=ssl.create_default_context())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
                         headers: http.client.HTTPMessage, newurl: str) -> None:
        """Leaves the redirect to :func:`request`: None makes urllib raise it as an HTTPError."""


class Answer:
    """An HTTP answer of status 2xx: ``headers`` (later ones of a redirect chain win) and the open body."""

    def __init__(self, status: int, headers: dict[str, str],
                 body: http.client.HTTPResponse | None) -> None:
        self.status, self.headers, self.body = status, headers, body

    def close(self) -> None:
        """Ends the connection."""
        if self.body is not None:
            self.body.close()


def request(method: str, url: str, *, token: str = "", headers: dict[str, str] | None = None,
            leave_host: bool = True) -> Answer:
    """Sends a request and follows redirects; the token goes to the first host only, and never from https to
    http.

    Args:
        leave_host: False stops at a redirect to another host and answers with the headers so far (an answer
            without a body): a hub says there what the file is, and the storage behind it need not be asked.

    Raises:
        urllib.error.HTTPError: a status of 400 or above.
        NETWORK_ERRORS: no connection, or one that broke.
    """
    opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler, _NoRedirect)
    first, seen = urlsplit(url), dict[str, str]()
    for _ in range(MOST_REDIRECTS):
        ask = urllib.request.Request(url, method=method, headers={
            "User-Agent": "satchel", "Accept-Encoding": "identity", **(headers or {})})
        if token and urlsplit(url)[:2] == first[:2]:
            ask.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            response: http.client.HTTPResponse = opener.open(ask, timeout=CONNECT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code not in _REDIRECTS or not error.headers.get("Location"):
                raise
            error.close()
            seen |= _lower(error.headers)
            target = urljoin(url, error.headers["Location"])
            if urlsplit(target).scheme not in ("https", first.scheme):
                reason = f"redirect from {first.scheme} to {target[:80]!r} refused"
                raise urllib.error.URLError(reason) from None
            if not leave_host and urlsplit(target).netloc != first.netloc:
                return Answer(error.code, seen, None)
            url = target
        else:
            return Answer(response.status, seen | _lower(response.headers), response)
    raise urllib.error.URLError(f"more than {MOST_REDIRECTS} redirects")


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of ``work``, or TimeoutError after ``seconds``.

    A name server that does not answer and a host with many addresses are not bounded by a socket's timeout:
    this is. The thread of a work that came too late is left to end by itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="satchel-hub")
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if errors:
        raise errors[0]
    raise TimeoutError(f"no answer within {seconds:g} s")


def explain(error: Exception) -> str:
    """One line for a network error, without Python's wrapping."""
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return str(reason) if "within" in str(reason) else "no answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return " ".join(str(reason).split()) or type(reason).__name__
