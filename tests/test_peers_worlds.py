"""Samples of a world against SAELens's own sampler, on that very world."""

import importlib

import pytest
import torch
from builders.scripts import ROOT

from sparse_coding.sweep.metrics import DetectionSums, matches, mcc, uniqueness
from sparse_coding.toy.synth_stream import CompiledSampler, TorchSampler, draw_compiles
from sparse_coding.toy.synth_world import FARTHEST, SynthWorld, base_rates, corrected, parents

N, H, N_SAMPLES = 300, 32, 100 * 2048
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("sae_lens.synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("peers").world_of_sae_lens(N, H, n_roots=2)


@pytest.fixture(scope="module")
def world(model) -> SynthWorld:
    """The model's own world, as this project has it."""
    law, vectors = model.activation_generator, model.feature_dict.state_dict()
    loadings, diagonal = law.low_rank_correlation
    return SynthWorld(
        features=vectors["feature_vectors"],
        bias=vectors["bias"],
        parent=parents(N),
        probability=law.firing_probabilities,
        threshold=law.correlation_thresholds.clamp(-FARTHEST, FARTHEST),
        loadings=loadings,
        diagonal=diagonal,
        mean=law.mean_firing_magnitudes,
        std=law.std_firing_magnitudes,
    )


@pytest.fixture(scope="module")
def theirs(model) -> torch.Tensor:
    torch.manual_seed(0)
    batches = (model.activation_generator.sample(2048) for _ in range(N_SAMPLES // 2048))
    return torch.cat([batch.to_dense() if batch.is_sparse else batch for batch in batches])


def test_the_rates_of_its_candidates_are_those_of_our_law(world):
    expected = corrected(base_rates(N), parents(N))
    assert torch.allclose(world.probability.double(), expected, atol=1e-5)


@pytest.mark.parametrize("sampler", [CompiledSampler, TorchSampler])
def test_features_fire_as_often_and_as_strongly_as_in_its_samples(world, theirs, sampler):
    if sampler is CompiledSampler and not draw_compiles():
        pytest.skip("needs numba and MKL")
    drawn = sampler(world, CPU, True)
    ours = torch.cat(
        [drawn.with_active(seed, 2048)[1].dense(N) for seed in range(N_SAMPLES // 2048)]
    )
    for power in (0, 1, 2):
        a, b = (v.bool().double() if power == 0 else v.double() ** power for v in (ours, theirs))
        error = ((a.var(dim=0) + b.var(dim=0)) / N_SAMPLES).sqrt() + 1e-12
        off = (a.mean(dim=0) - b.mean(dim=0)) / error
        assert off.abs().max() < 4.5, power
        assert off.square().mean() < 1.4, power


def test_x_is_made_as_it_makes_it(model, world, theirs):
    expected = model.feature_dict(theirs[:100])
    found = theirs[:100] @ world.features + world.bias
    assert torch.allclose(found, expected, atol=1e-5)


def test_its_evaluation_gives_the_same_scores(world, theirs):
    """Of a dictionary between the true features and noise, with thresholds."""
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    rng = torch.Generator().manual_seed(0)
    W_dec = world.features[:80] + 0.15 * torch.randn(80, H, generator=rng)
    x = theirs[:4096] @ world.features + world.bias
    codes = torch.relu((x - world.bias) @ W_dec.T - 2.0)
    similarity = matches(W_dec, world.features)
    assert mcc(similarity) == pytest.approx(
        evals.mean_correlation_coefficient(W_dec, world.features), abs=1e-6
    )
    assert uniqueness(similarity) == evals.feature_uniqueness(W_dec, world.features)
    sums = DetectionSums(similarity.argmax(dim=1))
    sums.add(x, codes @ W_dec, codes, theirs[:4096] > 0)
    found = sums.result()
    expected = evals.compute_classification_metrics(codes, theirs[:4096], W_dec, world.features)
    assert found["precision"] == pytest.approx(expected.precision, abs=1e-6)
    assert found["recall"] == pytest.approx(expected.recall, abs=1e-6)
    assert found["f1"] == pytest.approx(expected.f1_score, abs=1e-6)
    assert 0.1 < found["f1"] < 0.9
    shrinkage = evals.ShrinkageCalculator()
    shrinkage.add_batch(codes @ W_dec, x)
    assert found["shrinkage"] == pytest.approx(shrinkage.compute(), abs=1e-6)
