"""What is written for other libraries, computed again with torch; with them: test_peers.py."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparse_coding.config import UserError
from sparse_coding.sae.exported import (
    EXPORTERS,
    export_circuit_tracer,
    export_dictionary_learning,
    export_sparsify,
)
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


def random_transcoder(skip: bool, **more) -> SparseAutoencoder:
    W_skip = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)) if skip else None
    return random_sae(W_skip=W_skip, transcodes=True, **more)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_gets_a_transcoder_as_its_encode_and_forward_take_it(tmp_path, skip):
    sae = random_transcoder(skip, top_k=3)
    export_sparsify(tmp_path, sae, metadata={"layer": 1})
    t, config = (
        load_file(tmp_path / "sae.safetensors"),
        json.loads((tmp_path / "cfg.json").read_text()),
    )
    assert (config["transcode"], config["skip_connection"]) == (True, skip)
    assert ("W_skip" in t) == skip
    pre = (X @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    codes = torch.where(pre >= pre.sort(dim=1).values[:, -3:-2], pre, 0.0)
    y_hat = codes @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].mT if skip else 0.0)
    torch.testing.assert_close(y_hat, sae.decode(sae.encode(X), X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("more", [{}, {"threshold": THRESHOLDS}])
def test_circuit_tracer_gets_a_file_of_the_layer_and_a_config(tmp_path, skip, more):
    """Read as its load_relu_transcoder does, and config.yaml as its load_transcoder_from_hub."""
    sae, folder = random_transcoder(skip, **more), tmp_path / "cell"
    export_circuit_tracer(folder, sae, metadata={"model": "gpt2", "layer": 7})
    t = load_file(folder / "layer_7.safetensors")
    pre = torch.nn.functional.linear(X, t["W_enc"], t["b_enc"])
    threshold = t.get("activation_function.threshold", torch.zeros(()))
    codes = pre * (pre > threshold)
    y_hat = codes @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].T if skip else 0.0)
    torch.testing.assert_close(y_hat, sae.decode(sae.encode(X), X), atol=1e-5, rtol=1e-5)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {
        "model_kind": "transcoder_set",
        "model_name": "gpt2",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "cell",
    }


def test_what_a_library_lacks_is_refused(tmp_path):
    topk, plain = random_transcoder(False, top_k=3), random_sae()
    for export, sae, message in (
        (export_dictionary_learning, topk, "dictionary_learning has no transcoders"),
        (export_circuit_tracer, topk, "relu and jumprelu transcoders alone"),
        (export_circuit_tracer, plain, "relu and jumprelu transcoders alone"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "out", sae, metadata={"layer": 1})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", EXPORTERS)
def test_the_same_autoencoder_gives_the_same_bytes(tmp_path, library):
    transcodes = library == "circuit_tracer"
    sae = random_transcoder(True) if transcodes else random_sae(top_k=3)
    for name in ("first", "second"):
        of = {"arch": "relu" if transcodes else "topk", "layer": 1, "model": "demo"}
        EXPORTERS[library](tmp_path / name / "cell", sae, metadata=of)
    files = sorted(path.name for path in (tmp_path / "first" / "cell").iterdir())
    assert len(files) == 2
    for file in files:
        first, second = (tmp_path / name / "cell" / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


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
