"""Text comes whole, in order, streamed, and bad sources end in one line."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import platform
import random
import re
import tracemalloc
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from builders.models import write_jsonl, write_parquet

from sparse_coding.config import UserError
from sparse_coding.lm import documents
from sparse_coding.lm.documents import (
    BLOCK,
    LONGEST,
    PIECE,
    dataset_commit,
    document_id,
    in_batches,
    in_pieces,
    is_held_out,
    nesting,
    open_documents,
)

TEXTS = ["def f():\n    return 1\n", "zweite Datei: ß", "three"]


def put_into_cache(hub_cache, dataset, *, sha, files):
    """What `hf download` leaves; returns the folder of the files."""
    folder = hub_cache / f"datasets--{dataset.replace('/', '--')}"
    for name, texts in files.items():
        path = folder / "snapshots" / sha / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, texts)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(sha)


def test_the_standard_library_is_read_without_its_tests_and_packages():
    documents = open_documents("stdlib")
    texts = list(documents)
    assert re.fullmatch(rf"python {platform.python_version()} [0-9a-f]{{16}}", documents.revision)
    for module, is_there in ((contextlib, True), (json, True), (pytest, False)):
        assert (Path(module.__file__).read_text() in texts) == is_there
    assert 5e6 < sum(map(len, texts)) < 50e6
    assert texts == list(documents)


def test_texts_of_every_kind_of_file_come_back_in_order(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    write_parquet(tmp_path / "b.parquet", [TEXTS[1]])
    (tmp_path / "c.txt").write_text(TEXTS[2])
    (tmp_path / "d.md").write_text("not read")
    assert list(open_documents(str(tmp_path))) == TEXTS
    for i, name in enumerate(("a.jsonl", "b.parquet", "c.txt")):
        assert list(open_documents(str(tmp_path / name))) == [TEXTS[i]]


def test_empty_texts_are_left_out_and_broken_characters_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "a\\ud800b"}\n')
    assert list(open_documents(str(tmp_path / "a.jsonl"))) == ["a?b"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfx\xffy")  # a byte order mark, then no UTF-8
    assert list(open_documents(str(tmp_path / "b.txt"))) == ["x\ufffdy"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_says_how_a_text_is_read(tmp_path, encoding, suffix):
    text = "zwölf Boxkämpfer\n" * 300
    content = json.dumps({"text": text}, ensure_ascii=False) if suffix == "jsonl" else text
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes it for the others
    (tmp_path / f"a.{suffix}").write_bytes((mark + content).encode(encoding))
    assert list(open_documents(str(tmp_path / f"a.{suffix}"))) == [text]


@pytest.mark.parametrize(
    "content",
    ["zwölf Boxkämpfer\n" * 30, "x" * 100, b"\x1f\x8b\x08" + bytes(range(256)) * 50],
    ids=["latin-1", "utf-16-le", "binary"],
)
def test_text_that_is_no_utf_8_is_refused_with_what_to_do(tmp_path, content, request):
    kind = request.node.callspec.id
    data = content if isinstance(content, bytes) else content.encode(kind)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.txt is not text in UTF-8: .*iconv"):
        open_documents(str(tmp_path / "a.txt"))


def test_up_to_ten_broken_characters_are_an_accident(tmp_path):
    for n, name in ((10, "few.txt"), (11, "many.txt")):
        (tmp_path / name).write_bytes(b"a" * 100 + b"\xff" * n)
    assert list(open_documents(str(tmp_path / "few.txt"))) == ["a" * 100 + "\ufffd" * 10]
    with pytest.raises(UserError, match=r"many\.txt is not text in UTF-8"):
        open_documents(str(tmp_path / "many.txt"))


def test_a_text_full_of_replacement_characters_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufffd" * 1000)
    assert list(open_documents(str(tmp_path / "a.txt"))) == ["\ufffd" * 1000]


def test_what_a_folder_has_besides_texts_is_named_and_hidden_files_are_no_text(tmp_path, capsys):
    for name in ("a.txt", ".b.txt", ".git/c.txt", "._a.txt", "d.txt.bz2", "e.TXT", "in/f.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(open_documents(str(tmp_path))) == ["a.txt"]
    line = f"{tmp_path}: not read: d.txt.bz2, e.TXT, in/f.zst (but .txt, .jsonl, .parquet"
    (out,) = capsys.readouterr().out.splitlines()
    assert out.startswith(line)
    for i in range(9):
        (tmp_path / f"x{i}.md").write_text("x")
    open_documents(str(tmp_path / "a.txt"))
    assert capsys.readouterr().out == ""
    open_documents(str(tmp_path))
    assert "x0.md, x1.md and 7 more (" in capsys.readouterr().out


def packed(content: bytes, suffix: str) -> bytes:
    """In two parts, as of packed files put one behind the other."""
    parts = content[: len(content) // 2], content[len(content) // 2 :]
    zstd = partial(pyarrow.compress, codec="zstd", asbytes=True)
    return b"".join(map(gzip.compress if suffix == "gz" else zstd, parts))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_packed_texts_are_those_that_are_packed(tmp_path, suffix):
    long = "zwölf Boxkämpfer jagen\n\n" * 9000
    for name, content in {"a.jsonl": write_jsonl(tmp_path / "x", TEXTS), "b.txt": long}.items():
        content = Path(content).read_bytes() if name == "a.jsonl" else content.encode("utf-16")
        for folder, data in (("plain", content), ("packed", packed(content, suffix))):
            (tmp_path / folder).mkdir(exist_ok=True)
            ending = f".{suffix}" if folder == "packed" else ""
            (tmp_path / folder / f"{name}{ending}").write_bytes(data)
    texts = list(open_documents(str(tmp_path / "plain")))
    assert "".join(texts) == "".join(TEXTS) + long
    assert list(open_documents(str(tmp_path / "packed"))) == texts
    assert list(open_documents(str(tmp_path / f"packed/a.jsonl.{suffix}"))) == TEXTS


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("harm", [lambda d: d[: len(d) * 3 // 4], lambda d: b"x" * len(d)])
def test_a_packed_text_that_is_not_whole_is_refused(tmp_path, suffix, harm):
    path = tmp_path / f"a.txt.{suffix}"
    noise = random.Random(0).randbytes(3 * BLOCK).hex().encode()  # its start is whole
    path.write_bytes(harm(packed(noise, suffix)))
    with pytest.raises(UserError, match=rf"a\.txt\.{suffix} is no whole \.{suffix} file .*fetch"):
        list(open_documents(str(path)))


LINES = {
    "deep": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"text": "a", "n": ' + "7" * 5000 + "}",
    "torn": '{"text": "b',
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_is_no_json_is_named_by_its_number(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + LINES[kind])
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(open_documents(str(tmp_path / "a.jsonl")))


def no_utf_8() -> pyarrow.Array:
    """Strings of pyarrow, not all of which are any."""
    data = pyarrow.array([b"ok", b"bad \xff\xfe"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, data.buffers())


def parquet_bytes(column: pyarrow.Array) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


def bad_parquets() -> dict[str, bytes]:
    good = parquet_bytes(pyarrow.array([f"text {i} " * 9 for i in range(5000)]))
    holes = bytearray(good)
    for at in range(500, len(good) - 3000, 997):
        holes[at] ^= 255
    return {
        "damaged pages": bytes(holes),
        "no footer": good[:-100] + bytes(80) + good[-20:],
        "cut": good[:-9],
        "no utf-8": parquet_bytes(no_utf_8()),
        "all null": parquet_bytes(pyarrow.array([None] * 9, pyarrow.null())),
        "empty": b"",
    }


@pytest.mark.parametrize("kind", bad_parquets())
@pytest.mark.parametrize("place", ["local", "cached"])
def test_a_bad_parquet_file_is_one_line(tmp_path, hub_cache, kind, place):
    name = str(tmp_path / "a.parquet")
    if place == "local":
        Path(name).write_bytes(bad_parquets()[kind])
    else:
        put_into_cache(hub_cache, name := "a/b", sha="c" * 40, files={"train.parquet": TEXTS})
        (path,) = hub_cache.rglob("train.parquet")
        path.write_bytes(bad_parquets()[kind])
    with pytest.raises(UserError, match=name) as error:
        list(open_documents(name))
    assert "\n" not in str(error.value)
    assert "out of reach" not in str(error.value)


def test_a_cached_file_of_nulls_before_one_of_texts_is_one_line(hub_cache):
    files = {f"train-0000{i}-of-00002.parquet": TEXTS for i in range(2)}
    put_into_cache(hub_cache, "a/b", sha="c" * 40, files=files)
    first = min(hub_cache.rglob("train-0*.parquet"))
    first.write_bytes(bad_parquets()["all null"])
    with pytest.raises(UserError, match=r"a/b can't be read: .*null"):
        list(open_documents("a/b"))


def test_cached_json_nested_too_deep_for_its_reader_is_refused_before_it_crashes(hub_cache):
    put_into_cache(hub_cache, "a/b", sha="c" * 40, files={"train.parquet": TEXTS})
    (path,) = hub_cache.rglob("train.parquet")
    path.unlink()
    lines = '{"text": "a"}\n' + LINES["deep"]
    pretty = '[{"text":\n' + "[\n" * 5000 + "]\n" * 5000 + "}]"
    files = {"train.jsonl": lines.encode(), "train.json": pretty.encode(),
             "train.jsonl.gz": gzip.compress(lines.encode()),
             "train.json.bz2": bz2.compress(pretty.encode())}  # fmt: skip
    for name, content in files.items():
        path.with_name(name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is nested more than 500 deep"):
            open_documents("a/b")
        path.with_name(name).unlink()


@pytest.mark.parametrize("block", [1, 3, 7, 2**20])
def test_nesting_counts_brackets_outside_of_texts_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr("sparse_coding.lm.documents.BLOCK", block)
    for content, depth in (
        (b"", 0), (b"[[]]", 2), (b'{"a": [1, {"b": []}]}', 4), (b"[]\n[]\n[[]]\n", 2),
        (b'["[[[["]', 1), (rb'["\"[[[", [1]]', 2), (rb'["\\", [["\\\""]]]', 3), (b'["[[', 1),
        (b'{"a": "' + b"[" * 1000 + b'"}', 1),
    ):  # fmt: skip
        assert nesting(io.BytesIO(content)) == depth, content


def test_another_text_column_can_be_chosen(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    path = str(tmp_path / "a.parquet")
    assert list(open_documents(path, text_column="content")) == TEXTS
    with pytest.raises(UserError, match=r"no column 'text'.*content, meta"):
        open_documents(path)
    with pytest.raises(UserError, match="a dict where text was expected"):
        open_documents(path, text_column="meta")


@pytest.mark.parametrize("block", [7, 1000, 2**20])
def test_a_text_file_is_parted_at_end_of_text_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr("sparse_coding.lm.documents.BLOCK", block)
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>two<|endoftext|>\n\n<|endoftext|>three")
    assert list(open_documents(str(tmp_path / "a.txt"))) == ["one\n", "two", "three"]


@pytest.mark.parametrize("block", [997, 2**20])
def test_a_long_text_file_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path, monkeypatch, block):
    monkeypatch.setattr("sparse_coding.lm.documents.BLOCK", block)
    paragraph = "a line of text\n" * 30 + "\n"
    text = paragraph * 200 + "x" * 3 * LONGEST + "\nlast line"
    (tmp_path / "a.txt").write_text(text)
    pieces = list(open_documents(str(tmp_path / "a.txt")))
    assert "".join(pieces) == text
    assert all(PIECE < len(piece) <= 2 * PIECE for piece in pieces[:-1])
    assert all(piece.endswith("\n\n") for piece in pieces[: len(paragraph) * 200 // (2 * PIECE)])
    (tmp_path / "b.txt").write_text(text[:LONGEST])
    assert list(open_documents(str(tmp_path / "b.txt"))) == [text[:LONGEST]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz"])
def test_memory_stays_flat_when_the_text_grows(tmp_path, suffix):
    def peak(n_rows: int) -> int:
        path = tmp_path / f"{n_rows}.{suffix}"
        if suffix == "jsonl":
            write_jsonl(path, ["word " * 200] * n_rows)
        else:
            content = b"word " * 200 * n_rows
            path.write_bytes(content if suffix == "txt" else packed(content, "gz"))
        tracemalloc.start()
        n_characters = sum(len(text) for text in open_documents(str(path)))
        assert n_characters == 1000 * n_rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(16_000) < 1.1 * peak(4_000)


def test_a_line_too_long_to_be_parsed_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 2**20)
    write_jsonl(tmp_path / "a.jsonl", ["short", "x" * 2**24])
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.jsonl has a line of more than 1 MB: give its text as"):
        list(open_documents(str(tmp_path / "a.jsonl")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    longest = max(map(len, (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)))
    monkeypatch.setattr(documents, "LONGEST_LINE", longest)
    assert len(list(open_documents(str(tmp_path / "a.jsonl")))) == 2


def test_batches_and_pieces_are_as_large_as_they_may_be():
    texts = ["ab", "cd", "e", "fghij", "k"]
    assert list(in_batches(texts, 4)) == [["ab", "cd"], ["e"], ["fghij"], ["k"]]
    ends = ((" ", 0),)
    assert list(in_pieces("abcdefgh", 2, longest=4, ends=ends)) == ["abcd", "efgh"]
    assert list(in_pieces("ab cdefg", 2, longest=4, ends=ends)) == ["ab", " cde", "fg"]


def test_a_document_keeps_its_id_and_larger_shares_hold_out_more():
    digest = hashlib.sha256("zwölf".encode()).digest()
    assert document_id("zwölf") == int.from_bytes(digest[:8], "little") // 2
    ids = [document_id(f"document {i}") for i in range(20_000)]
    held = [i for i in ids if is_held_out(i, 0.05)]
    # binomial: 1000 ± 31
    assert 870 < len(held) < 1130
    assert all(is_held_out(i, 0.1) for i in held)
    assert not any(is_held_out(i, 0.0) for i in [0, *ids])
    assert all(is_held_out(i, 1.0) for i in [*ids, 2**63 - 1])


def test_a_cached_hub_dataset_is_read_without_network_at_its_pinned_commit(hub_cache, monkeypatch):
    copies = hub_cache.with_name("copies")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", copies)
    sha = "127bfedcd5047750df5ccf3a12979a47bfa0bafa"
    files = {"data/train-00000-of-00001-4746b8785c874cc7.parquet": TEXTS}
    put_into_cache(hub_cache, "NeelNanda/pile-10k", sha=sha, files=files)
    documents = open_documents("NeelNanda/pile-10k")
    assert list(documents) == TEXTS
    assert (documents.name, documents.revision) == ("NeelNanda/pile-10k", sha)
    assert not list(copies.rglob("*.arrow"))
    with pytest.raises(UserError, match=r"no column 'words'.*text, meta"):
        open_documents("NeelNanda/pile-10k", text_column="words")


def test_a_cached_dataset_without_a_pin_says_its_commit_and_needs_a_train_split(hub_cache):
    put_into_cache(hub_cache, "a/b", sha="c" * 40, files={"train.parquet": TEXTS})
    assert open_documents("a/b").revision == "c" * 40
    put_into_cache(hub_cache, "a/c", sha="d" * 40, files={"test-00000-of-00001.parquet": TEXTS})
    with pytest.raises(UserError, match=r"^a/c has no split train: use .* with one of test$"):
        open_documents("a/c")


CONFIGS = """---
configs:
- {config_name: en, data_files: [{split: train, path: en/train*}, {split: dev, path: en/dev*}]}
- {config_name: de-x.1, data_files: [{split: train, path: de/*}]}
---
"""


def test_a_configuration_and_a_split_can_be_chosen(hub_cache):
    files = {
        f"{name}-00000-of-00001.parquet": [name] for name in ("en/train", "en/dev", "de/train")
    }
    put_into_cache(hub_cache, "a/b", sha="c" * 40, files=files)
    with pytest.raises(UserError, match="a/b has no configuration en"):  # without its card
        open_documents("a/b:en")
    (hub_cache / f"datasets--a--b/snapshots/{'c' * 40}/README.md").write_text(CONFIGS)
    chosen = {"a/b:en": "en/train", "a/b:en@dev": "en/dev", "a/b:de-x.1@train": "de/train"}
    for choice, text in chosen.items():
        documents = open_documents(choice)
        assert (list(documents), documents.name, documents.revision) == ([text], choice, "c" * 40)
        assert dataset_commit(choice, "") == "c" * 40
    for choice, reason in {
        "a/b:fr": r"^a/b has no configuration fr: use --dataset a/b:CONFIG@SPLIT with one of en, ",
        "a/b": r"^a/b has no default configuration: use .* with one of en, de-x\.1$",
        "a/b:de-x.1@dev": r"^a/b:de-x\.1@dev has no split dev: use .* with one of train$",
        "a/b@dev[:9]": r"no such file or folder",
    }.items():
        with pytest.raises(UserError, match=reason):
            open_documents(choice)


def test_a_hub_dataset_that_is_not_whole_in_the_cache_says_how_to_fetch_it(hub_cache):
    with pytest.raises(UserError, match="hf download a/b --repo-type dataset`"):
        open_documents("a/b")
    files = {"data/train-00000-of-00002.parquet": TEXTS}
    put_into_cache(hub_cache, "a/b", sha="c" * 40, files=files)
    with pytest.raises(UserError, match=r"a/b is no local .* and the hub is out of reach"):
        open_documents("a/b")


def test_bad_sources_are_refused_with_the_reason(tmp_path, hub_cache):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": "b')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "torn.parquet").write_text("PAR1")
    (tmp_path / "a.bin").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "empty.txt": "is empty",
        "blank.txt": "has no text in it",
        "list.jsonl": "a row is a list",
        "torn.parquet": "not a whole parquet file",
        "a.bin": r"can read .txt, .jsonl, .parquet, .txt.gz, .jsonl.zst, \.\.\. only",
        "folder": "holds no file that we read: .txt",
        "missing.txt": "no such file",
    }.items():
        with pytest.raises(UserError, match=reason):
            open_documents(str(tmp_path / name))
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(open_documents(str(tmp_path / "torn.jsonl")))
    for name in ("no/such/file", "a..b/c", "two words"):
        with pytest.raises(UserError, match="no"):
            open_documents(name)
