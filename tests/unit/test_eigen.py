"""The largest eigenpairs: iterated ones are as good as proved, or not handed out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora import eigen

SIZE = 640
DECAYING = torch.arange(1, SIZE + 1).double() ** -1
SPECTRA = {
    "decaying": DECAYING,
    "steep": torch.logspace(0, -12, SIZE, dtype=torch.float64),
    "outliers": torch.cat([torch.tensor([1e4, 1e3]).double(), DECAYING[:-2]]),
    "flat": torch.ones(SIZE, dtype=torch.float64),
    "cluster": torch.cat([torch.full((40,), 2.0), torch.ones(SIZE - 40)]).double(),
    "white": torch.linspace(2, 0.2, SIZE, dtype=torch.float64),
    "few": torch.cat([torch.ones(3), torch.zeros(SIZE - 3)]).double(),
    "none": torch.zeros(SIZE, dtype=torch.float64),
}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_spectrum(values, seed=0):
    """A matrix of these eigenvalues, and its eigenvectors."""
    vectors = torch.linalg.qr(draw(len(values), len(values), seed=seed)).Q
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def reflected(values):
    """As :func:`with_spectrum`, for a large matrix: a reflection moves the axes."""
    axis = draw(len(values))
    axis = axis / axis.norm()
    moved = torch.eye(len(values), dtype=values.dtype) - 2 * axis[:, None] * axis
    matrix = (moved * values) @ moved
    return (matrix + matrix.T) / 2


def assert_best(found, matrix, spectrum, rank):
    """Orthonormal directions that leave what the best ones do, by their own account and really."""
    values, vectors = found
    best = spectrum[rank:].sum()
    allowed = 1.001e-6 * best + 1e-11 * spectrum.sum()
    assert spectrum.sum() - values.sum() <= best + allowed
    assert spectrum.sum() - (vectors.T @ matrix @ vectors).trace() <= best + allowed
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=vectors.dtype))
    assert (values >= 0).all() and (values.diff() <= 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 10])
def test_top_is_best_whatever_the_spectrum(spectrum, rank, scale, monkeypatch):
    monkeypatch.setattr(eigen, "pays", lambda size, rank: True)
    values = SPECTRA[spectrum] * scale
    matrix, _ = with_spectrum(values)
    assert_best(eigen.top(matrix, rank), matrix, values, rank)


@pytest.mark.parametrize("spectrum", ["decaying", "steep", "outliers"])
@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_spectra_as_layers_have_them_are_iterated(spectrum, scale):
    values = SPECTRA[spectrum] * scale
    matrix, _ = with_spectrum(values)
    assert_best(eigen.iterated(matrix, 20), matrix, values, 20)  # refined, beside outliers


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spectrum=st.sampled_from(sorted(SPECTRA)),
    rank=st.integers(1, 20),
    noise=st.floats(-6, 0).map(lambda exponent: 10**exponent),
    missing=st.sets(st.integers(0, 30), max_size=2),
    seed=st.integers(0, 1000),
)
def test_no_guess_is_certified_that_is_not_best(spectrum, rank, noise, missing, seed):
    """Guesses near and far from the eigenvectors, some of which are left out altogether."""
    values = SPECTRA[spectrum]
    matrix, vectors = with_spectrum(values, seed)
    kept = [i for i in range(rank + 10) if i not in missing]
    start = vectors[:, kept] + noise * draw(SIZE, len(kept), seed=seed + 1) / SIZE**0.5
    found = eigen.certified(matrix, rank, start)
    if found is not None:
        assert_best(found, matrix, values, rank)


def test_exact_eigenvectors_are_certified():
    matrix, vectors = with_spectrum(SPECTRA["white"])
    assert eigen.certified(matrix, 10, vectors[:, :18]) is not None


@pytest.mark.parametrize("missing", [0, 5, 9])
def test_an_eigenvector_that_the_guess_is_orthogonal_to_is_noticed(missing):
    """Nothing but the rest's Cholesky factor can tell: all residuals are zero."""
    matrix, vectors = with_spectrum(SPECTRA["white"])
    kept = [i for i in range(19) if i != missing]
    assert eigen.certified(matrix, 10, vectors[:, kept]) is None


def test_directions_that_have_not_converged_are_noticed():
    """Nothing but their residuals can tell: the rest is below its ceiling."""
    levels = {2.0: 10, 1.9: 8, 1.4: SIZE - 18}
    values = torch.cat([torch.full((n,), level).double() for level, n in levels.items()])
    matrix, vectors = with_spectrum(values)
    start = vectors[:, :18].clone()
    start[:, :10] += 0.4 * vectors[:, 20:30]
    assert eigen.certified(matrix, 10, start) is None


def test_random_numbers_are_its_own():
    matrix, _ = with_spectrum(SPECTRA["steep"])
    first = eigen.iterated(matrix, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = eigen.iterated(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))


def test_large_matrices_are_iterated_and_small_ones_or_many_pairs_are_not(monkeypatch):
    values = torch.arange(1, 2049).double() ** -1
    matrix = reflected(values)
    monkeypatch.setattr(eigen, "direct", None)
    assert_best(eigen.top(matrix, 32), matrix, values, 32)
    assert not eigen.pays(2048, 129) and not eigen.pays(1500, 8)
