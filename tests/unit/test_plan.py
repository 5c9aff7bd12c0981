"""What is predicted, against what stages really take, and against hand-made sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, SENTENCES, make_tokenizer
from eora import config as cfg
from eora import manifest, plan, shapes, stages

# Large enough that what a stage holds is not lost beside Python's imports.
HIDDEN, MLP, BLOCKS = 768, 6144, 2
SAMPLES, SEQLEN = 16, 128


def checked(**sections) -> cfg.Config:
    schema = cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    text = {"text": {"path": str(ROOT / "README.md")}}
    return cfg.validate({"datasets": text, **sections}, schema)


def config(model: Path) -> cfg.Config:
    return checked(
        models={"m": {"path": str(model)}},
        calibrations={"c": {"dataset": "text", "samples": SAMPLES, "seqlen": SEQLEN}},
        compressions={"w2": {"bits": 2, "group_size": 32, "iters": 1, "calibration": "c"}},
        adapters={"eora": {"calibration": "c", "ranks": [64], "max_rank": 128, "bits": [16, 4]}},
        tasks={"text": {"perplexity": "text", "window": SEQLEN, "windows": SAMPLES}},
        runtime={"device": "cpu", "batch_size": 8},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders as the first stages leave them: of a model, of its samples, of a text."""
    base = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=12,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    LlamaForCausalLM(model).to(torch.bfloat16).save_pretrained(base / "models/m/model")
    make_tokenizer().save_pretrained(base / "models/m/model")
    tokens = {
        "input_ids": torch.randint(2, 250, (SAMPLES, SEQLEN), dtype=torch.int32),
        "lengths": torch.full((SAMPLES,), SEQLEN),
    }
    (base / "tokens/m/c").mkdir(parents=True)
    save_file(tokens, base / "tokens/m/c/tokens.safetensors")
    Dataset.from_dict({"text": SENTENCES * 40}).save_to_disk(base / "datasets/text/data")
    for folder in ("models/m", "tokens/m/c", "datasets/text"):
        manifest.seal(base / folder, {})
    return base


class Job:
    """A stage's script, running; what it needed at its peak and what it left on disk."""

    def __init__(self, base: Path, config: cfg.Config, place: stages.Place, **inputs: str):
        self.out = base / place.folder
        params = stages.params(config, place.stage, dict(place.wildcards))
        command = [sys.executable, ROOT / f"scripts/{place.stage}.py"]
        command += ["--params", json.dumps(params), "--out", self.out, "--device", "cpu"]
        command += [part for k, v in inputs.items() for part in (f"--{k}", base / v)]
        self.log = (base / f"{place.stage}.log").open("w+")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)

    def end(self) -> tuple[float, float]:
        """Peak resident memory, and bytes of weights on disk."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = status
        self.log.seek(0)
        assert status == 0, self.log.read()[-3000:]
        files = self.out.rglob("*.safetensors")
        return usage.ru_maxrss * 1024, sum(file.stat().st_size for file in files)


COMPRESS = stages.place("compress", model="m", compression="w2")
COVARIANCE = stages.place("covariance", model="m", calibration="c", shard=0, shards=1)
DECOMPOSE = stages.place(
    "decompose", model="m", compression="w2", adapter="eora", shard=0, shards=1
)
EVALUATE = stages.place("evaluate", model="m", variant="w2", task="text")


@pytest.mark.slow
def test_memory_and_disk_are_within_a_quarter_of_what_stages_take(made):
    settings = config(made / "models/m/model")
    source = {"model": "models/m", "tokens": "tokens/m/c"}
    first = Job(made, settings, COMPRESS, **source), Job(made, settings, COVARIANCE, **source)
    taken = {COMPRESS: first[0].end(), COVARIANCE: first[1].end()}
    fitted = {"compressed": COMPRESS.folder, "moments": COVARIANCE.folder}
    last = (
        Job(made, settings, DECOMPOSE, model="models/m", **fitted),
        Job(made, settings, EVALUATE, model=COMPRESS.folder, dataset="datasets/text"),
    )
    taken |= {DECOMPOSE: last[0].end(), EVALUATE: last[1].end()}

    costs = plan.Costs(settings, cuda=False)
    found = shapes.known(settings["models"]["m"], made / "models/m")
    told = {place: costs.of(place, found) for place in taken}
    for place, (memory, disk) in taken.items():
        peak = plan.peak(told[place].host)
        parts = "".join(f"\n  {term.name}: {term.bytes / 1e6:.0f}" for term in peak)
        print(f"{place.stage}: {plan.total(peak) / 1e6:.0f} MB of memory, took {memory / 1e6:.0f}")
        print(f"  {told[place].disk / 1e6:.1f} MB on disk, took {disk / 1e6:.1f}{parts}")
    assert {place.stage: plan.total(plan.peak(told[place].host)) for place in taken} == {
        place.stage: pytest.approx(memory, rel=0.25) for place, (memory, _) in taken.items()
    }
    assert {place.stage: told[place].disk for place in taken} == {
        place.stage: pytest.approx(disk, rel=0.25) for place, (_, disk) in taken.items()
    }
