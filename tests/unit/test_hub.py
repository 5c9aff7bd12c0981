"""Hub sources, against a hub on loopback that serves what the real one does for these calls."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from datasets import load_from_disk

from conftest import ROOT, SENTENCES
from eora import manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = "".join(json.dumps({"text": s}) + "\n" for s in SENTENCES[:9])


class Hub(BaseHTTPRequestHandler):
    """One model (tiny/model) and one data set (tiny/data) at one commit."""

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


@pytest.fixture
def endpoint(tiny_model):
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"code"}
    Hub.repos = {
        "tiny/model": files,
        "datasets/tiny/data": {"en/part-0.jsonl": ROWS.encode(), "en/part-1.jsonl": b"broken"},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(script: str, source: dict, out: Path, endpoint: str):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", "--out", out]
        + ["--params", json.dumps({"source": source, "version": 1})],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "hf")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_models_weights_config_and_tokenizer_and_nothing_else(endpoint, tmp_path):
    out = tmp_path / "model"
    done = fetch("download_model", {"hub": "tiny/model", "revision": COMMIT}, out, endpoint)
    assert done.returncode == 0, done.stdout
    taken = {p.name for p in (out / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= taken
    assert not {"pytorch_model.bin", "modeling.py", ".cache"} & taken
    assert manifest.load(out)["params"]["source"]["revision"] == COMMIT


def test_one_file_of_a_data_set(endpoint, tmp_path):
    source = {"hub": "tiny/data", "revision": COMMIT, "data_files": "en/part-0.jsonl"}
    out = tmp_path / "data"
    done = fetch("download_dataset", {**source, "split": "train", "rows": [2, 5]}, out, endpoint)
    assert done.returncode == 0, done.stdout
    assert load_from_disk(str(out / "data"))["text"] == SENTENCES[2:5]


def test_an_unknown_revision_fails_and_leaves_no_manifest(endpoint, tmp_path):
    out = tmp_path / "model"
    done = fetch("download_model", {"hub": "tiny/model", "revision": "f" * 40}, out, endpoint)
    assert done.returncode != 0
    assert not (out / manifest.NAME).exists()
