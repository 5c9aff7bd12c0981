"""What the whole workflow leaves behind, on a tiny real model."""

import ast
import csv
import json
import math
import shutil
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ROOT, symmetric
from eora import (
    adapters,
    architectures,
    block_files,
    covariance,
    export,
    factor_files,
    loading,
    lowrank,
    manifest,
    plan,
    shapes,
    stages,
    streaming,
)
from eora import config as cfg

IDS = torch.arange(2, 66).view(2, 32)


def rows(pipeline):
    with (pipeline.results / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def adapter(pipeline, bits):
    return pipeline.results / f"adapters/tiny/w2/eora/r8-{bits}bit"


def test_summary_has_every_combination(pipeline):
    w2 = ("w2", *(f"w2+eora-r{rank}-{bits}bit" for rank in (4, 8) for bits in (16, 4)))
    w4 = ("w4", "w4+svd-r8-16bit")  # a checkpoint that was made from tiny
    made = {"tiny": ("original", *w2, *w4), "twin": ("original", *w2)}
    assert {(r["model"], r["variant"], r["task"]) for r in rows(pipeline)} == {
        (model, variant, task)
        for model, variants in made.items()
        for variant in variants
        for task in ("choice", "text")
    }
    assert all(float(r["value"]) == float(r["value"]) for r in rows(pipeline))


def test_results_hold_what_is_needed_to_judge_them(pipeline):
    for path in pipeline.results.glob("evaluations/*/*/*/results.json"):
        result = json.loads(path.read_text())
        metric = result["metrics"][result["primary"]]
        # Six questions may all be answered alike.
        assert metric["stderr"] > 0 or path.parent.name == "choice" and metric["stderr"] == 0
        assert result["samples"] == {"choice": 6, "text": 4}[path.parent.name]
        assert result["seconds"] > 0
        assert 1e6 < min(result["memory_bytes"].values()) < result["peak_memory_bytes"]
        assert result["planned_memory_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.3)
        assert {"lm_eval", "torch"} <= set(result["versions"])


def test_report_is_one_page_that_names_every_variant(pipeline):
    page = (pipeline.results / "report.html").read_text()
    assert page.count("<svg") >= 2 and "src=" not in page
    for row in rows(pipeline):
        assert row["variant"] in page


def test_the_run_says_where_the_report_is(pipeline):
    done = pipeline.snakemake("--forcerun", "report")
    assert str(pipeline.results / "report.html") in done.stdout


def test_every_job_left_a_log_and_a_benchmark(pipeline):
    logs = {p.relative_to(pipeline.results / "logs").with_suffix("") for p in find(pipeline, "log")}
    marks = {
        p.relative_to(pipeline.results / "benchmarks").with_suffix("")
        for p in find(pipeline, "tsv")
    }
    assert logs == marks and len(logs) > 30


# Each attempt asks for half as much again as the first, and a job for no less than 30 minutes.
@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("model", ["tiny", "twin"])  # twin was not downloaded as the run began
def test_jobs_ask_for_what_the_plan_says(pipeline, tmp_path, model, attempt):
    place = stages.place("adapter", model=model, compression="w2", adapter="eora", rank=4)
    if attempt > 1:
        pipeline = pipeline.copy(tmp_path / "again")
        wanted = ["--attempt", str(attempt), "--benchmark-extended", "--forcerun", "adapter"]
        done = pipeline.snakemake(*wanted, "--", f"results/{place.folder}/manifest.json")
        assert done.returncode == 0, done.stdout
    mark = f"benchmarks/adapter/{place.folder.removeprefix('adapters/')}.tsv"
    with (pipeline.results / mark).open() as file:
        asked = ast.literal_eval(next(csv.DictReader(file, delimiter="\t"))["resources"])
    config = cfg.validate(
        pipeline.config, cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    )
    known = shapes.known(config["models"][model], pipeline.results / "models" / model)
    cost = plan.Costs(config, cuda=False).of(place, known)
    first = math.ceil(1.25 * plan.total(plan.peak(cost.host)) / 1e6)
    assert asked["mem_mb"] == math.ceil(first * (1 + attempt) / 2)
    assert asked["runtime"] == 15 * (1 + attempt)


def find(pipeline, suffix):
    return pipeline.results.rglob(f"*.{suffix}")


def test_compressed_model_is_packed_and_loads_as_plain_transformers(pipeline):
    folder = pipeline.results / "compressed/tiny/w2"
    names = manifest.tensors(manifest.load(folder))
    assert names["model.layers.0.mlp.up_proj.qweight"]["dtype"] == "I32"
    model, _ = loading.load(folder / "model")
    assert torch.isfinite(model(IDS).logits).all()


def test_dense_weights_give_the_packed_layers_outputs(pipeline):
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    folder = pipeline.results / "compressed/tiny/w2/model"
    packed = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=AutoRoundConfig(backend="torch")
    )
    layers = dict(architectures.linear_layers(packed.model.layers[1]))
    assert len(layers) == 7
    for layer in layers.values():
        x = torch.randn(5, layer.infeatures)
        with torch.inference_mode():
            torch.testing.assert_close(x @ architectures.dense_weight(layer).T, layer(x))


@torch.inference_mode()
def test_peft_on_the_dense_model_gives_our_logits(pipeline, tmp_path):
    base = pipeline.results / "compressed/tiny/w2/model"
    ours, _ = loading.load(base, adapter(pipeline, 16) / "adapter")
    dense, _ = loading.load(base)
    before = dense(IDS).logits
    dense.save_pretrained(tmp_path)  # a plain model like any other, and saved as one
    assert not json.loads((tmp_path / "config.json").read_text()).get("quantization_config")
    theirs = PeftModel.from_pretrained(dense, adapter(pipeline, 16) / "adapter")(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 1e-2


def test_adapters_are_the_textbook_optimum_for_the_stored_moments(pipeline):
    """Read back weights and moments as any user could, solve as the paper does, compare."""
    original = streaming.BlockStream(pipeline.results / "models/tiny/model", "cpu")
    rounded = streaming.BlockStream(pipeline.results / "compressed/tiny/w2/model", "cpu")
    pairs = adapters.load_peft(adapter(pipeline, 16) / "adapter")
    files = sorted(pipeline.results.glob("covariance/tiny/moments/*/moments/block-*"))
    curves = json.loads((adapter(pipeline, 16) / "residuals.json").read_text())
    assert len(files) == len(original) == 3
    for index, file in enumerate(files):
        assert file.name == block_files.name(index)
        moments = load_file(file)
        with safe_open(file, framework="pt") as opened:
            shared = json.loads(opened.metadata()["inputs"])["shared"]
        with original.block(index) as exact, rounded.block(index) as approximate:
            for name, layer in architectures.linear_layers(exact).items():
                error = (
                    layer.weight - architectures.dense_weight(approximate.get_submodule(name))
                ).double()
                c = symmetric(moments[shared[name]]).double()
                values, q = torch.linalg.eigh(c)
                projection = q * values.clamp(min=0).sqrt()
                singular = torch.linalg.svdvals(error @ projection)
                best = singular[8:].square().sum().item()
                a, b = (m.double() for m in pairs[f"{original.name(index)}.{name}"])
                rest = error - b @ a
                left = (rest @ c @ rest.T).trace().item()
                total = singular.square().sum().item()
                # float16 factors: within a millionth of the error's whole weight
                assert left == pytest.approx(best, abs=2e-6 * total)
                curve = curves[f"{original.name(index)}.{name}"]
                assert curve[8] == pytest.approx(best, rel=1e-5, abs=1e-9 * total)
                assert curve[0] == pytest.approx(total, rel=1e-6)


def read_by_layers(model, tokens):
    """Layer -> the second moment of what it reads, by hooks on a whole model, sample by sample."""
    sums = {}

    def add(name):
        def hook(_, args):
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    for name, layer in architectures.linear_layers(model.model.layers).items():
        layer.register_forward_pre_hook(add(f"model.layers.{name}"))
    with torch.inference_mode():
        for ids, length in zip(tokens["input_ids"].long(), tokens["lengths"], strict=True):
            model(ids[None, :length])
    return {name: total / tokens["lengths"].sum() for name, total in sums.items()}


@pytest.mark.parametrize("compression", ["w4", "w2"])
def test_second_moments_of_what_a_compressed_model_reads(pipeline, compression, tmp_path):
    """Those that the workflow took for one format (compressed-tensors), and AutoRound's alike."""
    folder = pipeline.results / f"compressed/tiny/{compression}/model"
    tokens = load_file(pipeline.results / "tokens/tiny/moments/tokens.safetensors")
    files = sorted(pipeline.results.glob("covariance/tiny/w4/moments/*/moments/block-*"))
    if compression == "w2":
        stream = streaming.BlockStream(folder, "cpu", torch.float32)
        batches = covariance.batches(tokens["input_ids"], tokens["lengths"], 5)
        files = [tmp_path / block_files.name(index) for index in range(len(stream))]

        def save(index, block):
            covariance.save_moments(files[index], block)

        covariance.run_shard(stream, range(len(stream)), batches, None, tmp_path, save)
    expected = read_by_layers(loading.load(folder)[0].float(), tokens)
    original = read_by_layers(loading.load(pipeline.results / "models/tiny/model")[0], tokens)
    assert len(files) == 3
    for index, file in enumerate(files):
        inputs = covariance.Moments(file)
        assert len(inputs.shared) == 7
        for name, leader in inputs.shared.items():
            layer = f"model.layers.{index}.{name}"
            lower = inputs.lower(leader).double()
            found = lower + lower.tril(-1).T
            gap = (found - expected[layer]).norm() / expected[layer].norm()
            # AutoRound loads all of a model in float16; the pass takes what is not packed as it is.
            assert gap < (1e-3 if compression == "w2" else 1e-5), (layer, gap)
            # But for those of the first block, which read what the original's do.
            other = (original[layer] - expected[layer]).norm() / expected[layer].norm()
            assert index == 0 or other > 0.1


def test_a_rank_that_was_not_decomposed_is_refused(pipeline):
    files = sorted(pipeline.results.glob("decompositions/tiny/w2/eora/*/factors/block-*"))
    assert len(factor_files.slice_rank(files, 16)[0]) == 21
    with pytest.raises(ValueError, match="max_rank"):
        factor_files.slice_rank(files, 17)


def test_low_bit_adapter_is_small_and_loads(pipeline):
    def stored(bits):
        entries = manifest.tensors(manifest.load(adapter(pipeline, bits)))
        width = {"F16": 2, "I32": 4, "I64": 8}
        return sum(
            width[e["dtype"]] * e["shape"][0] * e["shape"][1]
            for n, e in entries.items()
            if ".lora_" in n and not n.endswith("weight_shape")
        )

    assert stored(4) / stored(16) == pytest.approx(4.5 / 16, rel=0.01)
    model, _ = loading.load(
        pipeline.results / "compressed/tiny/w2/model", adapter(pipeline, 4) / "adapter"
    )
    assert sum(isinstance(m, lowrank.LowRankLinear) for m in model.modules()) == 21
    assert torch.isfinite(model(IDS).logits).all()


def run_export(pipeline, bits, out, *more):
    """The export command's exit code and output."""
    command = [sys.executable, ROOT / "scripts/export.py", adapter(pipeline, bits)]
    process = pipeline.start(*command, "--out", out, *more)
    output, _ = process.communicate()
    return process.returncode, output


def test_an_exported_adapter_carries_what_was_measured(pipeline, tmp_path):
    out = tmp_path / "exported"
    assert run_export(pipeline, 16, out)[0] == 0
    card = (out / "README.md").read_text()
    ours = [
        r
        for r in rows(pipeline)
        if r["model"] == "tiny" and r["variant"] in ("original", "w2", "w2+eora-r8-16bit")
    ]
    for task, metric in (("choice", "acc_norm"), ("text", "perplexity")):
        line = next(line for line in card.splitlines() if line.startswith(f"| {task} | {metric}"))
        for row in (r for r in ours if r["task"] == task):
            assert f"{float(row['value']):.4g} ± {float(row['stderr']):.3g}" in line
    weights = manifest.load(pipeline.results / "compressed/tiny/w2")["outputs"]
    assert weights["model/model.safetensors"]["sha256"] in card
    assert "12 × 24 tokens (documents) of more" in card
    size = (out / "adapter_model.safetensors").stat().st_size
    assert f"16 bits, {size:,} bytes beside" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "peft", "tags": ["eora", "lora"]}  # the model is no hub's
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    plain = loading.load(pipeline.results / "compressed/tiny/w2/model")[0]
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(plain, out)(IDS).logits
        model = loading.load(
            pipeline.results / "compressed/tiny/w2/model", adapter(pipeline, 16) / "adapter"
        )[0]
        torch.testing.assert_close(theirs, model(IDS).logits)
    code, output = run_export(pipeline, 16, out)
    assert code == 1 and "is there already" in output


def test_a_card_names_the_checkpoint_that_somebody_made(pipeline):
    source = export.Source.of(pipeline.results / "adapters/tiny/w4/svd/r8-16bit")
    card = export.card(export.facts(source))
    assert "| its compression | method existing, checkpoint packed |" in card
    assert "| second moments | of the compressed model's inputs, 12 × 24 tokens" in card


def test_a_card_tells_of_scales_that_were_fitted_anew(pipeline, tmp_path):
    """And of what they were fitted to, and that it is of no use without an adapter."""
    for stage in ("compressed", "decompositions", "adapters"):
        shutil.copytree(pipeline.results / stage / "tiny/w4", tmp_path / stage / "tiny/again")
    (tmp_path / "compressed/tiny/w4").symlink_to(pipeline.results / "compressed/tiny/w4")
    for stage in ("models", "checkpoints", "datasets", "tokens", "covariance", "evaluations"):
        (tmp_path / stage).symlink_to(pipeline.results / stage)
    made = tmp_path / "compressed/tiny/again/manifest.json"
    told = json.loads(made.read_text())
    source = export.Source.of(tmp_path / "adapters/tiny/again/svd/r8-16bit")
    told["params"] |= {"method": "rescale", "compression": "w4", "rank": 8}
    made.write_text(json.dumps(told))
    card = export.card(export.facts(source))
    assert "as compressed by packed" in card
    assert "| method existing, checkpoint packed, then scales fitted anew |" in card
    assert "**without one they are of no use.**" in card and "(w4)" in card


def test_a_merged_checkpoint_is_plain_and_computes_the_same(pipeline, tmp_path):
    code, output = run_export(pipeline, 4, tmp_path / "merged", "--merged")
    assert code == 0, output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    beside = loading.load(
        pipeline.results / "compressed/tiny/w2/model", adapter(pipeline, 4) / "adapter"
    )[0]
    with torch.inference_mode():
        wanted = beside(IDS).logits
        left = (plain.float()(IDS).logits - wanted).norm() / wanted.norm()
    assert left < 0.01  # the sum's rounding to what the checkpoint is stored in


def test_only_adapters_are_exported(pipeline, tmp_path):
    command = [sys.executable, ROOT / "scripts/export.py", pipeline.results / "compressed/tiny/w2"]
    process = pipeline.start(*command, "--out", tmp_path / "out")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "is no adapter of the workflow: name one such as" in output
    assert not list(tmp_path.iterdir())


def test_a_configuration_is_recommended_for_a_budget(pipeline):
    command = [sys.executable, ROOT / "scripts/recommend.py", "--config", pipeline.write()]
    process = pipeline.start(*command, "--task", "text", "--budget", "0.11")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    fits = [
        r
        for r in rows(pipeline)
        if r["model"] == "tiny" and r["task"] == "text" and float(r["bytes"]) <= 110_000
    ]
    best = min(fits, key=lambda r: float(r["value"]))
    tiny, twin = output.split("tiny:")[1].split("twin:")
    assert f"take {best['variant']}: {float(best['bytes']) / 1e6:,.1f} MB" in tiny
    assert "take " in twin
    refused = pipeline.start(*command, "--task", "nothing")
    output, _ = refused.communicate()
    assert refused.returncode != 0 and "choice, text" in output


def test_manifests_hold_no_path_of_the_machine(pipeline):
    found = list(pipeline.results.rglob(manifest.NAME))
    assert len(found) > 25
    for path in found:
        assert str(pipeline.folder) not in path.read_text()


def test_hidden_states_are_not_kept(pipeline):
    assert not list(pipeline.results.rglob("hidden.safetensors"))


def test_a_rank_wider_than_all_layers_is_refused_before_any_job(pipeline, tmp_path):
    config = pipeline.config | {
        "adapters": {"eora": pipeline.config["adapters"]["eora"] | {"ranks": [65], "max_rank": 96}}
    }
    for folder in (tmp_path, pipeline.folder):  # before and after the model was fetched
        done = type(pipeline)(folder, config).snakemake("--dry-run")
        assert done.returncode != 0
        assert "all layers of model tiny" in done.stdout
        assert "lower the rank to at most 64" in done.stdout
        assert "Job" not in done.stdout
