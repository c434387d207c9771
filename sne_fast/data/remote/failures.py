"""Errors of stores elsewhere: which are tried again, and what their messages may say."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from ...regular_files import FileError

__all__ = [
    "Forbidden", "Interrupted", "RangesIgnored", "StoreError", "attempt", "interruptible", "refuse_credentials",
    "scrubbed", "waited",
]  # fmt: skip

T = TypeVar("T")

WAITS: tuple[float, ...] = (0.3, 1.0, 3.0)
"""Seconds before each further attempt after an error that may pass."""
_LONGEST_WAIT = 30.0  # that a store may ask for
_PASSING = (408, 425, 429, 500, 502, 503, 504)
# Kinds of errors of the network, by their names, since each store's library has its own.
_NETWORK = {
    "ClientConnectionError", "ClientPayloadError", "ConnectionError", "EndpointConnectionError", "IncompleteRead",
    "TimeoutError", "TransportError", "Truncated",
}  # fmt: skip
_USER = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s'\"]*:[^/\s'\"]*@|(https?://)[^/\s'\"]*@", re.IGNORECASE)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>]*", re.IGNORECASE)
_SECRET = re.compile(r"sig$|signature|token|secret|passw|pwd|credential|key|auth|^se$|^st$", re.IGNORECASE)
_LOOK = 0.25  # seconds between looks whether the user has ended the work
_GIVING_UP = 5.0  # seconds for which threads ask for nothing after that
_CONFIGURE = "give credentials as the store's own settings, see docs/many-networks.md"


class StoreError(FileError):
    """A store elsewhere that cannot be reached, refuses, or sends something else than it said; names the URL."""


class Forbidden(StoreError):
    """A file that may not be read; some servers say so of files that are not there."""


class RangesIgnored(StoreError):
    """A server that sends whole files where parts of them are asked for."""


class Interrupted(StoreError):
    """A request that was given up, since the user ended the work that it was for."""


class Truncated(StoreError):
    """An answer that ends too early."""


def scrubbed(text: str) -> str:
    """Return a message on one line without the names, passwords and parameters of URLs in it."""
    text = _USER.sub(lambda found: found[1] or found[2], " ".join(text.split()))
    return _QUERY.sub(r"\1", text)


def refuse_credentials(url: str) -> None:
    """Refuse a URL that holds a password or a signature, which would be written into manifests and results.

    Raises:
        StoreError: it holds one; the message does not.
    """
    if _USER.match(url):
        raise StoreError(
            f"{scrubbed(url)}: refused, it holds a name or password, which results would show; {_CONFIGURE}"
        )
    _, _, query = url.partition("?")
    for parameter in query.split("&"):
        name = parameter.partition("=")[0]
        if _SECRET.search(name):
            raise StoreError(
                f"{scrubbed(url)}: refused, its parameter {name[:40]!r} looks like a credential, which results would "
                f"show; {_CONFIGURE}"
            )


_ended_at = float("-inf")


@contextmanager
def interruptible() -> Iterator[None]:
    """Give up all requests of this process when Ctrl-C ends the block; others would be waited for, minutes long."""
    global _ended_at
    _ended_at = float("-inf")
    try:
        yield
    except KeyboardInterrupt:
        _ended_at = time.monotonic()
        raise


def waited(future: Future[T], url: str) -> T:
    """Return what a future gives.

    Raises:
        Interrupted: the user ended the work.
        Exception: what the future raises.
    """
    while not wait([future], _LOOK).done:
        try:
            _go_on(url)
        except Interrupted:
            future.cancel()
            raise
    return future.result()


def _go_on(url: str) -> None:
    if time.monotonic() - _ended_at < _GIVING_UP:
        raise Interrupted(f"{url}: was not read, the work was interrupted")


def _pause(seconds: float, url: str) -> None:
    """Sleep; raises Interrupted where the user ends the work."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _go_on(url)
        time.sleep(min(left, _LOOK))


def attempt(url: str, work: Callable[[], T]) -> T:
    """Return what `work` returns, trying again after errors that may pass, four times in all.

    Args:
        url: for messages.
        work: asks a store.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        Forbidden: it may not be read.
        StoreError: any other error of the store, as one sentence.
        ModuleNotFoundError: a package is missing.
    """
    for pause in (*WAITS, None):
        try:
            _go_on(url)
            return work()
        except NotADirectoryError as error:
            raise FileNotFoundError(url) from error
        except (FileNotFoundError, ModuleNotFoundError, RangesIgnored):
            raise
        except Exception as error:
            if pause is None or not may_pass(error):
                if isinstance(error, StoreError):
                    raise
                if status_of(error) in (401, 403) or isinstance(error, PermissionError):
                    said = f" (status {status_of(error)})" if status_of(error) else ""
                    raise Forbidden(f"{url}: may not be read{said}; check your credentials for this store") from error
                raise StoreError(f"{url}: {_reason(error)}") from error
            _pause(max(pause, _asked_wait(error)), url)
    raise AssertionError("the last attempt returns or raises")


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    return any(kind.__name__ in _NETWORK for kind in type(error).__mro__)


def status_of(error: BaseException) -> int | None:
    """Return the status that a server answered with, as the libraries of stores keep it; None where it gave none."""
    for held in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            status = getattr(held, name, None)
            if isinstance(status, int) and 100 <= status < 600:
                return status
    return None


def _asked_wait(error: BaseException) -> float:
    headers: Any = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 0)), _LONGEST_WAIT)
    except (AttributeError, TypeError, ValueError):
        return 0.0


def _reason(error: Exception) -> str:
    status = status_of(error)
    said = scrubbed(str(error))[:200]
    what = (
        f"the store answered with status {status}" if status else f"cannot be reached or read ({type(error).__name__})"
    )
    return f"{what}{f': {said}' if said else ''}"
