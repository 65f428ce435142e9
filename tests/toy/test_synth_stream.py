"""Samples of worlds: the law, the same by kernels and by torch, bits that depend on no thread."""

import dataclasses
import math

import pytest
import torch

from sparse_coding.toy.synth_stream import CompiledSampler, SynthStream, TorchSampler, draw_compiles
from sparse_coding.toy.synth_world import SynthWorld, make_synth_world

CPU = torch.device("cpu")
SAMPLERS = [
    pytest.param(
        CompiledSampler, marks=pytest.mark.skipif(not draw_compiles(), reason="needs numba and MKL")
    ),
    TorchSampler,
]
N = 600


@pytest.fixture(scope="module")
def world() -> SynthWorld:
    return make_synth_world(N, 32, 0)


def on_in(sampler, n_batches: int, batch: int = 2048) -> torch.Tensor:
    """Values (n_batches · batch, N)."""
    drawn = (sampler.with_active(seed, batch)[1].dense(N) for seed in range(n_batches))
    return torch.cat(list(drawn))


def naive(world: SynthWorld, n: int, seed: int, *, scaled: bool) -> torch.Tensor:
    """Every feature drawn, then the hierarchy level by level, as the paper says it: (n, N)."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    z = normal(n, world.loadings.shape[1]) @ world.loadings.T + world.diagonal * normal(n, N)
    value = (world.mean + world.std * normal(n, N)).relu() * (z > world.threshold)
    depth = world.depth
    for level in range(int(depth.max()) + 1):
        for parent in (depth == level).nonzero().flatten().tolist():
            children = (world.parent == parent).nonzero().flatten()
            if not len(children):
                continue
            lots = torch.rand(n, len(children), generator=rng) * (value[:, children] > 0)
            stays = lots == lots.amax(dim=1, keepdim=True)
            above = value[:, parent, None]
            kept = value[:, children] * stays * (above > 0)
            value[:, children] = kept * above / world.mean[parent] if scaled else kept
    return value


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scaled", [True, False])
def test_moments_are_those_of_drawing_every_feature(world, sampler, scaled):
    n = 20 * 2048
    found = on_in(sampler(world, CPU, scaled), 20).double()
    expected = naive(world, n, 1, scaled=scaled).double()
    for power in (0, 1, 2):
        a, b = (v.bool().double() if power == 0 else v**power for v in (found, expected))
        error = ((a.var(dim=0) + b.var(dim=0)) / n).sqrt() + 1e-12
        off = (a.mean(dim=0) - b.mean(dim=0)) / error
        assert off.abs().max() < 4.6, power  # of 600: 1 in 400 runs of another seed
        assert off.square().mean() < 1.35, power  # some are too rare for a normal law
        total = (a.sum(dim=1).mean() - b.sum(dim=1).mean()).abs()
        assert total < 4.5 * (2 * a.sum(dim=1).var() / n).sqrt(), power


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parents_and_siblings_are_as_the_hierarchy_says(world, sampler):
    on = on_in(sampler(world, CPU, True), 20) > 0
    for child, parent in enumerate(world.parent.tolist()):
        if parent >= 0:
            assert not (on[:, child] & ~on[:, parent]).any()
            siblings = (world.parent == parent).nonzero().flatten()
            assert on[:, siblings].sum(dim=1).max() <= 1
    assert on[:, 4:20].any(dim=0).all()  # children of the roots do fire


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pairs_of_roots_correlate_as_the_copula_says(world, sampler):
    """Loadings of the roots made large, so that it shows: P(both) by integrating over ε."""
    loadings = torch.zeros(N, 2)
    loadings[:, 0], loadings[:, 1] = 0.5, torch.linspace(-0.6, 0.6, N)
    diagonal = (1 - loadings.square().sum(dim=1)).sqrt()
    correlated = dataclasses.replace(world, loadings=loadings, diagonal=diagonal)
    on = (on_in(sampler(correlated, CPU, True), 60) > 0).double()
    eps = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    tops = (world.parent < 0).nonzero().flatten()[:12]
    q = torch.special.ndtr(
        (eps @ loadings[tops].T - world.threshold[tops]) / diagonal[tops]
    ).double()
    both, found = q.T @ q / len(q), on[:, tops].T @ on[:, tops] / len(on)
    error = (both / len(on) + both / len(q)).sqrt()
    off_diagonal = ~torch.eye(len(tops), dtype=torch.bool)
    assert ((found - both) / error)[off_diagonal].abs().max() < 4
    independent = q.mean(dim=0).outer(q.mean(dim=0))
    assert ((both - independent) / error)[off_diagonal].abs().max() > 20  # it does show


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_is_the_sum_of_what_is_on_and_the_bias(world, sampler):
    drawn = sampler(world, CPU, True)
    x, active = drawn.with_active(3, 100)
    expected = active.dense(N).double() @ world.features.double() + world.bias
    assert torch.allclose(x.double(), expected, atol=1e-5)
    assert torch.equal(drawn.x(3, 100), x)
    assert int(active.start[-1]) == len(active.feature) == len(active.value)
    assert (active.value > 0).all()


@pytest.mark.parametrize("batch_size", [1, 33, 500])
def test_a_batch_is_a_function_of_the_step_alone(world, batch_size):
    options = dict(batch_size=batch_size, batch_seed=7, device=CPU)
    threads, batches = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        stream = SynthStream(world, **options)
        batches.append(torch.stack([stream.batch(step) for step in (5, 0, 5)]))
    torch.set_num_threads(threads)
    assert torch.equal(*batches)
    assert torch.equal(batches[0][0], batches[0][2])
    assert not torch.equal(batches[0][0], batches[0][1])
    assert not torch.equal(
        SynthStream(world, **options | {"batch_seed": 8}).batch(5), batches[0][0]
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_world_without_trees_and_one_of_a_single_feature_are_drawn_too(world, sampler):
    free = dataclasses.replace(world, parent=torch.full((N,), -1, dtype=torch.int32))
    rates = (on_in(sampler(free, CPU, True), 30) > 0).double().mean(dim=0)
    on = torch.special.ndtr(world.mean / world.std)  # a magnitude above 0
    off = (rates - world.probability * on) / (world.probability / (30 * 2048)).sqrt()
    assert off.abs().max() < 5
    one = make_synth_world(1, 3, 0)
    x = sampler(dataclasses.replace(one, mean=torch.tensor([5.0])), CPU, True).x(0, 64)
    assert x.shape == (64, 3)
    assert x.isfinite().all()


def test_random_numbers_of_the_kernels_are_normal_and_uniform(world):
    """Through thresholds: of one feature of each probability, alone."""
    if not draw_compiles():
        pytest.skip("needs numba and MKL")
    p = torch.tensor([0.999, 0.9, 0.5, 0.2, 0.1, 1e-2, 1e-3, 1e-4]).repeat(75)
    threshold = math.sqrt(2) * torch.special.erfinv(1 - 2 * p.double()).float()
    alone = dataclasses.replace(
        world,
        parent=torch.full((N,), -1, dtype=torch.int32),
        probability=p,
        threshold=threshold,
        mean=torch.full((N,), 5.0),
        std=torch.full((N,), 0.5),
    )
    values = on_in(CompiledSampler(alone, CPU, True), 60)
    n = len(values)
    rates = (values > 0).double().view(n, 75, 8).mean(dim=(0, 1))
    error = (p[:8].double() * (1 - p[:8]) / (75 * n)).sqrt()
    # samples share ε, whose loadings tie the features of a sample to each other
    assert ((rates - p[:8]) / error).abs().max() < 12
    magnitudes = (values[values > 0].double() - 5) / 0.5
    assert abs(float(magnitudes.mean())) < 0.003
    assert abs(float(magnitudes.std()) - 1) < 0.003
    kurtosis = float((magnitudes**4).mean())
    assert kurtosis == pytest.approx(3, abs=0.02)


@pytest.mark.long
def test_a_million_samples_of_the_benchmarks_law_have_its_published_moments():
    """Of 61 440 samples of the package that defines it; its features are as far from orthogonal."""
    big = make_synth_world(16384, 768, 0, n_steps=0)
    level = torch.where(torch.arange(16384) >= 10880, 4, big.depth)
    stream = SynthStream(big, batch_size=4096, batch_seed=1, device=CPU)
    n, first = 250 * 4096, 0
    on, squares = torch.zeros(2, 5, dtype=torch.float64)
    for step in range(250):
        _, active = stream.with_active(step)
        of_active = level[active.feature]
        on += torch.bincount(of_active, minlength=5)
        squares.index_add_(0, of_active, active.value.double() ** 2)
        first += int((active.feature < 4096).sum())
    assert float(on.sum() / n) == pytest.approx(34.47, abs=0.15)
    assert first / n == pytest.approx(25.15, abs=0.1)
    assert (on / n).tolist() == pytest.approx([8.20, 7.32, 7.32, 7.12, 4.51], abs=0.05)
    assert (squares / n).tolist() == pytest.approx([208.5, 188.7, 187.1, 167.0, 81.7], rel=0.01)
