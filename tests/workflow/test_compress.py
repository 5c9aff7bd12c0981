"""AutoRound's settings, each really run on the tiny model."""

import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from eora import architectures, loading, manifest, streaming

SETTINGS = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "iters": 1,
    "batch_size": 2,
    "format": "auto_round",
    "alg_ext": False,
    "seed": 42,
    "version": 1,
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "auto_gptq"},
        {"bits": 2, "alg_ext": True, "keep": ["down_proj"]},
        {"bits": 3, "sym": False, "iters": 0},
    ],
    ids=["auto_gptq", "alg_ext, keep", "3-bit nearest"],
)
def test_a_setting_gives_a_folder_that_loads_and_decomposes(pipeline, tmp_path, change):
    settings = SETTINGS | change
    model, tokens = pipeline.results / "models/tiny", pipeline.results / "tokens/tiny/rounding"
    command = [sys.executable, ROOT / "scripts/compress.py", "--params", json.dumps(settings)]
    command += ["--model", model, "--tokens", tokens, "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

    config = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    method = {"auto_round": "auto-round", "auto_gptq": "gptq"}[settings["format"]]
    assert config["quant_method"] == method and config["bits"] == settings["bits"]
    tensors = manifest.tensors(manifest.load(tmp_path))
    kept = "model.layers.1.mlp.down_proj.weight" in tensors
    assert kept == ("keep" in settings)

    whole, _ = loading.load(tmp_path / "model")
    assert torch.isfinite(whole(torch.arange(2, 34)[None]).logits).all()
    # The streamed block has the same weights as the whole model, and few bits' worth of error.
    original = streaming.BlockStream(model / "model", "cpu")
    stream = streaming.BlockStream(tmp_path / "model", "cpu")
    with stream.block(1) as block, original.block(1) as exact:
        for name, layer in architectures.linear_layers(block).items():
            weight = architectures.dense_weight(layer)
            loaded = whole.get_submodule(f"model.layers.1.{name}").weight
            # AutoRound loads in 16 bits whatever the checkpoint's dtype, and saves kept layers so.
            torch.testing.assert_close(weight, loaded, rtol=1e-2, atol=1e-3, check_dtype=False)
            reference = exact.get_submodule(name).weight
            error = ((weight - reference).norm() / reference.norm()).item()
            if "keep" in settings and name == "mlp.down_proj":
                assert error < 0.01
            else:
                assert 0 < error < {2: 0.9, 3: 0.4, 4: 0.2}[settings["bits"]]
