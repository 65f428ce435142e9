"""From x to codes: the first half of a training step on the CPU, compiled by numba.

    encode   pre = x W_encᵀ + b_enc, codes = ReLU(pre); for each feature the samples it fires on
    bound    for topk: of each sample a value that k of its codes reach
    list     for topk: for each feature the samples whose bound it reaches
    choose   which of these a k selects; sparse or dense, from the share of codes above 0 in this
             very step; l1 if l0 is sought or p has changed; which features are silent

**Selection of the k largest sorts nothing.** Positive floats are ordered as the integers of their
bits (KEY), so the k-th largest of many is found by bisection, counting how many reach a value. It
is sought among few candidates: for batchtopk the codes above a hint (HINT of what the last batch
selected); for topk those from the k-th largest of the sample's maxima over groups of features on.
Where candidates do not do (the first step, a hint too high, codes that are many times equal) all
codes are gone through: slower, with the same result, which follows from the codes alone.
"""

from typing import get_args

import numpy as np

from sparse_coding.sae.engines.cpu_blas import (
    F0,
    F1,
    RUN,
    dot,
    fill_,
    gemm,
    kernel,
    lowest,
    mask_of_codes,
    mask_of_keys,
    split_,
)
from sparse_coding.sae.engines.cpu_scratch import GROUP, TILE
from sparse_coding.sae.families import EMA, LP_EPS, SLOPE, Penalty, Selection
from sparse_coding.sae.spec import PLACE

RELU, JUMP, TOPK, BATCHTOPK = range(len(get_args(Selection)))
NO_PENALTY, L1, LP, L0_STEP, L0_TANH = range(len(get_args(Penalty)))
KEY = np.int32(2**31 - 1)  # bits of a code without its sign: NaN is the largest, -0.0 is 0
HINT = np.float32(0.85)  # a batch's smallest code is hardly ever less than this times the last's
ROUNDS = 14  # of bisection, for a bound: to 2 %
P = PLACE.p


@kernel
def slope(sae, code, l1, numbers):
    """What the penalty adds to δ of a code."""
    if sae.penalty == L1 or (sae.penalty == LP and numbers[P] == F1):
        return l1
    if sae.penalty == LP:
        return l1 * numbers[P] * (code + np.float32(LP_EPS)) ** (numbers[P] - F1)
    if sae.penalty == L0_TANH:
        steepness = np.float32(SLOPE * sae.W_dec.shape[1] ** 0.5)
        t = np.float32(np.tanh(steepness * code))
        return l1 * steepness * (F1 - t * t)
    return F0


@kernel
def relu_(codes, bias):
    """codes of a feature (batch,) = ReLU(codes + bias); how many are above 0 (or NaN)."""
    n = np.int32(0)
    for b in range(codes.shape[0]):
        c = codes[b] + bias
        c = F0 if c <= F0 else c
        codes[b] = c
        n += np.int32(c != F0)
    return n


@kernel
def jump_(sae, work, f, bias):
    """Codes of a feature that are above 0 and its threshold; lists the samples in its window."""
    codes, window, threshold = work.codes[f], work.window[f], sae.threshold[f]
    half, n, k = np.float32(sae.bandwidth / 2), np.int32(0), np.int32(0)
    for first in range(0, codes.shape[0], RUN):
        run, within = codes[first : first + RUN], np.int32(0)
        for b in range(run.shape[0]):
            run[b] += bias
            within += np.int32(abs(run[b] - threshold) < half)
        for b in range(run.shape[0] if within else 0):
            if abs(run[b] - threshold) < half:
                window[k] = first + b
                k += 1
        for b in range(run.shape[0]):
            c = run[b]
            c = F0 if c <= F0 or c <= threshold else c
            run[b] = c
            n += np.int32(c != F0)
    work.count[f], work.n_window[f] = n, k


@kernel
def list_(codes, where):
    """where = indices of codes that are not 0, ascending."""
    batch, k, address = codes.shape[0], 0, np.uintp(codes.ctypes.data)
    runs = batch - batch % RUN
    for first in range(0, runs, RUN):
        k = note_(where, k, first, mask_of_codes(address + np.uintp(4 * first)))
    for b in range(runs, batch):
        if codes[b] != F0:
            where[k] = b
            k += 1


@kernel
def list_from_(bits, where, limit):
    """where = samples whose limit the keys of a feature reach, ascending; how many."""
    batch, k = bits.shape[0], 0
    address, least = np.uintp(bits.ctypes.data), np.uintp(limit.ctypes.data)
    runs = batch - batch % RUN
    for first in range(0, runs, RUN):
        off = np.uintp(4 * first)
        k = note_(where, k, first, mask_of_keys(address + off, least + off))
    for b in range(runs, batch):
        if (bits[b] & KEY) >= limit[b]:
            where[k] = b
            k += 1
    return k


@kernel
def note_(where, k, first, mask):
    """Appends the samples whose bits are set, of those from `first` on, to k others; how many."""
    while mask:
        where[k] = first + lowest(mask)
        k += 1
        mask &= mask - np.uint64(1)
    return k


@kernel
def reached(keys, least):
    """How many of the keys are at least that."""
    n = np.int32(0)
    for i in range(keys.shape[0]):
        n += np.int32((keys[i] & KEY) >= least)
    return n


@kernel
def kth(keys, k):
    """(the least of the k largest keys above 0, how many of those equal to it are among the k)."""
    low, high = np.int32(0), KEY  # low is reached by at least k keys, or is 0
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        n = reached(keys, middle)
        low, high = (middle, high) if n >= k else (low, middle)
        if n == k:
            break
    least, low = KEY, max(low, np.int32(1))
    for i in range(keys.shape[0]):
        key = keys[i] & KEY
        least = min(least, key if key >= low else KEY)
    above = reached(keys, np.int64(least) + 1)
    return least, min(k, reached(keys, least)) - above


@kernel
def kth_of_samples(bits, n_rows, k, rounds, work):
    """work.limit: of each sample the k-th largest of the keys in its column of bits (rows x batch),
    or 0 if fewer are above 0, by bisection in so many rounds (31 are exact: else it is a lower
    bound); work.room: how many of the equal ones are among the k."""
    low, high, middle, n = work.low, work.high, work.limit, work.room
    batch = low.shape[0]
    fill_(low, 0)
    fill_(high, KEY)
    for _ in range(rounds):
        for b in range(batch):
            middle[b] = max(low[b] + (high[b] - low[b]) // 2, 1)
        _count_reached(bits, n_rows, middle, n)
        for b in range(batch):
            low[b] = middle[b] if n[b] >= k else low[b]
            high[b] = high[b] if n[b] >= k else middle[b]
    for b in range(batch):
        middle[b] = low[b] + 1
    _count_reached(bits, n_rows, middle, n)
    for b in range(batch):
        work.limit[b] = low[b]
        n[b] = k - n[b] if low[b] else 0


@kernel
def _count_reached(bits, n_rows, least, n):
    """n (batch,) = how many keys of each column are at least that."""
    batch = n.shape[0]
    fill_(n, 0)
    for r in range(n_rows):
        row = bits[r * batch : (r + 1) * batch]
        for b in range(batch):
            n[b] += np.int32((row[b] & KEY) >= least[b])


@kernel
def keep_(bits, limit, room, each):
    """Sets codes of a feature to 0 that are below their sample's limit; of those at it the first
    stay while there is room (each: 1 if each sample has its own, or 0). How many stay."""
    n, ties = np.int32(0), np.int32(0)
    for b in range(bits.shape[0]):
        key = bits[b] & KEY
        n += np.int32(key > limit[b])
        ties += np.int32(key == limit[b]) & np.int32(key > 0)
    if not ties:
        for b in range(bits.shape[0]):
            bits[b] = bits[b] if (bits[b] & KEY) > limit[b] else 0
        return n
    for b in range(bits.shape[0]):
        key = bits[b] & KEY
        if key == limit[b] and room[b * each] > 0:
            room[b * each] -= 1
            n += np.int32(key > 0)
        elif key <= limit[b]:
            bits[b] = 0
    return n


@kernel
def keep_listed_(bits, where, limit, room, each):
    """The same for a list of samples, which is shortened; codes are left as they are."""
    n = 0
    for i in range(where.shape[0]):
        b = where[i]
        key = bits[b] & KEY
        tied = key == limit[b] and room[b * each] > 0
        if tied:
            room[b * each] -= 1
        if tied or key > limit[b]:
            where[n] = b
            n += 1
    return n


@kernel
def group_of(sae, n_dict):
    """Features in a group of topk's maxima, a part of a tile: so many that there are three groups
    for each of the k codes, which are hardly ever in the same then. 0: too small a dictionary."""
    size = GROUP
    while size < TILE // 2 and 2 * size * 3 * sae.k <= n_dict:
        size *= 2
    return size if size * sae.k <= n_dict else 0


@kernel
def encode(sae, work, x, span):
    """Codes of a span of tiles, before a k selects; lists as far as they are likely needed.

    x: with its parts
    """
    n_dict, start, total = sae.b_enc.shape[0], span[0] * TILE, 0
    group, n_dead = group_of(sae, n_dict) if sae.selection == TOPK else 0, np.int64(0)
    sets_aside = sae.aux and not work.place
    for f in range(start if sets_aside else 0):
        n_dead += sae.silent[f] >= sae.dead_steps
    if sae.selection == BATCHTOPK:
        fill_(work.limit_value, sae.hint[work.place])  # threads that share it write the same
    for t in range(start, min(span[1] * TILE, n_dict), TILE):
        e = min(t + TILE, n_dict)
        gemm(False, True, (sae.W_enc[t:e], sae.W_enc_parts[t:e]), x, work.codes[t:e])
        for f in range(t, e):
            bias = sae.b_enc[f]
            if sae.b_dec.shape[0] and not sae.transcodes:
                bias -= dot(sae.W_enc[f], sae.b_dec)
            if sae.selection == JUMP:
                jump_(sae, work, f, bias)
            else:
                work.count[f] = relu_(work.codes[f], bias)
            if sets_aside:
                n_dead = set_aside(sae, work, f, n_dead)
            if sae.selection == TOPK or sae.selection == BATCHTOPK:
                take_candidates(sae, work, f, group)
                continue
            total += work.count[f]
            # listed while in the cache, but not where it looks as if the step will be dense
            work.listed[f] = total * n_dict <= work.value.shape[0] * (f - start + 1)
            if work.listed[f] and work.count[f]:
                list_(work.codes[f], work.where[f])


@kernel
def take_candidates(sae, work, f, group):
    """Of a feature: for batchtopk those from the hint on, for topk maxima of its group."""
    batch = work.codes.shape[1]
    if sae.selection == BATCHTOPK:
        work.listed[f] = sae.hint[work.place] > F0
        if work.listed[f]:
            row = work.bits[f * batch : (f + 1) * batch]
            work.count[f] = list_from_(row, work.where[f], work.limit)
    elif group:
        raise_(work.maxima, work.bits, f, group, batch)


@kernel
def set_aside(sae, work, f, n_dead):
    """Copies the codes and the row of a dead feature; how many are dead now."""
    work.dead_row[f] = -1
    if sae.silent[f] < sae.dead_steps:
        return n_dead
    work.dead_row[f] = n_dead
    for b in range(work.codes.shape[1]):
        work.aux[n_dead, b] = work.codes[f, b]
    for j in range(sae.W_dec.shape[1]):
        work.aux_dec[n_dead, j] = sae.W_dec[f, j]
    split_(sae.W_dec[f], work.aux_dec_parts[n_dead], 0)
    return n_dead + 1


@kernel
def raise_(maxima, bits, f, group, batch):
    """Maxima of the group of feature f, its codes included."""
    first = f // group * batch
    row, most = bits[f * batch : (f + 1) * batch], maxima[first : first + batch]
    if f % group == 0:
        fill_(most, 0)
    for b in range(batch):
        key = row[b] & KEY
        most[b] = key if key > most[b] else most[b]


@kernel
def bound(sae, work, k):
    """work.limit: of each sample what at least k codes reach, or 1."""
    n_dict, batch = work.codes.shape
    group = group_of(sae, n_dict)
    if group > 0:
        kth_of_samples(work.maxima, -(-n_dict // group), np.int64(k), np.int64(ROUNDS), work)
        for b in range(batch):
            work.limit[b] = max(work.limit[b], 1)


@kernel
def list_bounded(sae, work, span):
    """Lists of candidates, for a span of tiles."""
    n_dict, batch = work.codes.shape
    group = group_of(sae, n_dict)
    for f in range(span[0] * TILE, min(span[1] * TILE, n_dict)):
        work.listed[f] = group > 0
        if group:
            bits = work.bits[f * batch : (f + 1) * batch]
            work.count[f] = list_from_(bits, work.where[f], work.limit)


@kernel
def select(sae, work, k):
    """Codes that a k, per sample, selects: `where` and `count` have them alone. Where candidates do
    not do, codes that are not selected become 0."""
    n_dict, batch = work.codes.shape
    each = np.int64(sae.selection == TOPK)
    k = int(k) if each else int(k * batch)
    few = work.listed[0] and (k * batch if each else k) <= work.value.shape[0]
    few = few and (limits_by_sample(work, k) if each else limit_of_batch(work, k))
    if each and not few:
        kth_of_samples(work.bits, n_dict, k, np.int64(31), work)
    elif not few:
        work.limit[0], work.room[0] = kth(work.bits, k)
    if not each:
        fill_(work.limit, work.limit[0])
    for f in range(n_dict):
        bits, where = work.bits[f * batch : (f + 1) * batch], work.where[f]
        work.listed[f] = few
        if few:
            where = where[: work.count[f]]
            work.count[f] = keep_listed_(bits, where, work.limit, work.room, each)
        else:
            work.count[f] = keep_(bits, work.limit, work.room, each)


@kernel
def limits_by_sample(work, k):
    """Limits of topk from the candidates listed; False if they are too many for `keys`."""
    batch = work.codes.shape[1]
    most, n = work.keys.shape[0] // batch, work.room
    fill_(n, 0)
    for f in range(work.codes.shape[0]):
        bits = work.bits[f * batch : (f + 1) * batch]
        for i in range(work.count[f]):
            b = work.where[f, i]
            if n[b] == most:
                return False
            work.keys[b * most + n[b]] = bits[b]
            n[b] += 1
    for b in range(batch):
        keys = work.keys[b * most : b * most + n[b]]
        work.limit[b], work.room[b] = kth(keys, k)
    return True


@kernel
def limit_of_batch(work, k):
    """The same of batchtopk; False if they are too few or too many."""
    batch, n = work.codes.shape[1], 0
    for f in range(work.count.shape[0]):
        n += work.count[f]
    if n < k or n > work.keys.shape[0]:
        return False
    n = 0
    for f in range(work.count.shape[0]):
        bits = work.bits[f * batch : (f + 1) * batch]
        for i in range(work.count[f]):
            work.keys[n] = bits[work.where[f, i]]
            n += 1
    work.limit[0], work.room[0] = kth(work.keys[:n], k)
    return True


@kernel
def track_smallest(sae, work):
    """The running mean of the smallest code of a batch, and the hint for the next."""
    if work.limit[0] == KEY:  # none was above 0
        return
    found = work.limit_value[0]
    smallest = sae.smallest_of_first if work.place else sae.smallest
    before = found if smallest[0] == F0 else smallest[0]
    smallest[0] = before + np.float32(EMA) * (found - before)
    sae.hint[work.place] = HINT * found if found == found else F0


@kernel
def choose_auxiliary(sae, work):
    """Of the dead features' codes the largest of each sample stay, half as many as x is wide."""
    n_dict, batch = work.aux.shape
    work.n_dead[0], k = 0, work.g_aux.shape[1] // 2
    for f in range(n_dict):
        work.n_dead[0] += work.dead_row[f] >= 0
    n_dead = work.n_dead[0]
    fill_(work.low, 1)
    _count_reached(work.aux_bits, n_dead, work.low, work.room)
    most = np.int32(0)
    for b in range(batch):
        most = max(most, work.room[b])
    if most > k:
        kth_of_samples(work.aux_bits, n_dead, k, np.int64(31), work)
    else:
        fill_(work.limit, 0)
    for d in range(n_dead):
        bits = work.aux_bits[d * batch : (d + 1) * batch]
        work.aux_count[d] = keep_(bits, work.limit, work.room, np.int64(1))


@kernel
def note_silence(sae, work):
    """How long each feature has been silent, and how many dead ones fired."""
    n_revived = np.int64(0)
    for f in range(work.count.shape[0]):
        silent = sae.silent[f]
        n_revived += np.int64(work.count[f] > 0 and silent >= sae.dead_steps)
        sae.silent[f] = 0 if work.count[f] else silent + 1
    sae.n_revived[0] += n_revived
