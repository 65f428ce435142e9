"""A tiny random-weight language model on disk with its tokenizer, and text for it.

`tiny_target` opens them as run.py does: model, site, corpus, training and held-out rows.
"""

import math
import random
from collections import Counter
from pathlib import Path

import torch
from builders.models import byte_level_bpe, hooked, random_model, save_tokenizer, write_parquet
from builders.scripts import ROOT

from sparse_coding.config import fingerprint
from sparse_coding.lm.activations.chunks import Chunks
from sparse_coding.lm.activations.harvest import Harvester
from sparse_coding.lm.activations.places import Place
from sparse_coding.lm.evaluation import HeldOut
from sparse_coding.lm.recipe import LanguageRecipe, Optimisation
from sparse_coding.lm.target import ModelChoice, Target, TextChoice, open_target
from sparse_coding.sae.saved import SparseAutoencoder

CPU = torch.device("cpu")
VOCAB, CONTEXT = 300, 16
SEPARATOR = 0  # <|endoftext|>, the only special token
KINDS = ("gpt2", "gpt_neox", "llama")
DISK = Place("disk", max_disk_gb=1.0)
WORDS = ["the", "cat", "and", "hat", "on", "mat", "def", "f(x):", "return", "x", "\n", "", "", "",
         "#", "in", "a", "tree", "0x1f", "3.14", "naïve"]  # fmt: skip


def write_model(folder: Path, kind: str = "gpt2", *, seed: int = 0) -> str:
    """A folder of save_pretrained with 3 layers of width 16 (MLP 40), and a byte-level BPE."""
    bpe = byte_level_bpe(special=["<|endoftext|>"])
    random_model(kind, seed=seed, vocab_size=VOCAB).save_pretrained(folder)
    return save_tokenizer(folder, bpe)


def texts(n: int, seed: int = 0) -> list[str]:
    """Documents of 3 to 40 words, no two alike."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for i in range(n)]


def tiny_target(
    root: Path,
    *,
    kind: str = "gpt2",
    layer: int = 1,
    site: str = "mlp_act",
    n_documents: int = 300,
    **changes: object,
) -> Target:
    """What open_target gives for write_model and texts below root, made once.

    changes: of ModelChoice and TextChoice
    """
    if not (root / kind).exists():
        write_model(root / kind, kind)
    if not (parquet := root / f"{n_documents}.parquet").exists():
        write_parquet(parquet, texts(n_documents))
    model = dict(model=str(root / kind), model_revision="", tokenizer="auto", layer=layer,
                 site=site, dtype="auto", store_dtype="float16", target_site="")  # fmt: skip
    text = dict(dataset=str(parquet), dataset_revision="", text_column="text",
                context_length=CONTEXT, packing="packed", held_out=0.2,
                max_text_tokens=10**6)  # fmt: skip
    model |= {k: v for k, v in changes.items() if k in model}
    text |= {k: v for k, v in changes.items() if k in text}
    assert changes.keys() <= model.keys() | text.keys()
    folder = root / fingerprint(model | text)
    return open_target(ModelChoice(**model), TextChoice(**text), str(folder), device=CPU)


def demo_target(root: Path, **changes: object) -> Target:
    """The small real model in assets/ on the source text of this package: layer 1, mlp_act."""
    if not (parquet := root / "source.parquet").exists():
        sources = sorted((ROOT / "sparse_coding").rglob("*.py"))
        write_parquet(parquet, [path.read_text() or path.name for path in sources])
    options = dict(model="demo", dataset=str(parquet), context_length=128) | changes
    return tiny_target(root, **options)


def harvester_of(target: Target, **changes: object) -> Harvester:
    """Of all that the text has; changes: of Harvester."""
    dtype = getattr(torch, target.model.store_dtype)
    options = dict(store_dtype=dtype, lm_batch_size=8, n_tokens=10**9) | changes
    return Harvester(target.lm, target.site, target.train, **options)


def all_rows(chunks: Chunks) -> torch.Tensor:
    """Rows of all chunks, one after another."""
    return torch.cat([chunks.load(k) for k in range(len(chunks.rows))])


def bits(rows: torch.Tensor) -> Counter:
    """The rows as a multiset."""
    return Counter(row.tobytes() for row in rows.contiguous().view(torch.int16).numpy())


def held_out_of(target: Target, **changes: object) -> HeldOut:
    """All held-out text; changes: of HeldOut."""
    options = dict(n_tokens=10**9, lm_batch_size=8) | changes
    return HeldOut(target.lm, target.site, target.held_out, **options)


def recipe_of(target: Target, *, n_eval_tokens: int = 1000, **changes: object) -> LanguageRecipe:
    """Four chunks mixed at a time; changes: of Optimisation."""
    options = dict(n_tokens=6400, batch_size=64, lr=3e-3, l1_normalisation="sum", warmup=0.1,
                   l1_warmup=0.2, decay=0.3, shuffle_gb=0.0005,
                   max_norm_multiple=10.0) | changes  # fmt: skip
    optimisation = Optimisation(**options)
    harvester = harvester_of(target, n_tokens=optimisation.n_tokens)
    held_out = held_out_of(target, n_tokens=n_eval_tokens)
    return LanguageRecipe(harvester, held_out, optimisation, target.provenance)


def massive_(target: Target, *, factor: float = 300.0, token: int = 21) -> Target:
    """The target with massive activations in the residual stream of its GPT-2: wherever this token
    is, of which there are few."""
    with torch.no_grad():
        target.lm.model.transformer.wte.weight[token] *= factor
    return target


def metrics_by_hand(
    held_out: HeldOut,
    kind: str,
    sae: SparseAutoencoder,
    mean: torch.Tensor,
    *,
    max_norm: float = math.inf,
) -> dict:
    """All that evaluate gives, from one batch with all rows, losses in float64."""
    lm, site = held_out.lm, held_out.site
    ids = torch.from_numpy(held_out.text.rows(0, held_out.n_rows))
    keep = ids != SEPARATOR
    keep[:, 0] = False
    keep &= hooked(lm.model, kind, site.layer, site.name, ids)[0].norm(dim=2) <= max_norm

    def loss(new) -> float:
        def in_place(x: torch.Tensor) -> torch.Tensor:
            return torch.where(keep[:, :, None], new(x), x)

        _, logits = hooked(lm.model, kind, site.layer, site.name, ids, new=in_place)
        log_p = torch.log_softmax(logits.double(), dim=2)
        return -log_p[:, :-1].gather(2, ids[:, 1:, None]).mean().item()

    def codes_of(x: torch.Tensor) -> torch.Tensor:
        return torch.clamp((x - sae.b_dec) @ sae.W_enc + sae.b_enc, min=0)

    x = hooked(lm.model, kind, site.layer, site.name, ids)[0][keep]
    codes = codes_of(x)
    error = (x - codes @ sae.W_dec - sae.b_dec).double()
    clean, zero = loss(lambda x: x), loss(torch.zeros_like)
    spliced = loss(lambda x: codes_of(x) @ sae.W_dec + sae.b_dec)
    return {
        "fvu": (error**2).sum().item() / ((x - x.mean(dim=0)).double() ** 2).sum().item(),
        "l0": (codes > 0).sum(dim=1).double().mean().item(),
        "mse": (error**2).mean().item(),
        "dead_fraction": (codes == 0).all(dim=0).double().mean().item(),
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": loss(lambda x: mean.expand_as(x)),
        "ce_recovered": (zero - spliced) / (zero - clean) if zero > clean else math.nan,
        "density": (codes > 0).double().mean(dim=0),
    }


def codes_of(
    held_out: HeldOut, sae: SparseAutoencoder, *, max_norm: float = math.inf
) -> tuple[torch.Tensor, ...]:
    """(ids, keep, codes) of all rows."""
    parts = [(ids, keep, codes) for ids, keep, (codes,) in held_out.codes([sae], max_norm=max_norm)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))
