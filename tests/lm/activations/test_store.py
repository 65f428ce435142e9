"""Rows are those of an independent hook, each token once; on disk they are written once, resumed,
checked, of one target; or computed as they are read."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.lm import (
    CONTEXT,
    KINDS,
    SEPARATOR,
    all_rows,
    bits,
    harvester_of,
    tiny_target,
)
from builders.models import hooked
from safetensors.torch import load_file, save_file

from sparse_coding.config import UserError
from sparse_coding.files import (
    read_tensor_info,
    read_tensors,
    tensors_checksum,
    write_tensors,
)
from sparse_coding.lm.activations import chunks, harvest, places
from sparse_coding.lm.activations.chunks import statistics
from sparse_coding.lm.activations.harvest import Harvester, Stretch
from sparse_coding.lm.activations.places import on_disk
from sparse_coding.lm.activations.store import (
    Store,
    check_manifest,
    chunk_path,
    claim_folder,
    open_store,
)
from sparse_coding.lm.model import SITES

WIDTH = 40  # of mlp_act
TEXTS_PER_CHUNK = 100  # rows of text: 8 chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(harvest, "CHUNK_BYTES", TEXTS_PER_CHUNK * CONTEXT * WIDTH * 2)


@pytest.fixture
def harvester(root) -> Harvester:
    return harvester_of(tiny_target(root))


def by_hand(root: Path, kind: str, layer: int, site: str, *, batch: int) -> torch.Tensor:
    """Activations in float32 of all tokens that count, from whole forward passes."""
    target = tiny_target(root, kind=kind, layer=layer, site=site)
    rows = []
    for first in range(0, target.train.n_rows, batch):
        last = min(first + batch, target.train.n_rows)
        ids = torch.from_numpy(target.train.rows(first, last))
        x, _ = hooked(target.lm.model, kind, layer, site, ids)
        rows.append(x[:, 1:][ids[:, 1:] != SEPARATOR])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_rows_are_those_of_an_independent_hook_each_token_once(root, monkeypatch, kind, site):
    target = tiny_target(root, kind=kind, layer=2, site=site)
    row_bytes = CONTEXT * target.site.width * 2
    monkeypatch.setattr(harvest, "CHUNK_BYTES", TEXTS_PER_CHUNK * row_bytes)
    harvester = harvester_of(target, lm_batch_size=20)
    expected = by_hand(root, kind, 2, site, batch=20)
    rows = all_rows(harvester)
    assert len(harvester.rows) == 8
    assert rows.dtype == torch.float16
    assert rows.shape == expected.shape
    assert bits(rows) == bits(expected.half())
    assert len(bits(rows)) > 0.8 * len(rows)  # so a row missed or taken twice does not hide


def test_a_chunk_has_the_rows_of_its_stretch_of_text_in_a_random_order(root, harvester):
    expected = by_hand(root, "gpt2", 1, "mlp_act", batch=8).half()
    first = 0
    for k, n_rows in enumerate(harvester.rows):
        chunk, stretch = harvester.load(k), expected[first : first + n_rows]
        assert chunk.shape == (n_rows, WIDTH)
        assert torch.equal(chunk, harvester.load(k))
        # compared by value, sorted: forward passes of another shape round differently
        assert torch.allclose(*(t.float().sort(dim=0).values for t in (chunk, stretch)), atol=1e-2)
        unmoved = (chunk.float() - stretch.float()).abs().amax(dim=1) < 1e-2
        assert unmoved.float().mean() < 0.1
        first += n_rows
    assert first == len(expected)


def test_the_forward_passes_batch_size_changes_rounding_only(root):
    one, many = (
        all_rows(harvester_of(tiny_target(root), lm_batch_size=n)).float() for n in (1, 64)
    )
    assert float((one - many).norm() / one.norm()) < 1e-3
    assert float((one - many).abs().max() / one.abs().max()) < 1e-3


def test_only_as_many_chunks_are_made_as_hold_the_tokens_asked_for(root, harvester):
    target, rows = tiny_target(root), harvester.rows
    ids = target.train.rows(0, target.train.n_rows)
    assert sum(rows) == int((ids[:, 1:] != SEPARATOR).sum())
    assert rows[0] == int((ids[:TEXTS_PER_CHUNK, 1:] != SEPARATOR).sum())
    assert [harvester.span(k) for k in (0, 7)] == [(0, 100), (700, target.train.n_rows)]
    assert harvester_of(target, n_tokens=1).rows == rows[:1]
    assert harvester_of(target, n_tokens=rows[0]).rows == rows[:1]
    assert harvester_of(target, n_tokens=rows[0] + 1).rows == rows[:2]
    assert harvester.n_bytes == sum(rows) * WIDTH * 2


def test_norms_are_those_of_the_stored_rows(harvester):
    rows, norms = harvester.computed(2)
    assert torch.equal(rows, harvester.load(2))
    assert torch.allclose(norms.double(), rows.double().square().sum(dim=1).sqrt(), rtol=1e-5)


def test_rows_in_bfloat16(root, harvester):
    rows = all_rows(replace(harvester, store_dtype=torch.bfloat16))
    assert rows.dtype == torch.bfloat16
    assert torch.allclose(rows.float(), all_rows(harvester).float(), rtol=2**-7, atol=1e-3)


def test_what_float16_can_not_hold_is_refused_and_bfloat16_can(root):
    target = tiny_target(root, site="resid_post", layer=0)
    with torch.no_grad():
        target.lm.model.transformer.wpe.weight[3] *= 1e6
    with pytest.raises(UserError, match=r"layer 0 resid_post .*--store-dtype bfloat16"):
        harvester_of(target).load(0)
    assert harvester_of(target, store_dtype=torch.bfloat16).load(0).abs().max() > 1e5


# --- statistics ---


class InMemory:
    """Chunks of known rows."""

    def __init__(self, *chunks: torch.Tensor):
        self.chunks, self.rows = chunks, [len(chunk) for chunk in chunks]

    def load(self, k: int) -> torch.Tensor:
        return self.chunks[k]


def test_scaled_rows_have_mean_square_norm_one_and_the_mean_is_theirs(harvester):
    of_all = statistics(harvester)
    x = all_rows(harvester).numpy().astype(np.float64)
    assert np.allclose(of_all.mean.numpy(), x.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert ((x * of_all.scale) ** 2).sum(axis=1).mean() == pytest.approx(1, rel=1e-9)


def test_statistics_are_of_the_first_whole_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "STATISTICS_ROWS", 3)
    first, second = torch.tensor([[1.0, 0], [3, 0]]).half(), torch.tensor([[2.0, 6]]).half()
    of_two = statistics(InMemory(first, second, torch.full((9, 2), 100.0).half()))
    assert of_two.mean.tolist() == [2, 2]
    assert of_two.scale == pytest.approx((3 / (1 + 9 + 40)) ** 0.5)


def test_rows_beyond_a_multiple_of_the_median_norm_are_in_no_statistic():
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 300, 4, generator=rng).half()
    planted = plain.clone()
    planted[0, 7] *= 1000
    planted[1, [0, 299]] *= 1000
    mask = torch.ones(600, dtype=torch.bool)
    mask[[7, 300, 599]] = False
    x = plain.flatten(0, 1)[mask].double()
    found = statistics(InMemory(*planted), max_norm_multiple=10)
    assert found.max_norm == pytest.approx(10 * planted[0].float().norm(dim=1).median().item())
    assert (found.n_rows, found.n_left_out) == (600, 3)
    assert torch.allclose(found.mean.double(), x.mean(dim=0), rtol=1e-5)
    assert found.scale == pytest.approx(x.square().sum(dim=1).mean().item() ** -0.5)
    of_all = statistics(InMemory(*planted), max_norm_multiple=0)
    assert (of_all.max_norm, of_all.n_left_out) == (math.inf, 0)
    assert of_all.scale < 0.1 * found.scale


def test_without_rows_beyond_it_the_limit_changes_no_bit(harvester):
    limited, unlimited = (statistics(harvester, max_norm_multiple=m) for m in (10, 0))
    assert limited.n_left_out == 0
    assert limited.scale == unlimited.scale
    assert torch.equal(limited.mean, unlimited.mean)


def test_rows_that_are_zero_have_no_part_in_the_median():
    rows = torch.zeros(100, 3)
    rows[:10] = 1.0
    rows[10] = 50.0
    found = statistics(InMemory(rows.half()), max_norm_multiple=10)
    assert (found.max_norm, found.n_left_out) == (pytest.approx(10 * 3**0.5), 1)
    later = statistics(InMemory(torch.zeros(5, 3), rows), max_norm_multiple=10)
    assert (later.max_norm, later.n_left_out) == (math.inf, 0)


def test_activations_that_are_all_zero_are_refused():
    with pytest.raises(UserError, match="all activations are 0"):
        statistics(InMemory(torch.zeros(5, 3).half()))


# --- on disk ---


METADATA = {"model": "m", "layer": 1, "store_dtype": "float16"}


def opened(folder: Path, harvester: Harvester, **metadata) -> Store:
    claim_folder(folder)
    return open_store(folder, harvester, metadata=METADATA | metadata)


@dataclass(frozen=True)
class Counting(Harvester):
    """Notes which chunks it is asked to read; at one it can fail, as a killed process would."""

    fails_at: int | None = None
    computed_of: list[int] = field(default_factory=list)

    def read(self, k: int, x: torch.Tensor, *passed: Callable) -> Stretch:
        if k == self.fails_at:
            raise KeyboardInterrupt
        self.computed_of.append(k)
        return super().read(k, x, *passed)


def counting(harvester: Harvester, fails_at: int | None = None) -> Counting:
    known = {f.name: getattr(harvester, f.name) for f in fields(Harvester)}
    return Counting(**known, fails_at=fails_at)


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
        checksum = tensors_checksum(tmp_path / name)
        assert len(checksum) == 64
        assert info | {"sha256": checksum} == manifest["chunks"][name]
        assert info["rows"] == store.rows[k] == len(tensors["activations"])
        assert info["n_documents"] == len(tensors["document_ids"])


def test_rows_of_extreme_norm_are_counted(tmp_path, harvester, monkeypatch):
    planted = harvester.load(0)
    planted[3] *= 0.001
    median = planted.float().norm(dim=1).median()
    large = [(i, 9) for i in range(20, 220)]  # no change of the median, but of the mean
    for i, norm in ((5, 11), (9, 30), *large):  # x the median; above 10 is extreme
        planted[i] = (planted[i].float() * norm * median / planted[i].float().norm()).half()
    found = planted, planted.float().norm(dim=1)
    monkeypatch.setattr(Harvester, "taken_out", lambda *arguments: found)
    opened(tmp_path, replace(harvester, n_tokens=1))
    assert read_tensor_info(chunk_path(tmp_path, 0))["n_extreme"] == 2
    assert json.loads((tmp_path / "manifest.json").read_text())["n_extreme"] == 2


@pytest.mark.parametrize(("name", "value"), [("layer", 2), ("new_field", "x")])
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
    with pytest.raises(UserError, match=r"not a manifest of ours|manifest.json is damaged"):
        opened(tmp_path, harvester)


def test_a_manifest_with_one_bit_flipped_is_refused_by_name(tmp_path, harvester):
    opened(tmp_path, replace(harvester, n_tokens=1))
    content = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(content.replace(b'"n_rows": 1', b'"n_rows": 3'))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(its checksum differs\)"):
        opened(tmp_path, replace(harvester, n_tokens=1))


@pytest.mark.parametrize("tensor", ["activations", "document_ids"])
def test_a_chunk_with_one_bit_flipped_is_harvested_again_to_the_same_bytes(
    tmp_path, harvester, capsys, tensor
):
    opened(tmp_path, harvester)
    path = chunk_path(tmp_path, 3)
    whole = path.read_bytes()
    content = bytearray(whole)
    place = load_file(path)[tensor].numpy().tobytes()
    content[content.index(place) + len(place) // 2] ^= 16
    path.write_bytes(content)
    store = opened(tmp_path, harvester)
    capsys.readouterr()
    assert torch.equal(all_rows(store), all_rows(harvester))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {path} is damaged (its checksum differs): it is harvested again"
    assert path.read_bytes() == whole


@pytest.mark.parametrize("harm", ["torn", "empty", "header", "no numbers"])
def test_a_chunk_that_cannot_be_read_is_harvested_again(tmp_path, harvester, capsys, harm):
    opened(tmp_path, harvester)
    path = chunk_path(tmp_path, 3)
    whole = path.read_bytes()
    tensors, info = read_tensors(path)
    write_tensors(path, tensors, info=info | {"rows": {}})
    harms = {"torn": whole[:-9], "empty": b"", "header": b"\xff" * 8 + whole[8:]}
    path.write_bytes(harms.get(harm, path.read_bytes()))
    again = counting(harvester)
    assert torch.equal(all_rows(opened(tmp_path, again)), all_rows(harvester))
    assert again.computed_of == [3]
    assert capsys.readouterr().err.count(f"{path} is damaged") == 1
    assert path.read_bytes() == whole


def test_a_chunk_in_the_place_of_another_is_harvested_again(tmp_path, harvester, capsys):
    """Whole, and of as many rows."""
    opened(tmp_path, harvester)
    path = chunk_path(tmp_path, 3)
    whole, (tensors, info) = path.read_bytes(), read_tensors(path)
    tensors["activations"] = tensors["activations"].flip(0)
    write_tensors(path, tensors, info=info | {"chunk": 2})
    again = counting(harvester)
    assert torch.equal(all_rows(opened(tmp_path, again)), all_rows(harvester))
    assert again.computed_of == [3]
    assert path.read_bytes() == whole
    assert f"{path} is damaged (it is chunk 2)" in capsys.readouterr().err


def test_a_chunk_of_before_checksums_is_read_and_its_rows_are_checked(tmp_path, harvester, capsys):
    opened(tmp_path, harvester)
    path = chunk_path(tmp_path, 3)
    tensors, info = read_tensors(path)
    info["sha256"] = hashlib.sha256(tensors["activations"].numpy().tobytes()).hexdigest()
    save_file(tensors, path, metadata={"info": json.dumps(info)})
    again = counting(harvester)
    assert torch.equal(all_rows(opened(tmp_path, again)), all_rows(harvester))
    assert again.computed_of == []
    tensors["activations"][0, 0] += 1
    save_file(tensors, path, metadata={"info": json.dumps(info)})
    assert torch.equal(all_rows(opened(tmp_path, again)), all_rows(harvester))
    assert again.computed_of == [3]


def test_a_store_of_the_older_version_is_refused_and_stays_as_it_is(tmp_path, harvester):
    (tmp_path / "manifest.json").write_text(json.dumps({"about": METADATA, "shards": {}}))
    (tmp_path / "shard-00000.safetensors").write_bytes(b"activations")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for open_again in (check_manifest, partial(open_store, harvester=harvester)):
        with pytest.raises(UserError, match=f"an older version: choose .* or delete {tmp_path}"):
            open_again(tmp_path, metadata=METADATA)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.name[0] != "."} == before


def test_a_folder_can_be_claimed_new_empty_with_text_and_as_a_store(tmp_path, harvester):
    for _ in range(2):  # new, then empty
        claim_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "text").mkdir()
    (tmp_path / "a" / "b" / ".harvest.lock").touch()
    claim_folder(tmp_path / "a" / "b")
    opened(tmp_path / "a" / "b", replace(harvester, n_tokens=1))
    claim_folder(tmp_path / "a" / "b")


def test_a_harvest_that_was_stopped_goes_on_with_the_missing_chunks(tmp_path, harvester):
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, counting(harvester, fails_at=5))
    there = sorted(int(p.stem[-5:]) for p in tmp_path.glob("chunk-*"))
    assert there in ([0, 1, 2, 3], [0, 1, 2, 3, 4])  # 4 may still wait for the thread that writes
    chunk_path(tmp_path, 1).unlink()
    again = counting(harvester)
    store = opened(tmp_path, again)
    assert again.computed_of == [1, *range(len(there), 8)]
    whole = opened(tmp_path / "whole", harvester)
    for k in range(8):
        assert chunk_path(tmp_path, k).read_bytes() == chunk_path(whole.folder, k).read_bytes()
    assert bits(all_rows(store)) == bits(all_rows(harvester))
    finished = counting(harvester)
    opened(tmp_path, finished)
    assert finished.computed_of == []


def test_a_store_grows_and_keeps_its_chunks(tmp_path, harvester):
    small = opened(tmp_path, replace(harvester, n_tokens=3000))
    assert len(small.rows) == 3
    before = {k: chunk_path(tmp_path, k).read_bytes() for k in range(3)}
    more = counting(harvester)
    store = opened(tmp_path, more)
    assert more.computed_of == [3, 4, 5, 6, 7]
    assert {k: chunk_path(tmp_path, k).read_bytes() for k in range(3)} == before
    assert json.loads((tmp_path / "manifest.json").read_text())["n_rows"] == sum(store.rows)
    fewer = opened(tmp_path, replace(harvester, n_tokens=3000))
    assert fewer.rows == small.rows


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
    assert on_disk(harvester, **open_any, max_bytes=n_bytes - 1) is harvester
    assert "over --max-disk-gb" in capsys.readouterr().out
    usage = shutil.disk_usage(tmp_path)
    nearly = usage._replace(free=n_bytes + places.DISK_RESERVE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly)
    assert on_disk(harvester, **open_any, max_bytes=1e9) is harvester
    assert "free: computed as they are read" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    claim_folder(tmp_path / "store")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    store = on_disk(harvester, **open_any, max_bytes=n_bytes)
    assert isinstance(store, Store)
    assert torch.equal(all_rows(store), all_rows(harvester))
