"""A web server and a Hub on this machine, which behave well or badly as a test asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@lru_cache(maxsize=256)
def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


class WebServer:
    """Files of memory at `url`, with requests counted.

    Attributes:
        files: content by path, without a slash in front.
        requests: number of requests by method and path.
        ranges: whether ranges are sent.
        latency: seconds before each answer.
        failures: statuses of the next answers, whatever is asked for.
        spoil: changes the body of an answer.
        most: greatest number of requests that were answered at the same time.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.ranges, self.latency = True, 0.0
        self.failures: list[int] = []
        self.spoil: Callable[[bytes], bytes] = lambda body: body
        self.most = self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                with server._lock:
                    server._now += 1
                    server.most = max(server.most, server._now)
                    server.requests[urlsplit(self.path).path.lstrip("/")] += 1
                    failure = server.failures.pop(0) if server.failures else None
                time.sleep(server.latency)
                with server._lock:
                    server._now -= 1
                if failure is not None:
                    self._answer(failure, b"")
                else:
                    server.answer(self)

            def _answer(self, status: int, body: bytes, **headers: str) -> None:
                sent = server.spoil(body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(sent)
                if len(sent) != len(body):
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that have left
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path).lstrip("/")
        if path.endswith("/"):
            handler._answer(200, self.page(path).encode(), Content_Type="text/html")
        elif path in self.files:
            self.send(handler, self.files[path])
        else:
            handler._answer(404, b"no such file")

    def page(self, folder: str) -> str:
        links = "".join(f'<a href="{name}">x</a>' for name in sorted(self._names(folder)))
        return f"<html>{links}</html>"

    def _names(self, folder: str) -> set[str]:
        inside = [path.removeprefix(folder) for path in self.files if path.startswith(folder)]
        return {name.partition("/")[0] + ("/" if "/" in name else "") for name in inside}

    def send(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        etag = _etag(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if asked is None or not self.ranges:
            handler._answer(200, content, ETag=etag)
            return
        start, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if start >= len(content):
            handler._answer(416, b"", Content_Range=f"bytes */{len(content)}")
            return
        place = f"bytes {start}-{end}/{len(content)}"
        handler._answer(206, content[start : end + 1], ETag=etag, Content_Range=place)


class Hub(WebServer):
    """A Hub with the model repository `user/zoo` at one commit, a gated one `user/gated`, and no others."""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        path = unquote(url.path).lstrip("/")
        if found := re.fullmatch(r"api/models/user/(zoo|gated)(?:/revision/(.*))?", path):
            if found[2] in (None, "main", "v1", COMMIT):
                said = {"id": f"user/{found[1]}", "sha": COMMIT, "private": False, "siblings": []}
                handler._answer(200, json.dumps(said).encode(), Content_Type="application/json")
            else:
                handler._answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif found := re.fullmatch(rf"api/models/user/(zoo|gated)/tree/{COMMIT}(?:/(.*))?", path):
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            body = json.dumps(self._tree(found[2] or "", recursive)).encode()
            handler._answer(200, body, Content_Type="application/json")
        elif found := re.fullmatch(rf"user/zoo/resolve/{COMMIT}/(.*)", path):
            if found[1] in self.files:
                self.send(handler, self.files[found[1]])
            else:
                handler._answer(404, b"", X_Error_Code="EntryNotFound")
        elif path.startswith("user/gated/"):
            handler._answer(403, b"", X_Error_Code="GatedRepo")
        else:
            handler._answer(401, b"", X_Error_Code="RepoNotFound")

    def _tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        start = f"{folder}/" if folder else ""
        found: dict[str, dict[str, object]] = {}
        for path, content in self.files.items():
            if not path.startswith(start):
                continue
            inside = path.removeprefix(start).split("/")
            for i in range(1, len(inside)):
                place = start + "/".join(inside[:i])
                if recursive or i == 1:
                    found[place] = {"type": "directory", "path": place, "oid": "0" * 40, "size": 0}
            if recursive or len(inside) == 1:
                oid = hashlib.sha1(content).hexdigest()
                found[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        return list(found.values())
