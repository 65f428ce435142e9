"""Adam of a feature's row on the CPU, compiled; rows of W_dec go back to length 1.

**Dormant rows.** After DORMANT steps without firing a row is left alone. Its gradient is 0, so
dense Adam would only decay its moments, which is made up for at once (m β₁^k, v β₂^k) when it fires
again, and would move it by less than float32 can show: a single gradient leaves m̂/√v̂ ≤
(1 − β₁)/√(1 − β₂) = 3.2, a steady one 1; the ratio falls by β₁/√β₂ = 0.9005 a step, so all movement
after 200 steps is below lr · 3.2 · 0.9005^200 / (1 − 0.9005) = 3e-8 lr, that is 3e-11 at an lr of
1e-3, where half a float32 step of an entry of 1/16 is 4e-9.
"""

import numpy as np

from sparse_coding.sae.engines.cpu_blas import F0, F1, dot, kernel, scale_, split_
from sparse_coding.sae.spec import BETAS, DORMANT, PLACE

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
def adam_without_gradient_(p, m, v, numbers):
    """The same where the gradient is 0."""
    rate, root, eps = numbers[RATE], numbers[ROOT], numbers[EPS]
    for j in range(p.shape[0]):
        m[j] *= np.float32(BETA1)
        v[j] *= np.float32(BETA2)
        p[j] -= rate * m[j] / (np.sqrt(v[j]) * root + eps)


@kernel
def rest(sae, f, numbers):
    """A feature without a gradient: its moments still carry it on, until it is dormant."""
    sae.idle[f] += 1
    if sae.idle[f] > DORMANT:
        return
    s = slice(f, f + 1)
    adam_without_gradient_(sae.b_enc[s], sae.b_enc_m[s], sae.b_enc_v[s], numbers)
    if sae.threshold.shape[0]:
        adam_without_gradient_(sae.threshold[s], sae.threshold_m[s], sae.threshold_v[s], numbers)
        sae.threshold[f] = F0 if sae.threshold[f] < F0 else sae.threshold[f]
    adam_without_gradient_(sae.W_enc[f], sae.W_enc_m[f], sae.W_enc_v[f], numbers)
    if not sae.frozen:
        adam_without_gradient_(sae.W_dec[f], sae.W_dec_m[f], sae.W_dec_v[f], numbers)
        if numbers[UNIT]:
            scale_(sae.W_dec[f], F1 / np.sqrt(dot(sae.W_dec[f], sae.W_dec[f])))
    split_(sae.W_enc[f], sae.W_enc_parts[f], 0)  # while it is in the cache


@kernel
def catch_up(sae, f):
    """Decays the moments of a feature for the steps that it was left alone."""
    missed = sae.idle[f] - DORMANT
    if missed > 0:
        m, v = np.float32(BETA1**missed), np.float32(BETA2**missed)
        sae.b_enc_m[f] *= m
        sae.b_enc_v[f] *= v
        if sae.threshold.shape[0]:
            sae.threshold_m[f] *= m
            sae.threshold_v[f] *= v
        scale_(sae.W_enc_m[f], m)
        scale_(sae.W_enc_v[f], v)
        scale_(sae.W_dec_m[f], m)
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
