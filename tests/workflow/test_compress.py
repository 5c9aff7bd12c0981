"""Every method of compression and its settings, each really run on the tiny model."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT, failures, make_model, make_packed
from eora import (
    adapters,
    architectures,
    block_files,
    covariance,
    decomposition,
    existing,
    factor_files,
    loading,
    lowrank,
    manifest,
    smoothing,
    solver,
    streaming,
)
from eora.errors import Mistake

ROUNDED = {"bits": 4, "group_size": 32, "sym": True, "keep": []}
SETTINGS = {
    "method": "autoround",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "iters": 1,
    "batch_size": 2,
    "format": "auto_round",
    "alg_ext": False,
    "seed": 42,
    "version": 1,
    "keep": [],
}
# Beside the version; the third: how far weights may be off, at most.
CASES = {
    "auto_gptq": (SETTINGS | {"format": "auto_gptq"}, "gptq", 0.2),
    "alg_ext, keep": (
        SETTINGS | {"bits": 2, "alg_ext": True, "keep": ["down_proj"]},
        "auto-round",
        0.9,
    ),
    "3-bit nearest": (SETTINGS | {"bits": 3, "sym": False, "iters": 0}, "auto-round", 0.4),
    "gptq": (
        {"method": "gptq", "bits": 3, "group_size": 32, "sym": False, "keep": []},
        "compressed-tensors",
        0.4,
    ),
    "gptq of rows, keep": (
        {"method": "gptq", "bits": 4, "group_size": -1, "sym": True, "keep": ["down_proj"]},
        "compressed-tensors",
        0.2,
    ),
    "awq": (
        {"method": "awq", "bits": 3, "group_size": 32, "sym": False, "keep": ["o_proj"]},
        "compressed-tensors",
        0.4,
    ),
    "sparsegpt 2:4": ({"method": "sparsegpt", "sparsity": "2:4", "keep": []}, None, 0.6),
    "wanda by half": ({"method": "wanda", "sparsity": "0.5", "keep": ["down_proj"]}, None, 0.4),
    "wanda 2:4, then 4 bits": (
        {
            "method": "wanda",
            "sparsity": "2:4",
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "keep": [],
        },
        "compressed-tensors",
        0.5,
    ),
}


def zeros_of_four(weight):
    """Zeros among every four weights of a row."""
    return (weight.unflatten(1, (-1, 4)) == 0).sum(dim=2)


def assert_made_up_for(pipeline, compressed):
    """That adapters of full rank give the original's logits, and those of few ranks help.

    Only where errors are those of what layers read once they are rescaled.
    """
    (compressed / "factors").mkdir()
    streams = [
        streaming.BlockStream(folder / "model", "cpu")
        for folder in (pipeline.results / "models/tiny", compressed)
    ]
    moments = (pipeline.results / "covariance/tiny/moments").glob("*/moments/block-*")
    scales, out = smoothing.Smoothing(compressed), compressed / "factors"
    for index, file in enumerate(sorted(moments, key=lambda file: file.name)):
        folder = file.parent
        decomposition.decompose_block(*streams, index, folder, out, 64, "eora", scales)
    # Of what the moments were taken on: directions that no input has are not repaired.
    seen = load_file(pipeline.results / "tokens/tiny/moments/tokens.safetensors")
    ids = seen["input_ids"][:1, : seen["lengths"][0]].long()
    exact = loading.load(pipeline.results / "models/tiny/model")[0](ids).logits
    gaps = [(loading.load(compressed / "model")[0](ids).logits - exact).norm()]
    for rank in (16, 64):
        files = block_files.listed(compressed / "factors")
        pairs, _ = factor_files.slice_rank(files, rank)
        adapters.save_peft(compressed / f"r{rank}", pairs, "tiny")
        model, _ = loading.load(compressed / "model", compressed / f"r{rank}")
        gaps.append((model(ids).logits - exact).norm())
    assert gaps[1] < 0.8 * gaps[0] and gaps[2] < 0.01 * gaps[0], gaps


def assert_fitted_to_its_own_inputs(pipeline, compressed):
    """That what an adapter leaves is as told, measured in what the compressed model's layers read:
    already rescaled, where those of the original are not."""
    tokens = load_file(pipeline.results / "tokens/tiny/moments/tokens.safetensors")
    data = covariance.batches(tokens["input_ids"], tokens["lengths"], 5)
    original = streaming.BlockStream(pipeline.results / "models/tiny/model", "cpu")
    stream = streaming.BlockStream(compressed / "model", "cpu", torch.float32)
    scales, out = smoothing.Smoothing(compressed), compressed / "own"
    (out / "factors").mkdir(parents=True)

    def save(index, block):
        covariance.save_moments(out / block_files.name(index), block)

    covariance.run_shard(stream, range(2), data, None, out, save)
    stream = streaming.BlockStream(compressed / "model", "cpu")
    decomposition.decompose_block(
        original, stream, 1, out, out / "factors", 16, "eora", scales, compressed_inputs=True
    )
    pairs, curves = factor_files.slice_rank(block_files.listed(out / "factors"), 16)
    inputs = covariance.Moments(out / block_files.name(1))
    with original.block(1) as exact, stream.block(1) as rounded:
        layers = architectures.linear_layers(exact)
        for name, layer in architectures.linear_layers(rounded).items():
            full = f"model.layers.1.{name}"
            a, b = pairs[full]
            wanted = scales.weight(full, layers[name].weight.float())
            rest = (wanted - architectures.dense_weight(layer).float() - b @ a).double()
            lower = inputs.lower(inputs.shared[name]).double()
            left = ((rest @ (lower + lower.tril(-1).T)) * rest).sum()
            best = curves[full][16].item()
            assert left.item() == pytest.approx(best, rel=1e-4), name


def assert_told(original, compressed):
    """That the checkpoint's own weights tell the scales that it was made with."""
    _, found = existing.check(original / "model", compressed / "model")
    made = load_file(compressed / smoothing.NAME)
    assert {f"{name}.input" for name in found} == {name for name in made if name.endswith("input")}
    for name, scales in found.items():
        gap = (scales.input / made[f"{name}.input"]).log()
        assert gap.std() < 0.05


@pytest.mark.parametrize("case", CASES)
def test_a_method_gives_a_folder_that_loads_and_decomposes(pipeline, tmp_path, case):
    settings, form, largest = CASES[case]
    settings = settings | {"version": 1}
    model, tokens = pipeline.results / "models/tiny", pipeline.results / "tokens/tiny/rounding"
    command = [sys.executable, ROOT / "scripts/compress.py", "--params", json.dumps(settings)]
    command += ["--model", model, "--tokens", tokens, "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

    told = json.loads((tmp_path / "model/config.json").read_text())
    config = told.get("quantization_config")
    assert (config and config["quant_method"]) == form
    if form == "gptq":  # as GPTQModel notes it
        config |= {"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
        (tmp_path / "model/config.json").write_text(json.dumps(told))
        assert existing.check(model / "model", tmp_path / "model")
    tensors = manifest.tensors(manifest.load(tmp_path))
    kept = {layer for layer in ("mlp.down_proj", "self_attn.o_proj") if settings["keep"]}
    kept = {layer for layer in kept if layer.endswith(tuple(settings["keep"]))}
    if form is not None:
        plain = {name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")}
        assert plain == {f"model.layers.{i}.{layer}" for i in range(3) for layer in kept}

    whole, _ = loading.load(tmp_path / "model")
    exact, _ = loading.load(model / "model")
    if settings["method"] == "awq":
        assert_made_up_for(pipeline, tmp_path)
        assert_fitted_to_its_own_inputs(pipeline, tmp_path)
        assert_told(model, tmp_path)
    for part in ("lm_head", "model.embed_tokens", "model.norm"):
        torch.testing.assert_close(
            whole.get_submodule(part).weight.float(),
            exact.get_submodule(part).weight,
            rtol=1e-2,
            atol=1e-3,
        )
    assert torch.isfinite(whole(torch.arange(2, 34)[None]).logits).all()
    # The streamed block has the same weights as the whole model, and few bits' worth of error.
    original = streaming.BlockStream(model / "model", "cpu")
    stream = streaming.BlockStream(tmp_path / "model", "cpu")
    smoothed = smoothing.Smoothing(tmp_path)
    with stream.block(1) as block, original.block(1) as exact:
        found = architectures.linear_layers(block)
        assert found.keys() == architectures.linear_layers(exact).keys()
        for name, layer in found.items():
            weight = architectures.dense_weight(layer)
            loaded = whole.get_submodule(f"model.layers.1.{name}").weight
            # AutoRound loads in 16 bits whatever the checkpoint's dtype, and saves kept layers so.
            torch.testing.assert_close(weight, loaded, rtol=1e-2, atol=1e-3, check_dtype=False)
            reference = exact.get_submodule(name).weight
            reference = smoothed.weight(f"model.layers.1.{name}", reference)
            error = ((weight - reference).norm() / reference.norm()).item()
            if name in kept:
                assert error < 0.01
                continue
            assert 0 < error < largest
            if settings.get("sparsity") == "2:4":
                assert (zeros_of_four(weight) >= 2).all()
            elif "sparsity" in settings:
                assert (weight == 0).double().mean() == pytest.approx(0.5, abs=0.01)


def test_a_model_is_rounded_around_an_adapter(pipeline, tmp_path):
    """What is saved is W - B A, here in 8 bits and so nearly exact, under the layers' own names."""
    model, tokens = pipeline.results / "models/tiny", pipeline.results / "tokens/tiny/rounding"
    adapter = pipeline.results / "adapters/tiny/w2/eora/r8-4bit"
    around = {"compression": "w2", "adapter": "eora", "rank": 8, "bits": 4}
    settings = SETTINGS | {"bits": 8, "keep": ["mlp.up_proj"], "around": around}
    command = [sys.executable, ROOT / "scripts/compress.py", "--params", json.dumps(settings)]
    command += ["--model", model, "--tokens", tokens, "--out", tmp_path, "--device", "cpu"]
    command += ["--adapter", adapter]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    made = manifest.load(tmp_path)
    assert made["params"]["around"] == around
    assert made["inputs"]["adapter"] == manifest.digest(adapter / "adapter")
    config = json.loads((tmp_path / "model/config.json").read_text())
    plain = pipeline.results / "compressed/tiny/w2/model/model.safetensors"
    named = manifest.tensor_shapes(tmp_path / "model/model.safetensors").keys()
    assert {n.rpartition(".")[0] for n in named} == {
        n.rpartition(".")[0] for n in manifest.tensor_shapes(plain)
    }
    assert ".base" not in json.dumps(config)

    factors = lowrank.load_factors(adapter / "adapter")
    original = streaming.BlockStream(model / "model", "cpu")
    stream = streaming.BlockStream(tmp_path / "model", "cpu")
    with stream.block(1) as block, original.block(1) as exact:
        for name, layer in architectures.linear_layers(block).items():
            weight = architectures.dense_weight(exact.get_submodule(name))
            a, b = factors[f"model.layers.1.{name}"].matrices(torch.float32)
            found = architectures.dense_weight(layer)
            if name == "mlp.up_proj":  # kept: as it was
                assert (found - weight).norm() / weight.norm() < 0.01
                continue
            error = (found - (weight - b @ a)).norm() / weight.norm()
            assert error < 0.02
            assert (found - weight).norm() / weight.norm() > 3 * error  # so B A tells


@pytest.mark.parametrize("base", ["w2", "w4"])
def test_scales_are_fitted_anew_in_both_formats(pipeline, tmp_path, base):
    """AutoRound's own and compressed-tensors': integers and all else stay, and less error is left.

    Moments come in shards, as many as the pipeline has.
    """
    results = pipeline.results
    model, compressed = results / "models/tiny", results / f"compressed/tiny/{base}"
    moments = sorted((results / "covariance/tiny/moments").iterdir())
    assert len(moments) == 2
    params = {"method": "rescale", "compression": base, "rank": 4, "rounds": 2, "version": 1}
    command = [sys.executable, ROOT / "scripts/compress.py", "--params", json.dumps(params)]
    command += ["--model", model, "--compressed", compressed, "--out", tmp_path]
    command += ["--device", "cpu", *(part for shard in moments for part in ("--moments", shard))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    made = manifest.load(tmp_path)
    assert {"compressed", "moments_0", "moments_1", "model"} == made["inputs"].keys()
    assert made["outputs"].keys() == manifest.load(compressed)["outputs"].keys()
    told = made["notes"]["output_error"]
    assert len(told) == 3 and all(0 < share < 1 for share in told.values())

    (old,) = (load_file(file) for file in (compressed / "model").glob("*.safetensors"))
    (new,) = (load_file(file) for file in (tmp_path / "model").glob("*.safetensors"))
    others = {name for name in old if not torch.equal(old[name], new[name])}
    assert others == {name for name in old if name.endswith(("scales", "weight_scale"))}
    assert len(others) == 3 * 7
    whole, _ = loading.load(tmp_path / "model")
    original, before, after = (
        streaming.BlockStream(folder / "model", "cpu") for folder in (model, compressed, tmp_path)
    )
    files = {file.name: file for s in moments for file in block_files.listed(s / "moments")}
    for index in range(3):
        inputs = covariance.Moments(files[block_files.name(index)])
        with original.block(index) as w, before.block(index) as v, after.block(index) as u:
            for name, layer in architectures.linear_layers(w).items():
                metric = solver.Metric(inputs.lower(inputs.shared[name]), "eora")
                left = []
                for rounded in (v, u):
                    weight = architectures.dense_weight(rounded.get_submodule(name)).float()
                    error = architectures.dense_weight(layer).float() - weight
                    left.append(solver.decompose(error, metric, 4).residual[4].item())
                assert left[1] < left[0], name
                loaded = whole.get_submodule(f"model.layers.{index}.{name}").weight.float()
                torch.testing.assert_close(weight, loaded, rtol=1e-2, atol=1e-3)


def test_the_workflow_fits_scales_anew(clone):
    """In second moments of all shards; one job, as all that it is made from is there."""
    rescaled = {"method": "rescale", "compression": "w2", "calibration": "moments", "rank": 4}
    clone.config["compressions"]["again"] = rescaled | {"rounds": 1}
    clone.config["adapters"]["eora"]["compressions"].append("again")  # else it is of no use
    done = clone.snakemake("--", "results/compressed/tiny/again/manifest.json")
    assert done.returncode == 0, failures(done.stdout, clone.folder)
    assert re.findall(r"^Job \d+: (.*)$", done.stdout, re.MULTILINE) == [
        "Compressing tiny to again"
    ]
    made = manifest.load(clone.results / "compressed/tiny/again")
    assert made["inputs"].keys() == {"model", "compressed", "moments_0", "moments_1"}
    for shard in range(2):
        folder = clone.results / f"covariance/tiny/moments/{shard}-of-2"
        assert made["inputs"][f"moments_{shard}"] == manifest.digest(folder)


def test_what_has_no_scales_is_refused(pipeline, tmp_path):
    """A plain checkpoint in a compressed one's place, as one that was pruned alone is."""
    results = pipeline.results
    params = {"method": "rescale", "compression": "p", "rank": 4, "rounds": 1, "version": 1}
    command = [sys.executable, ROOT / "scripts/compress.py", "--params", json.dumps(params)]
    command += ["--model", results / "models/tiny", "--compressed", results / "models/tiny"]
    for shard in (results / "covariance/tiny/moments").iterdir():
        command += ["--moments", shard]
    command += ["--out", tmp_path, "--device", "cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "it has no rounded layer, so no scales; name a compression to few bits" in done.stdout


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def adopt(pipeline, tmp_path, checkpoint):
    """Run the compress stage on an existing checkpoint; its exit code and output."""
    sealed = tmp_path / "checkpoint"
    (sealed / "model").mkdir(parents=True)
    for file in checkpoint.iterdir():
        (sealed / "model" / file.name).write_bytes(file.read_bytes())
    manifest.seal(sealed, {"stage": "download_model", "params": {}, "inputs": {}, "tools": {}})
    params = json.dumps({"method": "existing", "version": 1})
    command = [sys.executable, ROOT / "scripts/compress.py", "--params", params]
    command += ["--model", pipeline.results / "models/tiny", "--checkpoint", sealed]
    command += ["--out", tmp_path / "out", "--device", "cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_checkpoint_is_taken_over_as_it_is(pipeline):
    """The pipeline's w4, which llm-compressor rounded: byte for byte, with each block's error."""
    made = pipeline.results / "compressed/tiny/w4"
    for file in (pipeline.folder / "sources/packed").glob("*.safetensors"):
        assert (made / "model" / file.name).read_bytes() == file.read_bytes()
    assert not [name for name in manifest.load(made)["outputs"] if "/." in name]
    errors = manifest.load(made)["notes"]["weight_error"]
    assert len(errors) == 3 and all(0.02 < error < 0.2 for error in errors.values())


def test_autorounds_checkpoint_is_taken_over(pipeline, tmp_path):
    code, output = adopt(pipeline, tmp_path, pipeline.results / "compressed/tiny/w2/model")
    assert code == 0, output


def test_a_checkpoint_of_another_model_is_refused(pipeline, tmp_path):
    make_packed(make_model(tmp_path / "other", seed=3), tmp_path / "packed")
    code, output = adopt(pipeline, tmp_path, tmp_path / "packed")
    assert code == 1 and "Traceback" not in output
    # Their norms are all ones: what differs first is a layer.
    assert "is no compressed form of the model in" in output and "% off; is this the" in output


def test_a_checkpoint_with_fewer_blocks_is_refused(pipeline, tmp_path):
    make_packed(make_model(tmp_path / "short", layers=2), tmp_path / "packed")
    code, output = adopt(pipeline, tmp_path, tmp_path / "packed")
    assert code == 1 and "2 blocks for 3" in output


def make_autoawq(model, folder):
    """Write a model as AutoAWQ does: channels rescaled, four bits, in its own format."""
    torch.manual_seed(0)
    weights = load_file(model / "model.safetensors")
    for block in range(3):
        layers = f"model.layers.{block}."
        attention, mlp, inner = (torch.empty(n).normal_(0, 0.5).exp() for n in (64, 64, 96))
        for names, by in (("qkv", attention), (("gate", "up"), mlp), (("down",), inner)):
            for name in names:
                part = "self_attn" if names == "qkv" else "mlp"
                weights[f"{layers}{part}.{name}_proj.weight"] *= by
        weights[f"{layers}input_layernorm.weight"] /= attention
        weights[f"{layers}post_attention_layernorm.weight"] /= mlp
        weights[f"{layers}mlp.up_proj.weight"] /= inner[:, None]
    dense = {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        layer = torch.nn.Linear(*weights[name].shape[::-1], bias=False)
        layer.weight.data = weights.pop(name)
        grouped = layer.weight.data.unflatten(1, (-1, 32))
        low, high = grouped.amin(-1), grouped.amax(-1)
        step = ((high - low) / 15).half().float()
        zeros = (-low / step).round().clamp(0, 15)
        integers = (layer.weight / step.repeat_interleave(32, 1)).round()
        within = (zeros.repeat_interleave(32, 1), 15 - zeros.repeat_interleave(32, 1))
        layer.weight.data = integers.clamp(-within[0], within[1]) * step.repeat_interleave(32, 1)
        packed = WQLinear_GEMM.from_linear(layer, 4, 32, scales=step.T, zeros=zeros.T)
        stem = name.removesuffix(".weight")
        weights |= {f"{stem}.{n}": t.contiguous() for n, t in packed.named_buffers()}
        dense[stem] = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32).T
    shutil.copytree(model, folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    stored |= {"version": "gemm", "modules_to_not_convert": None}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    return dense


def test_autoawqs_checkpoint_is_taken_over(pipeline, tmp_path):
    """With the integers that it has, and with the scales that its weights tell."""
    model = pipeline.results / "models/tiny/model"
    dense = make_autoawq(model, tmp_path / "autoawq")
    code, output = adopt(pipeline, tmp_path, tmp_path / "autoawq")
    assert code == 0, output
    made = tmp_path / "out"
    loaded, _ = loading.load(made / "model")
    for name, weight in dense.items():
        found = loaded.get_submodule(name).weight
        torch.testing.assert_close(found.float(), weight.float(), rtol=1e-3, atol=1e-4)
    assert not [name for name in manifest.load(made)["outputs"] if "/." in name]
    assert max(manifest.load(made)["notes"]["weight_error"].values()) < 0.15
    assert_made_up_for(pipeline, made)


def test_a_checkpoint_whose_norm_is_another_is_refused(pipeline, tmp_path):
    """Scaled, but not by what the layers after it were multiplied with."""
    shutil.copytree(pipeline.folder / "sources/packed", tmp_path / "scaled")
    weights = load_file(tmp_path / "scaled/model.safetensors")
    weights["model.layers.2.input_layernorm.weight"] *= 0.9
    save_file(weights, tmp_path / "scaled/model.safetensors", {"format": "pt"})
    code, output = adopt(pipeline, tmp_path, tmp_path / "scaled")
    assert code == 1 and "Traceback" not in output
    assert "model.layers.2.input_layernorm.weight is not the original's (10% off)" in output
    assert "nor divided by scales that the layers after it were multiplied with" in output


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_checkpoint_with_other_embeddings_or_norm_is_refused(pipeline, tmp_path, part):
    model = shutil.copytree(pipeline.results / "models/tiny/model", tmp_path / "tuned")
    weights = load_file(model / "model.safetensors")
    weights[part][-1] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Mistake, match=rf"{re.escape(part)} is not the original's"):
        existing.check(pipeline.results / "models/tiny/model", model)


FORMATS = {
    "another library's": (
        {"quant_method": "hqq"},
        "its weights are stored as hqq, which is not read here; name a checkpoint in the format of "
        "auto-round, gptq, awq, compressed-tensors",
    ),
    "gemv": (
        {"quant_method": "awq", "version": "gemv"},
        "layers in another format of AWQ (gemv, 4 bits)",
    ),
    "desc_act": ({"quant_method": "gptq", "desc_act": True}, "columns in another order (desc_act)"),
    "gptq_v2": (
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        "layers in another format of GPTQ (gptq_v2)",
    ),
    "sparse": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
        "sparse weights of an older compressed-tensors",
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_that_is_not_read_is_named(form, tiny_model, tmp_path):
    stored, wanted = FORMATS[form]
    folder = shutil.copytree(tiny_model, tmp_path / "stored")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 32, **stored}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Mistake, match=re.escape(wanted)):
        existing.take(folder, tmp_path / "taken")


def test_a_checkpoint_with_other_biases_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    model.save_pretrained(tmp_path / "original")
    assert existing.check(tmp_path / "original", tmp_path / "original")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(Mistake, match="k_proj.bias is not the original's"):
        existing.check(tmp_path / "original", tmp_path / "other")
