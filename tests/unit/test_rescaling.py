"""Scales solved for anew: against the normal equations, and what must not change."""

import pytest
import torch

from eora import rescaling
from eora.errors import Mistake
from eora.rescaling import Rounded
from eora.solver import Metric, decompose

ROWS, GROUPS, SIZE = 24, 4, 16


@pytest.fixture
def problem():
    """A weight, what it was rounded to, and a second moment with a few large directions."""
    seed = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, GROUPS * SIZE, generator=seed)
    inputs = torch.randn(500, GROUPS * SIZE, generator=seed)
    inputs = inputs @ torch.randn(GROUPS * SIZE, GROUPS * SIZE, generator=seed)
    scales = torch.full((ROWS, GROUPS), 0.7)
    codes = (weight.view(ROWS, GROUPS, SIZE) / 0.7).round().clamp(-2, 1)
    return weight, Rounded(codes, scales, "scales", True), inputs.T @ inputs / 500


def spread(codes: torch.Tensor) -> torch.Tensor:
    """P of each row: its codes, a row a group. (rows, groups, in)"""
    rows, groups, size = codes.shape
    p = torch.zeros(rows, groups, groups, size)
    index = torch.arange(groups)
    p[:, index, index] = codes
    return p.view(rows, groups, groups * size)


def test_scales_are_those_of_the_normal_equations(problem, monkeypatch):
    """Whatever is above the moment's diagonal, and however many rows are solved at once."""
    weight, layer, moment = problem
    monkeypatch.setattr(rescaling, "RIDGE", 0)
    error = weight - layer.weight(layer.scales)
    metric = Metric(moment.tril(), "eora")
    found = rescaling.refit(error, layer.codes, layer.scales, metric)
    p, c = spread(layer.codes).double(), moment.double()
    right = torch.einsum("rgi,ij,rj->rg", p, c, weight.double())
    exact = torch.linalg.solve(p @ c @ p.mT, right[..., None])[..., 0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(rescaling, "SYSTEMS", 5 * 16 * GROUPS**2)
    again = rescaling.refit(error, layer.codes, layer.scales, metric)
    torch.testing.assert_close(again, found)


def test_groups_that_are_never_seen_or_zero_keep_their_scales(problem):
    weight, layer, moment = problem
    moment[:SIZE] = moment[:, :SIZE] = 0
    layer.codes[0, 2] = 0
    found, share = rescaling.rescale_layer(weight, layer, Metric(moment, "eora"), 8, 1)
    assert torch.equal(found[:, 0], layer.scales[:, 0])
    assert found[0, 2] == layer.scales[0, 2] and found[1, 2] != layer.scales[1, 2]
    assert torch.isfinite(found).all() and 0 < share < 1


def test_each_round_leaves_less_beside_the_adapter_that_follows(problem):
    weight, layer, moment = problem
    metric = Metric(moment, "eora")
    before = decompose(weight - layer.weight(layer.scales), metric, 8).residual[8]
    left = []
    for rounds in (1, 2, 4):
        scales, share = rescaling.rescale_layer(weight, layer, metric, 8, rounds)
        after = decompose(weight - layer.weight(scales), metric, 8).residual[8]
        left.append((after / before).item())
        assert left[-1] <= share * (1 + 1e-4)  # the adapter is fitted once more
    assert 1 > left[0] > left[1] > left[2]


def test_a_layer_without_error_stays(problem):
    _, layer, moment = problem
    weight = layer.weight(layer.scales)
    scales, share = rescaling.rescale_layer(weight, layer, Metric(moment, "eora"), 8, 2)
    assert torch.equal(scales, layer.scales) and share == 1


def test_what_a_layer_was_rounded_to_is_read_from_its_scales(problem):
    _, layer, _ = problem
    linear = torch.nn.Linear(GROUPS * SIZE, ROWS, bias=False)
    linear.weight.data = layer.weight(layer.scales).half().float()  # as kernels compute it
    assert rescaling.rounded(linear) is None
    linear.weight_scale = layer.scales
    found = rescaling.rounded(linear)
    assert torch.equal(found.codes, layer.codes) and torch.equal(found.scales, layer.scales)
    assert (found.stored, found.transposed) == ("weight_scale", False)
    linear.weight_scale = torch.tensor(0.7)  # one for the whole layer
    with pytest.raises(Mistake, match="are no numbers of rows and groups"):
        rescaling.rounded(linear)
    linear.weight_scale = layer.scales * 1.4
    with pytest.raises(Mistake, match="holds no integers"):
        rescaling.rounded(linear)
