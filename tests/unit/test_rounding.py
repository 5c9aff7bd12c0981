"""Low-bit factors: what rounding costs in the layer's own objective."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora import packing, rounding, solver

BITS = [2, 3, 4, 8]


def layer(out, features, tokens, steep, seed=0):
    """An error (out, in) and a second moment (in, in) of inputs whose directions differ in size."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    sizes = torch.arange(1, features + 1) ** -steep
    x = draw(tokens, features) * sizes @ torch.linalg.qr(draw(features, features)).Q
    return draw(out, features), x.T @ x / tokens


def factors(error, moment, rank, method="eora"):
    """A, B, and what is known of the inputs, as the decomposition leaves them."""
    found = solver.decompose(error, solver.Metric(moment, method), rank)
    return found.lora_A, found.lora_B, found.cross, found.channels


def objective(error, moment, a, b_t):
    rest = (error - b_t.T @ a).double()
    return (rest @ moment.double() @ rest.T).trace().item()


def costs(error, moment, rank, bits, group_size=32):
    """What is left with the factors as they are, rounded to nearest, and fitted again."""
    a, b, cross, channels = factors(error, moment, rank)
    plain = [plainly(m, bits, group_size) for m in (a, b.T.contiguous())]
    ours = [r.values for r in rounding.refit(a, b, cross, channels, bits, group_size)]
    return [objective(error, moment, *pair) for pair in ((a, b.T), plain, ours)]


def plainly(matrix, bits, group_size):
    """Rounded to the nearest of a grid that just holds the group's extreme value."""
    groups = rounding.grouped(matrix, group_size)
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    scale = scale.half().float().clamp(min=1e-7)
    limit = 2 ** (bits - 1)
    rounded = (groups / scale).round().clamp(-limit, limit - 1) * scale
    return rounded.flatten(1)[:, : matrix.shape[1]]


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(4, 80),  # with an output or two, luck decides
    features=st.integers(1, 80),
    rank=st.integers(1, 24),
    tokens=st.sampled_from([1, 5, 400]),
    steep=st.sampled_from([0.0, 1.0, 3.0]),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([8, 32, 1000]),
)
def test_no_worse_than_rounding_to_nearest(out, features, rank, tokens, steep, bits, group_size):
    """On the mean of some layers: what is known of the inputs is the mean of what they may be."""
    excess = 0.0
    for seed in range(10):
        error, moment = layer(out, features, tokens, steep, seed)
        _, plain, ours = costs(error, moment, rank, bits, group_size)
        whole = objective(error, moment, torch.zeros(1, features), torch.zeros(1, out))
        excess += (ours - plain) / whole / 10
    assert excess <= 1e-4


@pytest.mark.parametrize("bits, share", [(4, 0.05), (3, 0.035)])
def test_a_fraction_is_left_of_what_rounding_costs(bits, share):
    error, moment = layer(192, 256, 2000, steep=1.0)
    best, plain, ours = costs(error, moment, 64, bits)
    assert ours - best < share * (plain - best)


def test_knowing_the_inputs_pays():
    """B fitted by what a rounded A really does for these inputs, not by A's grid alone."""
    error, moment = layer(128, 128, 2000, steep=1.0)
    a, b, cross, channels = factors(error, moment, 48)
    blind = rounding.refit(a, b, a, torch.ones(128), 4, 32)
    seeing = rounding.refit(a, b, cross, channels, 4, 32)
    left = [objective(error, moment, x.values, y.values) for x, y in (blind, seeing)]
    best = objective(error, moment, a, b.T)
    assert left[1] - best < 0.7 * (left[0] - best)


@pytest.mark.parametrize("method", ["eora", "diagonal", "svd"])
def test_estimated_moments_are_near_the_true_ones(method):
    error, moment = layer(96, 200, 1000, steep=0.5)
    a, _, cross, channels = factors(error, moment, 32, method)
    c = {"eora": moment, "diagonal": moment.diagonal().diag(), "svd": torch.eye(200)}[method]
    c = c / (c.diagonal().mean())
    torch.testing.assert_close(cross, a @ c, rtol=1e-4, atol=1e-4 * cross.abs().max().item())
    torch.testing.assert_close(channels, c.diagonal())
    rounded = rounding.nearest(a, 3, 32).values
    towards, own = rounding._moments(a, cross, channels, rounded)
    true = (rounded @ c @ rounded.T).double()
    assert torch.linalg.norm(towards - (rounded @ c @ a.T).double()) < 1e-4 * true.norm()
    assert torch.linalg.norm(own - true) < 0.02 * true.norm()
    assert torch.linalg.eigvalsh(own).min() > 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("which", ["error", "moment", "both", "one input"])
def test_nothing_to_repair_gives_finite_factors(bits, which):
    error, moment = layer(24, 40, 100, steep=1.0)
    if which in ("error", "both"):
        error = torch.zeros_like(error)
    if which in ("moment", "both"):
        moment = torch.zeros_like(moment)
    if which == "one input":
        moment = torch.zeros_like(moment)
        moment[3, 3] = 1.0
    best, _, ours = costs(error, moment, 12, bits)
    for rounded in rounding.refit(*factors(error, moment, 12), bits, 32):
        assert rounded.values.isfinite().all() and rounded.scale.isfinite().all()
        assert torch.equal(packed_and_back(rounded, bits, 32), rounded.values)
    whole = objective(error, moment, torch.zeros(1, 40), torch.zeros(1, 24))
    assert ours <= best + 0.3 * whole + 1e-9


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3])
def test_the_weights_size_does_not_matter(size):
    error, moment = layer(64, 96, 500, steep=1.0)
    plain, scaled = (costs(error * s, moment, 16, 4) for s in (1.0, size))
    best, _, ours = (cost / size**2 for cost in scaled)
    assert ours - best == pytest.approx(plain[2] - plain[0], rel=0.2)


def packed_and_back(rounded, bits, group_size):
    packed = packing.pack(rounded, bits, group_size)
    assert packed["weight_shape"].tolist() == list(rounded.values.shape)
    words = -(-rounding.grouped(rounded.values, group_size)[0].numel() * bits // 32)
    assert packed["weight_packed"].shape[1] == words  # no bit is wasted
    return packing.unpack(packed, bits, group_size, torch.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8, 64), (3, 96), (16, 40), (5, 7), (2, 97), (4, 1)])
@pytest.mark.parametrize("group_size", [32, 24])
def test_packing_loses_nothing_whatever_the_width(bits, shape, group_size):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    rounded = rounding.nearest(matrix, bits, group_size)
    assert rounded.scale.shape[1] == -(-shape[1] // min(group_size, shape[1]))
    assert torch.equal(packed_and_back(rounded, bits, group_size), rounded.values)
    plain = (plainly(matrix, bits, group_size) - matrix).square().sum()
    assert (rounded.values - matrix).square().sum() <= plain


@pytest.mark.parametrize("size", [1, 2, 7, 48, 192])
def test_rotation_is_orthogonal(size):
    turn = rounding.rotation(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=turn.dtype))


def test_a_rows_error_is_made_up_for_by_the_rows_after_it():
    error, moment = layer(40, 30, 300, steep=1.0)
    matrix, metric = error.T.contiguous(), moment.double() + 1e-3 * torch.eye(30)

    def cost(rounded):
        rest = (rounded.values - matrix).double()
        return (rest.T @ metric @ rest).trace()

    handed_on = cost(rounding.in_metric(matrix, metric, 3, 32))
    assert handed_on < 0.6 * cost(rounding.nearest(matrix, 3, 32))
    # In a metric that knows no correlation there is nothing to hand on.
    alone = rounding.in_metric(matrix, torch.eye(30, dtype=torch.float64), 3, 32)
    assert torch.equal(alone.values, rounding.nearest(matrix, 3, 32).values)
