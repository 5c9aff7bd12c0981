"""Blocks streamed from disk are the blocks of the whole model."""

import pytest
import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear
from transformers import AutoModelForCausalLM

from eora import architectures, shapes, streaming
from eora.errors import Mistake


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("blocks", [1, 3, 30, 64])
def test_shards_cover_every_block_once(shards, blocks):
    covered = [i for k in range(shards) for i in shapes.shard_range(k, shards, blocks)]
    assert covered == list(range(blocks))


def test_streamed_forward_equals_the_model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    stream = streaming.BlockStream(tiny_model, "cpu")
    ids = torch.arange(2, 22).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # which the stream is not told: no real token sees what is to its right
    with torch.inference_mode():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        hidden = stream.embed(ids)
        torch.testing.assert_close(hidden, states[0])
        for index in range(len(stream) - 1):  # the last state is normed
            with stream.block(index) as block:
                hidden = block(hidden, **stream.calls(2, 10)[index])
            torch.testing.assert_close(hidden[mask.bool()], states[index + 1][mask.bool()])


def test_only_the_entered_block_holds_weights(tiny_model):
    stream = streaming.BlockStream(tiny_model, "cpu")
    loaded = lambda: [not next(b.parameters()).is_meta for b in stream.blocks]  # noqa: E731
    with stream.block(1):
        assert loaded() == [False, True, False]
    assert loaded() == [False, False, False]


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(Mistake, match="safetensors"):
        streaming.weight_files(tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dense_weight_is_exact_under_a_bias_much_larger_than_it(bits):
    layer = QuantLinear(bits, 32, 64, 32, bias=True)
    generator = torch.Generator().manual_seed(bits)
    for name in ("qweight", "qzeros"):
        packed = getattr(layer, name)
        drawn = torch.randint(-(2**31), 2**31, packed.shape, generator=generator)
        packed.copy_(drawn.int())
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) * 1e-3)
    layer.bias.fill_(1000.0)
    weight = architectures.dense_weight(layer)
    assert (layer.bias == 1000).all()
    layer.bias.zero_()
    assert weight.any()
    assert torch.equal(weight, layer(torch.eye(64)).T)
