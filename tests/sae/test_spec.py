"""Starts and schedules of autoencoders, by hand."""

import pytest
import torch

from sparse_coding.sae.spec import Factors, Schedule, initial_autoencoder


def factors(schedule: Schedule, kind: str, steps) -> list[float]:
    return [getattr(schedule, kind)(step) for step in steps]


def test_without_a_schedule_nothing_changes():
    constant = Schedule()
    assert factors(constant, "lr_factor", (0, 10**6)) == [1, 1]
    assert factors(constant, "l1_factor", (0, 10**6)) == [1, 1]
    assert constant.seeks_l0(0)


def test_the_learning_rate_rises_then_stays_then_falls_to_nearly_nothing():
    schedule = Schedule(n_steps=100, lr_warmup=4, decay_start=80)
    found = factors(schedule, "lr_factor", (0, 1, 3, 4, 79, 80, 90, 99))
    assert found == pytest.approx([0.2, 0.4, 0.8, 1, 1, 1, 0.5, 0.05])


def test_no_step_is_without_effect_and_rise_and_fall_may_overlap():
    schedule = Schedule(n_steps=10, lr_warmup=10, decay_start=0)
    found = factors(schedule, "lr_factor", range(10))
    assert found == pytest.approx([(s + 1) / 11 * (10 - s) / 10 for s in range(10)])
    assert min(found) > 0


def test_l1_rises_from_zero():
    schedule = Schedule(n_steps=100, l1_warmup=4)
    assert factors(schedule, "l1_factor", (0, 1, 3, 4, 99)) == [0, 0.25, 0.75, 1, 1]


def test_l0_is_sought_from_the_rise_of_l1_to_the_end():
    schedule = Schedule(n_steps=100, l1_warmup=4, decay_start=80)
    found = factors(schedule, "seeks_l0", (0, 3, 4, 79, 80, 99))
    assert found == [False, False, True, True, True, True]


def test_a_step_is_told_all_its_factors():
    schedule = Schedule(n_steps=100, lr_warmup=4, l1_warmup=10)
    assert schedule.at(2) == Factors(lr=0.6, l1=0.2, seek_l0=False, share=0.02)
    assert schedule.at(10) == Factors(lr=1.0, l1=1.0, seek_l0=True, share=0.1)


def test_a_tied_start_has_half_the_decoder_as_encoder_and_no_bias():
    start = initial_autoencoder(8, 200, seed=1, tied=True)
    assert torch.equal(start["W_enc"], start["W_dec"] / 2)
    assert not start["b_enc"].any()
    assert torch.allclose(start["W_dec"].norm(dim=1), torch.ones(200))
    assert start["W_dec"].mean(dim=0).norm() < 0.15  # on the whole sphere: 1/√200 by chance
    other = initial_autoencoder(8, 200, seed=2, tied=True)
    assert not torch.allclose(start["W_dec"], other["W_dec"])


def test_without_tying_encoder_and_bias_are_uniform_as_in_a_linear_layer():
    start, bound = initial_autoencoder(16, 200, seed=1), 16**-0.5
    for name in ("W_enc", "b_enc"):
        assert 0.9 * bound < start[name].abs().max() <= bound


def test_more_features_than_dimensions_start_with_orthonormal_columns():
    W_dec = initial_autoencoder(8, 32, seed=1)["W_dec"]
    assert W_dec.shape == (32, 8)
    assert torch.allclose(W_dec.norm(dim=1), torch.ones(32))
