"""Which library reads a checkpoint's quantized layers."""

import json

import pytest

from eora.formats import kernel, read_config

STORED = {
    "auto-round": {"quant_method": "auto-round", "bits": 2, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "meta": {"quantizer": ["x:1"]}},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "none": None,
}


@pytest.fixture
def config(request, tmp_path):
    config = {"model_type": "llama"}
    if STORED[request.param]:
        config["quantization_config"] = STORED[request.param]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


@pytest.mark.parametrize("config", ["auto-round", "gptq"], indirect=True)
def test_autoround_reads_its_format_and_gptqs_everywhere(config):
    """Left to transformers, GPTQ's layers would need two packages more, on a GPU as elsewhere."""
    assert kernel(config, portable=True).backend == "torch"
    assert kernel(config, portable=False).backend == "auto"
    assert "meta" not in config.quantization_config


@pytest.mark.parametrize("config", ["compressed-tensors", "none"], indirect=True)
def test_nothing_is_chosen_where_a_format_has_no_kernels(config):
    assert kernel(config, portable=True) is None
