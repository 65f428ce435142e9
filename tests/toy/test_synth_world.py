"""Worlds of SynthSAEBench: rates, trees, nearly orthogonal features, their files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.toy.synth_world import (
    SynthWorld,
    _factors,
    base_rates,
    corrected,
    digest,
    make_correlated_world,
    make_synth_world,
    orthogonalised,
    parents,
    read_world,
    write_world,
)


@pytest.fixture(scope="module")
def world() -> SynthWorld:
    return make_synth_world(300, 24, 0)


def same(a: SynthWorld, b: SynthWorld) -> bool:
    return digest(a) == digest(b) and all(
        torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(SynthWorld)
    )


def test_rates_of_the_benchmark_fall_as_published():
    p = base_rates(16384)
    places = [0, 1, 2, 3, 127, 639, 2687, 4095, 10879, 16383]
    expected = [0.4, 0.28207, 0.22982, 0.19868, 0.032944, 0.01327, 0.005121, 0.003646, 0.001215]
    assert p[places].tolist() == pytest.approx([*expected, 0.0005], rel=5e-4)
    assert float(p.sum()) == pytest.approx(59.144, abs=1e-3)
    assert float(p[:4096].sum()) == pytest.approx(40.117, abs=1e-3)


def test_trees_of_the_benchmark_are_breadth_first():
    parent = parents(16384)
    assert (parent[:128] == -1).all()
    assert parent[128:136].tolist() == [0] * 4 + [1] * 4
    assert parent[640:644].tolist() == [128] * 4
    assert parent[10876:10881].tolist() == [2687] * 4 + [-1]
    assert (parent[10880:] == -1).all()
    depth = dataclasses.replace(make_synth_world(16, 4, 0), parent=parent).depth
    assert torch.bincount(depth).tolist() == [128 + 5504, 512, 2048, 8192]


def test_rates_of_children_are_corrected_by_parent_and_siblings():
    base = torch.tensor([0.5, 0.1, 0.05, 0.02], dtype=torch.float64)
    found = corrected(base, torch.tensor([-1, 0, 0, -1]))
    assert found.tolist() == pytest.approx([0.5, 0.2 * 1.1, 0.1 * 1.2, 0.02])
    of_benchmark = corrected(base_rates(16384), parents(16384))
    assert float(of_benchmark.max()) == pytest.approx(0.915, abs=1e-3)
    children = of_benchmark.split([128, 512, 2048, 8192, 5504])
    sums = [float(part.sum()) for part in children]
    assert sums == pytest.approx([8.20, 373.5, 1813, 4967, 4.52], rel=2e-3)


def test_a_threshold_is_passed_with_the_probability(world):
    above = 1 - torch.special.ndtr(world.threshold.double())
    assert torch.allclose(above, world.probability.double(), rtol=1e-4)
    assert torch.allclose(world.diagonal**2 + world.loadings.square().sum(1), torch.ones(300))
    assert float(world.loadings.std()) == pytest.approx(0.1, abs=0.005)
    assert (float(world.mean[0]), float(world.mean[-1])) == (5, 4)
    assert float(world.bias.norm()) == pytest.approx(0.5)


def test_a_world_depends_on_its_seed_alone(world):
    assert same(world, make_synth_world(300, 24, 0))
    assert not torch.equal(world.features, make_synth_world(300, 24, 1).features)


def test_features_become_more_orthogonal_to_the_same_bits_by_any_number_of_threads():
    rng = torch.Generator().manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(1500, 64, generator=rng))
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(orthogonalised(before))
    torch.set_num_threads(threads)
    assert torch.equal(*found)

    def overlap(D: torch.Tensor) -> float:
        cosines = (D @ D.T).fill_diagonal_(0)
        return float(cosines.square().sum())

    assert overlap(found[0]) < 0.97 * overlap(before)
    assert torch.allclose(found[0].norm(dim=1), torch.ones(1500))


def test_orthogonalising_follows_the_gradient_of_its_loss():
    """One chunk against autograd, 100 steps."""
    rng = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(60, 16, generator=rng))
    D = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([D], lr=3e-4)
    for _ in range(100):
        cosines = D @ D.T
        lengths = cosines.diagonal()
        others = cosines.square().sum() - lengths.square().sum()
        adam.zero_grad()
        (others + 60 * (lengths - 1).square().sum()).backward()
        adam.step()
    expected = torch.nn.functional.normalize(D.detach())
    assert torch.allclose(orthogonalised(start), expected, atol=1e-5)


def test_a_world_is_read_back_as_it_was_written(world, tmp_path):
    write_world(world, tmp_path / "world.npz")
    assert same(read_world(tmp_path / "world.npz"), world)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": np.zeros(3)}, "bias has the shape"),
        ({"std": np.full(300, -1.0)}, "std has numbers below 0"),
        ({"mean": np.zeros(300)}, "mean of a parent is not above 0"),
        ({"mean": np.full(300, np.nan)}, "mean has numbers that are not finite"),
        ({"parent": np.arange(300)}, "each comes before its children"),
        ({"diagonal": np.zeros(300)}, "diagonal has numbers that are not above 0"),
        ({"features": np.zeros(5)}, "features is no matrix"),
        ({"probability": np.full(300, 1.5)}, "probability has numbers outside 0 to 1"),
        ({"probability": np.full(300, 0.3)}, "threshold is not that of probability"),
        ({"loadings": None}, "loadings is not a file in the archive"),
    ],
)
def test_a_file_that_is_no_world_is_refused_in_one_line(world, tmp_path, changes, reason):
    arrays = {f.name: getattr(world, f.name).numpy() for f in dataclasses.fields(world)} | changes
    path = tmp_path / "world.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=reason) as caught:
        read_world(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_npz_is_refused_too(tmp_path):
    for content in (b"", b"no archive", b"PK\x03\x04"):
        path = Path(tmp_path, "world.npz")
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no world"):
            read_world(path)
    with pytest.raises(UserError, match="is no world"):
        read_world(tmp_path / "missing.npz")


def test_each_array_counts_in_the_digest(world):
    known = {digest(world)}
    for field in dataclasses.fields(world):
        changed = getattr(world, field.name).clone()
        changed.view(-1)[0] += 1
        known.add(digest(dataclasses.replace(world, **{field.name: changed})))
    assert len(known) == 1 + len(dataclasses.fields(world))


# --- Sparse but Wrong ---


def test_features_of_sparse_but_wrong_are_orthogonal_with_rates_that_fall_linearly():
    world = make_correlated_world(50, 100, 42)
    assert torch.allclose(world.features @ world.features.T, torch.eye(50), atol=1e-5)
    p = world.probability.double()
    assert p[[0, -1]].tolist() == pytest.approx([0.345 * 49 / 50 + 0.05, 0.05])
    assert torch.allclose(p.diff(), torch.tensor(-0.345 / 50, dtype=torch.float64), atol=1e-6)
    assert float(p.sum()) == pytest.approx(10.95, abs=0.01)
    assert torch.allclose(torch.special.ndtr(-world.threshold.double()), p, atol=1e-6)
    assert world.parent.tolist() == [-1] * 50
    assert (world.mean.unique().tolist(), world.std[0].item()) == ([1.0], pytest.approx(0.15))


def test_its_copula_has_variances_of_one_and_strong_correlations_of_both_signs():
    world = make_correlated_world(50, 100, 42)
    C = world.loadings @ world.loadings.T + torch.diag(world.diagonal.square())
    assert torch.allclose(C.diagonal(), torch.ones(50), atol=1e-5)
    others = C[~torch.eye(50, dtype=torch.bool)]
    assert (others > 0.2).float().mean() > 0.1
    assert (others < -0.2).float().mean() > 0.1
    other = make_correlated_world(50, 100, 43)
    assert not torch.allclose(other.loadings @ other.loadings.T, C, atol=0.1)


def test_its_factors_are_those_of_a_matrix_that_is_one_of_correlations_already():
    rng = torch.Generator().manual_seed(0)
    A = torch.nn.functional.normalize(torch.randn(8, 30, generator=rng, dtype=torch.float64), dim=1)
    loadings, diagonal = _factors(A @ A.T)
    found = loadings @ loadings.T + torch.diag(diagonal.square())
    assert torch.allclose(found, A @ A.T, atol=1e-9)
    assert torch.allclose(diagonal.square(), torch.tensor(1e-3, dtype=torch.float64))
