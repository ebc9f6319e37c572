"""A Hugging Face hub on a loopback port: the part of its HTTP interface that downloads use."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """A model repository: its commits, and what branches and tags point to."""

    commits: dict[str, Files]
    refs: dict[str, str]
    gated: bool = False  # the listing is public, files are not
    private: bool = False
    moves_to: str | None = None  # commit that main moves to after the first look-up


@dataclass
class Request:
    """One answered request."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int = 0  # bytes of the body


@dataclass
class FakeHub:
    """What the server serves, its faults, and its log of requests."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    status: dict[str, int] = field(default_factory=dict)  # path pattern -> status of the answer
    ranges: bool = True
    page: bytes | None = None  # answer to every request, like a captive portal

    def add(self, name: str, files: Files, *, gated: bool = False, private: bool = False) -> str:
        """Add a repository with one commit on main; return the commit."""
        commit = commit_of(name, files)
        self.repos[name] = Repo({commit: files}, {"main": commit}, gated, private)
        return commit

    def downloaded(self) -> list[str]:
        """Names of the files sent."""
        paths = [r.path for r in self.log if r.method == "GET" and "/resolve/" in r.path and r.status in (200, 206)]
        return sorted({re.sub(r".*/resolve/[^/]*/", "", path) for path in paths})

    def sent(self) -> int:
        """Bytes of files sent, over all requests."""
        return sum(request.sent for request in self.log if "/resolve/" in request.path)


def commit_of(name: str, files: Files) -> str:
    """Return forty hexadecimal digits that depend on the content."""
    return sha1(repr((name, sorted((path, _etag(content)) for path, content in files.items()))).encode()).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, status in self.hub.status.items():
            if re.search(pattern, path):
                return self._send(path, status, b"{}")
        if self.hub.page is not None:
            return self._send(path, 200, self.hub.page)
        if api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, kind, revision = api[1], api[2], api[3] or "main"
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, kind, revision = file[1], file[3], file[2]
        else:
            return self._send(path, 404, b"")
        repo = self.hub.repos.get(name)
        if repo is None or repo.private:
            return self._refuse(path, 401, "RepoNotFound", "Invalid username or password.")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(path, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if kind == "tree":
            entries = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
            return self._send(path, 200, json.dumps(entries).encode())
        if kind in (None, "revision"):
            siblings = [{"rfilename": n, "size": len(c), "blobId": _etag(c)} for n, c in files.items()]
            if repo.moves_to is not None:
                repo.refs["main"] = repo.moves_to
            return self._send(path, 200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        if repo.gated:
            return self._refuse(path, 403, "GatedRepo", f"Access to model {name} is restricted.")
        if kind not in files:
            return self._refuse(path, 404, "EntryNotFound", "Entry not found")
        return self._send_file(path, files[kind], commit)

    def _send_file(self, path: str, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None or not self.hub.ranges:
            return self._send(path, 200, content, headers)
        begin, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self._send(path, 206, content[begin : end + 1], headers)

    def _refuse(self, path: str, status: int, code: str, message: str) -> None:
        self._send(path, status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, path: str, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        request = Request(self.command, path, self.headers.get("Range"), status)
        self.hub.log.append(request)  # before writing: the client may leave before the last write returns
        try:
            self.end_headers()
            for begin in range(0, len(body) if self.command == "GET" else 0, 1 << 16):
                request.sent += self.wfile.write(body[begin : begin + (1 << 16)])
        except OSError:  # the client has read enough
            self.close_connection = True


def _etag(content: bytes) -> str:
    return sha1(content).hexdigest()
