"""Files are whole or not there, come back as they were, or are refused."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparse_coding import files
from sparse_coding.config import UserError
from sparse_coding.files import (
    JSON_BYTES,
    Damaged,
    csv_text,
    hashes_folder,
    is_temporary,
    kept_sha256,
    read_csv,
    read_json,
    read_record,
    read_tensor_info,
    read_tensors,
    sha256,
    tensors_checksum,
    verified_checksum,
    write_atomic,
    write_csv,
    write_record,
    write_tensors,
    written_whole,
)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a" / "file.txt"
    write_atomic(path, "old")

    def write_half() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("torn")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_tensors_come_back_with_their_bits_and_info(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(2.0)}  # a is not contiguous
    write_tensors(tmp_path / "t.safetensors", tensors, info={"step": 7})
    back, info = read_tensors(tmp_path / "t.safetensors")
    assert info == {"step": 7}
    assert all(torch.equal(tensors[name], back[name]) for name in tensors)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
          torch.uint8, torch.bool]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_written_byte_for_byte_as_the_library_would(tmp_path, dtype):
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "b": (100 * torch.rand(3, 5, generator=rng)).to(dtype),
        "a": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "wide": torch.arange(2, dtype=torch.float64),
    }
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensors, info={"a name": 'é"\\', "step": 7, "x": 0.1})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert all(torch.equal(tensors[k], v) for k, v in read_tensors(path)[0].items())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_any_flipped_bit_of_tensors_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}
    write_tensors(path, tensors, info={"step": 7})
    whole, n_refused = path.read_bytes(), 0
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            back, info = read_tensors(path)
        except Damaged:
            n_refused += 1
        else:  # of the checksum's own name
            assert info["step"] == 7
            assert all(torch.equal(tensors[name], back[name]) for name in tensors | back)
    assert n_refused > 0.9 * 8 * len(whole)


def test_any_flipped_bit_of_a_record_is_refused_or_changes_no_value(tmp_path):
    path, record = tmp_path / "r.json", {"l0": 3.5, "nothing": None, "names": ["a", "b"], "n": 2}
    write_record(path, record)
    assert read_record(path) == record
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with contextlib.suppress(Damaged):
            assert record.items() <= read_record(path).items()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 200_000, b'{"n": ' + b"9" * 5000 + b"}", b"{}",
     b'{"n": 1' + b" " * JSON_BYTES + b"}"],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"r\.json is damaged"):
        read_record(tmp_path / "r.json")


def test_files_of_before_checksums_are_read(tmp_path):
    (tmp_path / "r.json").write_text('{"a": 1}')
    assert read_record(tmp_path / "r.json") == {"a": 1}
    info = {"info": json.dumps({"step": 1})}
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors", metadata=info)
    assert read_tensors(tmp_path / "t.safetensors")[1] == {"step": 1}
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "of others.safetensors")
    assert read_tensor_info(tmp_path / "of others.safetensors") == {}


@pytest.mark.parametrize("info", ["{", "[]", "[" * 50_000, '{"a": ' + "7" * 5000 + "}"])
def test_tensors_with_info_that_is_none_of_ours_are_refused(tmp_path, info):
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"info": info})
    for read in (read_tensors, read_tensor_info):
        with pytest.raises(Damaged, match=r"t\.safetensors is damaged"):
            read(path)


def test_a_table_is_read_with_its_checksum_only(tmp_path):
    write_csv(tmp_path / "r.csv", [{"n": 3}])
    checksum = sha256(tmp_path / "r.csv")
    assert read_csv(tmp_path / "r.csv", checksum=checksum) == [{"n": 3}]
    write_csv(tmp_path / "r.csv", [{"n": 2}])
    with pytest.raises(Damaged, match="its checksum differs"):
        read_csv(tmp_path / "r.csv", checksum=checksum)


@pytest.mark.parametrize("content", [b"n,x\n1\n", b"n\n1,2\n", b"n\nx\n", b"n\n\xff\n", b'n\n"1\n'])
def test_what_is_no_table_of_numbers_is_refused(tmp_path, content):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(Damaged):
        read_csv(tmp_path / "r.csv")


@pytest.mark.parametrize("name", [".a.json.0123abcd.tmp", ".tmpk3dF0a", ".t.safetensors.1.tmp"])
def test_temporary_files_of_ours_and_of_safetensors_are_known(name):
    assert is_temporary(Path("x", name))


@pytest.mark.parametrize("name", ["a.tmp", ".tmp", ".tmpfiles", ".tmp-12345", ".env"])
def test_files_of_others_are_not_taken_for_temporary_ones(name):
    assert not is_temporary(Path("x", name))


def test_what_the_system_refuses_names_the_file_and_not_the_temporary_one(tmp_path, monkeypatch):
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refusal:
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    assert refusal.value.filename == str(tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_text_in_a_table_is_no_formula_and_numbers_stay_numbers(text):
    rows = [{"name": text, "x": -1.5, "n": -3, "larger": None, "plain": "a-b"}]
    (row,) = csv.DictReader(io.StringIO(csv_text(rows), newline=""))
    assert row == {"name": f"'{text}", "x": "-1.5", "n": "-3", "larger": "", "plain": "a-b"}


def test_a_name_that_is_no_utf8_is_written_as_its_bytes_in_digits(tmp_path):
    write_atomic(tmp_path / "a.html", os.fsdecode(b"caf\xe9 \xc3\xa9"))
    assert (tmp_path / "a.html").read_text("utf-8") == "caf\\udce9 é"


def test_what_does_not_fit_on_the_disk_is_refused_before_the_write(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match="disk full"):
        write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1000)})
    assert os.listdir(tmp_path) == []


def test_csv_rows_come_back_with_numbers_and_empty_fields(tmp_path):
    rows = [{"n": 3, "x": 0.1, "larger": None}, {"n": 4, "x": 1e-30, "larger": 0.5}]
    write_csv(tmp_path / "r.csv", rows)
    assert (tmp_path / "r.csv").read_text().splitlines()[:2] == ["n,x,larger", "3,0.1,"]
    assert read_csv(tmp_path / "r.csv") == rows


JSON_OF_STRANGERS = {
    "deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON .*recursion"),
    "digits": (b'{"a": ' + b"7" * 5000 + b"}", "not JSON .*digits"),
    "list": (b"[1]", "holds a list, not a JSON object"),
    "number": (b"3", "holds a int"),
    "latin-1": ('{"a": "ß"}'.encode("latin-1"), "not JSON .*utf-8"),
    "torn": (b'{"a": ', "not JSON"),
    "empty": (b"", "not JSON"),
    "huge": (b"[" + b"[]," * (JSON_BYTES // 3) + b"[]]", "larger than 32 MB"),
}


@pytest.mark.parametrize("kind", JSON_OF_STRANGERS)
def test_json_of_strangers_is_refused_in_one_line_that_names_the_file(tmp_path, kind):
    content, reason = JSON_OF_STRANGERS[kind]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=f"x.json.*{reason}.*: mend it") as error:
        read_json(tmp_path / "x.json", remedy="mend it")
    assert "\n" not in str(error.value)


def test_json_that_is_no_file_is_refused_and_an_object_comes_back(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="can't be read"):
            read_json(path, remedy="")
    (tmp_path / "x.json").write_text('{"a": "ß", "b": [1, null]}', encoding="utf-16")
    assert read_json(tmp_path / "x.json", remedy="") == {"a": "ß", "b": [1, None]}


# --- what a file is ---


@pytest.fixture
def hashed(tmp_path, monkeypatch) -> list:
    """Files of any size and age are kept; the paths of those that were hashed."""
    paths = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "KEPT_FROM", 0)
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: paths.append(path) or real(path))
    return paths


def rewritten(path, data: bytes) -> str:
    """Other contents of the same size with the same date; their sha256."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock of the disk has ticked
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_hashed_once_and_again_after_any_edit(tmp_path, hashed):
    path = tmp_path / "a.bin"
    path.write_bytes(b"first")
    rewritten(path, b"first")  # at an earlier tick of the clock than what follows
    first = hashlib.sha256(b"first").hexdigest()
    assert [kept_sha256(path) for _ in range(3)] == [first] * 3
    assert hashed == [path]
    second = rewritten(path, b"other")
    assert [kept_sha256(path) for _ in range(2)] == [second] * 2
    assert hashed == [path] * 2
    path.rename(tmp_path / "b.bin")
    shutil.copy(tmp_path / "b.bin", path)
    assert kept_sha256(path) == second
    assert hashed == [path] * 3


def test_tensors_are_verified_once_and_again_after_any_edit(tmp_path, hashed, monkeypatch):
    path, read, real = tmp_path / "a.safetensors", [], files.read_tensors
    monkeypatch.setattr(files, "read_tensors", lambda path: read.append(path) or real(path))
    write_tensors(path, {"w": torch.arange(9)})
    whole = path.read_bytes()
    rewritten(path, whole)
    assert [verified_checksum(path) for _ in range(3)] == [tensors_checksum(path)] * 3
    assert read == [path]
    rewritten(path, whole[:-1] + b"\1")
    for _ in range(2):
        with pytest.raises(Damaged, match="its checksum differs"):
            verified_checksum(path)
    rewritten(path, whole)
    assert verified_checksum(path) == tensors_checksum(path)


def test_what_changed_a_moment_ago_is_hashed_anew(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(files, "SETTLED_NS", 60 * 10**9)
    path = tmp_path / "a.bin"
    path.write_bytes(b"first")
    os.utime(path, (0, 0))  # an old date tells nothing of when it was written
    for _ in range(2):
        kept_sha256(path)
    assert hashed == [path] * 2
    assert not hashes_folder().exists()


def test_a_damaged_note_or_no_place_for_notes_costs_time_only(tmp_path, hashed, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"first")
    rewritten(path, b"first")
    digest = kept_sha256(path)
    (note,) = hashes_folder().iterdir()
    whole = note.read_bytes()
    for damage in (b"", b"\xff", b"0" * 64, whole[:-1], b"0" + whole[1:], whole + b"0"):
        note.write_bytes(damage)
        assert kept_sha256(path) == digest
        assert note.read_bytes() == whole
    assert len(hashed) == 7
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert kept_sha256(path) == digest
