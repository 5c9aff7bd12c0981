"""Second moments: a plain sum over real tokens, whatever the batches, shards or padding."""

import json
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import symmetric
from eora import block_files, covariance, shapes, streaming, triangles

SEQLEN = 24


@pytest.fixture(scope="module")
def samples():
    """Seven right-padded samples: input_ids (7, 24) and their lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([24, 24, 7, 1, 13, 24, 20], dtype=torch.int32)
    ids = torch.randint(2, 256, (7, SEQLEN), generator=generator, dtype=torch.int32)
    return ids.masked_fill(torch.arange(SEQLEN) >= lengths[:, None], 0), lengths


def collect(folder, samples, batch_size, shards=1, dtype=torch.float32):
    """All blocks' second moments: full layer name -> C, and the number of tokens."""
    stream = streaming.BlockStream(folder, "cpu", dtype)
    data = covariance.batches(*samples, batch_size)
    found, tokens, hidden = {}, set(), None

    def keep(index, block):
        for name, leader in block.shared.items():
            found[f"{stream.name(index)}.{name}"] = symmetric(block.moments[leader].mean())
        tokens.update(m.tokens for m in block.moments.values())

    for shard in range(shards):
        blocks = shapes.shard_range(shard, shards, len(stream))
        with tempfile.TemporaryDirectory() as spill:
            hidden = covariance.run_shard(stream, blocks, data, hidden, Path(spill), keep).clone()
    return found, tokens


@pytest.fixture(scope="module")
def reference(tiny_model, samples):
    """The same by hooks on the whole model, one unpadded sample at a time, in float64."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    sums = {}

    def hook_for(name):
        def hook(module, args):
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(hook_for(name))
    with torch.inference_mode():
        for ids, length in zip(*samples, strict=True):
            model(ids[None, :length].long())
    return {name: total / samples[1].sum() for name, total in sums.items()}


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(
        ((found[n].double() - expected[n]).norm() / expected[n].norm()).item() for n in expected
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_streamed_equals_whole_model_whatever_the_batch(tiny_model, samples, reference, batch_size):
    found, tokens = collect(tiny_model, samples, batch_size)
    assert tokens == {int(samples[1].sum())}  # padding is not counted
    assert worst(found, reference) < 1e-5


def test_shards_chain(tiny_model, samples, reference):
    found, _ = collect(tiny_model, samples, batch_size=2, shards=3)
    assert worst(found, reference) < 1e-5


def test_order_of_batches_does_not_matter(tiny_model, samples):
    forward, _ = collect(tiny_model, samples, batch_size=2)
    backward, _ = collect(tiny_model, tuple(t.flip(0) for t in samples), batch_size=2)
    assert worst(forward, {n: c.double() for n, c in backward.items()}) < 1e-5


def test_early_batches_weigh_as_much_as_late_ones():
    moment = covariance.SecondMoment()
    for i in range(50):
        x = torch.zeros(4, 50)
        x[:, i] = 1.0
        moment.add(x)
    torch.testing.assert_close(symmetric(moment.mean()), torch.eye(50) / 50)


def test_small_addends_are_not_lost_in_a_large_sum():
    moment = covariance.SecondMoment()
    moment.add(torch.full((1, 1), 1e4))  # 1e8: float32 cannot hold 1e8 + 1
    for _ in range(1000):
        moment.add(torch.ones(1, 1))
    assert moment.blocks[0].item() == 1e8 + 1000


def test_products_of_16_bit_inputs_are_not_rounded():
    x = torch.randn(4096, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    moment = covariance.SecondMoment()
    moment.add(x)
    exact = x.double().T @ x.double() / 4096
    assert (symmetric(moment.mean()) - exact).norm() < 1e-6 * exact.norm()


def test_a_bfloat16_checkpoint_in_bfloat16(tiny_model, samples, reference, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16().save_pretrained(tmp_path)
    found, tokens = collect(tmp_path, samples, 3, dtype=None)
    assert tokens == {int(samples[1].sum())}
    assert worst(found, reference) < 0.1  # a random model: 0.045


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_computes_in_bfloat16_only_where_it_has_units_for_it(
    tiny_model, tmp_path, monkeypatch, unit
):
    AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    assert streaming.compute_dtype(tmp_path, "cpu") is None  # the checkpoint's own
    assert streaming.compute_dtype(tiny_model, "cpu") == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert streaming.compute_dtype(tmp_path, "cpu") == torch.float32
    told = json.loads((tmp_path / "config.json").read_text())
    assert streaming.compute_dtype(tmp_path, "cuda:1") == getattr(torch, told.pop("dtype"))
    (tmp_path / "config.json").write_text(json.dumps(told | {"torch_dtype": "float16"}))
    assert streaming.compute_dtype(tmp_path, "cuda") == torch.float16
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert streaming.compute_dtype(tmp_path, "cuda") is None


def test_four_moments_a_block_seven_layers(tiny_model, samples, tmp_path):
    stream = streaming.BlockStream(tiny_model, "cpu")
    path = tmp_path / block_files.name(0)
    covariance.run_shard(
        stream,
        range(1),
        covariance.batches(*samples, 4),
        None,
        tmp_path,
        lambda _, block: covariance.save_moments(path, block),
    )
    shared = covariance.Moments(path).shared
    assert len(shared) == 7 and len(set(shared.values())) == 4
    assert shared["self_attn.k_proj"] == shared["self_attn.v_proj"] == "self_attn.q_proj"
    assert shared["mlp.up_proj"] == "mlp.gate_proj"


def test_empty_moment_is_refused():
    with pytest.raises(ValueError, match="no token"):
        covariance.SecondMoment().mean()


def test_short_of_memory_hidden_states_lie_in_a_file(tiny_model, samples, monkeypatch):
    in_memory, _ = collect(tiny_model, samples, batch_size=2, shards=2)
    monkeypatch.setattr(covariance, "_room", lambda: 0)
    spilled, _ = collect(tiny_model, samples, batch_size=2, shards=2)
    assert all(torch.equal(spilled[name], in_memory[name]) for name in in_memory)


@pytest.mark.parametrize("size", [1, 2, 191, 192, 193, 500])
def test_packed_is_the_lower_triangle_row_by_row(size):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    packed = triangles.pack([matrix[rows, : rows.stop] for rows in triangles.row_blocks(size)])
    assert torch.equal(packed, matrix[np.tril_indices(size)])
    assert torch.equal(triangles.unpack(packed), matrix.tril())


def test_hidden_states_between_shards_are_those_of_any_batch_size(tiny_model, samples, tmp_path):
    stream = streaming.BlockStream(tiny_model, "cpu", torch.float32)
    between = [
        covariance.run_shard(
            stream,
            range(1),
            covariance.batches(*samples, size),
            None,
            tmp_path,
            lambda *_: None,
        )
        for size in (1, 3)
    ]
    assert between[0].shape == (int(samples[1].sum()), 64)  # no padding is handed on
    torch.testing.assert_close(*between, rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_depth(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=9,
        num_key_value_heads=3,
        dtype="bfloat16",
        pad_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    stream = streaming.BlockStream(tmp_path, "cpu", torch.float32)
    data = covariance.batches(torch.ones(8, 256, dtype=torch.int64), torch.full((8,), 256), 8)
    resident = []

    def save(index: int, block: covariance.BlockMoments) -> None:
        covariance.save_moments(tmp_path / "moments", block)
        resident.append(psutil.Process().memory_info().rss)

    covariance.run_shard(stream, range(24), data, None, tmp_path, save)
    one_block = 4 * sum(p.numel() for p in stream.blocks[0].parameters())
    assert max(resident[12:]) - max(resident[:4]) < 4 * one_block
