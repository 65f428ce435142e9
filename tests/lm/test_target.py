"""Model, tokenizer, site and text open together; a model that does not fit its text is noticed."""

import hashlib
import math
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.lm import CONTEXT, SEPARATOR, VOCAB, demo_target, texts, tiny_target
from builders.models import write_parquet

from sparse_coding.config import UserError
from sparse_coding.lm import target as target_module
from sparse_coding.lm.target import (
    ModelChoice,
    TextChoice,
    default_folder,
    flags_of,
    losses,
    stamps,
)

CPU = torch.device("cpu")
MODEL = ModelChoice(model="openai-community/gpt2", model_revision="", tokenizer="auto", layer=6,
                    site="mlp_act", dtype="auto", store_dtype="float16")  # fmt: skip
TEXT = TextChoice(dataset="NeelNanda/pile-10k", dataset_revision="", text_column="text",
                  context_length=256, packing="packed", held_out=0.05,
                  max_text_tokens=10**6)  # fmt: skip


# --- what is opened ---


def test_all_documents_are_encoded_with_the_models_tokenizer_and_split(root):
    target = tiny_target(root)
    numbers = [hashlib.sha256(t.encode()).digest()[:8] for t in texts(300)]
    held_out = {i for i, n in enumerate(numbers) if int.from_bytes(n, "little") >> 1 < 0.2 * 2**63}
    for side, wanted in ((target.held_out, held_out), (target.train, set(range(300)) - held_out)):
        assert set(side.documents.tolist()) == wanted
    encoded = target.tokenizer.encode_batch(texts(300))
    endless = [SEPARATOR]
    for i in target.train.documents:
        endless += [*encoded[i], SEPARATOR]
    rows = target.train.rows(0, target.train.n_rows)
    assert rows.ravel().tolist() == endless[: rows.size]
    assert len(endless) - rows.size < 2 * CONTEXT


def test_what_activations_depend_on_is_named(root):
    target = tiny_target(root, layer=2, site="resid_post", packing="documents", held_out=0.3)
    known = target.metadata
    assert (known["layer"], known["site"], known["packing"]) == (
        2,
        "resid_post",
        "documents",
    )
    assert (known["model"], known["model_dtype"]) == (str(root / "gpt2"), "float32")
    assert known["weight_hash"] == target.lm.weight_hash
    assert (known["context_length"], known["held_out"]) == (CONTEXT, 0.3)
    tokens = np.asarray(target.corpus.tokens).astype(np.uint16).tobytes()
    assert known["tokens_sha256"] == hashlib.sha256(tokens).hexdigest()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layer": 0}, "layer"),
        ({"site": "mlp_out"}, "site"),
        ({"dtype": "bfloat16"}, "model_dtype"),
        ({"store_dtype": "bfloat16"}, "store_dtype"),
        ({"kind": "llama"}, "weight_hash"),
        ({"context_length": 8}, "context_length"),
        ({"packing": "documents"}, "packing"),
        ({"held_out": 0.3}, "held_out"),
        ({"max_text_tokens": 9000}, "tokens_sha256"),
        ({"n_documents": 299}, "tokens_sha256"),
        ({"tokenizer": "bytes"}, "tokenizer"),
    ],
)
def test_another_choice_shows_in_what_activations_depend_on(root, change, field):
    ours, other = tiny_target(root).metadata, tiny_target(root, **change).metadata
    assert ours[field] != other[field]
    assert ours == tiny_target(root).metadata


def test_demo_is_the_model_in_assets(root):
    target = demo_target(root)
    assert target.metadata["model"] == "demo"
    assert (target.lm.n_layers, target.site.width) == (2, 256)


def test_the_longest_context_of_the_model_is_welcome(root):
    assert tiny_target(root, context_length=32).train.rows(0, 1).shape == (1, 32)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"held_out": 0.0}, "--held-out 0.0"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"held_out": math.nan}, "--held-out nan"),
        ({"context_length": 1}, "--context-length 1"),
        ({"max_text_tokens": 0}, "--max-text-tokens 0"),
    ],
)
def test_constants_out_of_range_are_refused_by_their_flag(change, flag):
    with pytest.raises(UserError, match=flag):
        replace(TEXT, **change)


# --- does the model fit the text? ---


def test_losses_are_those_of_the_model_and_of_token_frequencies(root):
    target = tiny_target(root)
    ids = torch.from_numpy(target.held_out.rows(0, target.held_out.n_rows))
    with torch.no_grad():
        log_p = torch.log_softmax(target.lm.model(ids).logits.double(), dim=2)
    of_model = -log_p[:, :-1].gather(2, ids[:, 1:, None]).mean().item()
    counts = Counter(np.asarray(target.corpus.tokens).tolist())
    n = sum(counts.values()) + VOCAB
    predicted = ids[:, 1:].flatten().tolist()
    unigram = -sum(math.log((counts[i] + 1) / n) for i in predicted) / len(predicted)
    assert losses(target) == pytest.approx((of_model, unigram), rel=1e-5)


def test_losses_are_of_a_sample_and_frequencies_of_the_first_tokens(root, monkeypatch):
    target = tiny_target(root)
    monkeypatch.setattr(target_module, "SANITY_TOKENS", 2 * CONTEXT + 1)  # 3 rows
    monkeypatch.setattr(target_module, "UNIGRAM_TOKENS", 4)
    ids = target.held_out.rows(0, 3)[:, 1:].ravel().tolist()
    counts = Counter(np.asarray(target.corpus.tokens[:4]).tolist())
    unigram = -sum(math.log((counts[i] + 1) / (4 + VOCAB)) for i in ids) / len(ids)
    assert losses(target)[1] == pytest.approx(unigram, rel=1e-5)


def test_a_model_worse_than_token_frequencies_is_warned_of_and_a_good_one_is_not(root):
    random, learned = tiny_target(root), demo_target(root)
    for target, warned in ((random, True), (learned, False)):
        of_model, unigram = losses(target)
        assert (of_model > unigram) is warned
        line = target.introduction().splitlines()[1]
        assert f"{of_model:.3f} nats" in line
        assert f"{unigram:.3f}" in line
        assert ("WARNING: wrong tokenizer, or wrong weights?" in line) is warned


def test_the_introduction_counts_documents_tokens_and_what_is_held_out(root):
    target = tiny_target(root)
    line = target.introduction().splitlines()[0]
    n_tokens, n_out = len(target.corpus.tokens), len(target.held_out.documents)
    assert f"300 documents, {n_tokens:,} tokens; {n_out} documents held out" in line


def test_a_wrong_tokenizer_shows_as_a_loss_worse_than_token_frequencies(root):
    of_model, unigram = losses(demo_target(root, tokenizer="bytes"))
    assert of_model > unigram


# --- the folder ---


@pytest.mark.parametrize(
    "change",
    [{"model": "gpt2"}, {"model_revision": "abc"}, {"tokenizer": "gpt2"}, {"layer": 5},
     {"site": "mlp_out"}, {"dtype": "float32"}, {"store_dtype": "bfloat16"}, {"dataset": "x.txt"},
     {"dataset_revision": "abc"},
     {"text_column": "body"}, {"context_length": 128}, {"packing": "documents"},
     {"held_out": 0.1}, {"max_text_tokens": 10}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_choice_is_another_default_folder(change):
    model = replace(MODEL, **{k: v for k, v in change.items() if hasattr(MODEL, k)})
    text = replace(TEXT, **{k: v for k, v in change.items() if hasattr(TEXT, k)})
    assert default_folder(model, text, CPU) != default_folder(MODEL, TEXT, CPU)


def test_the_default_folder_has_a_name_to_recognise():
    folder = default_folder(MODEL, TEXT, CPU)
    assert folder == default_folder(replace(MODEL), replace(TEXT), CPU)
    assert folder.parent == Path("activations")
    assert folder.name.startswith("gpt2-layer6-mlp_act-")
    nanogpt = replace(MODEL, model="out/ckpt.pt")
    assert default_folder(nanogpt, TEXT, CPU).name.startswith("ckpt-layer6-mlp_act-")


def test_a_local_model_or_text_that_was_written_anew_is_another(root, tmp_path):
    write_parquet(tmp_path / "t.parquet", texts(40, seed=1))
    tiny_target(root)  # writes the model
    shutil.copytree(root / "gpt2", tmp_path / "model")
    model = replace(MODEL, model=str(tmp_path / "model"))
    text = replace(TEXT, dataset=str(tmp_path / "t.parquet"))
    before = default_folder(model, text, CPU)
    assert stamps(model, text).keys() == {"model_files", "dataset_files"}
    assert default_folder(model, text, CPU) == before
    write_parquet(tmp_path / "t.parquet", texts(40, seed=2))
    after = default_folder(model, text, CPU)
    assert after != before
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert default_folder(model, text, CPU) != after
    assert stamps(MODEL, TEXT) == {}  # of the hub: their revisions count


def test_a_saved_autoencoder_names_the_flags_that_find_its_target(root, monkeypatch):
    target = tiny_target(root, layer=2, packing="documents")
    loaded = lambda known: SimpleNamespace(metadata=known)  # noqa: E731
    monkeypatch.setattr(target_module, "load_sae", loaded)
    flags = flags_of(target.provenance | {"n_eval_tokens": 77})
    names = {f.name for choice in (ModelChoice, TextChoice) for f in fields(choice)}
    assert flags.keys() == names | {"n_eval_tokens"}
    assert (flags["layer"], flags["packing"], flags["n_eval_tokens"]) == (2, "documents", 77)
    foreign = {"model": "gpt2", "layer": 3, "hook_name": "x"}
    assert flags_of(foreign) == {"model": "gpt2", "layer": 3}
