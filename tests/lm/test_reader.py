"""Batches are a random order of all rows, the same for a step however it is reached."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_coding.config import UserError
from sparse_coding.lm.reader import Reader

CPU = torch.device("cpu")
BATCH, WIDTH = 16, 3


class Numbered:
    """Chunks whose rows are n, n + 1/2, -n for n = 0, 1, 2, ... in the order of the text."""

    def __init__(self, *sizes: int):
        self.rows = list(sizes)
        self.loaded: list[tuple[int, int]] = []  # chunk and thread

    def load(self, k: int) -> torch.Tensor:
        self.loaded.append((k, threading.get_ident()))
        n = torch.arange(self.rows[k]) + sum(self.rows[:k])
        return torch.stack([n, n + 0.5, -n], dim=1).half()

    def chunk_of(self, number: int) -> int:
        ends = torch.tensor(self.rows).cumsum(0)
        return int((number >= ends).sum())


def reader(chunks, **changes) -> Reader:
    options = dict(batch_size=BATCH, n_steps=10**6, scale=1.0, seed=0, device=CPU, buffer_rows=100)
    return Reader(chunks, **options | changes)


def numbers(r: Reader, steps) -> list[list[int]]:
    """Which rows the batches of the steps have."""
    return [r.batch(step)[:, 0].int().tolist() for step in steps]


def dealt_in(r: Reader, steps) -> list[int]:
    """Rows of all batches of the steps, one after another."""
    return [n for batch in numbers(r, steps) for n in batch]


@pytest.mark.parametrize("sizes", [(64, 64, 64, 64), (50, 7, 90, 33, 70, 6)])
@pytest.mark.parametrize("buffer_rows", [1, 100, 10_000])
def test_an_epoch_has_every_row_once_but_for_the_remainders(sizes, buffer_rows):
    r = reader(Numbered(*sizes), buffer_rows=buffer_rows)
    first_epoch = epoch_steps(r)
    dealt = dealt_in(r, range(first_epoch))
    assert len(dealt) == len(set(dealt)) == first_epoch * BATCH
    assert set(dealt) <= set(range(256))
    n_segments = len(r.segments) if buffer_rows < 256 else 1
    assert 256 - len(dealt) < BATCH * n_segments
    if buffer_rows == 10_000 or len(set(sizes)) == 1:  # 256 and 64 rows are whole batches
        assert sorted(dealt) == list(range(256))


def epoch_steps(r: Reader) -> int:
    """Steps of the first epoch."""
    r.segment_of(0)
    assert r.epoch == 1
    return r.segments[-1].first + r.segments[-1].n_steps


def test_batches_are_float32_rows_times_the_scale():
    r = reader(Numbered(200), scale=0.25, buffer_rows=50)
    x = r.batch(3)
    assert x.dtype == torch.float32
    assert x.shape == (BATCH, WIDTH)
    n = x[:, 0] * 4
    assert torch.equal(n, n.round())
    assert torch.equal(x, torch.stack([n, n + 0.5, -n], dim=1) * 0.25)
    x.zero_()  # a batch is the caller's own
    assert torch.equal(r.batch(3)[:, 0] * 4, n)


def test_a_step_has_the_same_batch_however_it_is_reached():
    sizes = (50, 7, 90, 33, 70, 6)
    steps = range(40)  # two epochs and more
    straight = numbers(reader(Numbered(*sizes)), steps)
    assert numbers(reader(Numbered(*sizes)), steps) == straight
    for first in (5, 17, 39):  # resumed there
        assert numbers(reader(Numbered(*sizes)), range(first, 40)) == straight[first:]
    jumps = [39, 0, 20, 20, 21, 3, 38, 4]
    assert numbers(reader(Numbered(*sizes)), jumps) == [straight[step] for step in jumps]


def test_orders_differ_between_epochs_and_seeds():
    r = reader(Numbered(128), buffer_rows=200)
    first, second = (dealt_in(r, range(8 * e, 8 * e + 8)) for e in (0, 1))
    other = dealt_in(reader(Numbered(128), buffer_rows=200, seed=1), range(8))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(128))
    for a, b in ((first, second), (first, other), (first, sorted(first))):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # 1 expected by chance


def test_epochs_mix_other_chunks_with_each_other():
    r = reader(Numbered(*[20] * 12), buffer_rows=60)
    steps = epoch_steps(r)
    r.segment_of(3 * steps)
    of_epochs = [
        {s.chunks for s in r.segments if e * steps <= s.first < (e + 1) * steps} for e in range(3)
    ]
    assert all(len(groups) == 4 for groups in of_epochs)
    assert of_epochs[0] != of_epochs[1] != of_epochs[2]


def test_a_batch_mixes_the_chunks_of_the_buffer():
    chunks = Numbered(*[50] * 8)
    small, large = (reader(chunks, buffer_rows=n) for n in (100, 1000))
    n_mixed = [len({chunks.chunk_of(n) for n in batch}) for batch in numbers(small, range(20))]
    assert set(n_mixed) == {2}
    assert min(len({chunks.chunk_of(n) for n in b}) for b in numbers(large, range(20))) >= 4


def test_chunks_smaller_than_a_batch_are_put_together():
    r = reader(Numbered(*[5] * 10), buffer_rows=1)
    steps = epoch_steps(r)
    assert steps >= 2
    dealt = dealt_in(r, range(steps))
    assert len(dealt) == len(set(dealt)) == steps * BATCH


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(UserError, match=r"15 activations .*--batch-size 16"):
        reader(Numbered(10, 5))
    assert reader(Numbered(10, 6)).batch(0).shape == (BATCH, WIDTH)


def test_the_next_rows_are_loaded_by_a_thread_each_chunk_once_an_epoch():
    chunks = Numbered(*[48] * 4)
    r = reader(chunks, buffer_rows=48)
    numbers(r, range(12))
    here = [k for k, thread in chunks.loaded if thread == threading.get_ident()]
    assert len(here) == 1  # the first; all others were asked for ahead
    assert sorted(k for k, _ in chunks.loaded[:4]) == [0, 1, 2, 3]
    r.close()


def test_nothing_is_loaded_beyond_the_last_step():
    chunks = Numbered(*[48] * 4)
    r = reader(chunks, buffer_rows=48, n_steps=6)
    numbers(r, range(6))
    r.close()
    assert len(chunks.loaded) == 2
    one_more = reader(again := Numbered(*[48] * 4), buffer_rows=48, n_steps=7)
    numbers(one_more, range(7))
    one_more.close()
    assert len(again.loaded) == 3


def test_closing_waits_for_the_chunk_that_is_being_loaded_and_for_no_other():
    chunks, begun, running = Numbered(*[8] * 40), threading.Event(), []
    r = reader(chunks, buffer_rows=160)  # half of the chunks
    load = chunks.load

    def load_until_closing(k: int) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            running.append(k)
            begun.set()
            wait_until(lambda: r.closing)
            running.pop()
        return load(k)

    chunks.load = load_until_closing
    r.batch(0)
    assert begun.wait(10)
    r.close()
    assert not running
    assert len(chunks.loaded) == 20 + 1


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)


def test_what_fits_the_buffer_is_loaded_once():
    chunks = Numbered(48, 48)
    numbers(reader(chunks, buffer_rows=96), range(30))
    assert sorted(k for k, _ in chunks.loaded) == [0, 1]


def test_an_error_of_the_loading_thread_reaches_the_caller():
    chunks = Numbered(*[48] * 4)
    r = reader(chunks, buffer_rows=48)
    bad, load = r.segment_of(3).chunks[0], chunks.load

    def fail_once(k: int) -> torch.Tensor:
        if k == bad:
            raise UserError(f"chunk {k} is damaged")
        return load(k)

    chunks.load = fail_once
    numbers(r, range(3))
    with pytest.raises(UserError, match=f"chunk {bad} is damaged"):
        r.batch(3)


class Allocated:
    """Buffers that torch.empty made, and the most rows alive at once."""

    def __init__(self, monkeypatch):
        self.made: list[tuple[StorageWeakRef, int]] = []
        self.peak, self.empty = 0, torch.empty
        monkeypatch.setattr(torch, "empty", self)

    def __call__(self, shape, **options) -> torch.Tensor:
        made = self.empty(shape, **options)
        self.made.append((StorageWeakRef(made.untyped_storage()), len(made)))
        self.peak = max(self.peak, sum(n for ref, n in self.made if not ref.expired()))
        return made


@pytest.mark.parametrize("n_chunks", [8, 64])
def test_no_more_than_two_buffers_are_held_however_long_the_text(monkeypatch, n_chunks):
    allocated = Allocated(monkeypatch)
    r = reader(Numbered(*[32] * n_chunks), buffer_rows=128)
    for step in range(n_chunks * 2 * 2):  # two epochs
        r.batch(step)
    r.close()
    assert len(allocated.made) >= n_chunks // 2  # buffers of four chunks each
    assert allocated.peak == 2 * 128


def test_a_jump_holds_no_third_buffer(monkeypatch):
    allocated = Allocated(monkeypatch)
    r = reader(Numbered(*[48] * 4), buffer_rows=48)
    r.batch(0)
    wait_until(lambda: len(allocated.made) >= 2)  # the next rows are waiting
    r.batch(9)
    r.close()
    assert len(allocated.made) >= 3
    assert allocated.peak == 2 * 48


def test_rows_in_bfloat16_are_read_as_they_are():
    chunks = Numbered(64)
    load = chunks.load
    chunks.load = lambda k: load(k).bfloat16()
    x = reader(chunks).batch(0)
    assert x.dtype == torch.float32
    assert torch.equal(x, x.bfloat16().float())


# --- rows that are left out ---


def test_rows_beyond_the_norm_are_never_dealt_and_all_others_are():
    """The norm of row 65 is 112.9, that of row 66 is 114.6: 30 rows of 96 are beyond."""
    sizes = (50, 20, 26)
    plain, limited = (reader(Numbered(*sizes), max_norm=m) for m in (float("inf"), 113.5))
    steps = range(epoch_steps(limited))
    dealt = dealt_in(limited, steps)
    kept = [n for n in dealt_in(plain, steps) if n < 66]
    assert dealt[:66] == kept  # in the same order
    assert dealt == (kept + kept)[:96]  # and begun again, for whole batches
    again = reader(Numbered(*sizes), max_norm=113.5)
    assert dealt_in(again, range(3, 6)) == dealt[3 * BATCH :]  # resumed there


def test_where_no_row_is_beyond_the_norm_batches_have_the_same_bits():
    r, limited = reader(Numbered(50, 7, 90, 33)), reader(Numbered(50, 7, 90, 33), max_norm=1e4)
    assert all(torch.equal(r.batch(step), limited.batch(step)) for step in range(25))


def test_chunks_that_are_all_beyond_the_norm_are_refused():
    r = reader(Numbered(48, 48), buffer_rows=48, max_norm=1.0)
    with pytest.raises(UserError, match="--max-norm-multiple"):
        numbers(r, range(6))
