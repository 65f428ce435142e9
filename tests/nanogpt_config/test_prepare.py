"""prepare.py: the bins hold every document, come back after a kill; bad input ends in a line."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bin_writer
import numpy as np
import prepare
import pytest
import tiktoken
from builders.models import small_gpt2, write_jsonl
from builders.scripts import ROOT, run_script
from tokenizers import Tokenizer

from sparse_coding.config import UserError
from sparse_coding.lm.documents import Documents, document_id, is_held_out
from sparse_coding.lm.nanogpt import read_meta_pickle

TEXTS = [f"document {i}: " + "the quick brown fox\n" * (i % 7 + 1) + "ß €" for i in range(300)]
OF = {
    name: [t for t in TEXTS if is_held_out(document_id(t), 0.05) == (name == "val")]
    for name in ("train", "val")
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("text") / "texts.jsonl", TEXTS)


def decoded(folder: Path, name: str, end_of_text: int, decode) -> list[str]:
    """The documents of a bin."""
    ids = np.fromfile(folder / f"{name}.bin", np.uint16)
    assert ids[-1] == end_of_text
    *documents, rest = np.split(ids, np.flatnonzero(ids == end_of_text) + 1)
    assert len(rest) == 0
    return [decode(document[:-1].tolist()) for document in documents]


def test_a_bpe_is_learnt_and_the_bins_decode_to_the_documents(tmp_path, source):
    argv = ["--source", source, "--vocab-size", "300", "--output-dir", "out"]
    done = run_script([ROOT / "nanogpt_config/prepare.py", *argv], cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "out"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["vocab_size"], manifest["end_of_text"], manifest["dtype"]) == (
        300,
        0,
        "uint16",
    )
    for name in ("train", "val"):
        assert decoded(folder, name, 0, tokenizer.decode) == OF[name]
        content = (folder / f"{name}.bin").read_bytes()
        assert manifest[name] == {
            "documents": len(OF[name]),
            "tokens": len(content) // 2,
            "bytes": len("".join(OF[name]).encode()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    meta = read_meta_pickle(folder / "meta.pkl")  # for nanoGPT's train.py and sample.py
    assert meta["vocab_size"] == len(meta["itos"]) == 300
    assert all(meta["itos"][meta["stoi"][c]] == c for c in "the quick\n")
    assert not (folder / "progress.json").exists()


def test_the_bytes_are_their_own_ids(tmp_path, source):
    argv = ["--source", source, "--tokenizer", "bytes", "--output-dir", str(tmp_path)]
    assert prepare.main(argv) == 0
    assert decoded(tmp_path, "val", 256, lambda ids: bytes(ids).decode()) == OF["val"]
    assert read_meta_pickle(tmp_path / "meta.pkl")["vocab_size"] == 257


@pytest.mark.parametrize("n_batches", [0, 1, 5])
def test_an_interrupted_run_resumes_to_the_same_bins(tmp_path, source, monkeypatch, n_batches):
    monkeypatch.setattr(bin_writer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(bin_writer, "BATCH_CHARACTERS", 2000)
    argv = ["--source", source, "--vocab-size", "280", "--tokens", "5K", "--output-dir"]
    assert prepare.main([*argv, str(tmp_path / "whole")]) == 0

    batches, tofile = bin_writer.in_batches, []

    def killed(texts, n_characters):
        for i, batch in enumerate(batches(texts, n_characters)):
            if i == n_batches:
                tofile.append(i)
                (tmp_path / "torn" / "train.bin").open("ab").write(b"not saved")
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(bin_writer, "in_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.main([*argv, str(tmp_path / "torn")])
    assert prepare.main([*argv, str(tmp_path / "torn")]) == 0
    for name in ("train.bin", "val.bin", "tokenizer.json", "manifest.json"):
        whole, torn = (tmp_path / run / name for run in ("whole", "torn"))
        assert whole.read_bytes() == torn.read_bytes(), name


def test_tokens_ends_the_bins_with_the_document_that_reaches_it(tmp_path, source):
    argv = ["--source", source, "--tokenizer", "bytes", "--tokens", "0.01M"]
    assert prepare.main([*argv, "--output-dir", str(tmp_path)]) == 0
    documents = decoded(tmp_path, "train", 256, lambda ids: bytes(ids).decode())
    sizes = [len(text.encode()) + 1 for text in documents]
    assert sum(sizes[:-1]) < 10_000 <= sum(sizes)
    assert documents == OF["train"][: len(documents)]


def test_more_tokens_are_added_to_the_bins(tmp_path, source, capsys):
    argv = ["--source", source, "--vocab-size", "280", "--output-dir"]
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    assert prepare.main([*argv, str(whole), "--tokens", "6000"]) == 0
    assert prepare.main([*argv, str(grown), "--tokens", "2000"]) == 0
    begun = (grown / "train.bin").read_bytes()
    assert 2 * 2000 <= len(begun) < 2 * 2300
    assert prepare.main([*argv, str(grown), "--tokens", "6K"]) == 0
    assert (grown / "train.bin").read_bytes()[: len(begun)] == begun
    for name in ("train.bin", "val.bin", "tokenizer.json", "manifest.json"):
        assert (grown / name).read_bytes() == (whole / name).read_bytes(), name

    capsys.readouterr()
    for fewer in ("100", "6000"):
        assert prepare.main([*argv, str(grown), "--tokens", fewer]) == 0
        assert f"done before: {grown}" in capsys.readouterr().out
    assert prepare.main([*argv, str(grown)]) == 0  # all that there is
    assert prepare.main([*argv, str(grown), "--tokens", "5B"]) == 0  # there is no more
    assert "done before" in capsys.readouterr().out
    documents = decoded(
        grown, "train", 0, Tokenizer.from_file(str(grown / "tokenizer.json")).decode
    )
    assert documents == OF["train"]


def test_the_tokens_are_tiktokens_own(tmp_path, source, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", small_gpt2)
    encoding = small_gpt2("gpt2")
    argv = ["--source", source, "--output-dir", str(tmp_path), "--tokenizer"]
    assert prepare.main([*argv, "bytes"]) == 0
    assert prepare.main([*argv, "gpt2", "--fresh"]) == 0
    for name in ("train", "val"):
        marked = "<|endoftext|>".join([*OF[name], ""])
        ids = np.fromfile(tmp_path / f"{name}.bin", np.uint16)
        assert ids.tolist() == encoding.encode(marked, allowed_special="all")
    assert not (tmp_path / "meta.pkl").exists()  # nor that of before: nanoGPT takes 50304


def test_openwebtext_is_gpt2s_tokens_and_500_million_of_them():
    cfg = prepare.resolved(prepare.Config(source="openwebtext"))
    assert (cfg.tokenizer, cfg.tokens) == ("gpt2", "500M")
    cfg = prepare.resolved(prepare.Config(source="openwebtext", tokenizer="bytes", tokens="all"))
    assert (cfg.tokenizer, cfg.tokens) == ("bytes", "all")
    cfg = prepare.resolved(prepare.Config())
    assert (cfg.tokenizer, cfg.tokens) == ("bpe", "all")


def test_what_all_of_openwebtext_needs_is_said_before_the_start(tmp_path, monkeypatch, capsys):
    documents = Documents(prepare.OPENWEBTEXT, "79d93d7", lambda: iter(["four"] * 10))
    monkeypatch.setattr(prepare, "open_documents", lambda *_, **__: documents)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9 * 10**9))
    argv = ["--source", "openwebtext", "--tokenizer", "bytes", "--tokens"]
    # 39.77 GB of text, 5 tokens of two bytes for 4 bytes of it
    with pytest.raises(UserError, match=r"disk full: 99424 MB to write under .* 9000 MB free"):
        prepare.main([*argv, "all", "--output-dir", str(tmp_path)])
    assert "the bins will take about 99,424 MB" in capsys.readouterr().out
    with pytest.raises(UserError, match="disk full: 10000 MB"):  # before anything is read
        prepare.main([*argv, "5B", "--output-dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_names_end_of_text_does_not_end_there(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl", [f"{i} <|endoftext|> more" for i in range(200)])
    argv = ["--source", texts, "--vocab-size", "280", "--output-dir"]
    assert prepare.main([*argv, str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    ids = np.fromfile(tmp_path / "out" / "train.bin", np.uint16)
    assert (ids == 0).sum() == manifest["train"]["documents"] > 150


def test_a_folder_with_other_bins_is_not_touched(tmp_path, source, capsys):
    argv = ["--source", source, "--tokenizer", "bytes", "--output-dir", str(tmp_path / "out")]
    assert prepare.main(argv) == 0
    before = (tmp_path / "out" / "train.bin").read_bytes()
    assert prepare.main(argv) == 0
    assert "done before" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with another held_out: choose another --output-dir"):
        prepare.main([*argv, "--held-out", "0.1"])
    assert (tmp_path / "out" / "train.bin").read_bytes() == before
    assert prepare.main([*argv, "--held-out", "0.1", "--fresh"]) == 0
    assert (tmp_path / "out" / "train.bin").read_bytes() != before
    (tmp_path / "train.bin").write_bytes(b"openwebtext")
    with pytest.raises(UserError, match=r"holds a train\.bin that is not of this script"):
        prepare.main([*argv[:-1], str(tmp_path)])


DAMAGE = {
    "manifest.json": ["{", "[]", "{}", '{"constants": []}', '{"constants": ' + "[" * 100_000],
    "progress.json": [
        "{", "{}", '{"constants": {}, "splits": []}', '{"constants": {}, "splits": {"train": {}}}',
    ],
}  # fmt: skip


def test_a_damaged_manifest_or_progress_is_refused_by_its_name(tmp_path, source):
    argv = ["--source", source, "--tokenizer", "bytes", "--output-dir", str(tmp_path / "out")]
    assert prepare.main(argv) == 0
    manifest, progress = (tmp_path / "out" / name for name in DAMAGE)
    made = json.loads(manifest.read_text())
    for path in (manifest, progress):
        for content in DAMAGE[path.name]:
            path.write_text(content)
            with pytest.raises(UserError, match=f"{path}.*choose another --output-dir, or --fresh"):
                prepare.main(argv)
        manifest.unlink(missing_ok=True)
    sizes = dict.fromkeys(("documents", "bytes"), 0) | {"tokens": 10**15}
    for splits, reason in (
        ({"train": {"tokens": "3"}, "val": {}}, "tokens 3 is not of prepare"),
        ({"train": sizes, "val": {}}, r"train\.bin is damaged: [\d,]+ bytes, not 2,000,000,"),
    ):
        progress.write_text(json.dumps({"constants": made["constants"], "splits": splits}))
        with pytest.raises(UserError, match=reason):
            prepare.main(argv)


def test_bad_flags_and_texts_are_refused(tmp_path, source):
    (tmp_path / "one.txt").write_text("a single document")
    out = ["--output-dir", str(tmp_path / "out")]
    for argv, reason in (
        (["--vocab-size", "256"], "--vocab-size 256 must be between 257 and 65535"),
        (["--vocab-size", "70000"], "--vocab-size 70000 must be"),
        (["--held-out", "0.0"], "--held-out 0.0 must be between 0 and 1"),
        (["--tokens", "many"], "--tokens many must be all or a number"),
        (["--tokens", "900000B"], "disk full"),
        (["--source", str(tmp_path / "no.txt")], "no such file"),
        (["--source", str(tmp_path / "one.txt"), "--tokenizer", "bytes"], "no document fell to"),
    ):
        with pytest.raises(UserError, match=reason):
            prepare.main(["--source", source, *argv, *out])
