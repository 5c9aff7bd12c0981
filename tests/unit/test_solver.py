"""The decomposition against the textbook form of EoRA, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora import solver

# The last two are multiplied in several blocks.
SHAPES = [(12, 30), (30, 12), (16, 16), (300, 560), (560, 300)]


def problem(out, features, tokens, seed=0, scale=1.0):
    """An error (out, in) and a second moment (in, in) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(tokens, features) @ draw(features, features) * scale
    return draw(out, features), x.T @ x / tokens


def textbook(error, moment, rank):
    """EoRA as the paper writes it: project by Q L^1/2, truncate the SVD, project back."""
    values, q = torch.linalg.eigh(moment)
    projection = q * values.sqrt()
    u, s, vh = torch.linalg.svd(error @ projection, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(projection)


def objective(error, product, moment):
    rest = error - product
    return (rest @ moment @ rest.T).trace()


def product(factors, rank):
    return factors.lora_B[:, :rank] @ factors.lora_A[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_agrees_with_the_textbook_form(shape, rank):
    error, moment = problem(*shape, tokens=600)
    ours = product(solver.decompose(error, solver.Metric(moment, "eora"), 12), rank)
    theirs = textbook(error, moment, rank)
    assert torch.linalg.norm(ours - theirs) <= 1e-9 * torch.linalg.norm(theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_curve_is_the_objective_at_every_rank(shape):
    error, moment = problem(*shape, tokens=600)
    factors = solver.decompose(error, solver.Metric(moment, "eora"), 10)
    left = [objective(error, product(factors, r), moment).item() for r in range(11)]
    assert factors.residual.tolist() == pytest.approx(left, rel=1e-9)
    assert (factors.residual.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_nest(shape):
    error, moment = problem(*shape, tokens=600)
    large, small = (solver.decompose(error, solver.Metric(moment, "eora"), r) for r in (10, 4))
    torch.testing.assert_close(product(large, 4), product(small, 4), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_rank_deficient_second_moment_does_no_harm(shape, tokens):
    error, moment = problem(*shape, tokens=tokens)
    factors = solver.decompose(error, solver.Metric(moment, "eora"), 12)
    assert torch.isfinite(factors.lora_A).all() and torch.isfinite(factors.lora_B).all()
    # Inputs span only `tokens` directions, so that many ranks repair all that can be seen.
    assert objective(error, product(factors, tokens), moment) <= 1e-12 * factors.residual[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_second_moment_does_not_matter(shape, scale):
    error, moment = problem(*shape, tokens=600)
    plain = solver.decompose(error, solver.Metric(moment, "eora"), 6)
    scaled = solver.decompose(error, solver.Metric(moment * scale, "eora"), 6)
    torch.testing.assert_close(product(scaled, 6), product(plain, 6), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(scaled.residual, plain.residual * scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_to_repair_gives_zero_factors(shape):
    error, moment = problem(*shape, tokens=600)
    for e, c in ((torch.zeros_like(error), moment), (error, torch.zeros_like(moment))):
        factors = solver.decompose(e, solver.Metric(c, "eora"), 4)
        assert not factors.lora_A.any() and not factors.lora_B.any() and not factors.residual.any()


def test_dead_channels_get_no_weight():
    error, moment = problem(10, 20, tokens=100)
    moment[3], moment[:, 3] = 0, 0
    factors = solver.decompose(error, solver.Metric(moment, "eora"), 10)
    assert objective(error, product(factors, 10), moment) <= 1e-12 * factors.residual[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_balanced(shape):
    error, moment = problem(*shape, tokens=600)
    factors = solver.decompose(error, solver.Metric(moment, "eora"), 8)
    torch.testing.assert_close(factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_best_product_of_the_error_itself(shape):
    error, moment = problem(*shape, tokens=600)
    factors = solver.decompose(error, solver.Metric(moment, "svd"), 3)
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(product(factors, 3), (u[:, :3] * s[:3]) @ vh[:3])


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_is_the_best_product_in_scaled_inputs(shape):
    error, moment = problem(*shape, tokens=600)
    factors = solver.decompose(error, solver.Metric(moment, "diagonal"), 3)
    scale = moment.diagonal().sqrt()
    u, s, vh = torch.linalg.svd(error * scale, full_matrices=False)
    torch.testing.assert_close(product(factors, 3), (u[:, :3] * s[:3]) @ vh[:3] / scale)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(2, 14),
    features=st.integers(2, 14),
    tokens=st.integers(1, 30),
    rank=st.integers(1, 14),
    seed=st.integers(0, 10_000),
)
def test_no_other_product_of_that_rank_is_better(out, features, tokens, rank, seed):
    error, moment = problem(out, features, tokens, seed)
    factors = solver.decompose(error, solver.Metric(moment, "eora"), rank)
    best = objective(error, product(factors, rank), moment)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1):
        a, b = (
            f + size * torch.randn(f.shape, generator=generator, dtype=f.dtype)
            for f in (factors.lora_A, factors.lora_B)
        )
        assert best <= objective(error, b @ a, moment) + 1e-9 * factors.residual[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(40, 24), (24, 40), (32, 32), (300, 530), (530, 300)]),
    tokens=st.sampled_from([1, 7, 400]),
    spread=st.floats(0, 3),
    outlier=st.sampled_from([1.0, 1e2, 1e4]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),  # within float32
    dead=st.booleans(),
    rank=st.integers(1, 24),
    seed=st.integers(0, 10_000),
)
def test_stored_precision_is_no_worse_than_the_textbook_in_float64(
    shape, tokens, spread, outlier, scale, dead, rank, seed
):
    """Weights and moments as they are on disk, in float32, of channels of very different scale."""
    error, moment = problem(*shape, tokens, seed)
    channels = torch.logspace(0, spread, shape[1], dtype=torch.float64)
    channels[0] *= outlier
    if dead:
        channels[-3:] = 0
    moment = (moment * channels * channels[:, None] / moment.diagonal().mean()).float()
    error = error.float()
    factors = solver.decompose(error, solver.Metric(moment * scale, "eora"), rank)
    assert torch.isfinite(factors.lora_A).all() and torch.isfinite(factors.lora_B).all()
    exact = moment.double()
    values, q = torch.linalg.eigh((exact + exact.T) / 2)
    projection = q * values.clamp(min=0).sqrt()
    spectrum = torch.linalg.svdvals(error.double() @ projection).square()
    best, whole = spectrum[rank:].sum(), spectrum.sum()
    rest = (error.double() - product(factors, rank).double()) @ projection
    # Where next to nothing is left, it is the rounding of the stored moment itself.
    assert rest.square().sum() <= best * (1 + 1e-6) + torch.finfo(torch.float32).eps * whole
    assert factors.residual[0].item() == pytest.approx(whole.item() * scale, rel=1e-5)


def with_large_direction(error, moment, place, size):
    """A problem in which one direction of the error or of the inputs is far larger than all."""
    out, features = error.shape
    along = torch.linspace(-1, 1, features, dtype=moment.dtype)
    if place == "inputs":
        return error, moment + size * moment.diagonal().mean() * along * along[:, None]
    return error + size**0.5 * torch.linspace(1, 2, out, dtype=error.dtype)[:, None] * along, moment


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place, size", [("inputs", 1e5), ("error", 1e3)])
def test_directions_are_orthonormal_beside_one_that_is_far_larger(shape, place, size):
    """Else the residual curve, which counts on it, would tell less than is left."""
    error, moment = with_large_direction(*problem(*shape, tokens=600), place, size)
    factors = solver.decompose(error.float(), solver.Metric(moment.float(), "eora"), 10)
    u = factors.lora_B.double()
    u = u / u.norm(dim=0)
    torch.testing.assert_close(u.T @ u, torch.eye(10, dtype=u.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place, size", [("inputs", 1e2), ("error", 1e3), ("error", 1e7)])
def test_directions_are_best_beside_one_that_is_far_larger(shape, place, size):
    """They must not drown in its rounding."""
    error, moment = with_large_direction(*problem(*shape, tokens=600), place, size)
    error = error.float()
    factors = solver.decompose(error, solver.Metric(moment, "eora"), 10)
    error = error.double()
    best = objective(error, textbook(error, moment, 10), moment)
    found = objective(error, product(factors, 10).double(), moment)
    assert found <= best * (1 + 1e-6) + 1e-12 * factors.residual[0]
    assert factors.residual[10].item() == pytest.approx(found.item(), rel=1e-3)


@pytest.mark.parametrize("method", ["eora", "diagonal", "svd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_above_a_second_moments_diagonal_nothing_is_read(shape, method):
    error, moment = problem(*shape, tokens=600)
    whole = solver.decompose(error, solver.Metric(moment, method), 6)
    lower = moment.tril() + torch.full_like(moment, torch.nan).triu(1)
    half = solver.decompose(error, solver.Metric(lower, method), 6)
    for one, other in zip(vars(whole).values(), vars(half).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_moment_is_left_as_it_is():
    error, moment = problem(30, 12, tokens=600)
    before = moment.clone()
    solver.decompose(error, solver.Metric(moment, "eora"), 6)
    assert torch.equal(moment, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(20, 9), (9, 20), (14, 14), (1, 5), (5, 1)]),
    method=st.sampled_from(["eora", "diagonal", "svd"]),
    kind=st.sampled_from(["zero", "one token", "few tokens", "dead", "one channel", "whole"]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rank=st.integers(1, 20),
    seed=st.integers(0, 10_000),
)
def test_any_second_moment_gives_finite_nested_factors(
    shape, method, kind, scale, dtype, rank, seed
):
    error, moment = problem(*shape, {"one token": 1, "few tokens": 3}.get(kind, 50), seed)
    moment /= moment.diagonal().mean()
    seen = torch.ones(shape[1], dtype=moment.dtype)
    seen[{"zero": slice(None), "dead": slice(2), "one channel": slice(1, None)}.get(kind, [])] = 0
    moment = (moment * seen * seen[:, None] * scale).to(dtype)
    metric = solver.Metric(moment, method)
    large, small = (solver.decompose(error.to(dtype), metric, r) for r in (rank, (rank + 1) // 2))
    assert all(torch.isfinite(found).all() for found in vars(large).values())
    assert (large.residual >= 0).all() and (large.residual.diff() <= 0).all()
    kept = len(small.residual)
    torch.testing.assert_close(large.residual[:kept], small.residual, rtol=1e-6, atol=0)
    # What the residual says of the smaller rank is what the larger one's first columns leave.
    measure = {"eora": moment, "diagonal": moment.diagonal().diag(), "svd": torch.eye(shape[1])}
    cut = product(large, kept - 1).double()
    left = objective(error.to(dtype).double(), cut, measure[method].double())
    rounding = max(100 * torch.finfo(dtype).eps, 1e-11) * large.residual[0]
    torch.testing.assert_close(left, small.residual[-1], rtol=1e-5, atol=rounding.item())


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_iterated_directions_are_as_good(shape, monkeypatch):
    error, moment = problem(*shape, tokens=2000)
    # A spectrum that a Krylov space of a third of all columns holds.
    scales = torch.arange(1, shape[1] + 1, dtype=moment.dtype) ** -1
    moment = moment * scales * scales[:, None]
    error = error.float()
    monkeypatch.setattr(solver.eigen, "pays", lambda size, rank: True)
    monkeypatch.setattr(solver.eigen, "direct", None)
    factors = solver.decompose(error, solver.Metric(moment.float(), "eora"), 8)
    error, moment = error.double(), moment.float().double()
    best = objective(error, textbook(error, moment, 8), moment)
    assert objective(error, product(factors, 8).double(), moment) <= best * (1 + 1e-6)
    assert factors.residual[8].item() == pytest.approx(best.item(), rel=1e-5)


def test_bad_input_is_refused():
    error, moment = problem(4, 6, tokens=20)
    with pytest.raises(ValueError, match="does not fit"):
        solver.decompose(error.T, solver.Metric(moment, "eora"), 2)
    with pytest.raises(ValueError, match="max_rank"):
        solver.decompose(error, solver.Metric(moment, "eora"), 0)
    with pytest.raises(ValueError, match="unknown method"):
        solver.decompose(error, solver.Metric(moment, "lora"), 2)
    with pytest.raises(ValueError, match="not finite"):
        solver.decompose(error * float("nan"), solver.Metric(moment, "eora"), 2)
