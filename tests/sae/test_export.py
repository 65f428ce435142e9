"""ae.pt for dictionary_learning: computed again with torch.nn.Linear, as that library does."""

import json

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.sae.saved import SparseAutoencoder, export_dictionary_learning


def random_sae(activation_dim: int = 5, n_dict: int = 12, **more) -> SparseAutoencoder:
    """b_dec is not 0, rows of W_dec have lengths other than 1."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((activation_dim, n_dict), (n_dict,), (n_dict, activation_dim), (activation_dim,))
    return SparseAutoencoder(*(torch.randn(s, generator=rng) for s in shapes), about={}, **more)


def test_the_exported_weights_give_the_same_reconstruction_with_rows_of_length_one(tmp_path):
    sae = random_sae()
    export_dictionary_learning(tmp_path / "out", sae, about={})
    state = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    encoder, decoder = torch.nn.Linear(5, 12), torch.nn.Linear(12, 5, bias=False)
    encoder.load_state_dict({n: state[f"encoder.{n}"] for n in ("weight", "bias")})
    decoder.load_state_dict({"weight": state["decoder.weight"]})
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    x_hat = decoder(encoder(x - state["bias"]).relu()) + state["bias"]
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder.weight.norm(dim=0), torch.ones(12))
    assert len(state) == 4


def test_the_config_says_which_class_reads_it_and_where_it_comes_from(tmp_path):
    about = {"model": "demo", "layer": 1, "site": "mlp_act", "context_length": 128, "note": "x"}
    export_dictionary_learning(tmp_path, random_sae(), about=about)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["trainer"]["dict_class"] == "AutoEncoder"
    assert (config["trainer"]["activation_dim"], config["trainer"]["dict_size"]) == (5, 12)
    assert (config["trainer"]["lm_name"], config["trainer"]["layer"]) == ("demo", 1)
    assert config["buffer"]["ctx_len"] == 128
    assert config["sparse_coding"] == about


def test_the_same_autoencoder_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        export_dictionary_learning(tmp_path / name, random_sae(), about={})
    for file in ("ae.pt", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("more", [{"threshold": torch.zeros(12)}, {"top_k": 3}])
def test_what_is_more_than_a_relu_is_not_exported(tmp_path, more):
    with pytest.raises(UserError, match="plain ReLU"):
        export_dictionary_learning(tmp_path, random_sae(**more), about={})
    assert list(tmp_path.iterdir()) == []
