"""Batches for the training loop, several steps at a time, made while others train."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparse_coding.sae.engines.cpu_compile import one_thread_here

Batches = Iterator[tuple[range, Tensor]]


def inputs_and_targets(xs: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) of batches, each (n, batch, h): of autoencoders xs are both, of transcoders
    (n, 2, batch, h)."""
    return (xs[:, 0].contiguous(), xs[:, 1].contiguous()) if xs.dim() == 4 else (xs, xs)


def step_ranges(first: int, n_steps: int, *, length: int, stop_every: int) -> Iterator[range]:
    """Steps first .. n_steps in ranges of at most `length`, none across a multiple of stop_every.

    They begin at multiples of `length` after those, wherever `first` is.
    """
    while first < n_steps:
        since = first % stop_every
        end = first - since + min(since - since % length + length, stop_every)
        end = min(end, n_steps)
        yield range(first, end)
        first = end


def stacked(batch_at: Callable[[int], Tensor], ranges: Iterator[range]) -> Batches:
    """(steps, their batches (n, batch_size, activation_dim)) for each range."""
    for steps in ranges:
        yield steps, torch.stack([batch_at(step) for step in steps])


def prefetched(batch_at: Callable[[int], Tensor], ranges: Iterator[range]) -> Batches:
    """The same; the next one is made in a thread meanwhile.

    It computes alone, whatever OMP_NUM_THREADS says, so a batch is the same bits for any.
    """
    made = stacked(batch_at, ranges)
    with ThreadPoolExecutor(1, initializer=one_thread_here) as thread:
        coming = thread.submit(next, made, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, made, None)
            yield chunk


def on_side_stream(batch_at: Callable[[int], Tensor], ranges: Iterator[range]) -> Batches:
    """The same on a GPU, where the next one is made on a stream of its own meanwhile.

    The CPU runs ahead by two of them at most: memory stays bounded, and a signal is soon obeyed.
    """
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)  # what batch_at uses may still be on its way
    used: deque[torch.cuda.Event] = deque()

    def make(steps: range | None) -> tuple[range, Tensor, torch.cuda.Event] | None:
        if steps is None:
            return None
        with torch.cuda.stream(side):
            return steps, torch.stack([batch_at(step) for step in steps]), side.record_event()

    coming = make(next(ranges, None))
    while coming is not None:
        (steps, xs, made), coming = coming, make(next(ranges, None))
        main.wait_event(made)
        xs.record_stream(main)  # its memory is used again only after main is done with it
        yield steps, xs
        used.append(main.record_event())
        if len(used) == 2:
            used.popleft().synchronize()


def ahead_on(device: torch.device) -> Callable[..., Batches]:
    """How batches for this device are made ahead of time."""
    return on_side_stream if device.type == "cuda" else prefetched
