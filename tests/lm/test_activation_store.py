"""Chunks on disk: written once, resumed, checked, of one target; or computed as they are read."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders.lm import CONTEXT, all_rows, bits, harvester_of, texts, tiny_target

from sparse_coding.config import UserError
from sparse_coding.files import read_tensor_info, read_tensors
from sparse_coding.lm import activations
from sparse_coding.lm.activations import (
    Harvester,
    Store,
    check_manifest,
    chunk_path,
    claim_folder,
    open_activations,
    open_store,
)

WIDTH = 40  # of mlp_act
TEXTS_PER_CHUNK = 100  # rows of text: 8 chunks


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(activations, "CHUNK_BYTES", TEXTS_PER_CHUNK * CONTEXT * WIDTH * 2)


@pytest.fixture
def harvester(root) -> Harvester:
    return harvester_of(tiny_target(root))


METADATA = {"model": "m", "layer": 1, "store_dtype": "float16"}


def opened(folder: Path, harvester: Harvester, **metadata) -> Store:
    claim_folder(folder)
    return open_store(folder, harvester, metadata=METADATA | metadata)


def counting(harvester: Harvester, fails_at: int | None = None):
    """The harvester, noting which chunks it computes; one can fail as a killed process would."""
    computed: list[int] = []

    def parts(k: int) -> Iterator[torch.Tensor]:
        if k == fails_at:
            raise KeyboardInterrupt
        computed.append(k)
        return harvester.parts(k)

    names = ("rows", "text", "span", "site", "store_dtype", "n_tokens", "n_bytes", "assembled")
    return SimpleNamespace(
        parts=parts, computed=computed, **{n: getattr(harvester, n) for n in names}
    )


def test_the_store_gives_the_rows_of_the_harvester(tmp_path, harvester):
    store = opened(tmp_path / "a", harvester)
    assert store.rows == harvester.rows
    assert all(torch.equal(store.load(k), harvester.load(k)) for k in range(len(store.rows)))
    in_bfloat16 = replace(harvester, store_dtype=torch.bfloat16, n_tokens=1)
    assert torch.equal(opened(tmp_path / "b", in_bfloat16).load(0), in_bfloat16.load(0))


def test_the_manifest_has_rows_checksums_and_what_the_rows_depend_on(tmp_path, harvester):
    store = opened(tmp_path, harvester)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["metadata"] == METADATA
    assert manifest["n_rows"] == sum(store.rows)
    names = [f"chunk-{k:05d}.safetensors" for k in range(8)]
    assert list(manifest["chunks"]) == names
    for k, name in enumerate(names):
        tensors, info = read_tensors(tmp_path / name)
        data = tensors["activations"].numpy().tobytes()
        assert info == manifest["chunks"][name]
        assert info["sha256"] == hashlib.sha256(data).hexdigest()
        assert info["rows"] == store.rows[k] == len(tensors["activations"])
        assert info["n_documents"] == len(tensors["document_ids"])


def test_stored_documents_are_the_training_ones_by_the_hash_of_their_text(tmp_path, harvester):
    opened(tmp_path, harvester)
    stored = set()
    for path in tmp_path.glob("chunk-*"):
        stored |= set(read_tensors(path)[0]["document_ids"].tolist())
    ids = [hashlib.sha256(text.encode()).digest()[:8] for text in texts(300)]
    ids = [int.from_bytes(i, "little") >> 1 for i in ids]
    held_out = {i for i in ids if i < 0.2 * 2**63}
    assert len(held_out) > 30
    assert not stored & held_out
    last = set(ids) - held_out - stored  # at most what the incomplete last row had
    assert stored < set(ids)
    assert len(last) <= 2


def test_rows_of_extreme_norm_are_counted(tmp_path, harvester):
    planted = harvester.load(0)
    planted[3] *= 0.001
    median = planted.float().norm(dim=1).median()
    large = [(i, 9) for i in range(20, 220)]  # no change of the median, but of the mean
    for i, norm in ((5, 11), (9, 30), *large):  # x the median; above 10 is extreme
        planted[i] = (planted[i].float() * norm * median / planted[i].float().norm()).half()
    assert read_tensor_info(Path(write(tmp_path, harvester, planted)))["n_extreme"] == 2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["n_extreme"] == 2


def write(folder: Path, harvester: Harvester, rows: torch.Tensor) -> Path:
    """A store of one chunk with these rows."""
    one = counting(replace(harvester, n_tokens=1))
    one.assembled = lambda k, parts: (rows, rows.float().norm(dim=1))
    opened(folder, one)
    return chunk_path(folder, 0)


@pytest.mark.parametrize(
    ("name", "value"), [("layer", 2), ("store_dtype", "bfloat16"), ("new_field", "x")]
)
def test_a_store_of_something_else_is_refused_by_the_name_of_the_field(
    tmp_path, harvester, name, value
):
    few = replace(harvester, n_tokens=1)
    opened(tmp_path, few)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=rf"{name} {METADATA.get(name)} there, {value} here"):
        opened(tmp_path, few, **{name: value})
    with pytest.raises(UserError, match=f"{name} .* there"):
        check_manifest(tmp_path, METADATA | {name: value})
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["", "[]", '{"metadata": 3}', '{"chunks": {}}'])
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, harvester, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest of ours"):
        opened(tmp_path, harvester)


def test_a_store_of_the_older_version_is_refused_and_stays_as_it_is(tmp_path, harvester):
    (tmp_path / "manifest.json").write_text(json.dumps({"about": METADATA, "shards": {}}))
    (tmp_path / "shard-00000.safetensors").write_bytes(b"activations")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for open_again in (check_manifest, partial(open_store, harvester=harvester)):
        with pytest.raises(UserError, match=f"an older version: choose .* or delete {tmp_path}"):
            open_again(tmp_path, metadata=METADATA)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.name[0] != "."} == before


@pytest.mark.parametrize("name", ["chunk-00000.safetensors", "thesis.tex"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match=rf"--activations-dir .* holds other things .*{name}"):
        claim_folder(tmp_path)
    assert (tmp_path / name).read_bytes() == b"x"


def test_a_folder_can_be_claimed_new_empty_with_text_and_as_a_store(tmp_path, harvester):
    for _ in range(2):  # new, then empty
        claim_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "text").mkdir()
    (tmp_path / "a" / "b" / ".harvest.lock").touch()
    claim_folder(tmp_path / "a" / "b")
    opened(tmp_path / "a" / "b", replace(harvester, n_tokens=1))
    claim_folder(tmp_path / "a" / "b")


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        claim_folder(tmp_path / "file")
    for folder in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="can't be written"):
            claim_folder(folder)


def test_a_harvest_that_was_stopped_goes_on_with_the_missing_chunks(tmp_path, harvester):
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, counting(harvester, fails_at=5))
    there = {int(p.stem[-5:]) for p in tmp_path.glob("chunk-*")}
    assert there in ({0, 1, 2, 3}, {0, 1, 2, 3, 4})
    chunk_path(tmp_path, 1).unlink()
    again = counting(harvester)
    store = opened(tmp_path, again)
    assert again.computed == sorted(set(range(8)) - there | {1})
    whole = opened(tmp_path / "whole", harvester)
    for k in range(8):
        assert chunk_path(tmp_path, k).read_bytes() == chunk_path(whole.folder, k).read_bytes()
    assert bits(all_rows(store)) == bits(all_rows(harvester))
    finished = counting(harvester)
    opened(tmp_path, finished)
    assert finished.computed == []


def test_a_store_grows_and_keeps_its_chunks(tmp_path, harvester):
    small = opened(tmp_path, replace(harvester, n_tokens=3000))
    assert len(small.rows) == 3
    before = {k: chunk_path(tmp_path, k).read_bytes() for k in range(3)}
    more = counting(harvester)
    store = opened(tmp_path, more)
    assert more.computed == [3, 4, 5, 6, 7]
    assert {k: chunk_path(tmp_path, k).read_bytes() for k in range(3)} == before
    assert json.loads((tmp_path / "manifest.json").read_text())["n_rows"] == sum(store.rows)
    fewer = opened(tmp_path, replace(harvester, n_tokens=3000))
    assert fewer.rows == small.rows


def test_a_flipped_bit_is_refused_when_the_chunk_is_read(tmp_path, harvester):
    store = opened(tmp_path, replace(harvester, n_tokens=1500))
    path = chunk_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[data.index(store.load(1).numpy().tobytes()[:200]) + 1001] ^= 1  # among the activations
    path.write_bytes(data)
    fresh = Store(tmp_path, store.rows)
    assert torch.equal(fresh.load(0), harvester.load(0))
    with pytest.raises(UserError, match=r"chunk-00001.* is damaged .*: delete it"):
        fresh.load(1)


def test_a_truncated_chunk_is_refused_in_one_line(tmp_path, harvester):
    opened(tmp_path, replace(harvester, n_tokens=1500))
    path = chunk_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"chunk-00001.* is damaged .*: delete it"):
        opened(tmp_path, replace(harvester, n_tokens=1500)).load(1)


def test_what_a_killed_harvest_was_writing_is_removed(tmp_path, harvester):
    few = replace(harvester, n_tokens=1)
    opened(tmp_path, few)
    torn = tmp_path / ".chunk-00001.safetensors.0123abcd.tmp"  # a name of files.written_whole
    torn.write_bytes(b"half a chunk")
    opened(tmp_path, few)
    assert not torn.exists()


# --- on disk, or computed as they are read ---


def test_what_exceeds_the_limit_or_the_free_space_is_computed_as_it_is_read(
    tmp_path, harvester, monkeypatch, capsys
):
    n_bytes = harvester.n_bytes
    open_any = dict(folder=tmp_path / "store", metadata=METADATA)
    assert open_activations(harvester, **open_any, max_bytes=n_bytes - 1) is harvester
    assert "over --max-disk-gb" in capsys.readouterr().out
    usage = shutil.disk_usage(tmp_path)
    nearly = usage._replace(free=n_bytes + activations.DISK_RESERVE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly)
    assert open_activations(harvester, **open_any, max_bytes=1e9) is harvester
    assert "free: computed as they are read" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    claim_folder(tmp_path / "store")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    store = open_activations(harvester, **open_any, max_bytes=n_bytes)
    assert isinstance(store, Store)
    assert torch.equal(all_rows(store), all_rows(harvester))


def test_more_tokens_than_there_are_is_said_once_in_epochs(tmp_path, harvester, capsys):
    n = sum(harvester.rows)
    more = replace(harvester, n_tokens=5 * n // 2)
    open_activations(more, tmp_path, METADATA, max_bytes=1e9)
    line = f"{5 * n // 2:,} tokens requested, {n:,} available = 2.5 epochs\n"
    assert capsys.readouterr().out.count(line) == 1
    open_activations(replace(harvester, n_tokens=n), tmp_path, METADATA, max_bytes=1e9)
    assert "requested" not in capsys.readouterr().out
