"""The hub's cache made by hand, and a hub of one repository on this machine."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

REVISION = "0123456789abcdef0123456789abcdef01234567"


def lay_in_cache(folder: Path, home: Path, name: str) -> Path:
    """Lay a folder as the hub's cache lays a repository under HF_HOME; returns the snapshot."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@contextmanager
def serve(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a repository of a hub; gives the hub's address, and the files that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path, files = self.path.partition("?")[0], f"/{name}/resolve/{REVISION}/"
            if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/revision/"):
                names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
                info = {"id": name, "sha": REVISION, "siblings": [{"rfilename": file} for file in sorted(names)]}
                self._send(json.dumps(info).encode(), body)
            elif path.startswith(files) and (folder / path.removeprefix(files)).is_file():
                if body:
                    asked.append(path.removeprefix(files))
                self._send((folder / path.removeprefix(files)).read_bytes(), body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, data: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command_line(*arguments: object) -> list[str]:
    """`pyrexport` in a process of its own: the hub's client reads its settings once, when it is imported."""
    return [sys.executable, "-m", "pyrexport.cli", *map(str, arguments)]
