"""Chunks are laid out as they always were, whatever computes them: several at once, several threads
that are slow, into memory or onto the disk. What goes wrong in a thread is said, and nothing hangs.
"""

import contextlib
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.lm import CONTEXT, SEPARATOR, harvester_of, tiny_target
from builders.models import hooked

from sparse_coding.config import UserError, named_seed
from sparse_coding.lm.activations import harvest as harvest_module
from sparse_coding.lm.activations.harvest import Harvester, harvest
from sparse_coding.lm.activations.places import InMemory
from sparse_coding.lm.activations.store import chunk_path, open_store

CPU = torch.device("cpu")
WIDTH = 40  # of mlp_act
TEXTS_PER_CHUNK = 100  # rows of text: 8 chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(harvest_module, "CHUNK_BYTES", TEXTS_PER_CHUNK * CONTEXT * WIDTH * 2)


@pytest.fixture
def harvester(root) -> Harvester:
    return harvester_of(tiny_target(root), lm_batch_size=20)


def chunk_by_hand(root: Path, k: int, *, batch: int) -> torch.Tensor:
    """Chunk k as its files have had it since there were any: what a hook of the tests' own sees,
    row i of the tokens that count at place order[i]."""
    target = tiny_target(root)
    rows = []
    stop = min((k + 1) * TEXTS_PER_CHUNK, target.train.n_rows)
    for first in range(k * TEXTS_PER_CHUNK, stop, batch):
        ids = torch.from_numpy(target.train.rows(first, min(first + batch, stop)))
        x, _ = hooked(target.lm.model, "gpt2", 1, "mlp_act", ids)
        rows.append(x[:, 1:][ids[:, 1:] != SEPARATOR])
    x = torch.cat(rows).half()
    rng = torch.Generator().manual_seed(named_seed("shard", k))
    chunk = torch.empty_like(x)
    chunk[torch.randperm(len(x), generator=rng)] = x
    return chunk


@pytest.mark.parametrize("k", [0, 4, 7])
def test_a_chunk_has_the_bits_and_the_order_that_it_has_in_older_stores(root, harvester, k):
    assert torch.equal(harvester.load(k), chunk_by_hand(root, k, batch=20))


def all_of(harvester: Harvester) -> list[torch.Tensor]:
    return [harvester.load(k) for k in range(len(harvester.rows))]


def test_chunks_of_one_pass_have_the_same_bits_whichever_are_asked_for(root, harvester):
    three = replace(harvester, lm_batch_size=300, chunks_at_once=3)
    whole = all_of(three)
    kept: dict[int, torch.Tensor] = {}
    for some in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 5, 7], [6]):
        kept.clear()
        harvest(three, some, lambda k, rows, norms: kept.update({k: rows}), to=CPU)
        assert sorted(kept) == some
        assert all(torch.equal(kept[k], whole[k]) for k in some)
    for ours, alone in zip(whole, all_of(harvester), strict=True):  # the same rows, rounded
        assert torch.allclose(ours.float(), alone.float(), atol=1e-2)
    fewer = replace(three, n_tokens=sum(harvester.rows[:4]))  # of a store that is to grow
    assert len(fewer.rows) == 4
    assert all(torch.equal(fewer.load(k), whole[k]) for k in range(4))


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("at_once", [1, 3])
def test_no_buffer_is_written_to_before_its_chunks_are_taken(
    root, harvester, monkeypatch, n_threads, at_once
):
    if at_once > 1:
        harvester = replace(harvester, lm_batch_size=300, chunks_at_once=at_once)
    expected = all_of(harvester)
    monkeypatch.setitem(harvest_module.THREADS, "cpu", n_threads)
    taken_out, n_read, threads = Harvester.taken_out, [], set()

    def slowly(self, k, stretch, out=None):
        threads.add(threading.get_ident())
        time.sleep(0.05)
        return taken_out(self, k, stretch, out)

    def read(self, k, x, passed=None, read=Harvester.read):
        n_read.append(k)
        return read(self, k, x, passed)

    monkeypatch.setattr(Harvester, "taken_out", slowly)
    monkeypatch.setattr(Harvester, "read", read)
    kept = {}
    harvest(harvester, list(range(8)), lambda k, rows, _: kept.update({k: rows.clone()}), to=CPU,
            lent=True)  # fmt: skip
    assert all(torch.equal(kept[k], expected[k]) for k in range(8))
    assert len(n_read) == (8 if at_once == 1 else 3)
    assert 1 < len(threads) <= 3 if at_once == n_threads == 3 else len(threads) <= n_threads


def test_lent_rows_share_memory_and_others_do_not(harvester):
    kept: list[torch.Tensor] = []
    for lent, n_places in ((True, 1), (False, 8)):
        kept.clear()
        harvest(harvester, list(range(8)), lambda k, rows, _: kept.append(rows), to=CPU, lent=lent)
        assert len({rows.data_ptr() for rows in kept}) == n_places


def test_a_store_has_the_same_bytes_by_several_threads(tmp_path, harvester, monkeypatch):
    few = replace(harvester, n_tokens=5000)
    for n_threads in (1, 4):
        monkeypatch.setitem(harvest_module.THREADS, "cpu", n_threads)
        open_store(tmp_path / str(n_threads), few, metadata={})
    for k in range(len(few.rows)):
        one, four = (chunk_path(tmp_path / str(n), k).read_bytes() for n in (1, 4))
        assert one == four
    one, four = ((tmp_path / f"{n}/manifest.json").read_bytes() for n in (1, 4))
    assert one == four


@pytest.mark.parametrize("n_threads", [1, 3])
def test_what_goes_wrong_in_a_thread_is_raised_and_what_waits_is_left(
    harvester, monkeypatch, n_threads
):
    monkeypatch.setitem(harvest_module.THREADS, "cpu", n_threads)
    kept = []

    def keep(k: int, rows: torch.Tensor, norms: torch.Tensor) -> None:
        if k == 2:
            raise OSError(28, "no space")
        kept.append(k)

    with pytest.raises(OSError, match="no space"):
        harvest(harvester, list(range(8)), keep, to=CPU)
    assert {0, 1} <= set(kept) or n_threads > 1
    assert len(kept) < 7


def test_rows_beyond_the_stores_dtype_are_refused_in_memory_as_on_disk(root, tmp_path):
    target = tiny_target(root, site="resid_post", layer=0)
    with torch.no_grad():
        target.lm.model.transformer.wpe.weight[3] *= 1e6
    harvester = harvester_of(target)
    for make in (
        lambda: InMemory(harvester, CPU),
        lambda: open_store(tmp_path, harvester, metadata={}),
    ):
        with pytest.raises(UserError, match=r"layer 0 resid_post .*--store-dtype bfloat16"):
            make()
    assert not list(tmp_path.glob("chunk-*"))


@pytest.mark.parametrize("lent", [True, False])
def test_a_chunk_leaves_a_gpu_when_its_pass_is_done_and_its_buffer_is_free_when_it_has_left(
    harvester, monkeypatch, lent
):
    """The order of calls alone, without a GPU: streams that note them, memory that isn't pinned."""
    noted: list[object] = []

    class Stream:
        def __init__(self, device: torch.device):
            noted.append("stream")

        def wait_event(self, event: object) -> None:
            noted.append(event)

        def synchronize(self) -> None:
            noted.append("synchronized")

    taken_out, empty = Harvester.taken_out, torch.empty

    def noting(*arguments):
        noted.append("taken")
        return taken_out(*arguments)

    def unpinned(*shape, pin_memory: bool = False, **options):
        noted.extend(["pinned"] * pin_memory)
        return empty(*shape, **options)

    taking = harvest_module._Taking(harvester, CPU, lent)
    taking.from_gpu = taking.needs_room = True
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(Harvester, "taken_out", noting)
    expected, found = all_of(harvester)[:2], []
    noted.clear()
    for k in range(2):
        stretch = replace(harvester.read(k, harvester.buffer()), ready=f"pass {k} done")
        monkeypatch.setattr(stretch.taken, "release", lambda: noted.append("free"))
        rows, norms = taking.taken_out(k, stretch)
        found.append(rows)
        assert torch.equal(rows, expected[k])
        assert torch.equal(norms, rows.float().norm(dim=1))
    first = ["stream", "pass 0 done", "taken", "pinned", "synchronized", "free"]
    assert noted == [*first, "pass 1 done", "taken", "synchronized", "free"]
    assert (found[0].data_ptr() == found[1].data_ptr()) == lent


@pytest.mark.parametrize("at_once", [1, 3])
def test_progress_is_shown_of_each_pass_of_the_model_and_ends_at_the_whole(
    harvester, monkeypatch, at_once
):
    """A chunk of a large model takes minutes."""
    bars = []

    class Bar(contextlib.nullcontext):
        def __init__(self, total: int, **options: object):
            super().__init__(self)
            self.total, self.steps = total, []
            self.update = self.steps.append
            bars.append(self)

    monkeypatch.setattr(harvest_module, "progress_bar", Bar)
    several = replace(harvester, chunks_at_once=at_once)
    harvest(several, [4], lambda *_: None, to=CPU)
    (bar,) = bars
    assert (
        sum(bar.steps)
        == bar.total
        == sum(harvester.rows[3:6] if at_once == 3 else harvester.rows[4:5])
    )
    assert len(bar.steps) == at_once * TEXTS_PER_CHUNK // 20
