"""Cells of a sweep on a language model as training needs them: grid, data, starts, metrics."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import named_seed, require, require_flag
from sparse_coding.files import read_record, read_tensors, write_tensors
from sparse_coding.lm.activations.chunks import (
    Chunks,
    Statistics,
    in_words,
    scaled,
    statistics,
)
from sparse_coding.lm.activations.harvest import Harvester
from sparse_coding.lm.activations.passes import evaluation_rows, harvest_rows
from sparse_coding.lm.activations.places import Place, device_with_room, in_memory, on_disk
from sparse_coding.lm.activations.store import differences
from sparse_coding.lm.evaluation import HeldOut, evaluate
from sparse_coding.lm.reader import Reader, require_a_batch
from sparse_coding.lm.target import Target
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.families import FAMILIES, PREFIXES, Kind
from sparse_coding.sae.saved import SparseAutoencoder, save_sae, unscaled
from sparse_coding.sae.spec import Schedule, dead_steps
from sparse_coding.sweep.cells import merged_rows, missing_cells, sae_folder
from sparse_coding.sweep.grid import (
    Cell,
    Families,
    asked_and_found,
    check_grid,
    make_grid,
    specs_of,
)
from sparse_coding.sweep.metrics import mmcs_with_larger, n_matched, reconstruction
from sparse_coding.sweep.run_folder import run_folder_bytes
from sparse_coding.sweep.training import Task

COLUMNS = (
    "seed", "arch", "target_l0", "l1_alpha", "expansion_factor", "n_dict", "n_tokens", "fvu", "l0",
    "mse", "fvu_trained", "l0_trained", "dead_fraction", "n_revived", "ce_clean", "ce_spliced",
    "ce_zero", "ce_mean", "ce_recovered", "mmcs_with_larger", "n_matched_larger", "seconds",
)  # fmt: skip
OF_MODEL = ("weight_hash", "tokenizer_fingerprint")  # the same whatever the machine and dtype
SPARSITY = "sparsity.safetensors"  # log10 of the densities; the name and NEVER are SAELens's
NEVER = 1e-10  # added to a density before its logarithm
# Gradients of a mse per dimension, on x of mean square norm 1, shrink about as width^-1.8; at width
# 3 072 they are below Adam's usual eps: fvu .109, not .055 (LOG.md). So eps shrinks with them.
EPS, EPS_WIDTH = 1e-8, 256
MAX_LR = 1.0  # beyond it Adam cannot but diverge
# l1_alpha = 10^(-15/4) gave an l0 of 25 at width 256, on the demo (LOG.md). The mse is a mean over
# the width, so for equal l0 it falls as 1/width. The controller starts there.
L1_EXP, L1_WIDTH = -15, 256
TARGET_L0 = (16, 32, 64)  # if none is given; of relu, if no l1_alpha is either


def asked_l0(
    arch: tuple[str, ...], target_l0: tuple[int, ...], l1_exp_low: int | None
) -> tuple[int, ...]:
    """target_l0; TARGET_L0 where relu is asked for neither an l0 nor l1_alphas. (That was a grid of
    l1_alpha until 2026-11-29: by this constant runs of then are told from those of now.)"""
    nothing = "relu" in arch and l1_exp_low is None
    return target_l0 or TARGET_L0 * nothing


@dataclass(frozen=True)
class Grid:
    """Which autoencoders are trained; the fields are flags of run.py, high ends exclusive.

    families: what is asked of which family
    l1_exp_low, l1_exp_high: of relu, where no l0 is asked; both None: it is asked for TARGET_L0
    """

    families: Families
    l1_exp_low: int | None
    l1_exp_high: int | None
    expansion_exp_low: int
    expansion_exp_high: int
    seed: int
    n_seeds: int

    def __post_init__(self) -> None:
        """Raises UserError for a flag out of its range."""
        given = self.l1_exp_low is not None
        both = given == (self.l1_exp_high is not None)
        require_flag(self, "l1_exp_low", both, "given together with --l1-exp-high")
        check_grid(self if given else replace(self, l1_exp_low=0, l1_exp_high=1), "expansion_exp")

    def cells(self, width: int) -> list[Cell]:
        """All cells of the run, on activations of this width."""
        middle = L1_EXP + round(4 * math.log10(L1_WIDTH / width))
        low, high, families = self.l1_exp_low, self.l1_exp_high, self.families
        l0 = asked_l0(families.arch, families.target_l0, low)
        if low is None:
            low, high = middle, middle + 1
        of_size = make_grid(
            width,
            seeds=range(self.seed, self.seed + self.n_seeds),
            l1_exps=range(low, high),
            size_exps=range(self.expansion_exp_low, self.expansion_exp_high),
        )
        return replace(families, target_l0=l0).cells(of_size, start=middle, default_l0=TARGET_L0)


@dataclass(frozen=True)
class Optimisation:
    """How every cell is trained; the names are those of run.py's flags, which give the reasons.

    l1_normalisation: sum, or per_feature, which divides l1_alpha by n_dict
    warmup, l1_warmup, decay: shares of the steps
    shuffle_gb: of activations, that are mixed at a time
    max_norm_multiple: of the median norm; 0: no limit
    prefixes: of nested families, see SAESpec
    skip: of transcoders, see transcoding.py
    """

    n_tokens: int
    batch_size: int
    lr: float
    l1_normalisation: str
    warmup: float
    l1_warmup: float
    decay: float
    shuffle_gb: float
    max_norm_multiple: float
    prefixes: tuple[float, ...] = PREFIXES
    skip: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range."""
        require_flag(self, "batch_size", self.batch_size >= 1, "at least 1")
        rule = f"at least --batch-size {self.batch_size}"
        require_flag(self, "n_tokens", self.n_tokens >= self.batch_size, rule)
        require_flag(self, "lr", 0 < self.lr <= MAX_LR, f"above 0 and at most {MAX_LR:g}")
        for name in ("warmup", "l1_warmup", "decay"):
            require_flag(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        require_flag(self, "shuffle_gb", 0 < self.shuffle_gb < math.inf, "above 0 and finite")
        in_range = self.max_norm_multiple == 0 or 1 <= self.max_norm_multiple < math.inf
        require_flag(self, "max_norm_multiple", in_range, "0, for no limit, or at least 1")

    @property
    def n_steps(self) -> int:
        """Whole batches in n_tokens."""
        return self.n_tokens // self.batch_size

    def buffer_rows(self, width: int) -> int:
        """Activations of this width, two bytes a number, that are mixed at a time."""
        return int(self.shuffle_gb * 1e9 / (2 * width))

    def schedule(self, width: int) -> Schedule:
        """Shares of the steps as steps, and Adam's eps for activations of this width."""
        n = self.n_steps
        decay_start = n - round(self.decay * n) if self.decay else None
        l1_warmup = round(self.l1_warmup * n)
        return Schedule(
            n,
            round(self.warmup * n),
            l1_warmup,
            decay_start,
            eps=EPS * min(1, EPS_WIDTH / width) ** 2,
            anneal=range(l1_warmup, n if decay_start is None else decay_start),
            dead_steps=dead_steps(n),
        )


@dataclass(frozen=True)
class Reading:
    """How the model reads its texts; the fields are flags of run.py.

    lm_batch_size: rows of text per forward pass; 0: as suits the device, see passes.py
    """

    lm_batch_size: int
    n_eval_tokens: int
    store_dtype: str

    def __post_init__(self) -> None:
        """Raises UserError for a flag out of its range."""
        rule = "at least 1, or 0 for as many as suit the device"
        require_flag(self, "lm_batch_size", self.lm_batch_size >= 0, rule)
        require_flag(self, "n_eval_tokens", self.n_eval_tokens >= 1, "at least 1")


@dataclass(frozen=True)
class LanguageRecipe:
    """How cells are trained on activations of a language model (a training.Recipe).

    chunks: the training text's activations
    metadata: where they come from, for the saved autoencoders

    Raises:
        UserError: there are fewer activations than a batch has.
    """

    chunks: Chunks
    held_out: HeldOut
    optimisation: Optimisation
    metadata: dict
    headline = ("train/fvu", min)

    def __post_init__(self) -> None:
        require_a_batch(self.chunks, self.optimisation.batch_size)

    @property
    def device(self) -> torch.device:
        """The language model's."""
        return self.held_out.lm.device

    @property
    def n_steps(self) -> int:
        """Of every cell."""
        return self.optimisation.n_steps

    @property
    def width(self) -> int:
        """Of the activations."""
        return self.held_out.site.width

    @property
    def transcodes(self) -> bool:
        """Whether activations of the site's target are predicted."""
        return self.held_out.site.target is not None

    @property
    def buffer_rows(self) -> int:
        """Rows of the chunks that are mixed at a time."""
        return self.optimisation.buffer_rows(self.held_out.site.stored_width)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the training text's activations."""
        multiple = self.optimisation.max_norm_multiple
        n_sites = 1 + self.transcodes
        return statistics(self.chunks, max_norm_multiple=multiple, n_sites=n_sites)

    def left_out(self) -> str:
        """How many rows are beyond max_norm, in words."""
        known = self.statistics
        return (
            f"left out: {known.n_left_out:,} of the first {known.n_rows:,} activations, of norms "
            f"above {in_words(known.limits)}, {self.optimisation.max_norm_multiple:g} x the median "
            "(--max-norm-multiple)"
        )

    def memory(self, kinds: list[Kind]) -> int:
        """Of the ensemble, two buffers of rows, and codes of all of them at evaluation."""
        o, n_dicts = self.optimisation, [n for _, n in kinds]
        row_bytes = 2 * self.held_out.site.stored_width
        rows = 2 * row_bytes * min(self.buffer_rows, sum(self.chunks.rows))
        tokens = self.held_out.lm_batch_size * self.held_out.text.context_length
        one_evaluated = 4 * tokens * (4 * max(n_dicts) + 2 * self.held_out.lm.vocab_size)
        saved = sum(8 * n * self.width for n in n_dicts)
        ensemble = ensemble_bytes(
            kinds, self.width, o.batch_size, self.device, transcodes=self.transcodes
        )
        return ensemble + rows + one_evaluated + saved

    def prepare(self, group: list[Cell]) -> Task:
        """Autoencoders of cells of one seed, the batches they train on and their evaluation."""
        o, seed, known = self.optimisation, group[0].seed, self.statistics
        reader = Reader(
            self.chunks,
            batch_size=o.batch_size,
            n_steps=o.n_steps,
            scale=known.scales,
            seed=named_seed(seed, "batches"),
            device=self.device,
            buffer_rows=self.buffer_rows,
            max_norm=known.limits,
        )
        specs = specs_of(group, o.l1_normalisation, tied=True, prefixes=o.prefixes)
        ensemble = Ensemble(
            [replace(spec, transcodes=self.transcodes, skip=o.skip) for spec in specs],
            self.width,
            lr=o.lr,
            device=self.device,
            b_dec=known.output.mean * known.output.scale,
            project=True,
            schedule=o.schedule(self.width),
        )

        def measure(x: Tensor) -> dict[str, list[float]]:
            on_batch = reconstruction(ensemble, [x])
            return {f"train/{name}": on_batch[name] for name in ("mse", "fvu", "l0")}

        def finish() -> list[tuple[dict, dict[str, Tensor]]]:
            reader.close()  # its thread may be using the language model, too
            return self._evaluated(ensemble, group)

        return Task(ensemble, reader.batch, measure, finish, close=reader.close)

    def _evaluated(
        self, ensemble: Ensemble, group: list[Cell]
    ) -> list[tuple[dict, dict[str, Tensor]]]:
        """Rows and autoencoders for raw activations, with their feature densities."""
        known = self.statistics
        scales = known.scale, known.target.scale if known.target else None
        raw = [unscaled(ensemble.dictionary(i), *scales) for i in range(len(group))]
        more = dict(metadata={}, transcodes=self.transcodes)
        saes = [
            SparseAutoencoder(**tensors, **more, top_k=cell.top_k).to(self.device)
            for tensors, cell in zip(raw, group, strict=True)
        ]
        evaluations = evaluate(self.held_out, saes, mean=known.output.mean, max_norm=known.limits)
        as_trained = self._as_trained(ensemble, group)
        results = []
        for i, (cell, evaluation) in enumerate(zip(group, evaluations, strict=True)):
            known = {
                **asked_and_found(cell, ensemble, i, self.optimisation.l1_normalisation),
                "expansion_factor": cell.size_ratio,
                "n_tokens": self.n_steps * self.optimisation.batch_size,
                **{name: values[i] for name, values in as_trained.items()},
            }
            row = {column: (known | evaluation.values).get(column) for column in COLUMNS}
            more = {
                "density": evaluation.density,
                "n_left_out": torch.tensor(evaluation.n_left_out),
            }
            results.append((row, raw[i] | more))
        return results

    def _as_trained(self, ensemble: Ensemble, group: list[Cell]) -> dict[str, list[float | None]]:
        """fvu_trained and l0_trained of each cell whose codes are chosen by batch in training, by a
        threshold when it is saved: on the held-out tokens, in batches as in training."""
        by_batch = [FAMILIES[cell.arch].selection == "batchtopk" for cell in group]
        if not any(by_batch):
            return {}
        known, size = self.statistics, self.optimisation.batch_size
        xs = self.held_out.activations(size, max_norm=known.limits)
        found = reconstruction(ensemble, (scaled(x, known.scales) for x in xs))
        found = {f"{name}_trained": found[name] for name in ("fvu", "l0")}
        return {
            name: [value if by else None for value, by in zip(values, by_batch, strict=True)]
            for name, values in found.items()
        }

    def save(self, folder: Path, cell: Cell, tensors: dict[str, Tensor], row: dict) -> None:
        """A SAELens-6 folder; log10 densities as in SAELens's sparsity.safetensors."""
        sae = dict(tensors)
        sparsity = torch.log10(sae.pop("density") + NEVER)
        path = sae_folder(folder, cell)
        write_tensors(path / SPARSITY, {"sparsity": sparsity})
        of = self.statistics
        known = {
            "max_norm_multiple": self.optimisation.max_norm_multiple,
            "max_norm": of.max_norm if of.max_norm < math.inf else None,
            "n_left_out": of.n_left_out,
            "n_left_out_of": of.n_rows,
            "n_eval_left_out": sae.pop("n_left_out").item(),
            "n_eval_tokens": self.held_out.n_read,
            "n_tokens": self.optimisation.n_tokens,
            "l1_alpha": row["l1_alpha"],
            "seed": cell.seed,
            "arch": cell.arch,
            "target_l0": cell.target_l0 or None,
        }
        if FAMILIES[cell.arch].nested:
            known["prefixes"] = self.optimisation.prefixes
        if of.target:
            known |= {"skip": self.optimisation.skip}
            if known["max_norm"]:
                known |= {"target_max_norm": of.target.max_norm}
        known |= {name: row[name] for name in ("fvu", "l0", "ce_recovered")}
        of = dict(top_k=cell.top_k, transcodes=self.transcodes)
        save_sae(path, sae, metadata=self.metadata | known, **of)

    def merged(self, folder: Path, cells: list[Cell]) -> list[dict]:
        """Rows of results.csv."""
        compare = {"mmcs_with_larger": mmcs_with_larger, "n_matched_larger": n_matched}
        return merged_rows(folder, cells, columns=COLUMNS, compare=compare, device=self.device)


def recipe_on(target: Target, reading: Reading, optimisation: Optimisation) -> LanguageRecipe:
    """How cells are trained on the target's activations, which are computed as they are read."""
    of, length = dict(lm=target.lm, site=target.site), target.train.context_length
    n_rows = reading.lm_batch_size or harvest_rows(target.lm, length)
    harvester = Harvester(
        **of,
        text=target.train,
        store_dtype=getattr(torch, reading.store_dtype),
        lm_batch_size=n_rows,
        n_tokens=optimisation.n_tokens,
    )
    if target.lm.device.type == "cuda":  # a CPU gains nothing by it
        at_once = max(1, n_rows // harvester.texts_per_chunk)
        harvester = replace(harvester, chunks_at_once=at_once)
    held_out = HeldOut(
        **of,
        text=target.held_out,
        n_tokens=reading.n_eval_tokens,
        lm_batch_size=reading.lm_batch_size or evaluation_rows(target.lm, length),
    )
    return LanguageRecipe(harvester, held_out, optimisation, target.provenance)


def require_memory(
    recipe: LanguageRecipe, place: Place, *, folder: Path, cells: list[Cell], fresh: bool
) -> None:
    """Raises UserError if activations are to be kept in memory for cells that the run in `folder`
    lacks, and don't fit."""
    missing = cells if fresh else missing_cells(folder, cells)
    if missing and place.in_memory:
        _device_beside(recipe, missing)


def with_activations(
    recipe: LanguageRecipe, target: Target, place: Place, *, folder: Path, cells: list[Cell]
) -> LanguageRecipe:
    """The recipe on activations in their place, if they fit: harvested if need be, unless the run
    in `folder` has all its cells. On disk they are in the target's folder.

    Raises:
        UserError: the run was begun on other activations; they don't fit into memory; those of
            on_disk.
    """
    missing = missing_cells(folder, cells)
    _require_begun_on(target.metadata, folder, complete=not missing)
    if not missing:
        return recipe
    if place.in_memory:
        chunks = in_memory(recipe.chunks, _device_beside(recipe, missing))
    else:
        chunks = on_disk(
            recipe.chunks,
            target.folder,
            target.metadata,
            max_bytes=place.max_disk_gb * 1e9,
            reserve=run_folder_bytes([cell.n_dict for cell in missing], recipe.width),
        )
    if recipe.device.type == "cuda":
        torch.cuda.empty_cache()  # what forward passes took counts as free again
    recipe = replace(recipe, chunks=chunks)
    if recipe.statistics.n_left_out:
        print(recipe.left_out(), flush=True)
    return recipe


def _device_beside(recipe: LanguageRecipe, cells: list[Cell]) -> torch.device:
    """See device_with_room. A GPU must hold the training of all cells too, since there is the host;
    a CPU that of each."""
    kinds = [cell.kind for cell in cells]
    on_gpu = recipe.device.type == "cuda"
    needs = [recipe.memory(kinds)] if on_gpu else [recipe.memory([kind]) for kind in kinds]
    return device_with_room(recipe.chunks, training=max(needs))


def _require_begun_on(metadata: dict, folder: Path, *, complete: bool) -> None:
    """What no constant shows: weights changed in the hub's cache, text encoded in another way.

    complete: nothing is left to train, so only the model matters: see run_folder.MACHINE
    """
    if not (folder / "config.json").exists():
        return
    begun_on = read_record(folder / "config.json").get("activations", metadata)
    names = OF_MODEL if complete else {**begun_on, **metadata}
    there, here = ({k: known.get(k) for k in names} for known in (begun_on, metadata))
    shown = differences(there, here)
    require(
        not shown,
        f"--output-dir {folder} was begun on other activations ({shown}): choose another one, or "
        "--fresh to start again there",
    )


def feature_density(folder: Path) -> np.ndarray:
    """(n_dict,) share of the held-out tokens on which a feature of the saved autoencoder fires."""
    density = 10 ** read_tensors(folder / SPARSITY)[0]["sparsity"].double().numpy()
    return np.where(density > 2 * NEVER, density, 0)
