"""Hub sources, against a hub on loopback that serves what the real one does for these calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk

from conftest import ROOT, SENTENCES
from eora import manifest
from local_sources import COMMIT, hub

ROWS = "".join(json.dumps({"text": s}) + "\n" for s in SENTENCES[:9])


@pytest.fixture
def endpoint(tiny_model):
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"code"}
    repos = {
        "tiny/model": files,
        "datasets/tiny/data": {"en/part-0.jsonl": ROWS.encode(), "en/part-1.jsonl": b"broken"},
    }
    with hub(repos) as address:
        yield address


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


def test_a_kind_that_is_not_supported_is_refused_before_its_weights_are_fetched(tmp_path):
    """There are none: asking for them would be another message."""
    config = json.dumps({"model_type": "mamba", "state_size": 16}).encode()
    with hub({"tiny/mamba": {"config.json": config}}) as endpoint:
        source = {"hub": "tiny/mamba", "revision": COMMIT}
        done = fetch("download_model", source, tmp_path / "model", endpoint)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "model_type mamba is a state-space model, or a hybrid with one" in done.stdout
    assert "tiny/mamba" in done.stdout and not (tmp_path / "model" / manifest.NAME).exists()
