"""Statistics of both data laws, and that a batch depends on its step alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_coding.toy.data import LAWS, ToyData, ToyStream, _up_to, make_world

CPU = torch.device("cpu")
POST = ToyData("post", 256, 512, n_active=5, feature_prob_decay=0.99, noise_std=0.0, batch_size=256)
JUNE = replace(POST, law="june2023")


def stream_of(data: ToyData, *, batch_seed: int = 1) -> ToyStream:
    return ToyStream(data, make_world(data, 0), batch_seed=batch_seed, device=CPU)


def amplitudes(data: ToyData, n_batches: int) -> torch.Tensor:
    """Amplitudes instead of x: true features replaced by unit vectors."""
    stream = stream_of(data)
    stream.features = torch.eye(data.n_true_features)
    return torch.cat([stream.batch(step) for step in range(n_batches)])


@pytest.fixture(scope="module")
def post() -> torch.Tensor:
    return amplitudes(POST, 40)  # (10 240, 512)


@pytest.fixture(scope="module")
def june() -> torch.Tensor:
    return amplitudes(JUNE, 80)  # 80 draws of z, one per batch


@pytest.mark.parametrize("law", LAWS)
def test_a_batch_is_a_function_of_world_seed_batch_seed_and_step(law):
    data = replace(POST, law=law)
    a, b = stream_of(data), stream_of(data)
    for step in (0, 1, 2):
        a.batch(step)
    assert torch.equal(a.batch(7), b.batch(7))  # whatever was drawn before
    assert not torch.equal(a.batch(7), a.batch(8))
    assert not torch.equal(a.batch(7), stream_of(data, batch_seed=2).batch(7))


def test_the_first_batch_of_a_process_is_like_any_other():
    """MKL's erf may differ in its first call when threads share it: the stream warms it up."""
    code = (
        "import torch; from tests.toy.test_data import POST, stream_of; torch.set_num_threads(2);"
        "[torch.randn(512, 512) @ torch.randn(512, 512) for _ in range(3)]; s = stream_of(POST);"
        "assert torch.equal(s.batch(5), s.batch(5))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_worlds_of_neighbouring_seeds_share_nothing():
    a, b = make_world(POST, 0), make_world(POST, 1)
    assert (a.features * b.features).sum(dim=1).abs().max() < 0.35  # random: 4-5 sigma of 1/16
    assert torch.equal(a.features, make_world(POST, 0).features)


@pytest.mark.parametrize("law", LAWS)
def test_true_features_have_length_one(law):
    norms = make_world(replace(POST, law=law), 0).features.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(512))


def test_post_covariance_has_unit_diagonal_and_full_rank():
    sigma = make_world(POST, 0).covariance
    torch.testing.assert_close(sigma.diagonal(), torch.ones(512), atol=1e-4, rtol=0)
    off_diagonal = sigma - torch.diag(sigma.diagonal())
    assert off_diagonal.std().item() == pytest.approx(512**-0.5, rel=0.05)  # of A Aᵀ / G


def test_june2023_covariance_is_uniform_off_the_diagonal_with_a_std_near_3():
    sigma = make_world(JUNE, 0).covariance
    off = sigma[~torch.eye(512, dtype=torch.bool)]
    assert off.mean().item() == pytest.approx(0.5, abs=0.01)
    assert off.min() > -0.01
    assert off.max() < 1.01
    assert sigma.diagonal().mean().sqrt().item() == pytest.approx(3.1, abs=0.1)


def test_post_law_has_k_active_features_with_uniform_amplitudes(post):
    active = post > 0
    # Σ p = k exactly before the clamp at 1, which binds for none of the default probabilities
    assert active.sum(dim=1).float().mean().item() == pytest.approx(5, abs=0.1)
    values = post[active]
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert values.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert values.max() < 1


def test_post_law_decays_over_features(post):
    rate = (post > 0).float().mean(dim=0)
    # features 0..49 against 100..149: p ∝ λ^g gives λ^-100 = 2.73
    ratio = rate[:50].mean() / rate[100:150].mean()
    assert ratio.item() == pytest.approx(0.99**-100, rel=0.15)


def test_post_law_has_a_new_z_for_every_sample_and_june2023_one_per_batch():
    for data, per_sample in ((POST, True), (JUNE, False)):
        stream = stream_of(replace(data, batch_size=2000))
        stream.features = torch.eye(512)
        rate = (stream.batch(0) > 0).float().mean(dim=0)  # over one batch
        never = (rate[:100] == 0).float().mean().item()  # features likely to be active
        assert (never < 0.02) if per_sample else (never > 0.1)


def test_june2023_amplitudes_are_products_of_two_uniforms(june):
    active = june > 0
    several = june[active.sum(dim=1) > 1]  # rows that were not given a feature at random
    assert several[several > 0].mean().item() == pytest.approx(0.25, abs=0.01)
    # k on average, raised a little by the samples that were empty
    assert active.sum(dim=1).float().mean().item() == pytest.approx(5, abs=0.35)


def test_june2023_leaves_no_sample_empty_and_post_does(post, june):
    assert (june > 0).any(dim=1).all()
    assert not (post > 0).any(dim=1).all()


def test_x_is_the_sum_of_active_features_and_noise():
    stream = stream_of(POST)
    x = stream.batch(3)
    world, stream.features = stream.features, torch.eye(512)
    torch.testing.assert_close(x, stream.batch(3) @ world, atol=1e-5, rtol=1e-5)
    noisy = stream_of(replace(POST, noise_std=0.1)).batch(3)
    assert (noisy - x).std().item() == pytest.approx(0.1, rel=0.02)


def test_probabilities_are_clamped_to_one():
    data = replace(POST, n_true_features=16, n_active=14.0, feature_prob_decay=0.7)
    values = amplitudes(data, 20)
    assert values.max() < 1
    assert (values[:, 0] > 0).float().mean() > 0.95  # all but the samples of small u


def test_uniforms_below_p_are_stretched_to_0_1_and_others_are_0_for_any_p():
    p = torch.tensor([0.0, 1e-38, 1e-30, 1e-7, 0.3, 1.0]).repeat(4, 1)
    v = torch.tensor([0.0, 2**-24, 0.29, 1 - 2**-24]).view(4, 1).expand(4, 6)
    assert torch.equal(_up_to(v, p), torch.where(v < p, v / p, 0))
    assert _up_to(torch.tensor([0.29]), torch.tensor([0.3])) == pytest.approx(0.29 / 0.3)
