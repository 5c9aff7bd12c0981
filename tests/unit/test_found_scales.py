"""Scales of rescaled checkpoints, told from rounded weights and norms alone."""

import pytest
import torch

from eora import found_scales

WIDTH, INNER = 64, 128
# What reads a norm, in one layer or in several; what of a layer's rows another one reads.
SEPARATE = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "o": WIDTH, "gate": INNER, "up": INNER}
FUSED = {"qkv": 3 * WIDTH, "o": WIDTH, "gate_up": 2 * INNER}
NORMS = {"attention": ("q", "k", "v", "qkv"), "mlp": ("gate", "up", "gate_up")}
READ_BY = {"v": "o", "qkv": "o", "up": "down", "gate_up": "down"}


def scales(width):
    """As AWQ's: a few channels far from the others."""
    return (0.2 * torch.randn(width) + torch.bernoulli(torch.full((width,), 0.05))).exp()


def rounded(weight, bits=4, group=32):
    """To nearest, in groups along the input."""
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((grouped - low) / step).round() * step + low).flatten(1)


def rescaled(rows, seed, offset=0.0, bits=4):
    """A block's weights and norms, those of a checkpoint, and the scales between them."""
    torch.manual_seed(seed)
    before = {name: torch.randn(out, WIDTH) for name, out in rows.items()}
    before["down"] = torch.randn(WIDTH, INNER)
    inputs = {name: torch.ones(weight.shape[1]) for name, weight in before.items()}
    outputs = {name: torch.ones(len(weight)) for name, weight in before.items()}
    norms = {}
    for norm, readers in NORMS.items():
        by, weight = scales(WIDTH), 1 + 0.2 * torch.randn(WIDTH)
        norms[norm] = weight - offset, weight / by - offset
        inputs |= {name: by for name in readers if name in rows}
    for writer, reader in READ_BY.items():
        if writer in rows:
            inputs[reader] = scales(before[reader].shape[1])
            outputs[writer][-len(inputs[reader]) :] = inputs[reader]
    after = {
        name: rounded(weight * inputs[name] / outputs[name][:, None], bits)
        for name, weight in before.items()
    }
    return before, after, norms, inputs, outputs


def told(before, after, norms):
    fits = {name: found_scales.fit(before[name], after[name]) for name in before}
    return found_scales.explain(fits, norms)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rows", [SEPARATE, FUSED], ids=["separate", "fused"])
def test_a_rescaled_block(rows, offset, bits):
    for seed in range(5):
        before, after, norms, inputs, outputs = rescaled(rows, seed, offset, bits)
        found, read = told(before, after, norms)
        assert found.keys() == before.keys() and read.keys() == norms.keys()
        for name, layer in found.items():  # norms tell exactly; of others, rounding errors are left
            most = 0.16 / 2**bits if name in ("o", "down") else 1e-5
            assert (layer.input / inputs[name]).log().square().mean().sqrt() < most
            assert (layer.output / outputs[name]).log().square().mean().sqrt() < 0.16 / 2**bits
        # What one divides by is what the other multiplies with, to the last bit.
        for writer, reader in READ_BY.items():
            if writer in found:
                width = len(found[reader].input)
                assert torch.equal(found[writer].output[-width:], found[reader].input)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_block_that_is_only_rounded(bits):
    torch.manual_seed(0)
    before = {name: torch.randn(out, WIDTH) for name, out in SEPARATE.items()}
    before["down"] = torch.randn(WIDTH, INNER)
    after = {name: rounded(weight, bits) for name, weight in before.items()}
    assert told(before, after, {}) == ({}, {})


@pytest.mark.parametrize("factor", ["all", "each"])
def test_a_norm_that_was_fine_tuned_is_not_explained(factor):
    before, after, norms, *_ = rescaled(SEPARATE, 0)
    by = 0.9 if factor == "all" else scales(WIDTH)
    tuned = norms["mlp"][0], norms["mlp"][1] * by
    _, read = told(before, after, norms | {"mlp": tuned})
    assert read.keys() == {"attention"}


def test_channels_that_rounding_left_nothing_of():
    before, after, norms, inputs, _ = rescaled(SEPARATE, 0)
    for name in ("q", "k", "v"):
        after[name][:, 7] = 0
        before[name][:, 9] = after[name][:, 9] = 0
    found, read = told(before, after, norms)
    assert read.keys() == norms.keys()
    torch.testing.assert_close(found["q"].input, inputs["q"], rtol=0.002, atol=0)
