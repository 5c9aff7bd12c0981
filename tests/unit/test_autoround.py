"""Rounding around an adapter: the layers' names, before and after."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eora import adapters, autoround
from eora.streaming import INDEX


def test_a_layer_with_an_adapter_beside_it_is_what_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(6, 4), "k": nn.Linear(6, 4)})
    x = torch.randn(3, 6)
    before, weight = {name: layer(x) for name, layer in model.items()}, model["q"].weight.clone()
    pair = torch.randn(2, 6), torch.randn(4, 2)
    adapters.save_peft(tmp_path, {"q": pair}, "m")
    assert autoround.put_beside(model, tmp_path, {"q"}) == ["q"]
    for name, layer in model.items():
        torch.testing.assert_close(layer(x), before[name], rtol=1e-4, atol=1e-4)
    product = pair[1].half().float() @ pair[0].half().float()
    torch.testing.assert_close(model["q"].base.weight, weight - product)


def test_a_saved_model_gets_its_own_names_back(tmp_path):
    """In several files with an index too; a name that only looks alike stays."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = ["a.q.base.qweight", "a.q.base.bias", "a.q.factors.lora_A", "a.base.k.weight", "norm"]
    save_file({name: torch.tensor([i]) for i, name in enumerate(names)}, tmp_path / first)
    save_file({"a.v.weight": torch.tensor([9])}, tmp_path / second)
    index = {"weight_map": dict.fromkeys(names, first) | {"a.v.weight": second}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"kept": {"a.q.base": 16}, "x": "a.base"}))
    listed = {"modules_in_block_to_quantize": [["q.base"], ["k"]]}
    (tmp_path / "quantization_config.json").write_text(json.dumps(listed))
    autoround.take_apart(tmp_path, ["a.q"])
    wanted = {"a.q.qweight": 0, "a.q.bias": 1, "a.base.k.weight": 3, "norm": 4}
    assert {name: int(value) for name, value in load_file(tmp_path / first).items()} == wanted
    found = json.loads((tmp_path / INDEX).read_text())
    assert found["weight_map"] == dict.fromkeys(wanted, first) | {"a.v.weight": second}
    assert found["metadata"] == {"total_size": 5 * 8}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"kept": {"a.q": 16}, "x": "a.base"}
    stored = json.loads((tmp_path / "quantization_config.json").read_text())
    assert stored == {"modules_in_block_to_quantize": [["q"], ["k"]]}
