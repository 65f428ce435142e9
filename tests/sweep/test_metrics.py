"""Planted controls: dictionaries and predictions whose metrics are known."""

import pytest
import torch

from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep import metrics
from sparse_coding.sweep.metrics import (
    DetectionSums,
    ReconstructionSums,
    agreement,
    agreements,
    ceiling_mmcs,
    chance_mmcs,
    matched_at_once,
    matches,
    max_cosine,
    mcc,
    mmcs,
    mmcs_with_larger,
    n_matched,
    reconstruction,
    training_state,
    uniqueness,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(512, 256, generator=rng), dim=1)


def test_max_cosine_of_a_hand_computed_pair():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # lengths do not matter
    dictionary = torch.tensor([[3.0, 3.0], [0.0, -1.0]])
    torch.testing.assert_close(max_cosine(features, dictionary), torch.tensor([0.5**0.5, 0.5**0.5]))
    assert mmcs(dictionary, features).item() == pytest.approx((0.5**0.5 + 0) / 2)  # not symmetric


def test_perfect_permuted_and_rescaled_dictionaries_have_mmcs_one(truth):
    shuffled = truth[torch.randperm(512, generator=torch.Generator().manual_seed(1))] * 7
    for dictionary in (truth, shuffled):
        assert mmcs(truth, dictionary).item() == pytest.approx(1, abs=1e-5)


def test_a_negated_dictionary_is_not_a_found_one(truth):
    assert mmcs(truth, -truth).item() < 0.25


def test_a_dictionary_of_one_feature_repeated_finds_one_feature_only(truth):
    repeated = truth[:1].expand(512, -1)
    assert (max_cosine(truth, repeated) > 0.9).sum() == 1
    assert mmcs(truth, repeated).item() < 0.05
    assert mmcs(repeated, truth).item() == pytest.approx(1, abs=1e-5)  # dict to truth: all are true


@pytest.mark.parametrize(
    ("ratio", "chance"),
    [(1 / 8, 0.146), (1 / 4, 0.161), (1 / 2, 0.178), (1, 0.188), (2, 0.203), (4, 0.213)],
)
def test_chance_level_is_the_tabulated_one(truth, ratio, chance):
    assert chance_mmcs(truth, int(512 * ratio)) == pytest.approx(chance, abs=0.006)


@pytest.mark.parametrize(
    ("ratio", "most"), [(1 / 8, 0.25), (1 / 4, 0.37), (1 / 2, 0.59), (1, 1), (4, 1)]
)
def test_ceiling_is_that_of_exact_true_features(truth, ratio, most):
    assert ceiling_mmcs(truth, int(512 * ratio)) == pytest.approx(most, abs=0.005)


def test_chunks_and_stacks_change_nothing(truth, monkeypatch):
    dictionaries = torch.randn(3, 100, 256, generator=torch.Generator().manual_seed(2))
    whole = torch.stack([(d / d.norm(dim=1, keepdim=True) @ truth.T).amax(0) for d in dictionaries])
    monkeypatch.setattr("sparse_coding.sweep.metrics.CHUNK", 7)
    torch.testing.assert_close(max_cosine(truth, dictionaries), whole)


def test_metrics_are_in_full_float32_whatever_training_uses(truth):
    torch.set_float32_matmul_precision("high")
    try:
        inside = []
        real = torch.Tensor.__matmul__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.Tensor,
                "__matmul__",
                lambda a, b: inside.append(torch.get_float32_matmul_precision()) or real(a, b),
            )
            mmcs(truth, truth)
        assert inside == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mmcs_with_larger_is_the_mean_over_the_larger_ones_and_none_without(truth):
    small = truth[:64]
    other = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    expected = (1 + mmcs(small, other).item()) / 2
    assert mmcs_with_larger(small, [truth, other]) == pytest.approx(expected, abs=1e-5)
    assert mmcs_with_larger(small, []) is None


def sums_of(x, predict, codes, batch_size) -> dict[str, float]:
    """x (n, h) through a prediction and codes (n, n_dict), in batches."""
    sums = ReconstructionSums(1, codes.shape[1], x.shape[1], CPU)
    for i in range(0, len(x), batch_size):
        part = slice(i, i + batch_size)
        sums.add(x[part], predict(x[part])[None], codes[part].T[None])
    return {name: value.item() for name, value in sums.result().items()}


@pytest.mark.parametrize("batch_size", [7, 100])
def test_controls_of_reconstruction_hold_for_any_batch_size(batch_size):
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(100, 5, generator=rng) * 3 + 10  # a mean far from 0
    codes = torch.zeros(100, 5)
    codes[:, 0] = 2.0  # always on
    codes[::4, 2] = 1.0  # on for a quarter
    mean = x.mean(dim=0)
    of_mean = sums_of(x, lambda b: mean.expand_as(b), codes, batch_size)
    assert of_mean["fvu"] == pytest.approx(1, abs=1e-5)
    assert of_mean["mse"] == pytest.approx((x - mean).square().mean().item(), rel=1e-5)
    assert of_mean["l0"] == pytest.approx(1.25)
    assert of_mean["l1"] == pytest.approx(2.25)
    assert of_mean["n_dead"] == 3  # not as many as live
    of_identity = sums_of(x, lambda b: b, codes, batch_size)
    assert of_identity["fvu"] == 0
    of_zero = sums_of(x, torch.zeros_like, codes, batch_size)
    assert of_zero["mse"] == pytest.approx(x.square().mean().item(), rel=1e-5)
    assert of_zero["fvu"] > 1


def test_n_matched_counts_features_that_the_next_larger_dictionary_has():
    small = torch.eye(4)[:3]
    larger = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 1]])  # cosines 1, .96, .71
    assert n_matched(small, [larger, torch.eye(4)]) == 2
    assert n_matched(small, []) is None


# --- of an ensemble: equal to those of its saved dictionaries ---


H = 16


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    # widths out of order: results must come back in the order of the specs
    return Ensemble(
        [SAESpec(32, 0.1, 1), SAESpec(8, 0.1, 2), SAESpec(32, 0.1, 3)], H, lr=1, device=CPU
    )


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(60, H, generator=torch.Generator().manual_seed(0))


def test_reconstruction_equals_a_few_lines_on_the_saved_dictionary(ensemble, x):
    found = reconstruction(ensemble, x.split(25))
    for i in range(3):
        saved = ensemble.dictionary(i)
        codes = torch.relu((x - saved["b_dec"]) @ saved["W_enc"] + saved["b_enc"])
        x_hat = codes @ saved["W_dec"] + saved["b_dec"]
        error = (x - x_hat).square().sum()
        assert found["l0"][i] == pytest.approx((codes > 0).sum().item() / 60)
        assert found["l1"][i] == pytest.approx(codes.sum().item() / 60, rel=1e-5)
        assert found["mse"][i] == pytest.approx(error.item() / 60 / H, rel=1e-5)
        assert found["fvu"][i] == pytest.approx(
            (error / (x - x.mean(dim=0)).square().sum()).item(), rel=1e-5
        )
        assert found["n_dead"][i] == (codes == 0).all(dim=0).sum().item()


def test_rows_of_one_autoencoder_are_the_same_bits_alone_as_among_others():
    specs = [SAESpec(512, 0.01, seed) for seed in range(3)]
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).split(128)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together, alone = (
            reconstruction(ensemble, x)
            for ensemble in (Ensemble(m, 256, lr=1, device=CPU) for m in (specs, specs[1:2]))
        )
    finally:
        torch.set_num_threads(n_threads)
    assert {key: [values[1]] for key, values in together.items()} == alone


def test_agreement_equals_a_few_lines_on_the_saved_dictionary(ensemble):
    truth = torch.nn.functional.normalize(ensemble.dictionary(2)["W_dec"][:5], dim=1)
    n_recovered = []
    for i in range(3):
        W_dec = ensemble.dictionary(i)["W_dec"]
        found = agreement(W_dec, truth)
        cosines = truth @ torch.nn.functional.normalize(W_dec, dim=1).T  # (5, n_dict)
        assert found["mmcs"] == pytest.approx(cosines.amax(1).mean().item(), abs=1e-5)
        assert found["mmcs_dict_to_truth"] == pytest.approx(cosines.amax(0).mean().item(), abs=1e-5)
        nearest = len(cosines.abs().argmax(0).unique())
        assert found["uniqueness"] == nearest / len(W_dec)
        n_recovered.append(found["n_recovered"])
    assert n_recovered == [0, 0, 5]


def test_dictionaries_matched_in_threads_are_as_one_by_one_and_few_at_a_time(truth, monkeypatch):
    """Six of 100 rows fit twice into what may be taken, whatever the number of threads."""
    rng = torch.Generator().manual_seed(0)
    dictionaries = [truth[i : i + 100] + i * torch.randn(100, 256, generator=rng) for i in range(6)]
    one_by_one = [agreement(W_dec, truth) for W_dec in dictionaries]
    assert one_by_one[0]["mcc"] == pytest.approx(1)
    assert len({found["mcc"] for found in one_by_one}) == 6
    monkeypatch.setattr(metrics, "MATCHED_BYTES", 2 * 12 * 100 * 512 + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    begun = []
    for i, found in enumerate(agreements((begun.append(W) or W for W in dictionaries), truth)):
        assert found == one_by_one[i]
        assert len(begun) == min(i + 2, 6)
    assert matched_at_once(100, 512) == 2
    assert matched_at_once(2**15, 2**15) == 1


def test_what_is_logged_while_training_are_the_same_numbers(ensemble, x):
    truth = torch.eye(H)
    logged = training_state(ensemble, x, truth)
    assert logged["train/mse"] == reconstruction(ensemble, [x])["mse"]
    assert logged["train/l0"] == reconstruction(ensemble, [x])["l0"]
    dictionaries = (ensemble.dictionary(i)["W_dec"] for i in range(3))
    expected = [agreement(W_dec, truth)["mmcs"] for W_dec in dictionaries]
    assert logged["metrics/mmcs"] == pytest.approx(expected)


def test_mcc_and_uniqueness_of_true_features_in_any_order_and_sign_are_one(truth):
    shuffled = truth[torch.randperm(512, generator=torch.Generator().manual_seed(1))][:300] * -2
    similarity = matches(shuffled, truth)
    assert mcc(similarity) == pytest.approx(1, abs=1e-5)
    assert uniqueness(similarity) == 1


def test_mcc_matches_one_to_one_where_uniqueness_counts_collisions():
    """Two rows at the first feature: the second is matched with what is left, at 0.6."""
    features = torch.eye(3)
    dictionary = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
    similarity = matches(dictionary, features)
    assert mcc(similarity) == pytest.approx((1 + 0.6) / 2)
    assert uniqueness(similarity) == 0.5
    # the best matching is not the greedy one: 0.9 and 0.8 beat 1.0 and 0.1
    assert mcc(torch.tensor([[1.0, 0.9], [0.8, 0.1]])) == pytest.approx((0.9 + 0.8) / 2)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_detection_is_counted_for_each_latent_with_dead_ones_as_zero(batch_size):
    """Of eight samples: a latent that is right in 2 of the 3 where it is on, and misses 2 of 4; one
    that is always right, with a negative code; a dead one; one whose feature is never on."""
    codes = torch.zeros(8, 4)
    codes[[0, 1, 7], 0] = torch.tensor([1.0, 2.0, 3.0])
    codes[2:4, 1] = -1.0
    codes[5, 3] = 1.0
    truth = torch.zeros(8, 5, dtype=torch.bool)
    truth[[0, 1, 2, 3], 4] = True
    truth[2:4, 0] = True
    truth[:, 1] = True
    x = torch.arange(0.0, 8).view(8, 1).repeat(1, 2)  # the first is 0: nothing to shrink
    sums = DetectionSums(torch.tensor([4, 0, 1, 2]))
    for parts in zip(*(t.split(batch_size) for t in (x, x / 2, codes, truth)), strict=True):
        sums.add(*parts)
    found = sums.result()
    assert found["precision"] == pytest.approx((2 / 3 + 1 + 0 + 0) / 4)
    assert found["recall"] == pytest.approx((2 / 4 + 1 + 0 + 0) / 4)
    assert found["f1"] == pytest.approx((4 / 7 + 1 + 0 + 0) / 4)
    assert found["shrinkage"] == pytest.approx(0.5)
