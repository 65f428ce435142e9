"""Metrics of an ensemble equal those of its saved dictionaries, recomputed by hand."""

import pytest
import torch

from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep.metrics import agreement_with_truth, reconstruction, training_state

CPU = torch.device("cpu")
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
    truth = torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together, alone = (
            agreement_with_truth(ensemble, truth) | reconstruction(ensemble, x)
            for ensemble in (Ensemble(m, 256, lr=1, device=CPU) for m in (specs, specs[1:2]))
        )
    finally:
        torch.set_num_threads(n_threads)
    assert {key: [values[1]] for key, values in together.items()} == alone


def test_agreement_equals_a_few_lines_on_the_saved_dictionary(ensemble):
    truth = torch.nn.functional.normalize(ensemble.dictionary(2)["W_dec"][:5], dim=1)
    found = agreement_with_truth(ensemble, truth)
    for i in range(3):
        W_dec = ensemble.dictionary(i)["W_dec"]
        cosines = truth @ torch.nn.functional.normalize(W_dec, dim=1).T  # (5, n_dict)
        assert found["mmcs"][i] == pytest.approx(cosines.amax(1).mean().item(), abs=1e-5)
        assert found["mmcs_dict_to_truth"][i] == pytest.approx(
            cosines.amax(0).mean().item(), abs=1e-5
        )
    assert found["n_recovered"] == [0, 0, 5]


def test_what_is_logged_while_training_are_the_same_numbers(ensemble, x):
    truth = torch.eye(H)
    logged = training_state(ensemble, x, truth)
    assert logged["train/mse"] == reconstruction(ensemble, [x])["mse"]
    assert logged["train/l0"] == reconstruction(ensemble, [x])["l0"]
    assert logged["metrics/mmcs"] == pytest.approx(agreement_with_truth(ensemble, truth)["mmcs"])
