"""What is written for other libraries, computed again with torch; with them: test_peers.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.config import UserError
from sparse_coding.sae.exported import EXPORTERS, export_dictionary_learning, export_sparsify
from sparse_coding.sae.families import PREFIXES, bands
from sparse_coding.sae.saved import SparseAutoencoder

THRESHOLDS = torch.linspace(0, 2, 12)
X = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))


def random_sae(activation_dim: int = 5, n_dict: int = 12, **more) -> SparseAutoencoder:
    """b_dec is not 0, rows of W_dec have lengths other than 1."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((activation_dim, n_dict), (n_dict,), (n_dict, activation_dim), (activation_dim,))
    return SparseAutoencoder(*(torch.randn(s, generator=rng) for s in shapes), metadata={}, **more)


def test_the_exported_weights_give_the_same_reconstruction_with_rows_of_length_one(tmp_path):
    sae = random_sae()
    export_dictionary_learning(tmp_path / "out", sae, metadata={})
    state = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    encoder, decoder = torch.nn.Linear(5, 12), torch.nn.Linear(12, 5, bias=False)
    encoder.load_state_dict({n: state[f"encoder.{n}"] for n in ("weight", "bias")})
    decoder.load_state_dict({"weight": state["decoder.weight"]})
    x_hat = decoder(encoder(X - state["bias"]).relu()) + state["bias"]
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(X)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder.weight.norm(dim=0), torch.ones(12))
    assert len(state) == 4


def test_the_config_says_which_class_reads_it_and_where_it_comes_from(tmp_path):
    about = {"model": "demo", "layer": 1, "site": "mlp_act", "context_length": 128, "note": "x"}
    export_dictionary_learning(tmp_path, random_sae(), metadata=about)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["trainer"]["dict_class"] == "AutoEncoder"
    assert (config["trainer"]["activation_dim"], config["trainer"]["dict_size"]) == (5, 12)
    assert (config["trainer"]["lm_name"], config["trainer"]["layer"]) == ("demo", 1)
    assert config["buffer"]["ctx_len"] == 128
    assert config["sparse_coding"] == about


@pytest.mark.parametrize("library", EXPORTERS)
def test_the_same_autoencoder_gives_the_same_bytes(tmp_path, library):
    for name in ("first", "second"):
        EXPORTERS[library](tmp_path / name, random_sae(top_k=3), metadata={"arch": "topk"})
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize(
    ("more", "about", "dict_class"),
    [
        ({"top_k": 3}, {"arch": "topk", "target_l0": 3}, "AutoEncoderTopK"),
        ({"top_k": 3}, {}, "AutoEncoderTopK"),
        ({"threshold": THRESHOLDS}, {"arch": "jumprelu", "target_l0": 3}, "JumpReluAutoEncoder"),
        ({"threshold": THRESHOLDS}, {}, "JumpReluAutoEncoder"),
        ({"threshold": torch.ones(12)}, {"arch": "batchtopk", "target_l0": 3}, "BatchTopKSAE"),
        ({"threshold": torch.ones(12)}, {"arch": "batchtopk"}, "JumpReluAutoEncoder"),
        ({"threshold": THRESHOLDS}, {"arch": "batchtopk", "target_l0": 3}, "JumpReluAutoEncoder"),
        (
            {"threshold": torch.ones(12)},
            {"arch": "matryoshka", "target_l0": 3},
            "MatryoshkaBatchTopKSAE",
        ),
    ],
)
def test_each_kind_gets_the_class_that_has_its_parts(tmp_path, more, about, dict_class):
    export_dictionary_learning(tmp_path, random_sae(**more), metadata=about)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert trainer["dict_class"] == dict_class
    has_k = dict_class != "JumpReluAutoEncoder"
    assert trainer.get("k") == (3 if has_k else None)
    assert ("k" in state) == has_k
    if "group_sizes" in state:
        assert state["group_sizes"].tolist() == [end - first for first, end in bands(12, PREFIXES)]


def test_b_dec_is_folded_where_it_would_not_be_taken_off_the_input(tmp_path):
    sae = random_sae(threshold=THRESHOLDS)
    export_dictionary_learning(tmp_path, sae, metadata={})
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    pre = X @ state["W_enc"] + state["b_enc"]
    codes = pre * (pre > state["threshold"])
    torch.testing.assert_close(codes, sae.encode(X), atol=1e-5, rtol=1e-5)
    assert torch.equal(state["b_dec"], sae.b_dec)


def test_rows_of_other_lengths_stay_where_they_decide_what_is_largest(tmp_path):
    sae = random_sae(top_k=3)
    export_dictionary_learning(tmp_path / "dictionary_learning", sae, metadata={})
    state = torch.load(tmp_path / "dictionary_learning" / "ae.pt", weights_only=True)
    assert torch.equal(state["decoder.weight"].T, sae.W_dec)
    export_sparsify(tmp_path / "sparsify", sae, metadata={})
    weights = load_file(tmp_path / "sparsify" / "sae.safetensors")
    assert torch.equal(weights["W_dec"], sae.W_dec)
    assert torch.equal(weights["encoder.weight"].T, sae.W_enc)


def test_sparsify_finds_its_own_fields_filled(tmp_path):
    export_sparsify(tmp_path, random_sae(top_k=3), metadata={"model": "demo"})
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"]) == (5, 12, 3)
    assert config["activation"] == "topk"
    assert not config["transcode"]
    assert config["sparse_coding"] == {"model": "demo"}


@pytest.mark.parametrize("more", [{"threshold": THRESHOLDS}, {}])
def test_what_sparsify_lacks_is_not_exported_to_it(tmp_path, more):
    with pytest.raises(UserError, match="cell: sparsify has topk SAEs alone"):
        export_sparsify(tmp_path / "cell", random_sae(**more), metadata={})
    assert list(tmp_path.iterdir()) == []


def test_no_other_library_gets_a_refined_autoencoder(tmp_path):
    some = torch.ones(2)
    tensors = {"W_enc": torch.eye(2), "b_enc": some, "W_dec": torch.eye(2), "b_dec": some}
    sae = SparseAutoencoder(**tensors, metadata={}, threshold=some, first_threshold=some)
    with pytest.raises(UserError, match="dictionary_learning has no SAE that refines its codes"):
        export_dictionary_learning(tmp_path / "x", sae, metadata={})
    assert not (tmp_path / "x").exists()
