"""Layers that read rescaled inputs: their weights, and what errors of them are measured by."""

import torch

from eora import smoothing

torch.manual_seed(0)
WEIGHT, X = torch.randn(24, 16), torch.randn(200, 16)
INPUT, OUTPUT = torch.rand(16) + 0.5, torch.rand(24) + 0.5


def scaled(weight):
    return weight * INPUT / OUTPUT[:, None]


def test_scales_are_told_from_the_weights(tmp_path):
    """Up to a factor in common, also where weights are zero."""
    weight = WEIGHT.masked_fill(torch.rand(24, 16) < 0.1, 0)
    weight[:, 3] = 0
    found = smoothing.between(weight, scaled(weight))
    smoothing.save(tmp_path / smoothing.NAME, {"up": found})
    read = smoothing.Smoothing(tmp_path)
    torch.testing.assert_close(read.weight("up", weight), scaled(weight), rtol=1e-3, atol=1e-5)
    moment = read.moment("up", X.T @ X)
    live = [i for i in range(16) if i != 3]  # what it is divided by changes nothing
    expected = (X / INPUT).T @ (X / INPUT)
    unit = expected[0, 0] / moment[0, 0]
    torch.testing.assert_close(
        unit * moment[live][:, live], expected[live][:, live], rtol=1e-2, atol=1e-2
    )


def test_other_layers_and_other_compressions_are_as_they_were(tmp_path):
    assert smoothing.Smoothing(tmp_path).weight("up", WEIGHT) is WEIGHT
    smoothing.save(tmp_path / smoothing.NAME, {"up": smoothing.between(WEIGHT, scaled(WEIGHT))})
    read = smoothing.Smoothing(tmp_path)
    assert read.weight("down", WEIGHT) is WEIGHT and read.moment("down", X) is X
