"""Text becomes a corpus once, whole or not at all, and memory does not grow with it; nanoGPT's .bin
files are used in place."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.models import bin_manifest, byte_level_bpe
from builders.scripts import ROOT

from sparse_coding import files
from sparse_coding.config import UserError
from sparse_coding.lm import corpus as corpus_module
from sparse_coding.lm.corpus import Corpus, Seen, build_corpus, open_bin
from sparse_coding.lm.documents import Documents, document_id
from sparse_coding.lm.packing import Packed
from sparse_coding.lm.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["to be", "or not to be", "to be", "that is the question"]


def documents(texts: list[str] = TEXTS, *, name: str = "d", revision: str = "r") -> Documents:
    return Documents(name, revision, lambda: iter(texts))


def texts_of(corpus: Corpus) -> list[str]:
    pieces = zip(corpus.offsets, corpus.lengths, strict=True)
    return [bytes(corpus.tokens[o : o + n].astype(np.uint8)).decode() for o, n in pieces]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_follow_one_another_and_equal_ones_are_kept_once(tmp_path, byte_ids):
    corpus = build_corpus(tmp_path, documents(), byte_ids)
    assert texts_of(corpus) == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert corpus.offsets.tolist() == [0, 5, 17]
    assert corpus.ids.tolist() == [document_id(TEXTS[i]) for i in (0, 1, 3)]
    assert (tmp_path / "tokens.bin").read_bytes()[:4] == b"t\0o\0"  # uint16, little-endian


def test_what_it_is_made_of_stands_beside_it(tmp_path, byte_ids):
    build_corpus(tmp_path, documents(), byte_ids)
    tokens = (tmp_path / "tokens.bin").read_bytes()
    index = (tmp_path / "documents.npy").read_bytes()
    assert files.read_record(tmp_path / "corpus.json") == {
        "dataset": "d",
        "revision": "r",
        "fingerprint": byte_ids.fingerprint,
        "tokenizer_state": byte_ids.state,
        "dtype": "uint16",
        "max_tokens": None,
        "tokenizer": "bytes",
        "n_tokens": len(tokens) // 2,
        "n_duplicates": 1,
        "sha256": hashlib.sha256(tokens).hexdigest(),
        "n_documents": 3,
        "documents_sha256": hashlib.sha256(index).hexdigest(),
    }


def test_batches_do_not_change_the_corpus(tmp_path, byte_ids, monkeypatch):
    build_corpus(tmp_path / "one", documents(), byte_ids)
    monkeypatch.setattr(corpus_module, "BATCH", 3)  # also cuts every text into pieces
    build_corpus(tmp_path / "many", documents(), byte_ids)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_a_corpus_that_is_there_is_not_encoded_again(tmp_path, byte_ids):
    build_corpus(tmp_path, documents(), byte_ids)
    before = contents(tmp_path)
    unread = Documents("d", "r", lambda: pytest.fail("read again"))
    assert texts_of(build_corpus(tmp_path, unread, byte_ids))[0] == TEXTS[0]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "e"}, "dataset 'd', not 'e'"),
        ({"revision": "s"}, "revision 'r', not 's'"),
        ({"max_tokens": 7}, "max_tokens None, not 7"),
        ({"vocab_size": 256}, "fingerprint"),
    ],
)
def test_another_corpus_is_refused_with_what_differs(tmp_path, byte_ids, change, message):
    build_corpus(tmp_path, documents(), byte_ids)
    other = documents(name=change.get("name", "d"), revision=change.get("revision", "r"))
    tokenizer = load_tokenizer("x", choice="bytes", vocab_size=change.get("vocab_size", 257))
    with pytest.raises(UserError, match=f"holds a corpus with {message}"):
        build_corpus(tmp_path, other, tokenizer, max_tokens=change.get("max_tokens"))


def test_large_vocabularies_get_four_bytes(tmp_path):
    for vocab_size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        tokenizer = load_tokenizer("x", choice="bytes", vocab_size=vocab_size)
        corpus = build_corpus(tmp_path / str(vocab_size), documents(), tokenizer)
        assert corpus.tokens.dtype == dtype
        assert texts_of(corpus)[0] == TEXTS[0]


def test_max_tokens_is_exact(tmp_path, byte_ids):
    corpus = build_corpus(tmp_path, documents(), byte_ids, max_tokens=9)
    assert texts_of(corpus) == ["to be", "or n"]
    assert corpus.metadata["n_tokens"] == 9


def test_of_a_long_text_no_more_is_encoded_than_was_asked_for(tmp_path, byte_ids, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH", 1000)
    n_encoded = []

    def encode(texts: list[str]) -> list[list[int]]:
        n_encoded.append(sum(map(len, texts)))
        return byte_ids.encode_batch(texts)

    counting = Tokenizer(**{**vars(byte_ids), "encode_batch": encode})
    text = documents(["short", "a word " * 200_000, "another"])
    few = build_corpus(tmp_path / "few", text, counting, max_tokens=3000)
    assert len(few.tokens) == 3000
    assert sum(n_encoded) < 6000
    whole = build_corpus(tmp_path / "whole", text, byte_ids)
    assert few.tokens.tolist() == whole.tokens[:3000].tolist()
    assert few.lengths.tolist() == [5, 2995]
    assert whole.lengths.tolist() == [5, 1_400_000, 7]


def test_reading_stops_at_max_tokens(tmp_path, byte_ids, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH", 1)

    def texts() -> Iterator[str]:
        yield from TEXTS[:3]
        pytest.fail("read on")

    build_corpus(tmp_path, Documents("d", "r", texts), byte_ids, max_tokens=5)


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path, byte_ids, monkeypatch):
    monkeypatch.setattr(files, "DISK_RESERVE", 2**70)
    with pytest.raises(UserError, match="disk full"):
        build_corpus(tmp_path, documents(), byte_ids)


def test_text_without_a_token_is_an_error(tmp_path, byte_ids):
    nothing = Tokenizer(**{**vars(byte_ids), "encode_batch": lambda texts: [[] for _ in texts]})
    with pytest.raises(UserError, match="d has no token"):
        build_corpus(tmp_path, documents(), nothing)


def flipped(path: Path) -> bytes:
    """The contents of the file before one bit in its middle is flipped."""
    content = path.read_bytes()
    harmed = bytearray(content)
    harmed[len(content) // 2] ^= 4
    path.write_bytes(harmed)
    return content


FILES = ["tokens.bin", "documents.npy", "corpus.json"]


@pytest.mark.parametrize("harm", ["one bit", "torn", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_corpus_is_encoded_again(tmp_path, byte_ids, name, harm, capsys):
    build_corpus(tmp_path, documents(), byte_ids)
    before = contents(tmp_path)
    content = flipped(tmp_path / name)
    if harm == "missing":
        (tmp_path / name).unlink()
    elif harm != "one bit":
        (tmp_path / name).write_bytes(content[:-8] if harm == "torn" else b"")
    capsys.readouterr()
    build_corpus(tmp_path, documents(), byte_ids)
    assert contents(tmp_path) == before
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    if name == "corpus.json" and harm == "missing":  # no corpus, then
        assert warnings == []
    else:
        (line,) = warnings
        assert f"{tmp_path / name} is damaged (" in line
        assert line.endswith("the text is encoded again")


@pytest.mark.parametrize(("column", "value"), [(0, 2**40), (0, -8), (1, 0), (1, 2**40)])
def test_documents_that_lie_elsewhere_are_noticed_without_a_checksum_too(
    tmp_path, byte_ids, column, value
):
    build_corpus(tmp_path, documents(), byte_ids)
    metadata = json.loads((tmp_path / "corpus.json").read_text())
    del metadata["documents_sha256"], metadata["checksum"]
    (tmp_path / "corpus.json").write_text(json.dumps(metadata))
    index = np.load(tmp_path / "documents.npy")
    sound = index[0, :2].tolist()
    index[0, column] = value
    np.save(tmp_path / "documents.npy", index)
    again = build_corpus(tmp_path, documents(), byte_ids)
    assert [again.offsets[0], again.lengths[0]] == sound


def test_a_corpus_of_before_checksums_is_read(tmp_path, byte_ids, monkeypatch):
    before = build_corpus(tmp_path, documents(), byte_ids)
    metadata = json.loads((tmp_path / "corpus.json").read_text())
    del metadata["documents_sha256"], metadata["checksum"]
    (tmp_path / "corpus.json").write_text(json.dumps(metadata))
    monkeypatch.setattr(corpus_module, "_encode", lambda *args: pytest.fail("encoded again"))
    assert build_corpus(tmp_path, documents(), byte_ids).ids.tolist() == before.ids.tolist()


KILLED = """
import os, pathlib, signal, sys
from sparse_coding.lm import corpus
from sparse_coding.lm.documents import Documents
from sparse_coding.lm.tokenizer import load_tokenizer
def texts():
    for i in range(100):
        if i == 60: os.kill(os.getpid(), signal.SIGKILL)
        yield f"document {i}"
corpus.BATCH = 10
tokenizer = load_tokenizer("x", choice="bytes", vocab_size=257)
corpus.build_corpus(pathlib.Path(sys.argv[1]), Documents("d", "r", texts), tokenizer)
"""


def test_a_killed_build_leaves_nothing_that_counts(tmp_path, byte_ids):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    (left,) = (p for p in (tmp_path / "killed").iterdir() if files.is_temporary(p))
    texts = documents([f"document {i}" for i in range(100)])
    build_corpus(tmp_path / "killed", texts, byte_ids)
    build_corpus(tmp_path / "whole", texts, byte_ids)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not left.exists()


def test_long_texts_are_cut_before_spaces(tmp_path, monkeypatch, byte_ids):
    monkeypatch.setattr(corpus_module, "BATCH", 4)
    encoded = []

    def encode(texts: list[str]) -> list[list[int]]:
        encoded.extend(texts)
        return byte_ids.encode_batch(texts)

    spy = Tokenizer(**{**vars(byte_ids), "encode_batch": encode})
    text = "to be or not" + 20 * "x"
    corpus = build_corpus(tmp_path, documents([text]), spy)
    assert encoded[:3] == ["to be", " or not" + "x", "x" * 8]
    assert texts_of(corpus) == [text]


def test_ids_seen_are_remembered_when_they_are_sorted_in(monkeypatch):
    monkeypatch.setattr(corpus_module, "RECENT", 5)
    numbers = np.random.default_rng(0).integers(0, 60, size=400).tolist()
    seen, expected = Seen(), set()
    for number in numbers:
        assert seen.add(number) == (number not in expected)
        expected.add(number)


MEMORY = """
import pathlib, sys
import numpy as np
from sparse_coding.lm import corpus
from sparse_coding.lm.documents import Documents
from sparse_coding.lm.packing import Packed
from sparse_coding.lm.tokenizer import load_tokenizer
n = int(sys.argv[2])
def texts():
    return (f"{i} " * 20_000 for i in range(n))
def peak():  # of anonymous and file pages, since the process began
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
tokenizer = load_tokenizer("x", choice="bytes", vocab_size=257)
built = corpus.build_corpus(pathlib.Path(sys.argv[1]), Documents("d", "r", texts), tokenizer)
order = np.arange(n)
rows = Packed(built, documents=order, context_length=512, separator=256, packing="packed")
for start in range(0, rows.n_rows - 64, 64):
    rows.rows(start, start + 64)
print(peak(), built.metadata["n_tokens"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_in_the_size_of_the_text(tmp_path):
    def run(n: int) -> tuple[int, int]:
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(n)), str(n)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return tuple(map(int, done.stdout.split()))

    (small, few), (large, many) = run(50), run(400)
    assert many > 7.9 * few  # 3 and 24 million tokens: 6 and 48 MB in the file
    assert large < 1.1 * small


# --- nanoGPT's .bin files ---

SEP = 256


def write_bin(path: Path, ids: list[int]) -> Path:
    np.array(ids, dtype=np.uint16).tofile(path)
    return path


def test_documents_are_the_stretches_between_separators(tmp_path, byte_ids):
    ids = [1, 2, 3, SEP, 4, SEP, SEP, 1, 2, 3, SEP, 5, 6]
    corpus = open_bin(write_bin(tmp_path / "train.bin", ids), byte_ids, tmp_path / "corpus")
    assert corpus.offsets.tolist() == [0, 4, 11]
    assert corpus.lengths.tolist() == [3, 1, 2]  # the empty one and the copy are left out
    assert corpus.metadata["n_duplicates"] == 1
    rows = Packed(corpus, documents=np.array([2, 0, 1]), context_length=4, separator=SEP,
                  packing="packed")  # fmt: skip
    assert rows.rows(0, 2).tolist() == [[SEP, 5, 6, SEP], [1, 2, 3, SEP]]


def test_the_file_is_not_copied(tmp_path, byte_ids):
    corpus = open_bin(write_bin(tmp_path / "a.bin", [1, SEP, 2]), byte_ids, tmp_path / "corpus")
    assert Path(corpus.tokens.filename) == tmp_path / "a.bin"
    names = sorted(os.listdir(tmp_path / "corpus"))
    assert names == [".corpus.lock", "corpus.json", "documents.npy"]


def test_without_a_separator_documents_are_pieces(tmp_path, byte_ids, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE", 4)
    path = write_bin(tmp_path / "a.bin", list(range(10)))
    corpus = open_bin(path, byte_ids, tmp_path / "corpus")
    assert corpus.offsets.tolist() == [0, 4, 8]
    assert corpus.lengths.tolist() == [4, 4, 2]
    no_separator = load_tokenizer("x", choice="bytes", vocab_size=256)
    corpus = open_bin(path, no_separator, tmp_path / "other")
    assert corpus.lengths.tolist() == [4, 4, 2]


def test_equal_documents_have_equal_ids_in_any_file(tmp_path, byte_ids):
    first = open_bin(write_bin(tmp_path / "a.bin", [1, 2, SEP, 3]), byte_ids, tmp_path / "a")
    second = open_bin(write_bin(tmp_path / "b.bin", [9, SEP, 1, 2, SEP]), byte_ids, tmp_path / "b")
    assert first.ids[0] == second.ids[1]
    assert len({*first.ids, *second.ids}) == 3
    assert all(0 <= i < 2**63 for i in first.ids)


def test_blocks_do_not_change_what_is_found(tmp_path, byte_ids, monkeypatch):
    ids = np.random.default_rng(0).choice([1, 2, 3, SEP], size=500).tolist()
    path = write_bin(tmp_path / "a.bin", ids)
    whole = open_bin(path, byte_ids, tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "SCAN", 7)
    pieces = open_bin(path, byte_ids, tmp_path / "pieces")
    assert pieces.metadata == whole.metadata
    assert (pieces.offsets == whole.offsets).all()
    assert (pieces.ids == whole.ids).all()


def test_a_file_that_is_known_is_not_scanned_again(tmp_path, byte_ids, monkeypatch):
    path = write_bin(tmp_path / "a.bin", [1, SEP, 2])
    before = open_bin(path, byte_ids, tmp_path / "corpus")
    os.utime(path, (0, 0))  # another date, the same tokens
    assert open_bin(path, byte_ids, tmp_path / "corpus").ids.tolist() == before.ids.tolist()
    monkeypatch.setattr(corpus_module, "_scan", lambda *args: pytest.fail("scanned again"))
    assert open_bin(path, byte_ids, tmp_path / "corpus").ids.tolist() == before.ids.tolist()


@pytest.mark.parametrize("name", FILES[1:])
def test_where_a_damaged_index_lay_the_file_is_scanned_again(tmp_path, byte_ids, name, capsys):
    path, folder = write_bin(tmp_path / "a.bin", [1, SEP, 2]), tmp_path / "corpus"
    open_bin(path, byte_ids, folder)
    before = contents(folder)
    flipped(folder / name)
    open_bin(path, byte_ids, folder)
    assert contents(folder) == before
    assert f"{folder / name} is damaged" in capsys.readouterr().err


def test_a_file_that_has_changed_is_refused(tmp_path, byte_ids):
    open_bin(write_bin(tmp_path / "a.bin", [1, SEP, 2]), byte_ids, tmp_path / "corpus")
    with pytest.raises(UserError, match="holds a corpus with sha256"):
        open_bin(write_bin(tmp_path / "a.bin", [1, SEP, 2, 3]), byte_ids, tmp_path / "corpus")


def test_an_edit_that_keeps_size_and_date_is_refused(tmp_path, byte_ids):
    path = write_bin(tmp_path / "a.bin", [1, SEP, 2])
    open_bin(path, byte_ids, tmp_path / "corpus")
    stat = path.stat()
    write_bin(path, [1, SEP, 3])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="holds a corpus with sha256"):
        open_bin(path, byte_ids, tmp_path / "corpus")


def test_a_tokenizer_that_cuts_other_text_in_another_way_is_refused(tmp_path):
    """Though its fingerprint, of a sample of text, may be the same: a merge is missing."""
    bpe = json.loads(byte_level_bpe(special=[]).to_str())
    tokenizers = []
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(bpe))
        tokenizers.append(load_tokenizer("x", choice=str(tmp_path / name), vocab_size=300))
        bpe["model"]["merges"] = bpe["model"]["merges"][:-1]
    ours, other = tokenizers
    assert ours.state != other.state
    other = replace(other, name=ours.name, fingerprint=ours.fingerprint)
    build_corpus(tmp_path / "corpus", documents(), ours)
    with pytest.raises(UserError, match="holds a corpus with tokenizer_state"):
        build_corpus(tmp_path / "corpus", documents(), other)


def test_another_tokenizer_is_refused(tmp_path, byte_ids):
    path = write_bin(tmp_path / "a.bin", [1, 2])
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
    path = write_bin(tmp_path / "val.bin", [1, SEP, 2])
    tokenizer = {"name": "bytes", "fingerprint": byte_ids.fingerprint}
    split = {"documents": 2, "tokens": 3, "bytes": 2}
    val = split | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    bin_manifest(tmp_path, tokenizer=tokenizer, val=val)
    assert len(open_bin(path, byte_ids, tmp_path / "whole").ids) == 2

    bin_manifest(tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"val\.bin is damaged: its sha256 is not that of"):
        open_bin(path, byte_ids, tmp_path / "damaged")
    other = {"name": "tiktoken:gpt2", "fingerprint": "f" * 16}
    manifest = bin_manifest(tmp_path, tokenizer=other, val=val)
    reason = "made with the tokenizer tiktoken:gpt2, not with bytes of the model: choose the model"
    with pytest.raises(UserError, match=reason):
        open_bin(path, byte_ids, tmp_path / "other")
    numbers = load_tokenizer("", choice="ids", vocab_size=257, dataset=str(path))
    assert len(open_bin(path, numbers, tmp_path / "numbers").ids) == 1  # without a separator
    manifest.write_text('{"of": "another program"}')
    assert len(open_bin(path, byte_ids, tmp_path / "foreign").ids) == 2


@pytest.mark.parametrize(
    "changes",
    [{"tokenizer": {"name": "bytes"}}, {"tokenizer": []}, {"constants": []}, {"val": {}},
     {"constants": {}}, {"vocab_size": "257"}, {"vocab_size": None}, {"end_of_text": None},
     {"end_of_text": -1}, {"train": {"documents": 1, "tokens": "2", "bytes": 1, "sha256": ""}}],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_other_fields_is_refused_by_their_names(tmp_path, byte_ids, changes):
    path = write_bin(tmp_path / "val.bin", [1, SEP, 2])
    manifest = bin_manifest(tmp_path, **changes)
    with pytest.raises(UserError, match=f"{manifest}: .* is not of prepare.py"):
        open_bin(path, byte_ids, tmp_path / "corpus")
    manifest.write_text('{"end_of_text": ' + "[" * 100_000)
    with pytest.raises(UserError, match=f"{manifest} is not JSON"):
        open_bin(path, byte_ids, tmp_path / "corpus")


def test_a_missing_file_is_refused(tmp_path, byte_ids):
    with pytest.raises(UserError, match="no such file"):
        open_bin(tmp_path / "a.bin", byte_ids, tmp_path / "corpus")
