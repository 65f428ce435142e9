"""Batches from chunks of activations, in a random order that a step determines.

As many chunks as fit the buffer are mixed: their rows are permuted together and dealt out in
batches, while the next chunks are loaded in a thread. Every epoch deals the chunks anew. A batch
depends on the seed and the step alone, so a resume sees the batches of the uninterrupted run.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_coding.config import named_seed, require
from sparse_coding.lm.activations.chunks import Chunks, PerSite, is_kept, scaled


@dataclass(frozen=True)
class Segment:
    """Steps first .. first + n_steps, which deal out the rows of some chunks (ascending)."""

    first: int
    n_steps: int
    chunks: tuple[int, ...]
    seed: int  # of the permutation of their rows


class Reader:
    """x of a step: (batch_size, width) float32 on the device, multiplied by `scale`; of a site and
    its target x and y, (2, batch_size, width), each by its own.

    Args:
        n_steps: beyond them nothing is loaded ahead
        buffer_rows: rows that are mixed at a time; another as many may be waiting
        seed: of all random orders
        max_norm: rows beyond it are left out; others of the same chunks are dealt twice instead, so
            that every step has its batch
    Raises:
        UserError: there are fewer rows than a batch has.
    """

    def __init__(
        self,
        chunks: Chunks,
        *,
        batch_size: int,
        n_steps: int,
        scale: PerSite,
        seed: int,
        device: torch.device,
        buffer_rows: int,
        max_norm: PerSite = math.inf,
    ):
        require_a_batch(chunks, batch_size)
        self.n_steps, self.closing = n_steps, False
        self.chunks, self.batch_size, self.scale = chunks, batch_size, scale
        self.seed, self.device, self.buffer_rows = seed, device, buffer_rows
        self.max_norm = max_norm
        self.segments: list[Segment] = []
        self.epoch = 0
        self.loader = ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current: tuple[Segment, Tensor, Tensor] | None = None  # with rows and their order
        self.loaded: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None
        self.waiting: tuple[tuple[int, ...], Future] | None = None

    def batch(self, step: int) -> Tensor:
        """x of the step: see the class."""
        segment = self.segment_of(step)
        if self.current is None or self.current[0] != segment:
            self._enter(segment)
        _, rows, order = self.current
        if rows.is_cuda:  # the stream that reads them may be another than they were made on
            rows.record_stream(torch.cuda.current_stream())
        first = (step - segment.first) * self.batch_size
        chosen = order[first : first + self.batch_size]
        return scaled(rows.index_select(0, chosen).float(), self.scale)

    def segment_of(self, step: int) -> Segment:
        """The segment that has this step; extends the list of segments as far as needed."""
        while not self.segments or step >= self.segments[-1].first + self.segments[-1].n_steps:
            self._add_epoch()
        index = len(self.segments) - 1
        while self.segments[index].first > step:
            index -= 1
        return self.segments[index]

    def _add_epoch(self) -> None:
        """Deals the chunks, in a new random order, to segments that fit the buffer."""
        # "shards" is what chunks were called: another name would be another order
        rng = torch.Generator().manual_seed(named_seed(self.seed, "shards", self.epoch))
        groups: list[list[int]] = [[]]
        for k in torch.randperm(len(self.chunks.rows), generator=rng).tolist():
            held = sum(self.chunks.rows[i] for i in groups[-1])
            # a group too small for a batch would deal out nothing
            if held >= self.batch_size and held + self.chunks.rows[k] > self.buffer_rows:
                groups.append([])
            groups[-1].append(k)
        for i, group in enumerate(groups):
            n_steps = sum(self.chunks.rows[k] for k in group) // self.batch_size
            if n_steps == 0:
                continue
            last = self.segments[-1] if self.segments else None
            first = last.first + last.n_steps if last else 0
            seed = named_seed(self.seed, "rows", self.epoch, i)
            self.segments.append(Segment(first, n_steps, tuple(sorted(group)), seed))
        self.epoch += 1

    def _enter(self, segment: Segment) -> None:
        """Makes the rows of the segment current and has the next ones loaded meanwhile."""
        self.current = None  # else two buffers are held while a third is loaded
        rows, kept = self._take(segment.chunks)
        rng = torch.Generator().manual_seed(segment.seed)
        order = torch.randperm(len(rows), generator=rng)
        order = self._whole_batches(order[kept[order]], segment).to(self.device)
        self.current = (segment, rows, order)
        end = segment.first + segment.n_steps
        following = self.segment_of(end).chunks if end < self.n_steps else segment.chunks
        if following != segment.chunks:
            self.waiting = (following, self.loader.submit(self._load, following))

    def _whole_batches(self, order: Tensor, segment: Segment) -> Tensor:
        """The order, begun again where it is too short for the segment's steps."""
        n = segment.n_steps * self.batch_size
        require(len(order) > 0, "chunks of activations are all beyond --max-norm-multiple")
        return order if len(order) >= n else order.repeat(-(-n // len(order)))

    def _take(self, chunks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What _load gives for these chunks: held, waited for, or loaded now."""
        if self.waiting and self.waiting[0] == chunks:
            self.loaded = (chunks, self.waiting[1].result())
        elif self.loaded is None or self.loaded[0] != chunks:
            self.loaded = None  # memory first
            self.loaded = (chunks, self._load(chunks))
        self.waiting = None
        return self.loaded[1]

    def _load(self, chunks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """See _read. On a GPU on a stream of its own, so that copies wait for no training, and done
        when it returns, for whatever stream."""
        if self.stream is None:
            return self._read(chunks)
        with torch.cuda.stream(self.stream):
            found = self._read(chunks)
            self.stream.synchronize()
        return found

    def _read(self, chunks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Rows of these chunks in one tensor, and which of them are not beyond max_norm, on the
        CPU. One chunk at a time is held twice."""
        rows, first = None, 0
        kept = torch.ones(sum(self.chunks.rows[i] for i in chunks), dtype=torch.bool)
        for k in chunks:
            if self.closing:
                break
            chunk = self.chunks.load(k)
            if rows is None:
                shape = (len(kept), chunk.shape[1])
                rows = torch.empty(shape, dtype=chunk.dtype, device=self.device)
            rows[first : first + len(chunk)] = chunk
            kept[first : first + len(chunk)] = is_kept(chunk, self.max_norm)
            first += len(chunk)
        return rows, kept

    def close(self) -> None:
        """Returns when nothing is being loaded any more, after one chunk at most."""
        self.closing = True
        self.loader.shutdown(wait=True, cancel_futures=True)


def require_a_batch(chunks: Chunks, batch_size: int) -> None:
    """Raises UserError if there are fewer rows than a batch has."""
    n_rows = sum(chunks.rows)
    require(
        n_rows >= batch_size,
        f"{n_rows} activations are fewer than --batch-size {batch_size}: give more text",
    )
