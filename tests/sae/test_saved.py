"""Saved autoencoders: the formulas by hand, the folder read back, what is refused and how."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_coding.config import UserError
from sparse_coding.sae import saved
from sparse_coding.sae.saved import (
    SparseAutoencoder,
    load_sae,
    save_sae,
    unscaled,
    with_unit_rows,
)

# x − b_dec = (2, 3), pre-activations (1, 3, −0.5), so codes (1, 3, 0) and x_hat = (2, 1)
BY_HAND = {
    "W_enc": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]),
    "b_enc": torch.tensor([-1.0, 0.0, 0.5]),
    "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]]),
    "b_dec": torch.tensor([1.0, -2.0]),
}
X = torch.tensor([3.0, 1.0])
ABOUT = {
    "model": "demo",
    "weight_hash": "0f3a",
    "layer": 1,
    "site": "mlp_act",
    "context_length": 128,
    "dataset": "stdlib",
    "l1_alpha": 0.1,
    "prepend_bos": False,
}
FOREIGN = {  # a cfg.json of sae_lens 6
    "architecture": "standard",
    "d_in": 2,
    "d_sae": 3,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.12",
        "model_name": "gpt2-small",
        "hook_name": "blocks.7.hook_resid_post",
        "context_size": 64,
    },
}


def random_tensors(activation_dim: int = 5, n_dict: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """b_dec is not 0, rows of W_dec have lengths other than 1."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (activation_dim, n_dict), "b_enc": (n_dict,)}
    shapes |= {"W_dec": (n_dict, activation_dim), "b_dec": (activation_dim,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def write_foreign(folder: Path, tensors: dict[str, Tensor], **changes) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(FOREIGN | changes))
    return folder


def test_codes_and_reconstruction_are_those_computed_by_hand():
    sae = SparseAutoencoder(**BY_HAND, metadata={})
    assert sae.encode(X).tolist() == [1, 3, 0]
    assert sae.decode(sae.encode(X)).tolist() == [2, 1]
    assert (sae.activation_dim, sae.n_dict) == (2, 3)
    assert sae.encode(X.expand(4, 7, 2)).shape == (4, 7, 3)


def test_a_jumprelu_code_must_exceed_its_threshold_and_topk_keeps_the_largest():
    thresholds = torch.tensor([1.0, 1.0, 0.0])
    assert SparseAutoencoder(**BY_HAND, metadata={}, threshold=thresholds).encode(X).tolist() == [
        0,
        3,
        0,
    ]
    assert SparseAutoencoder(**BY_HAND, metadata={}, top_k=1).encode(X).tolist() == [0, 3, 0]
    assert SparseAutoencoder(**BY_HAND, metadata={}, top_k=3).encode(X).tolist() == [1, 3, 0]


def test_a_saved_autoencoder_is_read_back_to_the_bit_with_what_it_is_about(tmp_path):
    tensors = random_tensors()
    save_sae(tmp_path / "cell", tensors, metadata=ABOUT)
    sae = load_sae(tmp_path / "cell")
    assert all(torch.equal(sae.tensors[name], tensors[name]) for name in tensors)
    assert sae.metadata == ABOUT
    assert (sae.threshold, sae.top_k) == (None, None)


def of_kind(kind: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and options of save_sae for an architecture of SAELens."""
    tensors = random_tensors()
    if kind == "jumprelu":
        tensors["threshold"] = torch.linspace(0, 2, 12)
    return tensors, {"top_k": 3} if kind == "topk" else {}


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_one_with_thresholds_or_a_k_is_read_back_to_the_bit_too(tmp_path, kind):
    tensors, options = of_kind(kind)
    save_sae(tmp_path, tensors, metadata=ABOUT, **options)
    sae = load_sae(tmp_path)
    found = sae.tensors | ({"threshold": sae.threshold} if kind == "jumprelu" else {})
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (sae.top_k, sae.threshold is None) == (
        (None, False) if kind == "jumprelu" else (3, True)
    )
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == kind
    assert config.get("k") == options.get("top_k")
    assert config.get("rescale_acts_by_decoder_norm") == (False if kind == "topk" else None)


def test_one_of_plain_relu_says_nothing_of_thresholds_or_a_k(tmp_path):
    """The fields, in their order, since the first of our folders."""
    save_sae(tmp_path, random_tensors(), metadata=ABOUT)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert list(config) == [*FOREIGN, "checksum"]
    assert config["architecture"] == "standard"


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        save_sae(tmp_path / name, random_tensors(), metadata=ABOUT)
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_another_device_or_dtype_gives_the_same_autoencoder():
    sae = SparseAutoencoder(**BY_HAND, metadata=ABOUT, threshold=torch.zeros(3), top_k=2)
    doubled = sae.to(dtype=torch.float64)
    assert doubled.threshold.dtype == doubled.W_enc.dtype == torch.float64
    assert doubled.encode(X.double()).tolist() == [1, 3, 0]
    assert (doubled.metadata, doubled.top_k) == (ABOUT, 2)
    assert sae.W_enc.dtype == torch.float32  # unchanged


def test_saelens_finds_its_own_fields_filled(tmp_path):
    save_sae(tmp_path, random_tensors(), metadata=ABOUT)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"]) == (5, 12)
    assert config["apply_b_dec_to_input"] is True
    metadata = config["metadata"]
    assert metadata["sae_lens_version"] == "6.0.0"
    assert metadata["model_name"] == "demo"
    assert metadata["hook_name"] == "blocks.1.mlp.hook_post"
    assert (metadata["context_size"], metadata["dataset_path"]) == (128, "stdlib")
    assert metadata["prepend_bos"] is False
    assert metadata["sparse_coding"] == ABOUT


@pytest.mark.parametrize(
    ("site", "hook", "reshape"),
    [
        ("mlp_act", "blocks.3.mlp.hook_post", "none"),
        ("mlp_out", "blocks.3.hook_mlp_out", "none"),
        ("resid_post", "blocks.3.hook_resid_post", "none"),
        ("attn_concat", "blocks.3.attn.hook_z", "hook_z"),
        ("elsewhere", None, "none"),
    ],
)
def test_each_site_has_the_name_of_its_hook_and_is_known_again_by_it(tmp_path, site, hook, reshape):
    save_sae(tmp_path / "ours", BY_HAND, metadata={"site": site, "layer": 3})
    config = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert config["metadata"].get("hook_name") == hook
    assert config["reshape_activations"] == reshape
    foreign = write_foreign(tmp_path / "foreign", BY_HAND, metadata={"hook_name": hook})
    known = {"hook_name": hook, "site": site, "layer": 3} if hook else {}
    assert load_sae(foreign).metadata == known


def test_a_bias_fixed_at_zero_is_not_applied_to_the_input(tmp_path):
    save_sae(tmp_path, BY_HAND | {"b_dec": torch.zeros(2)}, metadata={})
    assert json.loads((tmp_path / "cfg.json").read_text())["apply_b_dec_to_input"] is False


def test_a_save_that_is_killed_leaves_no_folder_that_looks_whole(tmp_path, monkeypatch):
    save_sae(tmp_path, BY_HAND, metadata={})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        save_sae(tmp_path, random_tensors(), metadata={})
    with pytest.raises(UserError, match=r"has no cfg\.json"):
        load_sae(tmp_path)


def test_a_foreign_folder_tells_what_it_knows(tmp_path):
    about = load_sae(write_foreign(tmp_path / "sae", BY_HAND)).metadata
    assert about == {
        "model": "gpt2-small",
        "hook_name": "blocks.7.hook_resid_post",
        "context_length": 64,
        "site": "resid_post",
        "layer": 7,
    }


def test_a_decoder_bias_that_is_not_applied_to_the_input_is_folded_into_the_encoders(tmp_path):
    tensors = random_tensors()
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    folder = write_foreign(tmp_path / "sae", tensors, d_in=5, d_sae=12, apply_b_dec_to_input=False)
    sae = load_sae(folder)
    codes = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(codes), codes @ tensors["W_dec"] + tensors["b_dec"])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("chosen", "more"), [("", {}), ("jumprelu_", {"threshold": True}), ("topk_", {"top_k": 3})]
)
def test_transcoders_are_saved_under_sae_lens_names_and_read_again(tmp_path, chosen, more, skip):
    tensors, rng = random_tensors(), torch.Generator().manual_seed(2)
    if more.get("threshold"):
        tensors["threshold"] = torch.rand(12, generator=rng)
    if skip:
        tensors["W_skip"] = torch.randn(5, 5, generator=rng)
    about = {"model": "demo", "layer": 1, "site": "mlp_in", "target_site": "mlp_out"}
    top_k = more.get("top_k")
    save_sae(tmp_path, tensors, metadata=about, top_k=top_k, transcodes=True)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == f"{chosen}{'skip_' * skip}transcoder"
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (5, 5, False)
    hooks = [config["metadata"][name] for name in ("hook_name", "hook_name_out")]
    assert hooks == ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
    sae = load_sae(tmp_path)
    assert (sae.transcodes, sae.top_k, sae.metadata) == (True, top_k, about)
    assert (sae.W_skip is not None) == skip
    x = torch.randn(20, 5, generator=rng)
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    codes = pre.relu()
    if "threshold" in tensors:
        codes = codes * (pre > tensors["threshold"])
    if top_k:
        codes = torch.where(codes >= codes.sort(dim=1).values[:, -3:-2], codes, 0.0)
    y_hat = codes @ tensors["W_dec"] + tensors["b_dec"] + (x @ tensors["W_skip"].T if skip else 0.0)
    assert torch.equal(sae.encode(x), codes)
    torch.testing.assert_close(sae.decode(codes, x), y_hat)


def test_a_foreign_transcoder_tells_its_two_sites(tmp_path):
    of = {"hook_name": "blocks.7.mlp.hook_in", "hook_name_out": "blocks.7.hook_mlp_out"}
    changes = {"architecture": "transcoder", "d_out": 2, "metadata": of}
    sae = load_sae(write_foreign(tmp_path / "sae", BY_HAND, apply_b_dec_to_input=False, **changes))
    assert sae.transcodes
    known = [sae.metadata.get(name) for name in ("site", "target_site", "layer")]
    assert known == ["mlp_in", "mlp_out", 7]
    torch.testing.assert_close(sae.encode(X), (X @ BY_HAND["W_enc"] + BY_HAND["b_enc"]).relu())


def test_folding_two_powers_of_two_is_exact():
    rng = torch.Generator().manual_seed(0)
    tensors = random_tensors() | {"W_skip": torch.randn(5, 5, generator=rng)}
    x, options = torch.randn(50, 5, generator=rng), dict(metadata={}, transcodes=True)
    inside = SparseAutoencoder(**tensors, **options)
    raw = SparseAutoencoder(**unscaled(tensors, 0.25, 8.0), **options)
    scaled = 0.25 * x
    expected = inside.decode(inside.encode(scaled), scaled) / 8
    torch.testing.assert_close(raw.decode(raw.encode(x), x), expected)
    assert torch.equal(raw.W_dec, inside.W_dec)


def test_topk_that_ranks_by_decoder_length_is_read_with_rows_of_length_one(tmp_path):
    tensors = random_tensors()
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    changes = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    folder = write_foreign(tmp_path / "sae", tensors, d_in=5, d_sae=12, **changes)
    sae = load_sae(folder)
    lengths = tensors["W_dec"].norm(dim=1)
    pre = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu() * lengths
    codes = torch.where(pre >= pre.sort(dim=1).values[:, -3:-2], pre, 0.0)
    x_hat = (codes / lengths) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(sae.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat, atol=1e-5, rtol=1e-5)


def test_rows_of_length_one_change_no_reconstruction_even_where_a_row_is_zero():
    tensors = random_tensors()
    tensors["W_dec"][4] = 0.0
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    before = SparseAutoencoder(**tensors, metadata={})
    after = SparseAutoencoder(**(tensors | with_unit_rows(tensors)), metadata={})
    torch.testing.assert_close(after.W_dec.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(
        after.decode(after.encode(x)), before.decode(before.encode(x)), atol=1e-5, rtol=1e-5
    )


def test_low_precision_weights_are_read_as_float32(tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in BY_HAND.items()}
    sae = load_sae(write_foreign(tmp_path / "sae", halves, dtype="bfloat16"))
    assert sae.W_dec.dtype == torch.float32
    assert sae.encode(X).tolist() == [1, 3, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "gated"},
            "is a gated SAE; only standard, jumprelu, topk, matryoshka_refined",
        ),
        ({"normalize_activations": "layer_norm"}, "normalize_activations layer_norm"),
        (
            {"architecture": "transcoder", "d_out": 3},
            "predicts activations of width 3 from such of 2; only equal ones",
        ),
        ({"architecture": "transcoder"}, "predicts activations of width None from such of 2"),
        (
            {"architecture": "transcoder", "d_out": 2, "apply_b_dec_to_input": True},
            "apply_b_dec_to_input True can't be honoured",
        ),
        (
            {"architecture": "skip_transcoder", "d_out": 2, "apply_b_dec_to_input": False},
            "lacks W_skip",
        ),
        ({"metadata": None}, "not of SAELens 6"),
        ({"d_sae": 4}, r"W_enc has shape \(2, 3\), but d_in 2 and d_sae 4"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"architecture": "topk"}, "k None of a topk SAE must be 1 to d_sae 3"),
        ({"architecture": "topk", "k": 4}, "k 4 of a topk SAE"),
    ],
)
def test_what_the_formulas_cannot_express_is_refused_with_its_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_sae(write_foreign(tmp_path / "sae", BY_HAND, **changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b_dec": torch.tensor([1.0, float("nan")])}, "b_dec holds NaN or inf"),
        ({"W_dec": torch.ones(2, 3)}, r"W_dec has shape \(2, 3\)"),
        ({"scaling_factor": torch.ones(3)}, "also has scaling_factor"),
    ],
)
def test_tensors_that_cannot_be_right_are_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        load_sae(write_foreign(tmp_path / "sae", BY_HAND | tensors))


def test_a_folder_that_is_none_or_is_no_sae_is_said_to_be_so(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no saved SAE: it has no cfg\.json"):
        load_sae(tmp_path)
    folder = write_foreign(tmp_path / "sae", BY_HAND)
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"is damaged .* write or fetch"):
        load_sae(folder)
    (folder / "cfg.json").write_text('{"architecture": ')
    with pytest.raises(UserError, match="not JSON"):
        load_sae(folder)
    (folder / "cfg.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="a list, not a JSON object"):
        load_sae(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"no sae_weights\.safetensors"):
        load_sae(folder)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_one_flipped_bit_of_ours_is_refused(tmp_path, name):
    save_sae(tmp_path, random_tensors(), metadata=ABOUT)
    load_sae(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[content.index(b"128") + 1 if name == "cfg.json" else -2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged \(its checksum differs\): write or"):
        load_sae(tmp_path)


def test_files_without_a_checksum_are_read_as_they_are(tmp_path):
    tensors = random_tensors()
    save_sae(tmp_path, tensors, metadata=ABOUT)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["checksum"]
    config["metadata"]["sparse_coding"]["layer"] = 7
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert load_sae(tmp_path).metadata["layer"] == 7


def test_a_refined_autoencoder_chooses_its_codes_twice_and_is_read_back_the_same(tmp_path):
    """By hand: W_enc and W_dec are the identity, b_dec 0. x = (1, 0.5) and thresholds .8, then .6:
    first codes (1, 0) leave (0, .5) over, 0.3 of which lifts the second from .5 to .65."""
    eye, zero = torch.eye(2), torch.zeros(2)
    tensors = {"W_enc": eye, "b_enc": zero, "W_dec": eye, "b_dec": zero}
    tensors |= {"threshold": torch.full((2,), 0.6), "first_threshold": torch.full((2,), 0.8)}
    save_sae(tmp_path, tensors, metadata={})
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.encode(torch.tensor([1.0, 0.5])), torch.tensor([1.0, 0.65]))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["refinement"]) == ("matryoshka_refined", 0.3)
    del config["checksum"]
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"refinement": 0.5}))
    with pytest.raises(UserError, match=r"refinement 0\.5 can't be honoured here"):
        load_sae(tmp_path)
