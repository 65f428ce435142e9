"""What the kernels of this folder take, and what they share."""

from typing import NamedTuple, get_args

import triton
import triton.language as tl
from torch import Tensor

from sparse_coding.sae import families

RELU, JUMP, TOPK, BATCHTOPK = map(tl.constexpr, range(len(get_args(families.Selection))))
NO_PENALTY, L1, LP, L0_STEP, L0_TANH = map(tl.constexpr, range(len(get_args(families.Penalty))))
LP_EPS = tl.constexpr(families.LP_EPS)
NO_SIGN = tl.constexpr(0x7FFFFFFF)  # bits of a code without its sign; the largest int32
WAYS = 32  # thresholds that a program of a search over a batch counts at once
ROUNDS = 8  # of such a search: 32 ways each, until one of 2^31 keys is left and counted


class Rows(NamedTuple):
    """Parameters with Adam's moments (_m, _v) of n_saes autoencoders of one stack, views of it."""

    W_enc: Tensor  # (n_saes, n_dict, h)
    W_enc_m: Tensor
    W_enc_v: Tensor
    W_dec: Tensor  # (n_saes, n_dict, h)
    W_dec_m: Tensor
    W_dec_v: Tensor
    b_enc: Tensor  # (n_saes, n_dict)
    b_enc_m: Tensor
    b_enc_v: Tensor
    b_dec: Tensor  # (n_saes, h); empty where it is fixed at 0
    b_dec_m: Tensor
    b_dec_v: Tensor
    threshold: Tensor  # (n_saes, n_dict) where selection is JUMP
    threshold_m: Tensor
    threshold_v: Tensor
    W_enc_factor: Tensor  # as it stands in GEMMs: rounded to 16 bits, or W_enc itself
    W_dec_factor: Tensor
    idle: Tensor  # (n_saes, n_dict) int32: steps that a feature's moments are without a gradient
    silent: Tensor  # (n_saes, n_dict) int32: steps since it fired, or since the start
    n_revived: Tensor  # (n_saes,) int64: how often one that was dead fired
    l1: Tensor  # (n_saes,)
    target_l0: Tensor  # (n_saes,), 0 where l1 stays
    smallest: Tensor  # (n_saes,): of the codes that BATCHTOPK selects, a running mean
    hint: Tensor  # (n_saes,): what the next batch's hardly ever are below; 0: not known
    k: Tensor  # (n_saes,) int32: of a sample, where selection is TOPK; of a batch, if BATCHTOPK
    n_codes: Tensor  # (n_saes,) int32: above 0 on the last batch
    ends: Tensor  # (n_bands,) int32: of the bands of features that prefixes add


class Work(NamedTuple):
    """Input and scratch of a step. Lists never overflow: they are as long as what they list from.
    What is of features that are not listed is not written."""

    x: Tensor  # (batch, h)
    numbers: Tensor  # StepNumbers
    centred: Tensor  # (n_saes, batch, h): x − b_dec, as a factor
    pre: Tensor  # (n_saes, batch, n_dict): (x − b_dec) W_encᵀ, without b_enc
    raw: Tensor  # (n_saes, batch, n_dict): codes of candidates; r W_decᵀ; δ of sparse steps
    by_sample: Tensor  # (n_saes, batch, n_dict) int32: features, ascending
    by_feature: Tensor  # (n_saes, n_dict, batch) int32: samples, ascending, of sparse steps
    codes: Tensor  # (n_saes, batch, n_dict), a factor, of dense steps
    delta: Tensor  # (n_saes, batch, n_dict), a factor, of dense steps
    n_of_sample: Tensor  # (n_saes, batch) int32
    n_of_feature: Tensor  # (n_saes, n_dict) int32
    limit: Tensor  # (n_saes, batch) int32: keys above it are selected,
    last: Tensor  # (n_saes, batch) int32: and those at it, up to this feature
    least: Tensor  # (n_saes, batch): smallest code that is selected
    total: Tensor  # (n_saes,) int32: candidates of the batch
    bracket: Tensor  # (n_saes, 2, ROUNDS, 2) int32: of the searches for a key, and among equal ones
    reached: Tensor  # (n_saes, 2, ROUNDS, parts, WAYS) int32: keys from a threshold on, in a part
    powers: Tensor  # (n_saes, tiles of features, 2): Σ (codes + LP_EPS)^p, p of last step and this
    count: Tensor  # (n_saes, n_dict) int32: codes above 0
    dead: Tensor  # (n_saes, n_dict) int32: whether a feature was, before this batch
    state: Tensor  # (n_saes, n_dict) int32: ASLEEP, RESTS or MOVES
    missed: Tensor  # (n_saes, n_dict) int32: steps of decay that its v is behind, or LAST
    sums: Tensor  # (n_bands, n_saes, batch, h): of a band's codes times rows of W_dec
    r: Tensor  # (n_bands, n_saes, batch, h): x_hat − x, summed over the prefixes with a band
    r_factor: Tensor  # the same as a factor
    bias_grad: Tensor  # (n_saes, n_dict): ∂b_enc
    threshold_grad: Tensor  # (n_saes, n_dict)
    W_enc_grad: Tensor  # (n_saes, n_dict, h), of dense steps
    W_dec_grad: Tensor
    b_dec_grad: Tensor  # (n_saes, h)
    aux_slot: Tensor  # (n_saes, n_dict) int32: a feature's row of those below, or -1
    aux_enc: Tensor  # (n_saes, n_near, h): what the auxiliary loss adds to gradients
    aux_dec: Tensor


class Shape(NamedTuple):
    """What the kernels are compiled for. n_dict is not of it: all sizes share the kernels."""

    h: int
    batch: int
    selection: int
    penalty: int
    b_dec: bool  # whether it is trained
    project: bool
    unit_rows: bool
    frozen: bool
    through_input: bool
    aux: bool  # whether some features get a gradient of the auxiliary loss
    n_bands: int
    bandwidth: float
    slope: float  # of L0_TANH
    dead_steps: int
    sparse: bool
    half: bool  # whether factors have 16 bits
    block_h: int  # a power of two, at least h
    parts: int  # programs of a search over a batch
    block_n: int = 1024  # features at a time, of a sample
    tile_f: int = 64  # features of a program that takes all samples,
    tile_b: int = 32  # so many at a time
    gather_h: int = 512  # dimensions of gathered rows at a time
    gather_e: int = 8  # rows at a time
    row_e: int = 4  # the same where a program holds whole rows


ASLEEP, RESTS, MOVES = map(tl.constexpr, range(3))


@triton.jit
def key_of(codes):
    """Positive floats are ordered as the integers of their bits; NaN is the largest."""
    return codes.to(tl.int32, bitcast=True) & NO_SIGN


@triton.jit
def relu(pre):
    """max(pre, 0), but NaN stays."""
    return tl.where(pre <= 0, 0.0, pre)


@triton.jit
def pre_at(rows, work, n, s, b, f, mask, S: tl.constexpr):
    """Pre-activations of samples b and features f, of one shape; 0 where masked."""
    at = (s * S.batch + b).to(tl.int64) * n + f
    pre = tl.load(work.pre + at, mask=mask, other=0.0)
    return pre + tl.load(rows.b_enc + s * n + f, mask=mask, other=0.0)


@triton.jit
def selected(rows, work, n, place, pre, mask, S: tl.constexpr):
    """Which pre-activations become codes, once `limit` and `last` are known; place: autoencoder,
    samples, features."""
    s, b, f = place
    codes = relu(pre)
    on = mask & (codes != 0)
    if S.selection == JUMP:
        on = on & ~(pre <= tl.load(rows.threshold + s * n + f, mask=mask, other=0.0))
    if S.selection == TOPK or S.selection == BATCHTOPK:
        key, of_sample = key_of(codes), s * S.batch + b
        limit = tl.load(work.limit + of_sample, mask=mask, other=NO_SIGN)
        last = tl.load(work.last + of_sample, mask=mask, other=-1)
        on = on & ((key > limit) | ((key == limit) & (f <= last)))
    return on


@triton.jit
def in_window(rows, n, s, f, pre, mask, S: tl.constexpr):
    """Which pre-activations are so near their threshold that it learns from them."""
    threshold = tl.load(rows.threshold + s * n + f, mask=mask, other=0.0)
    return mask & (tl.abs(pre - threshold) < S.bandwidth / 2)
