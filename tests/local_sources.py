"""What models and data sets come from in tests: a hub on loopback, and a local wheel index."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Some repositories at one commit, served as the real hub serves them for our calls."""

    repos: dict[str, dict[str, bytes]] = {}

    def log_message(self, *args):
        pass

    def reply(self, body: bytes, headers: dict[str, str], status: int = 200):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status=200):
        self.reply(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def entry(self, path: str, content: bytes):
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        for repo, files in self.repos.items():
            api = f"/api/{repo if repo.startswith('datasets') else 'models/' + repo}"
            if path.startswith(f"{api}/tree/{COMMIT}"):
                below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                return self.json(
                    [self.entry(n, c) for n, c in files.items() if n.startswith(below)]
                )
            if path in (api, f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                return self.json({"id": repo, "sha": COMMIT, "siblings": siblings})
            for name, content in files.items():
                if path == f"/{repo}/resolve/{COMMIT}/{name}":
                    etag = hashlib.sha1(content).hexdigest()
                    return self.reply(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self.reply(b"{}", {"X-Error-Code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        for repo, files in self.repos.items():
            if self.path.startswith(f"/api/{repo}/paths-info"):
                found = [self.entry(n, c) for n, c in files.items() if n in unquote(body)]
                return self.json(found)
        return self.json([], 404)


@contextmanager
def hub(repos: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serve repositories (name -> file -> content); yields the endpoint's address."""
    handler = type("Handler", (Hub,), {"repos": repos})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def data_wheel(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Make data_pack 1.0, a wheel that holds the rows; returns it as a config's source."""
    folder.mkdir(parents=True)
    wheel = folder / "data_pack-1.0-py3-none-any.whl"
    info = "data_pack-1.0.dist-info/"
    files = {
        "data_pack/rows.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        "data_pack/__init__.py": "raise SystemExit('never imported')",
        info + "METADATA": "Metadata-Version: 2.1\nName: data-pack\nVersion: 1.0",
        info + "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any",
        info + "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # of no time: always the same bytes
    return {
        "wheel": "data-pack==1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": "data_pack/rows.jsonl",
    }


def index(folder: Path) -> dict[str, str]:
    """Environment in which pip looks at the folder's wheels and nowhere else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
