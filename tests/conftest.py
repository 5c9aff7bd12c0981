"""Fixtures shared by all tests: tiny random models and data, made in seconds, no network."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from xdist.scheduler import LoadScopeScheduling

from eora import store
from local_sources import COMMIT, data_wheel, hub, index

ROOT = Path(__file__).parent.parent
# The rules that alone touch the network.
DOWNLOADS = {"download_model", "download_checkpoint", "download_dataset", "prepare_task"}

# Each start of snakemake asks SLURM, where it is installed, for its settings, and waits ten seconds
# for one that does not answer. Tests that run on one take this back.
os.environ["SLURM_CONF"] = os.devnull


class Scheduling(LoadScopeScheduling):
    """A free worker takes a whole file of unit tests, the one of those on SLURM, which share what
    they start, and of all others, which take longer, one test."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if "unit/" in file or "slurm/" in file else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


SENTENCES = [
    f"The {colour} {animal} {verb} over the {place} while {number} others watch."
    for colour in ("red", "green", "blue", "old")
    for animal in ("fox", "owl", "bear", "hare")
    for verb in ("jumps", "runs", "flies")
    for place in ("hill", "river", "house")
    for number in ("two", "seven")
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the sentences."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=256, special_tokens=["<unk>", "<eos>"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def make_model(folder: Path, seed: int = 0, layers: int = 3) -> Path:
    """Save a tiny random Llama with grouped-query attention and its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_packed(model: Path, folder: Path) -> Path:
    """Save a model in 4 bits as somebody else would, rounded to nearest by llm-compressor."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    nearest = QuantizationModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    oneshot(str(model), recipe=[nearest], pipeline="datafree", output_dir=str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama: 3 blocks, hidden 64, intermediate 96, kv width 32."""
    return make_model(tmp_path_factory.mktemp("model"))


def symmetric(packed: torch.Tensor) -> torch.Tensor:
    """The whole matrix of a packed lower triangle."""
    size = int((2 * len(packed)) ** 0.5)  # n (n + 1) / 2 values
    matrix = torch.zeros(size, size, dtype=packed.dtype)
    matrix[np.tril_indices(size)] = packed
    return matrix + matrix.tril(-1).T


def make_questions(path: Path) -> None:
    """Multiple-choice questions in the columns of lm-eval's ARC tasks, as JSON lines."""
    rows = [
        {
            "id": str(i),
            "question": sentence.replace("over the", "over which"),
            "choices": {"text": ["hill", "river", "house"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i, sentence in enumerate(SENTENCES[:12])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_config(sources: Path, wheel: dict[str, str]) -> dict[str, Any]:
    """A config that takes two tiny models through every rule, from sources of every kind."""
    return {
        "models": {
            "tiny": {"path": str(sources / "tiny")},
            "twin": {"hub": "tiny/twin", "revision": COMMIT},
        },
        "datasets": {
            "sentences": {**wheel, "text": "sentence"},
            "more": {"hub": "tiny/data", "revision": COMMIT, "data_files": "en/part-0.jsonl"},
            "questions": {"path": str(sources / "questions.jsonl")},
        },
        "calibrations": {
            "rounding": {"dataset": "sentences", "samples": 4, "seqlen": 32},
            "moments": {"dataset": "more", "samples": 12, "seqlen": 24, "layout": "documents"},
        },
        "compressions": {
            "w2": {"bits": 2, "group_size": 32, "iters": 1, "calibration": "rounding"},
            "w4": {
                "method": "existing",
                "model": "tiny",
                "checkpoint": {"path": str(sources / "packed")},
            },
        },
        "adapters": {
            "eora": {
                "calibration": "moments",
                "ranks": [4, 8],
                "compressions": ["w2"],
                "max_rank": 16,
                "bits": [16, 4],
            },
            "svd": {
                "calibration": "moments",
                "ranks": [8],
                "compressions": ["w4"],
                "max_rank": 16,
                "bits": [16],
                "method": "svd",
                "calibrate_on": "compressed",
            },
        },
        "tasks": {
            "choice": {
                "lm_eval": "arc_easy",
                "dataset": "questions",
                "fewshot_dataset": "questions",
                "num_fewshot": 1,
                "limit": 6,
            },
            "text": {"perplexity": "sentences", "window": 32, "windows": 4},
        },
        "covariance": {"shards": 2},
        "runtime": {"device": "cpu", "threads": 1},
    }


@dataclass
class Pipeline:
    """A working directory in which the workflow ran, and the config that it ran with."""

    folder: Path
    config: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    root: Path = ROOT  # the checkout that it runs from

    def write(self, config: dict[str, Any] | None = None) -> Path:
        """A file with the config (this one's by default)."""
        file = self.folder / "edited.yaml"
        file.write_text(yaml.safe_dump(self.config if config is None else config))
        return file

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """Start a command here; stdout and stderr together."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def command(self, file: Path, *args: str) -> list[str | Path]:
        """The snakemake command for a config file."""
        command = ["snakemake", "--snakefile", self.root / "Snakefile", "--configfile", file]
        return [*command, "--cores", "2", "--resources", "gpu=2", *args]

    def snakemake(
        self, *args: str, config: dict[str, Any] | None = None, before: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run snakemake on a config (this one's by default); a command may come before it."""
        process = self.start(*before, *self.command(self.write(config), *args))
        output, _ = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def copy(self, folder: Path) -> "Pipeline":
        """The same in another folder, with results, Snakemake's notes and sources."""
        shutil.copytree(self.folder, folder)  # copies mtimes of files, not of folders
        return replace(self, folder=folder)

    @property
    def results(self) -> Path:
        return self.folder / "results"


def failures(output: str, folder: Path) -> str:
    """The ends of the logs of those jobs that failed."""
    logs = dict.fromkeys(re.findall(r"^    log: (\S+)", output, re.MULTILINE))
    ends = [f"{log}:\n{(folder / log).read_text()[-1500:]}" for log in logs]
    return "\n\n".join(ends) or output[-3000:]


@pytest.fixture(scope="session")
def unrun(tmp_path_factory) -> Iterator[Pipeline]:
    """The workflow before it runs: two tiny random models and data, from sources of every kind."""
    folder = tmp_path_factory.mktemp("pipeline")
    sources = folder / "sources"
    make_packed(make_model(sources / "tiny"), sources / "packed")
    twin = make_model(tmp_path_factory.mktemp("twin"), seed=1, layers=2)
    make_questions(sources / "questions.jsonl")
    wheel = data_wheel(folder / "index", [{"sentence": s} for s in SENTENCES])
    texts = "".join(json.dumps({"text": s}) + "\n" for s in SENTENCES).encode()
    repos = {
        "tiny/twin": {p.name: p.read_bytes() for p in twin.iterdir()},
        "datasets/tiny/data": {"en/part-0.jsonl": texts},
    }
    with hub(repos) as address:
        home = str(tmp_path_factory.mktemp("hf"))
        env = {"HF_ENDPOINT": address, "HF_HOME": home, **index(folder / "index")}
        yield Pipeline(folder, tiny_config(sources, wheel), env)


def copy_whole(folder: Path, to: Path) -> None:
    """Copy a folder with the times of files and folders, and the store's links as links."""
    subprocess.run(["cp", "-a", folder, to], check=True)


def without_network() -> list[str]:
    """The beginning of a command that has no network but the loopback interface, its own.

    Raises:
        OSError: there can be none here.
    """
    said = []
    for unshare in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        command = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        done = subprocess.run([*command, "true"], capture_output=True, text=True)
        if done.returncode == 0:
            return command
        said.append(done.stderr.strip())
    raise OSError(f"needs the right to make a network namespace: {'; '.join(said)}")


def run_apart(flow: Pipeline) -> None:
    """Run the downloads, and all that follows where there is no network, if that can be had."""
    apart: list[str] = []
    with suppress(OSError):
        apart = without_network()
    for name, before, args in (
        ("downloads.log", [], ["--until", *DOWNLOADS]),
        ("offline.log", apart, []),
    ):
        # The benchmarks tell what jobs asked for.
        done = flow.snakemake("--benchmark-extended", *args, before=before)
        assert done.returncode == 0, failures(done.stdout, flow.folder)
        (flow.folder / name).write_text(done.stdout)


@pytest.fixture(scope="session")
def pipeline(unrun: Pipeline, tmp_path_factory) -> Pipeline:
    """The whole workflow, run once: every rule, real tools.

    One worker runs it and the others copy it, with sources that are theirs byte for byte.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = tmp_path_factory.getbasetemp().parent / "run"
    else:
        shared = tmp_path_factory.mktemp("shared") / "run"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            run_apart(unrun)
            copy_whole(unrun.folder, shared)
            return unrun
    shutil.rmtree(unrun.folder)
    copy_whole(shared, unrun.folder)
    return unrun


@pytest.fixture
def clone(pipeline: Pipeline, tmp_path: Path) -> Pipeline:
    """The finished pipeline in a folder of its own, links of the store kept."""
    folder = tmp_path / "clone"
    copy_whole(pipeline.folder, folder)
    return replace(pipeline, folder=folder, config=copy.deepcopy(pipeline.config))


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """A config with one entry of each kind."""
    config = copy.deepcopy(config)
    del config["models"]["twin"], config["compressions"]["w4"], config["tasks"]["choice"]
    del config["adapters"]["svd"]
    config["adapters"]["eora"] |= {"ranks": [8], "bits": [4]}
    return config


@pytest.fixture
def small(clone: Pipeline) -> Pipeline:
    """The same with a smaller config, where much is computed anew."""
    return replace(clone, config=smaller(clone.config))


def contents(clone: Pipeline) -> dict[str, str]:
    """Digest of every file that is a result, less what a run measures."""
    return {
        path.relative_to(clone.results).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in clone.results.rglob("*")
        if path.is_file()
        and path.name not in ("results.json", ".snakemake_timestamp", "report.html")
        and path.relative_to(clone.results).parts[0] not in (store.NAME, "logs", "benchmarks")
    }


def assert_remade(flow: Pipeline, before: dict[str, str]) -> None:
    """That what a pipeline made anew, from nothing or from its downloads, is what it made before.

    Of the table, which names what the config does, only that it is there.
    """
    now = contents(flow)
    assert now.pop("summary.csv") and now.pop("summary.json") and len(now) > 30
    assert now == {name: before.get(name) for name in now}


def unsummed(files: dict[str, str]) -> dict[str, str]:
    """Less the table, which changes when models go from the config."""
    return {name: digest for name, digest in files.items() if not name.startswith("summary.")}
