"""Model, tokenizer, site and text open together; a model that does not fit its text is noticed."""

import hashlib
import math
import os
import shutil
from collections import Counter
from copy import copy
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
from sparse_coding.lm.packaged import smollm2
from sparse_coding.lm.target import (
    ModelChoice,
    TextChoice,
    commits,
    default_folder,
    flags_of,
    losses,
    open_target,
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


def test_smollm2_is_made_from_its_package_before_anything_is_read_of_it(tmp_path, monkeypatch):
    model = replace(MODEL, model="smollm2")
    assert model.path == str(smollm2.FOLDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "NEEDED", ("no_such_package",))
    with pytest.raises(UserError, match=r"^--model smollm2 needs no_such_package .*`pip install"):
        commits(model, TEXT)
    monkeypatch.setattr(target_module, "smollm2_folder", lambda: smollm2.FOLDER.mkdir(parents=True))
    assert commits(model, replace(TEXT, dataset="pydoc")) == dict.fromkeys(
        ("model_revision", "dataset_revision"), ""
    )
    assert set(stamps(model, replace(TEXT, dataset="pydoc"))) == {"stdlib_files"}


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
    doubled = replace(target, corpus=copy(target.corpus))
    doubled.corpus.metadata = target.corpus.metadata | {"n_duplicates": 1234}
    assert "300 documents (1,234 duplicates left out), " in doubled.introduction()


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
    assert default_folder(model, text, {}, CPU) != default_folder(MODEL, TEXT, {}, CPU)


def test_the_default_folder_has_a_name_to_recognise():
    folder = default_folder(MODEL, TEXT, {}, CPU)
    assert folder == default_folder(replace(MODEL), replace(TEXT), {}, CPU)
    assert folder.parent == Path("activations")
    assert folder.name.startswith("gpt2-layer6-mlp_act-")
    nanogpt = replace(MODEL, model="out/ckpt.pt")
    assert default_folder(nanogpt, TEXT, {}, CPU).name.startswith("ckpt-layer6-mlp_act-")


@pytest.fixture
def local(root, tmp_path) -> tuple[ModelChoice, TextChoice]:
    """Choices of a model and a text below tmp_path, which may be changed."""
    tiny_target(root)  # writes the model
    shutil.copytree(root / "gpt2", tmp_path / "model")
    write_parquet(tmp_path / "t.parquet", texts(40, seed=1))
    model = replace(MODEL, model=str(tmp_path / "model"))
    return model, replace(TEXT, dataset=str(tmp_path / "t.parquet"))


def edit(path: Path) -> None:
    """Another byte in the middle; size and dates stay."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "stamp"),
    [("model/model.safetensors", "model_files"), ("model/config.json", "model_files"),
     ("model/tokenizer.json", "model_files"), ("t.parquet", "dataset_files")],
)  # fmt: skip
def test_an_edit_in_the_middle_of_a_file_is_another_choice(local, tmp_path, name, stamp):
    before = stamps(*local)
    assert before.keys() == {"model_files", "dataset_files"}
    assert stamps(*local) == before
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + b" " * 3 * 2**20)  # beyond a MB at either end
    grown = stamps(*local)
    edit(path)
    edited = stamps(*local)
    assert len({before[stamp], grown[stamp], edited[stamp]}) == 3
    assert {k: v for k, v in edited.items() if k != stamp} == {
        k: v for k, v in before.items() if k != stamp
    }
    folders = {default_folder(*local, files, CPU) for files in (before, grown, edited)}
    assert len(folders) == 3


def test_a_file_that_is_not_read_does_not_count(local, tmp_path):
    before = stamps(*local)
    for name in ("notes.txt", "README.md", "optimizer.pt", "trainer_state.json", "training.log"):
        (tmp_path / "model" / name).write_text("any")
    (tmp_path / "beside.txt").write_text("any")
    assert stamps(*local) == before


def test_the_tokenizer_that_is_given_or_found_beside_a_checkpoint_counts(local, tmp_path):
    model, text = local
    shutil.copy(tmp_path / "model/tokenizer.json", tmp_path / "own.json")
    given = replace(model, tokenizer=str(tmp_path / "own.json"))
    of_file, of_folder = stamps(given, text), replace(given, tokenizer=str(tmp_path / "model"))
    assert of_file.keys() == stamps(of_folder, text).keys() == {*stamps(*local), "tokenizer_files"}
    edit(tmp_path / "own.json")
    assert stamps(given, text)["tokenizer_files"] != of_file["tokenizer_files"]

    (tmp_path / "ckpt.pt").write_bytes(b"weights")
    checkpoint = replace(model, model=str(tmp_path / "ckpt.pt"))
    assert stamps(checkpoint, text).keys() == {"model_files", "dataset_files"}
    shutil.copy(tmp_path / "own.json", tmp_path / "tokenizer.json")
    beside = stamps(checkpoint, text)
    edit(tmp_path / "tokenizer.json")
    assert stamps(checkpoint, text)["tokenizer_files"] != beside["tokenizer_files"]


def test_the_demo_and_the_standard_library_are_known_by_their_contents(tmp_path, monkeypatch):
    demo = replace(MODEL, model="demo"), replace(TEXT, dataset="stdlib")
    before = stamps(*demo)
    assert before.keys() == {"model_files", "stdlib_files"}
    (tmp_path / "os.py").write_text("import this\n")
    monkeypatch.setattr(target_module, "stdlib_files", lambda: [tmp_path / "os.py"])
    shutil.copytree(target_module.DEMO_MODEL, tmp_path / "demo")
    edit(tmp_path / "demo/model.safetensors")
    monkeypatch.setattr(target_module, "DEMO_MODEL", tmp_path / "demo")
    assert all(before[name] != stamp for name, stamp in stamps(*demo).items())


def test_hub_ids_become_their_commits(local, hub_cache, monkeypatch):
    commit = {"models--openai-community--gpt2": "a" * 40, "datasets--me--text": "b" * 40,
              "models--me--bpe": "c" * 40}  # fmt: skip
    for name, sha in commit.items():
        (hub_cache / name / "refs").mkdir(parents=True)
        (hub_cache / name / "refs/main").write_text(sha)
        (hub_cache / name / "snapshots" / sha).mkdir(parents=True)
        (hub_cache / name / "snapshots" / sha / "train.parquet").write_bytes(b"any")
    text = replace(TEXT, dataset="me/text")
    assert commits(MODEL, text) == {"model_revision": "a" * 40, "dataset_revision": "b" * 40}
    assert commits(*local) == {"model_revision": "", "dataset_revision": ""}
    assert stamps(MODEL, text) == {}
    own = replace(MODEL, tokenizer="me/bpe")
    assert stamps(own, text) == {"tokenizer_commit": "c" * 40}
    (hub_cache / "models--openai-community--gpt2/refs/main").write_text("d" * 40)
    (hub_cache / "models--openai-community--gpt2/snapshots" / ("d" * 40)).mkdir()
    assert commits(MODEL, text)["model_revision"] == "d" * 40
    with pytest.raises(UserError, match="hf download EleutherAI/pythia-70m`"):
        commits(replace(MODEL, model="EleutherAI/pythia-70m"), text)
    with pytest.raises(UserError, match="hf download me/none --repo-type dataset`"):
        commits(MODEL, replace(TEXT, dataset="me/none"))


def test_what_is_written_to_while_it_is_read_is_refused(root):
    target = tiny_target(root)
    target.require_same_files(target.files)
    with pytest.raises(UserError, match=r"model_files changed while they were read: run it again"):
        target.require_same_files(target.files | {"model_files": "0" * 16})


def test_a_saved_autoencoder_names_the_flags_that_find_its_target(root, monkeypatch):
    target = tiny_target(root, layer=2, packing="documents")
    known = target.provenance | {"n_eval_tokens": 77}
    monkeypatch.setattr(target_module, "load_sae", lambda _: SimpleNamespace(metadata=known))
    argv = flags_of(Path("sae"), [])
    names = {f.name for choice in (ModelChoice, TextChoice) for f in fields(choice)}
    given = {arg.split("=")[0].removeprefix("--").replace("-", "_") for arg in argv}
    assert given == names - {"target_site"} | {"n_eval_tokens", "max_norm_multiple"}
    assert {"--layer=2", "--packing=documents", "--n-eval-tokens=77"} <= set(argv)
    assert "--max-norm-multiple=0.0" in argv  # of before there was one
    known["max_norm_multiple"] = 10.0
    assert "--max-norm-multiple=10.0" in flags_of(Path("sae"), [])


def told(monkeypatch, known: dict, *given: str) -> list[str]:
    monkeypatch.setattr(target_module, "load_sae", lambda _: SimpleNamespace(metadata=known))
    return flags_of(Path("sae"), [f"--{name}=x" for name in given])


def test_a_foreign_autoencoder_names_what_it_knows_and_the_rest_must_be_given(monkeypatch):
    known = {"model": "gpt2", "layer": 3, "site": "mlp_out", "dtype": "bfloat16", "hook_name": "h"}
    assert set(told(monkeypatch, known)) == {
        "--model=gpt2", "--layer=3", "--site=mlp_out", "--dtype=bfloat16",
    }  # fmt: skip
    unknown = {"model": "gpt2", "hook_name": "blocks.3.hook_attn_out"}
    with pytest.raises(UserError, match=r"hook blocks\.3\.hook_attn_out is at none .* --layer and"):
        told(monkeypatch, unknown)
    with pytest.raises(UserError, match=r"give --site$"):
        told(monkeypatch, unknown, "layer")
    assert told(monkeypatch, unknown, "layer", "site") == ["--model=gpt2"]
    with pytest.raises(UserError, match=r"give --model$"):
        told(monkeypatch, {"layer": 3, "site": "mlp_out"})
    for nothing in ({}, {"flags": {}}):
        with pytest.raises(UserError, match="give --layer and --model and --site"):
            told(monkeypatch, nothing)


def test_a_stranger_chooses_no_place_to_write(monkeypatch, root):
    own = tiny_target(root).provenance
    evil = {"output_dir": "/", "activations_dir": "/home", "wandb_mode": "online", "evaluate": "x"}
    known = own | evil | {"flags": own["flags"] | evil}
    assert sorted(told(monkeypatch, known)) == sorted(told(monkeypatch, own))


def test_rows_begin_with_bos_where_the_autoencoder_was_trained_so(root):
    def opened(folder: str, **options):
        plain = tiny_target(root)
        return open_target(plain.model, plain.text, str(root / folder), device=CPU, **options)

    rows, with_bos = (t.held_out.rows(0, 5) for t in (opened("a"), opened("b", prepend_bos=True)))
    assert (with_bos[:, 0] == SEPARATOR).all()
    assert with_bos[:, 1:].ravel().tolist() == rows.ravel()[: 5 * (CONTEXT - 1)].tolist()
    line = opened("b", prepend_bos=True, centred=True).introduction().splitlines()[2]
    assert "rows begin with bos" in line
    bytes_only = dict(prepend_bos=True, device=CPU)
    model, text = replace(tiny_target(root).model, tokenizer="bytes"), tiny_target(root).text
    with pytest.raises(UserError, match="prepend_bos can't be honoured: bytes has no bos token"):
        open_target(model, text, str(root / "c"), **bytes_only)
