"""Adam of a feature's row on the CPU, compiled; rows of W_dec go back to length 1.

**Dormant rows.** Without a gradient Adam's moves shrink by β₁/√β₂ = 0.9005 a step. A row that has
not fired for DORMANT steps makes all that are left at once, 1/(1 − 0.9005) times the next one, and
spends m on them; then it is left alone until it fires again, when its v is decayed for the steps
missed. So it ends where dense Adam would take it, but for that some steps sooner: a single gradient
leaves m̂/√v̂ ≤ (1 − β₁)/√(1 − β₂) = 3.2, a steady one 1, and all moves after 64 steps are below
3.2 · 0.9005^64/(1 − 0.9005) = 0.04 of the learning rate: 0.12 % of those that the firing left.
"""

import numpy as np

from sparse_coding.sae.engines.cpu_blas import F0, F1, dot, fill_, kernel, scale_, split_
from sparse_coding.sae.spec import BETAS, DORMANT, PLACE, REMAINING

RATE, ROOT, EPS, PROJECT, UNIT = (*PLACE[:3], PLACE.project, PLACE.unit_rows)
BETA1, BETA2 = BETAS


@kernel
def adam_(p, m, v, grad, numbers):
    """A step of Adam for parameters p with moments m and v (Kingma, Ba 2015, arXiv 1412.6980)."""
    rate, root, eps = numbers[RATE], numbers[ROOT], numbers[EPS]
    for j in range(p.shape[0]):
        m[j] = np.float32(BETA1) * m[j] + np.float32(1 - BETA1) * grad[j]
        v[j] = np.float32(BETA2) * v[j] + np.float32(1 - BETA2) * grad[j] * grad[j]
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)


@kernel
def adam_without_gradient_(p, m, v, numbers, last):
    """The same where the gradient is 0; the last of these steps makes the moves of all to come."""
    rate, root, eps = numbers[RATE], numbers[ROOT], numbers[EPS]
    rate *= np.float32(REMAINING) if last else F1
    for j in range(p.shape[0]):
        m[j] *= np.float32(BETA1)
        v[j] *= np.float32(BETA2)
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)
    if last:
        fill_(m, F0)


@kernel
def rest(sae, f, numbers):
    """A feature without a gradient: its moments still carry it on, until it is dormant."""
    sae.idle[f] += 1
    if sae.idle[f] > DORMANT:
        return
    s, last = slice(f, f + 1), sae.idle[f] == DORMANT
    adam_without_gradient_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], numbers, last)
    if sae.threshold.shape[0]:
        m, v = sae.threshold_m[s], sae.threshold_v[s]
        adam_without_gradient_(sae.threshold[s], m, v, numbers, last)
        sae.threshold[f] = F0 if sae.threshold[f] < F0 else sae.threshold[f]
    adam_without_gradient_(sae.W_enc[f], sae.W_enc_m[f], sae.W_enc_v[f], numbers, last)
    if not sae.frozen:
        adam_without_gradient_(sae.W_dec[f], sae.W_dec_m[f], sae.W_dec_v[f], numbers, last)
        if numbers[UNIT]:
            scale_(sae.W_dec[f], F1 / np.sqrt(dot(sae.W_dec[f], sae.W_dec[f])))
    split_(sae.W_enc[f], sae.W_enc_parts[f], 0)  # while it is in the cache


@kernel
def catch_up(sae, f):
    """Decays v of a feature for the steps that it was left alone; its m is spent."""
    missed = sae.idle[f] - DORMANT
    if missed > 0:
        v = np.float32(BETA2**missed)
        sae.b_enc_v[f] *= v
        if sae.threshold.shape[0]:
            sae.threshold_v[f] *= v
        scale_(sae.W_enc_v[f], v)
        scale_(sae.W_dec_v[f], v)
    sae.idle[f] = 0


@kernel
def fired(sae, f, d_biases, d_enc, d_dec, off, numbers):
    """Adam of a feature's row, and its part of ∂b_dec into off.

    d_biases: ∂b_enc and ∂threshold, arrays of one number
    """
    catch_up(sae, f)
    d_bias, d_threshold = d_biases
    W_enc, W_dec = sae.W_enc[f], sae.W_dec[f]
    if sae.b_dec.shape[0] and not sae.transcodes:
        for j in range(off.shape[0]):
            off[j] -= d_bias[0] * W_enc[j]
            d_enc[j] -= d_bias[0] * sae.b_dec[j]
    if numbers[PROJECT]:
        along = dot(d_dec, W_dec)
        for j in range(d_dec.shape[0]):
            d_dec[j] -= along * W_dec[j]
    s = slice(f, f + 1)
    adam_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], d_bias, numbers)
    if sae.threshold.shape[0]:
        adam_(sae.threshold[s], sae.threshold_m[s], sae.threshold_v[s], d_threshold, numbers)
        sae.threshold[f] = F0 if sae.threshold[f] < F0 else sae.threshold[f]
    adam_(W_enc, sae.W_enc_m[f], sae.W_enc_v[f], d_enc, numbers)
    if not sae.frozen:
        adam_(W_dec, sae.W_dec_m[f], sae.W_dec_v[f], d_dec, numbers)
        if numbers[UNIT]:
            scale_(W_dec, F1 / np.sqrt(dot(W_dec, W_dec)))
    split_(W_enc, sae.W_enc_parts[f], 0)
