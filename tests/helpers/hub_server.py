"""A Hub on this machine: repositories below a folder, served as the real one serves them."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
LFS_BYTES = 100_000
"""Bytes from which a file is told by its SHA-256, as one that lies outside of git."""
PIECE = 1_000_000


class HubServer:
    """Serves ``org/repo`` folders.

    Args:
        root: Holds them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.sizes: dict[str, int] = {}
        """Sizes that are told instead of the real ones, by path."""
        self.stall_after: int | None = None
        """Bytes of a file after which no more come until ``go_on`` is set."""
        self.go_on = threading.Event()
        self.endpoint = ""

    @contextmanager
    def run(self) -> Iterator["HubServer"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.go_on.set()
            server.shutdown()
            server.server_close()

    def describe(self, repo: str) -> list[dict[str, Any]]:
        """Files of a repository, as its tree tells them."""
        folder = self.root / repo
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return [self._describe(file, str(file.relative_to(folder)), repo) for file in files]

    def _describe(self, file: Path, name: str, repo: str) -> dict[str, Any]:
        size = self.sizes.get(f"{repo}/{name}", file.stat().st_size)
        known: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": etag(file)[:40]}
        if size >= LFS_BYTES:
            known["lfs"] = {"oid": etag(file), "sha256": etag(file), "size": size, "pointerSize": 1}
        return known


@cache
def etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def _answer(self, *, has_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", path):
                return self._send_json(hub.describe(found[1]))
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path):
                return self._send_repository(found[1])
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                return self._send_file(hub.root / found[1] / found[2], has_body=has_body)
            return self._send_missing("RepoNotFound")

        def _send_repository(self, repo: str) -> None:
            if not (hub.root / repo).is_dir():
                return self._send_missing("RepoNotFound")
            siblings = [
                {"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]}
                | ({"lfs": file["lfs"]} if "lfs" in file else {})
                for file in hub.describe(repo)
            ]
            return self._send_json({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

        def _send_json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send_file(self, file: Path, *, has_body: bool) -> None:
            if not file.is_file():
                return self._send_missing("EntryNotFound")
            size = file.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(asked[1]) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("ETag", f'"{etag(file)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(size - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            if has_body:
                self._send_pieces(file.read_bytes(), start)
            return None

        def _send_pieces(self, content: bytes, start: int) -> None:
            for place in range(start, len(content), PIECE):
                if hub.stall_after is not None and place >= hub.stall_after:
                    hub.go_on.wait()
                try:
                    self.wfile.write(content[place : place + PIECE])
                except OSError:  # the client has gone
                    return

    return Handler
