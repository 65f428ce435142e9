"""Kernels that select codes without sorting.

A list of candidates is taken of each sample: those from a bound on that enough codes reach. Of
topk the bound is the k-th largest of the maxima of 1 024 groups of features; of batchtopk it is a
hint, HINT times the smallest code of the batch before. Then the k-th largest of the candidates is
found by bisection of their bits, in one program for a sample; for a batch in ROUNDS launches, each
of which counts how many keys reach WAYS thresholds. Of equal codes the lowest feature comes first,
then the lowest sample. The result follows from the codes alone.
"""

import triton
import triton.language as tl

from sparse_coding.sae.engines.gpu_gemm import parts
from sparse_coding.sae.engines.gpu_gemm.parts import (
    BATCHTOPK,
    JUMP,
    NO_SIGN,
    TOPK,
    in_window,
    key_of,
    pre_at,
    relu,
)

WAYS, ROUNDS = tl.constexpr(parts.WAYS), tl.constexpr(parts.ROUNDS)
BISECTIONS = tl.constexpr(16)  # for a bound: to a 2^-8 where maxima are within a factor 2^16
LARGEST = tl.constexpr(0x7FC00000)  # key of NaN; keys of orders are below it
OCTAVES = tl.constexpr(16 << 23)  # of keys


@triton.jit
def bound(rows, work, n, S: tl.constexpr):
    """Of a sample, one program each, a key that at least k codes reach; 0 if none is known."""
    N: tl.constexpr = S.block_n
    s, b = tl.program_id(0) // S.batch, tl.program_id(0) % S.batch
    most = tl.zeros([N], tl.int32)
    for start in range(0, n, N):
        f = start + tl.arange(0, N)
        most = tl.maximum(most, key_of(relu(pre_at(rows, work, n, s, b, f, f < n, S))))
    k = tl.load(rows.k + s)
    high = tl.max(most, 0) + 1
    low = tl.maximum(high - OCTAVES, 0)
    low = tl.where(tl.sum((most >= low).to(tl.int32), 0) >= k, low, 0)
    for _ in range(BISECTIONS):
        middle = tl.maximum(low + (high - low) // 2, 1)
        enough = tl.sum((most >= middle).to(tl.int32), 0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    tl.store(work.limit + s * S.batch + b, low)


@triton.jit
def list_from(rows, work, n, s, b, least, S: tl.constexpr):
    """Lists candidates of a sample, with their codes: those whose keys reach `least`, and those in
    the window of their threshold."""
    N: tl.constexpr = S.block_n
    of_sample, n_listed = s * S.batch + b, 0
    at = of_sample.to(tl.int64) * n
    for start in range(0, n, N):
        f = start + tl.arange(0, N)
        pre = pre_at(rows, work, n, s, b, f, f < n, S)
        codes = relu(pre)
        listed = (f < n) & (codes != 0) & (key_of(codes) >= least)
        if S.selection == JUMP:
            listed = listed & ~(pre <= tl.load(rows.threshold + s * n + f, mask=f < n, other=0.0))
            listed = listed | in_window(rows, n, s, f, pre, f < n, S)
        place = at + n_listed + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(work.by_sample + place, f, mask=listed)
        tl.store(work.raw + place, codes, mask=listed)
        n_listed += tl.sum(listed.to(tl.int32), 0)
    tl.store(work.n_of_sample + of_sample, n_listed)


@triton.jit
def list_candidates(rows, work, n, S: tl.constexpr):
    """Those of a sample, one program each."""
    s, b = tl.program_id(0) // S.batch, tl.program_id(0) % S.batch
    least = 0
    if S.selection == TOPK:
        least = tl.load(work.limit + s * S.batch + b)
    if S.selection == BATCHTOPK:
        least = key_of(tl.load(rows.hint + s))
    list_from(rows, work, n, s, b, least, S)


@triton.jit
def tally(rows, work, n, S: tl.constexpr):
    """Candidates of a whole batch, one program for each autoencoder."""
    s, total = tl.program_id(0), 0
    for start in range(0, S.batch, 1024):
        b = start + tl.arange(0, 1024)
        listed = tl.load(work.n_of_sample + s * S.batch + b, mask=b < S.batch, other=0)
        total += tl.sum(listed, 0)
    tl.store(work.total + s, total)


@triton.jit
def list_again(rows, work, n, S: tl.constexpr):
    """All codes above 0 become candidates, where the hint was too high."""
    s, b = tl.program_id(0) // S.batch, tl.program_id(0) % S.batch
    if tl.load(work.total + s) < tl.load(rows.k + s):
        list_from(rows, work, n, s, b, 0, S)


@triton.jit
def found(work, s, TIES: tl.constexpr, ROUND: tl.constexpr, PARTS: tl.constexpr):
    """A search after a round: its bracket [low, high), the counts of WAYS thresholds in it."""
    at = (s * 2 + TIES) * ROUNDS + ROUND
    low, high = tl.load(work.bracket + 2 * at), tl.load(work.bracket + 2 * at + 1)
    i = tl.arange(0, PARTS)[:, None] * WAYS + tl.arange(0, WAYS)[None, :]
    return low, high, tl.sum(tl.load(work.reached + at * PARTS * WAYS + i), 0)


@triton.jit
def kth(work, s, TIES: tl.constexpr, PARTS: tl.constexpr):
    """The key that a finished search has found, how many reach it, how many are above."""
    low, _, counts = found(work, s, TIES, ROUNDS - 1, PARTS)
    way = tl.arange(0, WAYS)
    reach = tl.sum(tl.where(way == 0, counts, 0), 0)
    return low, reach, tl.sum(tl.where(way == 1, counts, 0), 0)


@triton.jit
def narrow(rows, work, n, S: tl.constexpr, TIES: tl.constexpr, ROUND: tl.constexpr):
    """A round of the search for the k-th largest key of a batch, by S.parts programs; with TIES,
    for the last of those equal to it, whose keys are then those of their order."""
    N: tl.constexpr = S.block_n // 8
    PARTS: tl.constexpr = S.parts
    s, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    k, limit, needed = tl.minimum(tl.load(rows.k + s), tl.load(work.total + s)), 0, True
    if TIES:
        limit, reach, above = kth(work, s, 0, S.parts)
        needed = reach > k
        k -= above
    if needed:
        low, high = 1, LARGEST + 1
        if ROUND > 0:
            low, high, counts = found(work, s, TIES, ROUND - 1, PARTS)
            width = tl.maximum((high - low + WAYS - 1) // WAYS, 1)
            low += width * (tl.sum((counts >= k).to(tl.int32), 0) - 1)
            high = tl.minimum(low + width, high)
        width = tl.maximum((high - low + WAYS - 1) // WAYS, 1)
        thresholds = low + width * tl.arange(0, WAYS)
        at, counts = (s * 2 + TIES) * ROUNDS + ROUND, tl.zeros([WAYS], tl.int32)
        for b in range(part, S.batch, PARTS):
            n_listed = tl.load(work.n_of_sample + s * S.batch + b)
            first = (s * S.batch + b).to(tl.int64) * n
            for start in range(0, n_listed, N):
                i = start + tl.arange(0, N)
                key = key_of(tl.load(work.raw + first + i, mask=i < n_listed, other=0.0))
                if TIES:
                    f = tl.load(work.by_sample + first + i, mask=i < n_listed, other=0)
                    key = tl.where(key == limit, LARGEST - (f * S.batch + b), 0)
                counts += tl.sum((key[:, None] >= thresholds[None, :]).to(tl.int32), 0)
        tl.store(work.reached + (at * PARTS + part) * WAYS + tl.arange(0, WAYS), counts)
        tl.store(work.bracket + 2 * at, low)
        tl.store(work.bracket + 2 * at + 1, high)


@triton.jit
def n_from(work, first, n_listed, key, N: tl.constexpr):
    """How many candidates of a sample reach a key."""
    count = 0
    for start in range(0, n_listed, N):
        i = start + tl.arange(0, N)
        codes = tl.load(work.raw + first + i, mask=i < n_listed, other=0.0)
        count += tl.sum((key_of(codes) >= key).to(tl.int32), 0)
    return count


@triton.jit
def kth_of_sample(work, k, bound_key, first, n_listed, N: tl.constexpr):
    """A sample's limit, and how many codes that are equal to it are among its k largest.

    bound_key: what all listed codes reach
    """
    limit, room = tl.maximum(bound_key - 1, 0), NO_SIGN
    if n_listed > k:
        low, high, n_low = limit + 1, LARGEST + 1, n_listed
        while (high - low > 1) & (n_low > k):
            middle = low + (high - low) // 2
            n_middle = n_from(work, first, n_listed, middle, N)
            enough = n_middle >= k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
            n_low = tl.where(enough, n_middle, n_low)
        limit = low - 1
        if n_low > k:
            limit = low
            room = k - n_from(work, first, n_listed, low + 1, N)
    return limit, room


@triton.jit
def trim(rows, work, n, S: tl.constexpr):
    """Finds `limit` and `last` of a sample, one program each, and shortens its list to them."""
    N: tl.constexpr = S.block_n
    s, b = tl.program_id(0) // S.batch, tl.program_id(0) % S.batch
    of_sample = s * S.batch + b
    first, n_listed = of_sample.to(tl.int64) * n, tl.load(work.n_of_sample + of_sample)
    k, last = tl.load(rows.k + s), NO_SIGN
    if S.selection == BATCHTOPK:
        limit, reach, _ = kth(work, s, 0, S.parts)
        if reach > tl.minimum(k, tl.load(work.total + s)):
            order, _, _ = kth(work, s, 1, S.parts)
            last = (LARGEST - order + S.batch - b) // S.batch - 1
        limit = tl.where(k > 0, limit, NO_SIGN)
    else:
        bound_key = tl.load(work.limit + of_sample)
        limit, room = kth_of_sample(work, k, bound_key, first, n_listed, N)
        last = tl.where(room < NO_SIGN, -1, last)
    n_kept, n_tied, least = 0, 0, float("inf")
    for start in range(0, n_listed, N):
        i = start + tl.arange(0, N)
        f = tl.load(work.by_sample + first + i, mask=i < n_listed, other=0)
        codes = tl.load(work.raw + first + i, mask=i < n_listed, other=0.0)
        key = key_of(codes)
        tied = (key == limit) & (i < n_listed) & (key > 0)
        if S.selection == TOPK:
            nth = n_tied + tl.cumsum(tied.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(tied & (nth <= room), f, -1), 0))
            n_tied += tl.sum(tied.to(tl.int32), 0)
        kept = (i < n_listed) & ((key > limit) | (tied & (f <= last)))
        place = first + n_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of this part is read before any of it is written
        tl.store(work.by_sample + place, f, mask=kept)
        n_kept += tl.sum(kept.to(tl.int32), 0)
        least = tl.minimum(least, tl.min(tl.where(kept, codes, float("inf")), 0))
    tl.store(work.n_of_sample + of_sample, n_kept)
    tl.store(work.limit + of_sample, limit)
    tl.store(work.last + of_sample, last)
    tl.store(work.least + of_sample, least)
