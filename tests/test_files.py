"""Files are whole or not there, and come back as they were."""

import os
import shutil
from collections import namedtuple

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.files import (
    read_csv,
    read_tensors,
    write_atomic,
    write_csv,
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
