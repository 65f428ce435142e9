"""nanoGPT's .bin files are used in place, their documents found, and bad ones refused."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sparse_coding.config import UserError
from sparse_coding.lm.corpus import open_bin
from sparse_coding.lm.packing import Packed
from sparse_coding.lm.tokenizer import Tokenizer, load_tokenizer

SEP = 256


@pytest.fixture(scope="module")
def byte_ids() -> Tokenizer:
    return load_tokenizer("x", choice="bytes", vocab_size=257)


def write(path: Path, ids: list[int]) -> Path:
    np.array(ids, dtype=np.uint16).tofile(path)
    return path


def test_documents_are_the_stretches_between_separators(tmp_path, byte_ids):
    ids = [1, 2, 3, SEP, 4, SEP, SEP, 1, 2, 3, SEP, 5, 6]
    corpus = open_bin(write(tmp_path / "train.bin", ids), byte_ids, tmp_path / "corpus")
    assert corpus.offsets.tolist() == [0, 4, 11]
    assert corpus.lengths.tolist() == [3, 1, 2]  # the empty one and the copy are left out
    assert corpus.metadata["n_duplicates"] == 1
    rows = Packed(corpus, documents=np.array([2, 0, 1]), context_length=4, separator=SEP,
                  packing="packed")  # fmt: skip
    assert rows.rows(0, 2).tolist() == [[SEP, 5, 6, SEP], [1, 2, 3, SEP]]


def test_the_file_is_not_copied(tmp_path, byte_ids):
    corpus = open_bin(write(tmp_path / "a.bin", [1, SEP, 2]), byte_ids, tmp_path / "corpus")
    assert Path(corpus.tokens.filename) == tmp_path / "a.bin"
    names = sorted(os.listdir(tmp_path / "corpus"))
    assert names == [".corpus.lock", "corpus.json", "documents.npy"]


def test_without_a_separator_documents_are_pieces(tmp_path, byte_ids, monkeypatch):
    monkeypatch.setattr("sparse_coding.lm.corpus.PIECE", 4)
    path = write(tmp_path / "a.bin", list(range(10)))
    corpus = open_bin(path, byte_ids, tmp_path / "corpus")
    assert corpus.offsets.tolist() == [0, 4, 8]
    assert corpus.lengths.tolist() == [4, 4, 2]
    no_separator = load_tokenizer("x", choice="bytes", vocab_size=256)
    corpus = open_bin(path, no_separator, tmp_path / "other")
    assert corpus.lengths.tolist() == [4, 4, 2]


def test_equal_documents_have_equal_ids_in_any_file(tmp_path, byte_ids):
    first = open_bin(write(tmp_path / "a.bin", [1, 2, SEP, 3]), byte_ids, tmp_path / "a")
    second = open_bin(write(tmp_path / "b.bin", [9, SEP, 1, 2, SEP]), byte_ids, tmp_path / "b")
    assert first.ids[0] == second.ids[1]
    assert len({*first.ids, *second.ids}) == 3
    assert all(0 <= i < 2**63 for i in first.ids)


def test_blocks_do_not_change_what_is_found(tmp_path, byte_ids, monkeypatch):
    ids = np.random.default_rng(0).choice([1, 2, 3, SEP], size=500).tolist()
    path = write(tmp_path / "a.bin", ids)
    whole = open_bin(path, byte_ids, tmp_path / "whole")
    monkeypatch.setattr("sparse_coding.lm.corpus.SCAN", 7)
    pieces = open_bin(path, byte_ids, tmp_path / "pieces")
    assert pieces.metadata == whole.metadata
    assert (pieces.offsets == whole.offsets).all()
    assert (pieces.ids == whole.ids).all()


def test_a_file_that_is_known_is_not_scanned_again(tmp_path, byte_ids, monkeypatch):
    path = write(tmp_path / "a.bin", [1, SEP, 2])
    before = open_bin(path, byte_ids, tmp_path / "corpus")
    os.utime(path, (0, 0))  # another date, the same tokens
    assert open_bin(path, byte_ids, tmp_path / "corpus").ids.tolist() == before.ids.tolist()
    monkeypatch.setattr("sparse_coding.lm.corpus._scan", lambda *args: pytest.fail("scanned again"))
    assert open_bin(path, byte_ids, tmp_path / "corpus").ids.tolist() == before.ids.tolist()


def test_a_file_that_has_changed_is_refused(tmp_path, byte_ids):
    open_bin(write(tmp_path / "a.bin", [1, SEP, 2]), byte_ids, tmp_path / "corpus")
    with pytest.raises(UserError, match="holds a corpus with sha256"):
        open_bin(write(tmp_path / "a.bin", [1, SEP, 2, 3]), byte_ids, tmp_path / "corpus")


def test_another_tokenizer_is_refused(tmp_path, byte_ids):
    path = write(tmp_path / "a.bin", [1, 2])
    open_bin(path, byte_ids, tmp_path / "corpus")
    with pytest.raises(UserError, match="holds a corpus with fingerprint"):
        open_bin(path, load_tokenizer("x", choice="bytes", vocab_size=256), tmp_path / "corpus")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\1\0\2", "odd number of bytes"),
        (b"\1\0\1\1", "has the id 257, the model only 257 ids"),
        (b"\0\1\0\1", "holds nothing but separators"),
    ],
)
def test_files_that_are_no_tokens_of_the_model_are_refused(tmp_path, byte_ids, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_bin(tmp_path / "a.bin", byte_ids, tmp_path / "corpus")


def test_the_manifest_beside_a_bin_tells_its_tokenizer_and_whether_it_is_whole(tmp_path, byte_ids):
    path = write(tmp_path / "val.bin", [1, SEP, 2])
    about = {
        "end_of_text": SEP,
        "tokenizer": {"name": "bytes", "fingerprint": byte_ids.fingerprint},
        "val": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
    }
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(about))
    assert len(open_bin(path, byte_ids, tmp_path / "whole").ids) == 2

    manifest.write_text(json.dumps(about | {"val": {"sha256": "0" * 64}}))
    with pytest.raises(UserError, match=r"val\.bin is damaged: its sha256 is not that of"):
        open_bin(path, byte_ids, tmp_path / "damaged")
    other = {"tokenizer": {"name": "tiktoken:gpt2", "fingerprint": "f" * 16}}
    manifest.write_text(json.dumps(about | other))
    reason = "made with the tokenizer tiktoken:gpt2, not with bytes of the model: choose the model"
    with pytest.raises(UserError, match=reason):
        open_bin(path, byte_ids, tmp_path / "other")
    manifest.write_text('{"of": "another program"}')
    assert len(open_bin(path, byte_ids, tmp_path / "foreign").ids) == 2


def test_a_missing_file_is_refused(tmp_path, byte_ids):
    with pytest.raises(UserError, match="no such file"):
        open_bin(tmp_path / "a.bin", byte_ids, tmp_path / "corpus")
