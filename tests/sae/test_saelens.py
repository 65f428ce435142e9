"""cfg.json of strangers: what changes the activations is honoured or refused by its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparse_coding.config import UserError
from sparse_coding.sae.saelens import saved_flags, site_of
from sparse_coding.sae.saved import load_sae

METADATA = {  # as sae_lens 6.54 writes it
    "sae_lens_version": "6.54.0",
    "sae_lens_training_version": "6.54.0",
    "model_name": "gpt2-small",
    "model_class_name": "HookedTransformer",
    "hook_name": "blocks.7.hook_resid_post",
    "hook_head_index": None,
    "context_size": 64,
    "dataset_path": "Skylion007/openwebtext",
    "prepend_bos": True,
    "seqpos_slice": [None],
    "exclude_special_tokens": False,
    "model_from_pretrained_kwargs": {"center_writing_weights": False},
}
CONFIG = {"architecture": "standard", "d_in": 2, "d_sae": 3, "dtype": "float32", "device": "cpu",
          "apply_b_dec_to_input": True, "normalize_activations": "none",
          "reshape_activations": "none", "metadata": METADATA}  # fmt: skip


def write_foreign(folder: Path, *, config: dict | None = None, **metadata) -> Path:
    folder.mkdir(exist_ok=True)
    shapes = {"W_enc": (2, 3), "b_enc": (3,), "W_dec": (3, 2), "b_dec": (2,)}
    save_file({k: torch.ones(s) for k, s in shapes.items()}, folder / "sae_weights.safetensors")
    content = CONFIG | {"metadata": METADATA | metadata} | (config or {})
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def told(folder: Path, **metadata) -> dict:
    return load_sae(write_foreign(folder, **metadata)).metadata


def test_what_saelens_writes_is_told_by_our_names(tmp_path):
    assert told(tmp_path / "sae") == {
        "model": "gpt2-small",
        "hook_name": "blocks.7.hook_resid_post",
        "site": "resid_post",
        "layer": 7,
        "context_length": 64,
        "dataset": "Skylion007/openwebtext",
        "prepend_bos": True,
    }


def test_what_can_be_honoured_is_told(tmp_path):
    options = {"center_writing_weights": True, "dtype": "torch.bfloat16", "revision": "step3000"}
    known = told(tmp_path / "sae", model_from_pretrained_kwargs=options, prepend_bos=False)
    assert known["center_writing_weights"] is True
    assert (known["dtype"], known["model_revision"]) == ("bfloat16", "step3000")
    assert "prepend_bos" not in known


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.0.mlp.hook_post", ("mlp_act", 0)),
        ("blocks.11.hook_mlp_out", ("mlp_out", 11)),
        ("blocks.3.attn.hook_z", ("attn_concat", 3)),
        ("blocks.8.hook_resid_pre", ("resid_post", 7)),
        ("blocks.0.hook_resid_pre", (None, None)),  # the embedding
        ("blocks.3.hook_attn_out", (None, None)),
        ("blocks.3.hook_resid_mid", (None, None)),
        ("model.layers.3", (None, None)),
        ("blocks.3.hook_resid_post.", (None, None)),
        (None, (None, None)),
    ],
)
def test_a_hook_is_known_or_none_of_ours(hook, place):
    assert site_of(hook) == place


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"checkpoint_index": 3}, "checkpoint_index 3"),
        ({"checkpoint_value": 0}, "checkpoint_value 0"),
        ({"first_n_layers": 2}, "first_n_layers 2"),
        ({"load_in_8bit": True}, "load_in_8bit True"),
        ({"dtype": "float16"}, "dtype float16"),
        ({"torch_dtype": "int8"}, "torch_dtype int8"),
        ({"center_writing_weights": "yes"}, "center_writing_weights yes"),
        ({"revision": 3}, "revision 3"),
        ({"a\nb": 1}, "a"),
        ({"fold_ln": True, "center_unembed": True, "device": "cuda", "n_devices": 2}, None),
        ({"fold_value_biases": True, "refactor_factored_attn_matrices": True}, None),
        ({"load_in_4bit": False, "quantization_config": None}, None),
    ],
)
def test_options_of_the_model_are_harmless_or_refused_by_name(tmp_path, options, named):
    if named is None:
        told(tmp_path / "sae", model_from_pretrained_kwargs=options)
        return
    with pytest.raises(UserError, match=f"model_from_pretrained_kwargs has {named}"):
        told(tmp_path / "sae", model_from_pretrained_kwargs=options)


@pytest.mark.parametrize("hook", ["blocks.3.attn.hook_z", "model.layers.3.self_attn"])
def test_value_biases_that_are_folded_are_refused_where_they_change_the_heads(tmp_path, hook):
    for name in ("fold_value_biases", "refactor_factored_attn_matrices"):
        with pytest.raises(UserError, match=name):
            told(tmp_path / "sae", hook_name=hook, model_from_pretrained_kwargs={name: True})


@pytest.mark.parametrize(
    "metadata",
    [
        {"hook_head_index": 3},
        {"seqpos_slice": [5, -5]},
        {"use_chat_formatting": True},
        {"prepend_bos": "yes"},
        {"context_size": "64"},
        {"context_size": 0},
        {"model_name": 3},
        {"hook_name": ["blocks.7.hook_resid_post"]},
        {"dataset_path": {"a": 1}},
        {"model_from_pretrained_kwargs": [1]},
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(tmp_path, metadata):
    (name,) = metadata
    with pytest.raises(UserError, match=f"cfg.json: {name}"):
        told(tmp_path / "sae", **metadata)


@pytest.mark.parametrize(
    "config",
    [
        {"d_in": "2"},
        {"d_in": True},
        {"d_sae": 3.0},
        {"d_sae": None},
        {"dtype": "float8_e4m3fn"},
        {"dtype": 3},
        {"apply_b_dec_to_input": "false"},
        {"apply_b_dec_to_input": [0]},
        {"reshape_activations": "hook_q"},
        {"activation_fn": "tanh-relu"},
        {"rescale_acts_by_decoder_norm": "no"},
    ],
)
def test_fields_of_other_types_or_meanings_are_refused_by_name(tmp_path, config):
    (name,) = config
    with pytest.raises(UserError, match=f"cfg.json: {name}"):
        load_sae(write_foreign(tmp_path / "sae", config=config))


@pytest.mark.parametrize("normalised", ["layer_norm", "expected_average_only_in", 3, ["none"]])
def test_other_normalisations_are_refused_by_name(tmp_path, normalised):
    with pytest.raises(UserError, match="normalize_activations"):
        load_sae(write_foreign(tmp_path / "sae", config={"normalize_activations": normalised}))


def test_only_flags_that_are_asked_for_are_taken_and_only_numbers_and_texts(tmp_path):
    flags = {"layer": 3, "held_out": 0.05, "model": "--output-dir", "output_dir": "/", "site": None}
    argv = saved_flags(tmp_path, flags, ("model", "layer", "held_out", "site", "dataset"))
    assert argv == ["--model=--output-dir", "--layer=3", "--held-out=0.05"]
    for wrong in ([1], {"a": 1}, True):
        with pytest.raises(UserError, match=r"cfg\.json: layer .* is no number or text"):
            saved_flags(tmp_path, {"layer": wrong}, ("layer",))
    with pytest.raises(UserError, match="flags is no object"):
        saved_flags(tmp_path, [1], ("layer",))
    assert saved_flags(tmp_path, None, ("layer",)) == []
