"""How good autoencoders are on a language model, on held-out text.

The only place where these numbers are computed: for results.csv and for run.py --evaluate alike.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sparse_coding.config import passing_bar
from sparse_coding.lm.activations.chunks import PerSite, is_kept
from sparse_coding.lm.model import LanguageModel, Site, activations, logits, next_token_loss
from sparse_coding.lm.packing import Packed
from sparse_coding.sae.saved import SparseAutoencoder
from sparse_coding.sweep.metrics import ReconstructionSums, full_float32, reconstructed


@dataclass(frozen=True)
class HeldOut:
    """Text that no autoencoder was trained on, and the model that reads it.

    n_tokens: of it are used, rounded up to whole rows of text
    lm_batch_size: rows of text per forward pass
    """

    lm: LanguageModel
    site: Site
    text: Packed
    n_tokens: int
    lm_batch_size: int

    @property
    def n_rows(self) -> int:
        """Rows of text used."""
        return min(self.text.n_rows, -(-self.n_tokens // self.text.context_length))

    @property
    def n_read(self) -> int:
        """Tokens of these rows: those asked for, rounded up to rows, or all that there are."""
        return self.n_rows * self.text.context_length

    def shortage(self) -> str:
        """A line if the text is smaller than asked, else ""."""
        line = f"{self.n_tokens:,} held-out tokens requested, {self.n_read:,} available\n"
        return line * (self.n_read < self.n_tokens)

    def batches(self, purpose: str = "evaluation") -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, keep), each (rows, context_length); keep: tokens that autoencoders are for.

        purpose: for the bar that tells how long it will take
        """
        batches = self.text.batches(0, self.n_rows, size=self.lm_batch_size)
        n_batches = -(-self.n_rows // self.lm_batch_size)
        for ids_and_keep in passing_bar(batches, desc=purpose, total=n_batches, unit="batch"):
            yield tuple(torch.from_numpy(array).to(self.lm.device) for array in ids_and_keep)

    @property
    def n_kept(self) -> int:
        """Tokens that autoencoders are for."""
        return int(self.text.keep(0, self.n_rows).sum())

    def activations(self, size: int, *, max_norm: PerSite = math.inf) -> Iterator[Tensor]:
        """x of the kept tokens in float32, (size, stored width) at a time, fewer at the end.

        max_norm: tokens whose activations are beyond it are dropped, too
        """
        waiting = torch.empty(0, self.site.stored_width, device=self.lm.device)
        for ids, keep in self.batches():
            x = activations(self.lm, self.site, ids).float()
            waiting = torch.cat([waiting, x[keep & is_kept(x, max_norm)]])
            *whole, waiting = waiting.split(size)
            yield from whole
        yield waiting

    def codes(
        self, saes: list[SparseAutoencoder], *, max_norm: PerSite = math.inf
    ) -> Iterator[tuple[Tensor, Tensor, Iterator[Tensor]]]:
        """(ids, keep, codes (rows, context_length, n_dict) of one autoencoder after another), the
        codes of dropped tokens being 0.

        Args:
            saes: on the model's device, in float32
            max_norm: tokens whose activations are beyond it are dropped, too
        """
        for ids, keep in self.batches("features"):
            x = activations(self.lm, self.site, ids).float()
            keep, x = keep & is_kept(x, max_norm), x[..., : self.site.width]
            yield ids, keep, (sae.encode(x) * keep.unsqueeze(2) for sae in saes)


@dataclass(frozen=True)
class Evaluation:
    """values: columns of results.csv; density: (n_dict,) share of tokens a feature is active on;
    n_left_out: tokens beyond max_norm."""

    values: dict[str, float]
    density: Tensor
    n_left_out: int


@full_float32()
@torch.no_grad()
def evaluate(
    held_out: HeldOut, saes: list[SparseAutoencoder], *, mean: Tensor, max_norm: PerSite = math.inf
) -> list[Evaluation]:
    """Each autoencoder on the same held-out tokens.

    fvu, l0, mse, dead_fraction: over the kept tokens (not the first of a row, not special ones, not
    those whose activations are beyond max_norm).
    ce_*: cross-entropy in nats of the next token, over all predictions of the rows, with the
    activations of the kept tokens unchanged (clean), replaced by x_hat (spliced), by zeros (zero),
    by their mean over a sample of the training text (mean).
    ce_recovered = (ce_zero − ce_spliced) / (ce_zero − ce_clean), hence with zero ablation.
    Of transcoders: fvu, mse and ce_* at the site's target, where x_hat of x takes the place of y.

    Args:
        saes: on the model's device, float32, raw activations in and out
        mean: (width,) of the training text's activations there, see activations.statistics
        max_norm: see activations.Statistics
    """
    site, device = held_out.site, held_out.lm.device
    sums = [ReconstructionSums(1, sae.n_dict, site.width, device) for sae in saes]
    by_saes = [partial(reconstructed, s, sums=total) for s, total in zip(saes, sums, strict=True)]
    substitutes = [lambda x, y: torch.zeros_like(y), lambda x, y: mean.to(y).expand_as(y), *by_saes]
    ce = torch.zeros(1 + len(substitutes), dtype=torch.float64, device=device)
    for ids, keep in held_out.batches():
        ce += _summed_losses(held_out, ids, keep, substitutes, max_norm=max_norm)
    n_predictions = held_out.n_rows * (held_out.text.context_length - 1)
    clean, zero, by_mean, *spliced = (ce / n_predictions).tolist()
    return [
        Evaluation(
            _values(total, clean=clean, spliced=ce_spliced, zero=zero, by_mean=by_mean),
            total.density()[0].float().cpu(),
            held_out.n_kept - total.n_samples,
        )
        for total, ce_spliced in zip(sums, spliced, strict=True)
    ]


def _summed_losses(
    held_out: HeldOut,
    ids: Tensor,
    keep: Tensor,
    substitutes: list[Callable[[Tensor, Tensor], Tensor]],
    *,
    max_norm: PerSite,
) -> Tensor:
    """Next-token losses of these rows, summed: of the model itself, then with each substitute."""
    lm, site, found = held_out.lm, held_out.site, []
    output = site.target or site
    with computed_once(lm, output):
        x = activations(lm, replace(site, target=None), ids) if site.target else None
        of_kept = partial(_replaced, x=x, keep=keep, max_norm=max_norm)
        for change in (None, *(partial(of_kept, new=new) for new in substitutes)):
            spliced = logits(lm, ids, site=output, replace=change)
            found.append(next_token_loss(spliced, ids).double().sum())
    return torch.stack(found)


@contextlib.contextmanager
def computed_once(lm: LanguageModel, site: Site) -> Iterator[None]:
    """Inside, for passes over the same ids: the layers up to the site are computed by the first
    forward pass alone, which the later ones go on from."""
    n_same = site.layer + (site.name == "resid_post")
    same, found = lm.layers[:n_same], []

    def keep(_: nn.Module, args: tuple, out: object) -> None:
        if not found:
            found.append(out)
            for layer in same:  # whatever it is given, the next one gets what the last one gave
                layer.forward = lambda *_, **__: found[0]

    # before hooks that replace a layer's output: what is kept is not replaced
    handles = [layer.register_forward_hook(keep) for layer in same[-1:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in same if found else ():
            del layer.forward


def _replaced(
    y: Tensor,
    *,
    x: Tensor | None,
    keep: Tensor,
    new: Callable[[Tensor, Tensor], Tensor],
    max_norm: PerSite,
) -> Tensor:
    """y (rows, context_length, width) with new(x, y) of the kept tokens, each (n, width), in their
    place. x: None: y itself, else as it was before in the same pass."""
    rows, x = (y, y) if x is None else (torch.cat([x, y], dim=-1), x)
    result, keep = y.clone(), keep & is_kept(rows, max_norm)
    result[keep] = new(x[keep].float(), y[keep].float()).to(y.dtype)
    return result


def _values(
    total: ReconstructionSums, *, clean: float, spliced: float, zero: float, by_mean: float
) -> dict[str, float]:
    sums = {name: value.item() for name, value in total.result().items()}
    gap = zero - clean
    return {
        **{name: sums[name] for name in ("fvu", "l0", "mse")},
        "dead_fraction": sums["n_dead"] / total.n_fired.shape[1],
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": by_mean,
        # no meaning where the ablation costs nothing
        "ce_recovered": (zero - spliced) / gap if gap > 0 else float("nan"),
    }
