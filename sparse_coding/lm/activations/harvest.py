"""The harvest: a language model reads text, chunks of its activations come out.

A chunk is a fixed stretch of the packed text, so it can be computed alone. Its rows are shuffled.

The model's forward passes fill one of two buffers, in the order of the text. Beside them threads
take chunks out of the other one, and hash and write them. On a GPU the threads have streams of
their own, on which rows are shuffled and checked before they are copied to pinned memory.
"""

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import named_seed, progress_bar, require
from sparse_coding.lm.activations.chunks import PIECE_ROWS
from sparse_coding.lm.model import LanguageModel, Site, activations
from sparse_coding.lm.packing import Packed
from sparse_coding.sae.engines.cpu_compile import one_thread_here

CHUNK_BYTES = 32 * 2**20  # of a chunk, about; ours: small enough to mix many of them in memory
BUFFERS = 2
THREADS = {"cpu": 1, "cuda": 8}  # that take out and keep chunks: sha256 does 1.4 GB/s in each, and
# on a CPU one does not hold up the model for long

Keep = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Stretch:
    """Activations of all tokens of some rows of text, in their order.

    start: the first row of text
    x: (rows of text x context_length or more, width) in the store's dtype, on the model's device
    kept: (rows of text, context_length): tokens that count
    ready: on a GPU, when x is there
    taken: released for each chunk that is taken out of it
    """

    start: int
    x: Tensor
    kept: np.ndarray
    ready: torch.cuda.Event | None
    taken: threading.Semaphore = field(default_factory=partial(threading.Semaphore, 0))


@dataclass(frozen=True)
class Harvester:
    """Computes chunks with the language model.

    store_dtype: float16 or bfloat16, in which rows are kept
    lm_batch_size: rows of text per forward pass
    n_tokens: asked for; there may be fewer
    chunks_at_once: chunks of one forward pass, if it is larger than a chunk; they are computed
        together, and each has the same bits whichever of them are asked for
    """

    lm: LanguageModel
    site: Site
    text: Packed
    store_dtype: torch.dtype
    lm_batch_size: int
    n_tokens: int
    chunks_at_once: int = 1

    @property
    def texts_per_chunk(self) -> int:
        """Rows of text behind a chunk."""
        row_bytes = self.text.context_length * self.site.stored_width * self.store_dtype.itemsize
        return max(1, round(CHUNK_BYTES / row_bytes))

    def span(self, k: int, n_chunks: int = 1) -> tuple[int, int]:
        """First and last (exclusive) row of text of chunk k, or of n_chunks chunks from it on."""
        n = self.texts_per_chunk
        return k * n, min((k + n_chunks) * n, self.text.n_rows)

    @cached_property
    def rows(self) -> list[int]:
        """Activations of each chunk, as many chunks as hold n_tokens of them, or all there are."""
        rows: list[int] = []
        n_chunks = -(-self.text.n_rows // self.texts_per_chunk)
        while len(rows) < n_chunks and sum(rows) < self.n_tokens:
            rows.append(int(self.text.keep(*self.span(len(rows))).sum()))
        return rows

    @property
    def n_bytes(self) -> int:
        """Of all chunks."""
        return sum(self.rows) * self.site.stored_width * self.store_dtype.itemsize

    def load(self, k: int) -> Tensor:
        """Chunk k, computed, on the model's device."""
        return self.computed(k)[0]

    def computed(self, k: int) -> tuple[Tensor, Tensor]:
        """See taken_out."""
        return self.taken_out(k, self.read(k, self.buffer()))

    def buffer(self) -> Tensor:
        """For `read`: (tokens of chunks_at_once chunks, width)."""
        n_texts = min(self.chunks_at_once * self.texts_per_chunk, self.text.n_rows)
        shape = (n_texts * self.text.context_length, self.site.stored_width)
        return torch.empty(shape, dtype=self.store_dtype, device=self.lm.device)

    def stretch_of(self, k: int) -> range:
        """The chunks that are read together with chunk k."""
        first = k - k % self.chunks_at_once
        return range(first, min(first + self.chunks_at_once, len(self.rows)))

    def read(self, k: int, x: Tensor, passed: Callable[[int], object] | None = None) -> Stretch:
        """The stretch of text that has chunk k, read by forward passes that fill x.

        passed: is told of how many rows each pass was
        """
        start, stop = self.span(self.stretch_of(k).start, self.chunks_at_once)
        kept, first = [], 0
        for ids, keep in self.text.batches(start, stop, size=self.lm_batch_size):
            found = activations(self.lm, self.site, sent(ids, self.lm.device)).flatten(0, 1)
            x[first : first + len(found)].copy_(found)
            first += len(found)
            kept.append(keep)
            if passed:
                passed(int(keep.sum()))
        ready = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None
        return Stretch(start, x, np.concatenate(kept), ready)

    def taken_out(
        self, k: int, stretch: Stretch, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(rows of chunk k in a random order, (rows[k], width); their norms in float32).

        out: (rows[k] or more, width): where rows are put

        Raises:
            UserError: an activation is too large for the store's dtype, or not a number.
        """
        source = self._shuffled(k, stretch).to(stretch.x.device)
        n, width = len(source), self.site.stored_width
        rows = stretch.x.new_empty(n, width) if out is None else out[:n]
        norms = torch.empty(n, device=rows.device)
        at_once = n if rows.is_cuda else min(n, PIECE_ROWS)
        single = torch.empty(at_once, width, device=rows.device)  # a piece in float32
        for first in range(0, n, at_once):
            piece = rows[first : first + at_once]
            torch.index_select(stretch.x, 0, source[first : first + at_once], out=piece)
            torch.linalg.vector_norm(
                single[: len(piece)].copy_(piece), dim=1, out=norms[first : first + at_once]
            )
        require(
            bool(torch.isfinite(norms).all()),
            f"activations of layer {self.site.layer} {self.site.name} are beyond the range of "
            f"{self.store_dtype}: use --store-dtype bfloat16",
        )
        return rows, norms

    def _shuffled(self, k: int, stretch: Stretch) -> Tensor:
        """(rows[k],): rows of stretch.x that chunk k has, in its random order."""
        first, last = (row - stretch.start for row in self.span(k))
        kept = np.flatnonzero(stretch.kept[first:last]) + first * self.text.context_length
        # "shard" is what chunks were called: another name would be another order
        rng = torch.Generator().manual_seed(named_seed("shard", k))
        source = torch.empty(len(kept), dtype=torch.int64)
        source[torch.randperm(len(kept), generator=rng)] = torch.from_numpy(kept)
        return source


def sent(ids: np.ndarray, device: torch.device) -> Tensor:
    """ids on the device. On a GPU the caller does not wait for passes before."""
    tensor = torch.from_numpy(ids)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Taking:
    """Takes chunks out of stretches, in several threads. Each has room on the host for the rows, if
    they are lent or come from a GPU, and of a GPU a stream."""

    def __init__(self, harvester: Harvester, to: torch.device, lent: bool):
        self.harvester, self.lent, self.mine = harvester, lent, threading.local()
        self.from_gpu = harvester.lm.device.type == "cuda"
        self.needs_room = to.type == "cpu" and (lent or self.from_gpu)

    def taken_out(self, k: int, stretch: Stretch) -> tuple[Tensor, Tensor]:
        """See Harvester.taken_out; the stretch may be overwritten then."""
        try:
            if self.from_gpu:
                return self._from_gpu(k, stretch)
            return self.harvester.taken_out(k, stretch, self._room())
        finally:
            stretch.taken.release()

    def _room(self) -> Tensor | None:
        """Of this thread."""
        if self.needs_room and not hasattr(self.mine, "room"):
            h = self.harvester
            shape = (h.texts_per_chunk * h.text.context_length, h.site.stored_width)
            self.mine.room = torch.empty(shape, dtype=h.store_dtype, pin_memory=self.from_gpu)
        return self.mine.room if self.needs_room else None

    def _from_gpu(self, k: int, stretch: Stretch) -> tuple[Tensor, Tensor]:
        if not hasattr(self.mine, "stream"):
            self.mine.stream = torch.cuda.Stream(stretch.x.device)
        self.mine.stream.wait_event(stretch.ready)
        with torch.cuda.stream(self.mine.stream):
            rows, norms = self.harvester.taken_out(k, stretch)
            if (room := self._room()) is not None:
                rows = room[: len(rows)].copy_(rows, non_blocking=True)
            norms = norms.cpu()  # here: on the model's stream it would wait for the next passes
            self.mine.stream.synchronize()
        return rows if self.lent or rows.is_cuda else rows.clone(), norms


def harvest(
    harvester: Harvester, chunks: list[int], keep: Keep, *, to: torch.device, lent: bool = False
) -> None:
    """Computes these chunks, ascending, with a progress bar; keep(k, rows, norms) of each, in
    threads, while the model reads on.

    Args:
        to: device of the rows: the CPU or the model's
        lent: whether keep is done with the rows when it returns, so that their memory is used again
    Raises:
        UserError: that of taken_out; whatever keep raises.
    """
    taking = _Taking(harvester, to, lent)

    def work(k: int, stretch: Stretch) -> None:
        keep(k, *taking.taken_out(k, stretch))

    together = [list(ks) for _, ks in itertools.groupby(chunks, harvester.stretch_of)]
    n_rows = sum(harvester.rows[k] for ks in together for k in harvester.stretch_of(ks[0]))
    spare = [harvester.buffer() for _ in range(BUFFERS)]
    in_use: deque[tuple[Stretch, int]] = deque()
    jobs: deque[Future] = deque()
    # with threads of their own they would take turns with those of the model
    pool = ThreadPoolExecutor(THREADS[harvester.lm.device.type], initializer=one_thread_here)
    with (
        contextlib.ExitStack() as at_end,
        progress_bar(total=n_rows, unit="tok", unit_scale=True, desc="harvest") as bar,
    ):
        at_end.callback(pool.shutdown, cancel_futures=True)  # of those that wait, after an error
        for ks in together:
            x = spare.pop() if spare else _free_again(*in_use.popleft())
            stretch = harvester.read(ks[0], x, bar.update)
            in_use.append((stretch, len(ks)))
            jobs.extend(pool.submit(work, k, stretch) for k in ks)
            while jobs and jobs[0].done():
                jobs.popleft().result()
        for job in jobs:
            job.result()


def _free_again(stretch: Stretch, n_chunks: int) -> Tensor:
    """The stretch's buffer, when its chunks are taken out of it."""
    for _ in range(n_chunks):
        stretch.taken.acquire()
    return stretch.x
