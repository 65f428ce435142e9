"""Ranges of steps, and batches made ahead of time."""

import contextlib
import threading

import pytest
import torch

from sparse_coding.sae.batches import ahead_on, on_side_stream, prefetched, stacked, step_ranges


def ranges(first: int, n_steps: int, length: int, stop_every: int) -> list[tuple[int, int]]:
    of_steps = step_ranges(first, n_steps, length=length, stop_every=stop_every)
    return [(steps.start, steps.stop) for steps in of_steps]


def test_chunks_stop_where_something_is_logged_and_at_the_end():
    assert ranges(0, 25, 8, 10) == [(0, 8), (8, 10), (10, 18), (18, 20), (20, 25)]
    assert ranges(0, 3, 1, 100) == [(0, 1), (1, 2), (2, 3)]
    assert ranges(5, 5, 8, 10) == []


@pytest.mark.parametrize("first", range(26))
def test_ranges_cover_each_step_once_wherever_a_resume_begins(first):
    steps = [i for a, b in ranges(first, 25, 8, 10) for i in range(a, b)]
    assert steps == list(range(first, 25))
    assert {10, 20} - set(range(first + 1)) <= {b for _, b in ranges(first, 25, 8, 10)}


def test_prefetched_batches_are_those_of_their_steps():
    def batch_at(step: int) -> torch.Tensor:
        return torch.full((2, 3), step)

    for make in (stacked, prefetched):
        found = list(make(batch_at, iter([range(0, 2), range(2, 5)])))
        assert [steps for steps, _ in found] == [range(0, 2), range(2, 5)]
        assert [xs[:, 0, 0].tolist() for _, xs in found] == [[0, 1], [2, 3, 4]]


def test_a_torch_built_without_mkl_makes_batches_ahead_too(monkeypatch):
    monkeypatch.setattr("sparse_coding.sae.engines.cpu_compile.libtorch", object)
    ((steps, xs),) = prefetched(lambda step: torch.full((2, 3), step), iter([range(1)]))
    assert (steps, xs.shape) == (range(1), (1, 2, 3))


def test_the_next_batches_are_made_while_these_are_used_and_no_further():
    made, ready = [], threading.Event()

    def batch_at(step: int) -> torch.Tensor:
        made.append(step)
        if step == 3:
            ready.set()
        return torch.zeros(1)

    batches = prefetched(batch_at, iter([range(i, i + 2) for i in range(0, 8, 2)]))
    next(batches)
    assert ready.wait(10)
    batches.close()
    assert made == [0, 1, 2, 3]


def test_an_error_in_the_thread_arrives_and_the_thread_ends():
    def batch_at(step: int) -> torch.Tensor:
        if step == 2:
            raise OSError("disk gone")
        return torch.zeros(1)

    before = threading.active_count()
    batches = prefetched(batch_at, iter([range(0, 2), range(2, 4)]))
    next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert threading.active_count() == before


def test_batches_made_ahead_are_the_same_bits_for_any_number_of_threads():
    a, b = torch.randn(300, 500), torch.randn(500, 300)
    n_threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found += [xs for _, xs in prefetched(lambda step: a @ b, iter([range(1)]))]
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(*found)


class Streams:
    """Stands in for torch.cuda's streams: `log` has what happened, in the order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[tuple] = []
        self.on = self.main = _Stream(self.log, "main")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.on)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: _Stream(self.log, "side"))
        monkeypatch.setattr(torch.cuda, "stream", self.switch)
        note = lambda tensor, stream: self.log.append(("held for", stream.name))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", note)

    @contextlib.contextmanager
    def switch(self, stream: "_Stream"):
        before, self.on = self.on, stream
        yield
        self.on = before


class _Stream:
    def __init__(self, log: list[tuple], name: str):
        self.log, self.name, self.n_events = log, name, 0

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append((self.name, "waits for all of", other.name))

    def wait_event(self, event: "_Event") -> None:
        self.log.append((self.name, "waits for", event.name))

    def record_event(self) -> "_Event":
        self.n_events += 1
        return _Event(self.log, f"{self.name} {self.n_events - 1}")


class _Event:
    def __init__(self, log: list[tuple], name: str):
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(("CPU", "waits for", self.name))


def test_on_a_gpu_batches_are_made_on_a_side_stream_one_chunk_ahead(monkeypatch):
    streams = Streams(monkeypatch)

    def batch_at(step: int) -> torch.Tensor:
        streams.log.append((streams.on.name, "makes", step))
        return torch.full((2, 3), step)

    for steps, xs in on_side_stream(batch_at, iter([range(i, i + 1) for i in range(4)])):
        assert streams.on is streams.main
        assert xs.tolist() == torch.full((1, 2, 3), steps.start).tolist()
        streams.log.append(("main", "trains on", steps.start))
    made = [("side", "makes", i) for i in range(4)]
    ready = [("main", "waits for", f"side {i}") for i in range(4)]
    held, trained = ("held for", "main"), [("main", "trains on", i) for i in range(4)]
    used = [("CPU", "waits for", f"main {i}") for i in range(3)]
    assert streams.log == [
        ("side", "waits for all of", "main"),
        *(made[0], made[1], ready[0], held, trained[0]),
        *(made[2], ready[1], held, trained[1], used[0]),
        *(made[3], ready[2], held, trained[2], used[1]),
        *(ready[3], held, trained[3], used[2]),
    ]


def test_where_batches_are_made_ahead_depends_on_the_device():
    assert ahead_on(torch.device("cpu")) is prefetched
    assert ahead_on(torch.device("cuda", 1)) is on_side_stream


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_of_a_real_side_stream_are_those_of_their_steps():
    weights = torch.randn(2000, 2000, device="cuda")

    def batch_at(step: int) -> torch.Tensor:
        rng = torch.Generator("cuda").manual_seed(step)
        return torch.randn(500, 2000, device="cuda", generator=rng) @ weights

    ranges = [range(i, i + 3) for i in range(0, 60, 3)]
    expected = [xs.sum(dim=(1, 2)) for _, xs in stacked(batch_at, iter(ranges))]
    found = []
    for _, xs in on_side_stream(batch_at, iter(ranges)):
        for _ in range(20):  # keeps the main stream behind
            weights @ weights
        found.append(xs.sum(dim=(1, 2)))
    assert torch.equal(torch.stack(found), torch.stack(expected))
