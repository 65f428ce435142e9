"""Steps in chunks, and batches made ahead of time."""

import threading

import pytest
import torch

from sparse_coding.batches import chunks, in_chunks, prefetched


def ranges(first: int, n_steps: int, length: int, stop_every: int) -> list[tuple[int, int]]:
    found = chunks(first, n_steps, length=length, stop_every=stop_every)
    return [(steps.start, steps.stop) for steps in found]


def test_chunks_stop_where_something_is_logged_and_at_the_end():
    assert ranges(0, 25, 8, 10) == [(0, 8), (8, 10), (10, 18), (18, 20), (20, 25)]
    assert ranges(0, 3, 1, 100) == [(0, 1), (1, 2), (2, 3)]
    assert ranges(5, 5, 8, 10) == []


@pytest.mark.parametrize("first", range(26))
def test_chunks_cover_each_step_once_wherever_a_resume_begins(first):
    steps = [i for a, b in ranges(first, 25, 8, 10) for i in range(a, b)]
    assert steps == list(range(first, 25))
    assert {10, 20} - set(range(first + 1)) <= {b for _, b in ranges(first, 25, 8, 10)}


def test_prefetched_batches_are_those_of_their_steps():
    def batch_at(step: int) -> torch.Tensor:
        return torch.full((2, 3), step)

    for make in (in_chunks, prefetched):
        found = list(make(batch_at, iter([range(0, 2), range(2, 5)])))
        assert [steps for steps, _ in found] == [range(0, 2), range(2, 5)]
        assert [xs[:, 0, 0].tolist() for _, xs in found] == [[0, 1], [2, 3, 4]]


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
