"""Fixtures shared by all tests: tiny random models and data, made in seconds, no network."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama: 3 blocks, hidden 64, intermediate 96, kv width 32."""
    return make_model(tmp_path_factory.mktemp("model"))


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


def tiny_config(sources: Path) -> dict[str, Any]:
    """A config that takes a tiny model through every rule, from local files."""
    return {
        "models": {"tiny": {"path": str(sources / "tiny")}},
        "datasets": {
            "sentences": {"path": str(sources / "sentences.jsonl"), "text": "sentence"},
            "questions": {"path": str(sources / "questions.jsonl")},
        },
        "calibrations": {
            "rounding": {"dataset": "sentences", "samples": 4, "seqlen": 32},
            "moments": {
                "dataset": "sentences",
                "samples": 12,
                "seqlen": 24,
                "layout": "documents",
            },
        },
        "compressions": {
            name: {
                "bits": bits,
                "sym": sym,
                "group_size": 32,
                "iters": 1,
                "calibration": "rounding",
            }
            for name, bits, sym in (("w2", 2, False), ("w4", 4, True))
        },
        "adapters": {
            "eora": {"calibration": "moments", "ranks": [8], "max_rank": 16, "bits": [16, 4]}
        },
        "tasks": {
            "choice": {"lm_eval": "arc_easy", "dataset": "questions", "limit": 6},
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

    def snakemake(
        self, *args: str, config: dict[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run snakemake on a config (this one's by default); stdout and stderr together."""
        file = self.folder / "edited.yaml"
        file.write_text(yaml.safe_dump(self.config if config is None else config))
        command = ["snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", str(file)]
        command += ["--cores", "2", "--resources", "gpu=2", *args]
        return subprocess.run(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def results(self) -> Path:
        return self.folder / "results"


def failures(output: str, folder: Path) -> str:
    """The ends of the logs of those jobs that failed."""
    logs = dict.fromkeys(re.findall(r"^    log: (\S+)", output, re.MULTILINE))
    ends = [f"{log}:\n{(folder / log).read_text()[-1500:]}" for log in logs]
    return "\n\n".join(ends) or output[-3000:]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Pipeline:
    """The whole workflow, run once on a tiny random model: every rule, real tools."""
    folder = tmp_path_factory.mktemp("pipeline")
    sources = folder / "sources"
    make_model(sources / "tiny")
    rows = (json.dumps({"sentence": s}) + "\n" for s in SENTENCES)
    (sources / "sentences.jsonl").write_text("".join(rows))
    make_questions(sources / "questions.jsonl")
    made = Pipeline(folder, tiny_config(sources))
    done = made.snakemake()
    assert done.returncode == 0, failures(done.stdout, folder)
    return made
