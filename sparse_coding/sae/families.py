"""The families of sparse autoencoders, as combinations of few choices: compare with the papers.

Engines know the choices, not the names: a new combination is a line of FAMILIES and a test. What
the choices mean in formulas is in stack.py. Rows of W_dec have length 1 in every family, unless a
SAESpec leaves them free; x is scaled to a mean square norm of 1 where a constant below names a
value of an activation or code.
"""

from dataclasses import dataclass, replace
from typing import Literal

Kind = tuple[str, int]  # name of a family, n_dict: on what an autoencoder's memory depends
Arch = Literal[
    "relu", "p_anneal", "topk", "batchtopk", "jumprelu", "jumprelu_tanh", "matryoshka",
    "matryoshka_refined",
]  # fmt: skip
Rows = Literal["unit", "free", "raw"]  # of W_dec: of length 1, or of any, see stack.py
Selection = Literal["relu", "jump", "topk", "batchtopk"]
Penalty = Literal["none", "l1", "lp", "l0_step", "l0_tanh"]


@dataclass(frozen=True)
class Family:
    """One kind of autoencoder.

    selection: which positive pre-activations become codes: all (relu), those above the threshold
        of their feature (jump), the k largest of a sample (topk), the k · batch largest of a batch
        (batchtopk)
    penalty: what the loss adds: a weight times the mean over samples of Σ codes (l1), Σ codes^p
        with a p that falls (lp), the number of codes (l0_step) or Σ tanh(slope · code) (l0_tanh)
    nested: the loss sums the errors of x_hat from the first features alone, for several prefixes
    aux: features that have not fired for long learn to reconstruct what x_hat leaves over
    through_input: the straight-through gradient of thresholds goes to pre-activations as well
    refined: codes are chosen twice, the second time with what the encoder finds in what the first
        ones leave over; and prefixes are cut along how often features fire, each trains its own
        band alone, samples of large errors count more, and k falls
    frozen: rows of W_dec stay the random ones that they start as; a baseline
    lr: what of the learning rate that suits relu suits this family; measured, LOG.md
    """

    selection: Selection
    penalty: Penalty = "none"
    nested: bool = False
    aux: bool = False
    through_input: bool = False
    refined: bool = False
    frozen: bool = False
    lr: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for what has no gradients in stack.py."""
        if self.refined and (self.penalty != "none" or not self.has_k):
            raise ValueError("refined codes are those of a k, without a penalty")

    @property
    def has_k(self) -> bool:
        """Whether sparsity is a k; else the weight of a penalty decides on it."""
        return self.selection in ("topk", "batchtopk")

    @property
    def in_units(self) -> bool:
        """Whether constants below are activations or codes, and meant for x of a mean square norm
        of 1; other families are the same at any scale of x, but for the pace of their biases."""
        return self.selection == "jump" or self.penalty == "lp"

    def bandwidth(self, width: int) -> float:
        """Width of the threshold's window, for activations of this width."""
        return TANH_BANDWIDTH / width**0.5 if self.penalty == "l0_tanh" else BANDWIDTH

    def first_weight(self, width: int) -> float | None:
        """Where a controller of the penalty's weight starts: what makes a code of the threshold's
        start as dear as the error that it saves. None: the weight is given."""
        of_number = self.penalty in ("l0_step", "l0_tanh")
        return THRESHOLD**2 / width if of_number else None

    @property
    def saved_as(self) -> str:
        """The architecture as SAELens names it: what is chosen by batch gets a threshold."""
        return {"relu": "standard", "topk": "topk"}.get(self.selection, "jumprelu")


FAMILIES: dict[str, Family] = {
    # Sharkey, Braun, Millidge 2022; unit rows: Bricken et al. 2023, Towards Monosemanticity
    "relu": Family("relu", "l1"),
    # Karvonen et al. 2024, https://arxiv.org/abs/2408.00113
    "p_anneal": Family("relu", "lp", lr=2),
    # Gao et al. 2024, https://arxiv.org/abs/2406.04093
    "topk": Family("topk", aux=True, lr=2),
    # Bussmann, Leask, Nanda 2024, https://arxiv.org/abs/2412.06410
    "batchtopk": Family("batchtopk", aux=True, lr=2),
    # Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435; here l0 is sought by the weight
    "jumprelu": Family("jump", "l0_step", lr=2),
    # Anthropic, January 2025, https://transformer-circuits.pub/2025/january-update
    "jumprelu_tanh": Family("jump", "l0_tanh", through_input=True, lr=2),
    # Bussmann et al. 2025, https://arxiv.org/abs/2503.17547
    "matryoshka": Family("batchtopk", nested=True, aux=True, lr=2),
    # Chanin 2026, https://github.com/chanind/claude-auto-research-synthsaebench, commit 183b197
    "matryoshka_refined": Family("batchtopk", nested=True, aux=True, refined=True, lr=4),
}
TRAINED = tuple(FAMILIES)
FROZEN = "_frozen"  # what the names of the baselines end with
# Korznikov et al. 2026, https://arxiv.org/abs/2602.14111
FAMILIES |= {f"{name}{FROZEN}": replace(FAMILIES[name], frozen=True) for name in TRAINED}
# of n_dict; the last is the whole. SynthSAEBench's 128, 512, 2048 of 4096 (arXiv 2602.14687)
PREFIXES = (1 / 32, 1 / 8, 1 / 2, 1.0)
MOST_PREFIXES = 8  # for which memory is planned
# Added to codes under the power p, whose slope at 0 is infinite; ours. With 1e-3 the slopes of the
# smallest codes are so steep that rounding decides what a run of 200 steps gives (LOG.md)
LP_EPS = 1e-2
# Of the threshold's straight-through gradient: width of the window around it in which a
# pre-activation tells how l0 and error change with it; and the threshold at the start. Both ours:
# Rajamanoharan et al. have 0.001, whose window is hit too rarely in short runs (LOG.md)
BANDWIDTH = 0.03
THRESHOLD = 0.03
# Anthropic's window, over √width, and slope of tanh, times √width: for x of a mean square norm of
# its width
TANH_BANDWIDTH, SLOPE = 2.0, 4.0
AUX = 1 / 32  # weight of the auxiliary error; Gao et al.
# Of refined families, as in their source
REFINEMENT = 0.3  # of what the encoder finds in what is left over, added to pre-activations
TILT = 0.002  # samples weigh as softmax(TILT · error / mean error)
RATE_EMA = 0.01  # weight of a batch in the running mean of how often features fire
K_START = 2.4  # times k, from which k falls linearly, in the source until the end; here it ends
K_FALL = 0.9  # at this share of the steps, so that thresholds, running means, are those of k
EMA = 0.01  # weight of a step in the mean of the smallest code chosen; as in SAELens


def bands(n_dict: int, prefixes: tuple[float, ...] = (1.0,)) -> list[tuple[int, int]]:
    """(first, end) of the features that each prefix adds to the one before; none is empty.

    prefixes: shares of n_dict, ascending to 1
    """
    ends = sorted({round(share * n_dict) for share in prefixes} - {0})
    return list(zip([0, *ends], ends, strict=False))
