"""What a sweep on a language model shows: figures, report, page of features, exports."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparse_coding.config import one_line, require, require_flag
from sparse_coding.figures.frontier import (
    FigureSpec,
    FrontierSpec,
    density_csv,
    draw_density_histograms,
    draw_frontier,
    frontier_csv,
)
from sparse_coding.figures.heatmap import HeatmapSpec
from sparse_coding.figures.report import write_figure, write_figures, write_report
from sparse_coding.files import Damaged, read_record, write_record
from sparse_coding.lm.activations.chunks import in_words
from sparse_coding.lm.evaluation import evaluate
from sparse_coding.lm.features.names import Names, read_names
from sparse_coding.lm.features.run_pages import recovered, rename_features, write_pages
from sparse_coding.lm.hub.folder import CARD, HUB, write_hub_folder
from sparse_coding.lm.hub.push import PushChoice, push
from sparse_coding.lm.recipe import LanguageRecipe, feature_density
from sparse_coding.lm.target import Target
from sparse_coding.sae.exported import EXPORTERS
from sparse_coding.sae.families import FAMILIES
from sparse_coding.sae.saved import SparseAutoencoder, load_sae
from sparse_coding.sweep.cells import sae_folder
from sparse_coding.sweep.grid import L1_TERMS, Cell, asked_of, gap, on_grid

SHOWN = "shown.json"  # the choice behind what the folder shows
TITLE = "{} on a language model"
# what an autoencoder was trained on that its evaluation must share
MUST_MATCH = ("model", "weight_hash", "layer", "site", "target_site", "tokenizer_fingerprint",
              "held_out", "tokens_sha256", "model_dtype")  # fmt: skip


@dataclass(frozen=True)
class ShowChoice:
    """What is shown of a finished sweep: run.py's flags of these names."""

    page_l0: float
    n_page_tokens: int
    pages: str
    names: tuple[str, ...]
    export: str

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range."""
        require_flag(self, "n_page_tokens", self.n_page_tokens >= 1, "at least 1")
        require_flag(self, "page_l0", self.page_l0 > 0, "above 0")


def best_row(rows: list[dict], *, most_l0: float) -> dict:
    """The row of lowest fvu whose l0 is at most this; without one, that of lowest l0."""
    sound = [row for row in rows if math.isfinite(row["fvu"])] or rows
    sparse = [row for row in sound if row["l0"] <= most_l0]
    return min(sparse, key=lambda r: r["fvu"]) if sparse else min(sound, key=lambda r: r["l0"])


def verdict(rows: list[dict], *, most_l0: float) -> str:
    """One paragraph: the best cell, and what ce_recovered is measured against."""
    best = best_row(rows, most_l0=most_l0)
    if not math.isfinite(best["fvu"]):
        return f"All {len(rows)} cells diverged: lower --lr."
    lead = f"Best at l0 <= {most_l0:g}"
    if best["l0"] > most_l0:
        lead = f"No cell has l0 <= {most_l0:g}: ask for less; the sparsest"
    n_diverged = sum(not math.isfinite(row["fvu"]) for row in rows)
    text = f"{n_diverged} cells diverged and are left out of this line. " if n_diverged else ""
    return text + (
        f"{lead}: fvu {best['fvu']:.3f} at l0 {best['l0']:.1f}, ce_recovered "
        f"{recovered(best['ce_recovered'])} ({asked_of(best)}, n_dict {best['n_dict']}, "
        f"{best['dead_fraction']:.1%} dead), on held-out documents. "
        f"Cross-entropy {best['ce_clean']:.3f} nats; ablation by zeros costs "
        f"{best['ce_zero'] - best['ce_clean']:.2f}, by the mean "
        f"{best['ce_mean'] - best['ce_clean']:.2f}, this one "
        f"{best['ce_spliced'] - best['ce_clean']:.3f}. {gap(rows)}".rstrip()
    )


def show(
    folder: Path,
    rows: list[dict],
    *,
    cells: list[Cell],
    recipe: LanguageRecipe,
    target: Target,
    choice: ShowChoice,
    context: dict,
) -> dict[str, Path]:
    """Writes pages of features, figures, exports and report.html; returns the png of each figure.

    Args:
        cells: in the order of the rows
        context: what was run, for the report
    """
    sound = [c for c, row in zip(cells, rows, strict=True) if math.isfinite(row["fvu"])]
    of_cells = dict(zip(cells, rows, strict=True))
    pages = _write_pages(folder, of_cells, recipe=recipe, target=target, choice=choice)
    n_left_out, text = say_left_out(folder, sound)
    figures = draw_figures(
        folder,
        rows,
        {cell: feature_density(sae_folder(folder, cell)) for cell in cells},
        n_tokens=recipe.held_out.n_kept - n_left_out,
        l1_note=f"L1 term of the loss: {L1_TERMS[recipe.optimisation.l1_normalisation]}",
    )
    _export(folder, sound, choice.export, frontiers=[figures[spec.name] for spec in FRONTIERS])
    write_report(
        folder,
        title=TITLE.format("Transcoders" if recipe.transcodes else "Sparse autoencoders"),
        verdict=verdict(rows, most_l0=choice.page_l0),
        rows=rows,
        specs=(*FRONTIERS, *_heatmaps(cells), DENSITIES),
        context=context | {"left_out": text},
        filter_example="expansion_factor>=2 l0<32",
        pages=[pages.get(cell) for cell in cells],
    )
    _note_shown(folder, _without_names(choice), names_of(folder, choice))
    return figures


def _write_pages(
    folder: Path,
    rows: dict[Cell, dict],
    *,
    recipe: LanguageRecipe,
    target: Target,
    choice: ShowChoice,
) -> dict[Cell, str]:
    """The pages of features that are chosen; where each is. Of a diverged cell there is none."""
    (folder / SHOWN).unlink(missing_ok=True)  # no earlier choice is shown whole from here on
    names = names_of(folder, choice)
    sound = {cell: row for cell, row in rows.items() if math.isfinite(row["fvu"])}
    if not sound:
        return {}
    row = best_row(list(sound.values()), most_l0=choice.page_l0)
    best = next(cell for cell in sound if sound[cell] is row)
    return write_pages(
        folder,
        {best: row} if choice.pages == "best" else sound,
        best=best,
        recipe=recipe,
        target=target,
        n_tokens=choice.n_page_tokens,
        names=names,
    )


def say_left_out(folder: Path, cells: list[Cell]) -> tuple[int, str]:
    """How many held-out tokens were left out of the cells' rows for their norms, and that in words
    with those of the training text; printed if there are any."""
    known = load_sae(sae_folder(folder, cells[0])).metadata if cells else {}
    if not known.get("max_norm"):
        return 0, "nothing: no --max-norm-multiple"
    n, limits = known["n_eval_left_out"], known["max_norm"]
    if "target_max_norm" in known:
        limits = limits, known["target_max_norm"] or math.inf
    text = (
        f"left out, of norms above {in_words(limits)}, {known['max_norm_multiple']:g} x the "
        f"median: {known['n_left_out']:,} of the first {known['n_left_out_of']:,} activations, "
        f"{n:,} held-out tokens"
    )
    if n:
        print(text)
    return n, text


def require_exportable(cells: list[Cell], export: str) -> None:
    """Raises UserError if --export names a library that lacks the family of a cell."""
    refined = sorted({c.arch for c in cells if FAMILIES[c.arch].refined})
    library = "sae_lens" if export == HUB else "it"
    require(
        export == "none" or not refined,
        f"--export {export}: {library} has no class that refines its codes, as "
        f"{', '.join(refined)} does: drop the flag",
    )
    others = sorted({c.arch for c in cells if FAMILIES[c.arch].selection != "topk"})
    require(
        export != "sparsify" or not others,
        f"--export sparsify: it has topk alone, not {', '.join(others)}: choose --export "
        "dictionary_learning, which has every family",
    )


def _export(
    folder: Path, cells: list[Cell], export: str, *, frontiers: Sequence[Path] = ()
) -> None:
    """Each autoencoder once more, for the library of this name: <library>/<cell>/; or, with the
    figures, for the Hub."""
    require_exportable(cells, export)
    if export == HUB and cells:
        write_hub_folder(folder, cells, frontiers)
    for cell in cells if export in EXPORTERS else ():
        sae = load_sae(sae_folder(folder, cell))
        EXPORTERS[export](folder / export / cell.name, sae, metadata=sae.metadata)


def draw_figures(
    folder: Path,
    rows: list[dict],
    densities: dict[Cell, np.ndarray],
    *,
    n_tokens: int,
    l1_note: str,
) -> dict[str, Path]:
    """Writes figures/<name>.png of the heat-maps, FRONTIERS and DENSITIES, each with its csv; the
    png by name.

    Args:
        rows: of results.csv
        densities: (n_dict,) of each cell, the share of n_tokens tokens on which a feature fires
        l1_note: how the L1 term of the loss is normalised
    """
    of_grid = [row for row in rows if on_grid(row)]
    paths = write_figures(
        folder,
        of_grid,
        _heatmaps(list(densities)),
        x_label=f"l1_alpha; {l1_note}",
        y_label="expansion_factor",
        row_key="expansion_factor",
        column_key="l1_alpha",
    )
    drawn = {
        spec.name: (draw_frontier(rows, spec, l1_note=l1_note), frontier_csv(rows, spec.column))
        for spec in FRONTIERS
    }
    histograms = draw_density_histograms(densities, DENSITIES, n_tokens=n_tokens)
    drawn[DENSITIES.name] = (histograms, density_csv(densities, n_tokens=n_tokens))
    return paths | {
        name: write_figure(folder, name, figure, csv=csv) for name, (figure, csv) in drawn.items()
    }


def _heatmaps(cells: list[Cell]) -> tuple[HeatmapSpec, ...]:
    """None without a grid of l1_alpha: with --target-l0 every size has l1_alphas of its own."""
    return FIGURES if any(not cell.target_l0 for cell in cells) else ()


def names_of(folder: Path, choice: ShowChoice) -> Names:
    """The names that are chosen for features of the run. Raises UserError: see read_names."""
    return read_names(choice.names, folder / "saes")


def is_shown(folder: Path, choice: ShowChoice) -> bool:
    """Whether the folder shows what is chosen, names aside."""
    if choice.export == HUB and not (folder / HUB / CARD).exists():
        return False
    record = _shown(folder)
    return bool(record) and record | _without_names(choice) == record


def rename(folder: Path, choice: ShowChoice) -> bool:
    """Gives the pages of a folder that is_shown the names that are chosen; False if one has to be
    drawn anew."""
    record, names = _shown(folder), names_of(folder, choice)
    if record.get("names") != _as_json(names):
        write_record(folder / SHOWN, record | {"names": None})  # until all pages have them
        if not rename_features(folder, names):
            return False
        _note_shown(folder, record, names)
    return True


def _shown(folder: Path) -> dict:
    """The choice behind what the folder shows; empty if it shows nothing."""
    try:
        return read_record(folder / SHOWN) if os.path.exists(folder / SHOWN) else {}
    except Damaged as error:
        error.warn("shown anew")
        return {}


def _note_shown(folder: Path, record: dict, names: Names) -> None:
    write_record(folder / SHOWN, record | {"names": _as_json(names)})


def _without_names(choice: ShowChoice) -> dict:
    """They are known by what the files hold, not by where these are."""
    return {name: value for name, value in asdict(choice).items() if name != "names"}


def _as_json(names: Names) -> dict[str, dict[str, str]]:
    return {cell: {str(f): name for f, name in of.items()} for cell, of in names.items()}


def last_lines(rows: list[dict], folder: Path, choice: ShowChoice, upload: PushChoice) -> int:
    """Prints what came out and where it is, and uploads it, if that is chosen; the exit code."""
    print(verdict(rows, most_l0=choice.page_l0))
    files = "report.html, features.html" + f", {HUB}/" * (choice.export == HUB)
    print(f"done: {folder}: {files} (--fresh starts again)", flush=True)
    if upload.push:
        push(folder, upload)
    return 0


def check_fit(sae: SparseAutoencoder, target: Target) -> None:
    """Warns if the autoencoder was trained elsewhere. Raises UserError if it can't be used here."""
    site, ours = target.site, target.metadata
    require(
        sae.activation_dim == site.width,
        f"the autoencoder takes activations of width {sae.activation_dim}, but layer {site.layer} "
        f"{site.name} of {ours['model']} has width {site.width}: choose its own --model, "
        "--layer and --site",
    )
    transcodes = site.target is not None
    require(
        sae.transcodes == transcodes,
        "the transcoder predicts another site's activations: give that site as --target-site"
        if sae.transcodes
        else f"the autoencoder is no transcoder: drop --target-site {ours.get('target_site')}",
    )
    require(
        not (target.before_norm and sae.metadata.get("hook_name")),
        f"{sae.metadata.get('hook_name')} of {ours['model']} stands behind a norm, {site.name} "
        "here before it: evaluate it with sae_lens",
    )
    for name in MUST_MATCH:
        here = ours.get(name)
        was = sae.metadata.get(name, here)
        if was != here:
            line = f"warning: trained on {name} {was}, evaluated on {here}"
            print(one_line(line), file=sys.stderr)


def evaluate_one(sae: SparseAutoencoder, recipe: LanguageRecipe) -> dict[str, float]:
    """The metrics of results.csv for an autoencoder from elsewhere; says on what."""
    known = recipe.statistics
    (found,) = evaluate(recipe.held_out, [sae], mean=known.output.mean, max_norm=known.limits)
    n = recipe.held_out.n_kept - found.n_left_out
    print(f"{n:,} held-out tokens; ce_recovered: against ablation by zeros")
    if found.n_left_out:
        print(f"left out: {found.n_left_out:,}, of norms above {in_words(known.limits)}")
    return found.values


FIGURES = (
    HeatmapSpec(
        name="fvu",
        column="fvu",
        title="What the autoencoders miss (FVU)",
        colour_label="fvu on held-out documents: 0 perfect, 1 as bad as the mean (log scale)",
        explanation="The share of the activations' variance that is not reconstructed. It rises "
        "with l1_alpha and falls with the size; read it together with l0, since it can always be "
        "bought with more active features. Above 0.3 little of what the model computes is left.",
        log_scale=True,
        value_format=".2g",
        cmap="cividis",
    ),
    HeatmapSpec(
        name="l0",
        column="l0",
        title="Active features per token (L0)",
        colour_label="l0 on held-out documents (log scale)",
        explanation="How many features one token needs. Look for the cells between about 10 and "
        "100: fewer lose too much, and with more a single feature stops meaning one thing. "
        "An l0 near n_dict / 2 means that l1_alpha does nothing yet.",
        log_scale=True,
        value_format=".3g",
    ),
    HeatmapSpec(
        name="dead_fraction",
        column="dead_fraction",
        title="Dead features",
        colour_label="dead_fraction: share of features that fire on no held-out token",
        explanation="Dead features cost memory and explain nothing. A few per cent are harmless; "
        "where the share grows with the size, the data or the training is too short for so large "
        "a dictionary, and where it grows to the right, l1_alpha is too strong.",
        vmin=0.0,
        vmax=1.0,
        cmap="magma",
    ),
    HeatmapSpec(
        name="ce_recovered",
        column="ce_recovered",
        title="How well the model still predicts (CE recovered)",
        colour_label="ce_recovered = (ce_zero − ce_spliced) / (ce_zero − ce_clean)",
        explanation="The reconstruction takes the place of the activations: 1 means that the "
        "model predicts the next token as well as before, 0 as badly as with zeros there. "
        "It says little where ce_zero − ce_clean is small (see the table).",
        vmin=0.0,
        vmax=1.0,
        value_format=".3f",
    ),
    HeatmapSpec(
        name="mmcs_with_larger",
        column="mmcs_with_larger",
        title="Agreement with larger dictionaries",
        colour_label="mmcs with the next two larger",
        explanation="No true features are known here; but those that dictionaries of several "
        "sizes find independently are likely to be real. Look for the l1_alpha where the agreement "
        "peaks. The largest dictionary has none to compare with.",
        vmin=0.0,
        vmax=1.0,
    ),
)
FRONTIERS = (
    FrontierSpec(
        name="frontier_fvu",
        title="Reconstruction against sparsity",
        explanation="Lower and further left is better: the same reconstruction from fewer active "
        "features. Choose a cell at the bend of a line, beyond which each further feature buys "
        "little; where the lines of two sizes meet, the larger one is not worth its cost.",
        alt="Lines of fvu over l0, one for each dictionary size",
        column="fvu",
        y_label="fvu on held-out documents",
        upwards=False,
    ),
    FrontierSpec(
        name="frontier_ce",
        title="What the model loses, against sparsity",
        explanation="Higher and further left is better. It checks the fvu: the little variance "
        "that is missing may be what the model needs most. Compare with the ablations above the "
        "axes: where they cost a few hundredths of a nat, ce_recovered tells nothing.",
        alt="Lines of ce_recovered over l0, one for each dictionary size",
        column="ce_recovered",
        y_label="ce_recovered = (ce_zero − ce_spliced) / (ce_zero − ce_clean)\n"
        "ablation: zeros in place of the activations",
        upwards=True,
    ),
)
DENSITIES = FigureSpec(
    name="densities",
    title="How often the features fire",
    explanation="Look for one hump between -5 and -1.5. Features right of -1 fire on every tenth "
    "token and are rarely about one thing: a lower l0 helps. A second hump at the far left "
    "is of features that are dying, or too rare for this text to show what they mean.",
    alt="Histograms of log10 feature density, by dictionary size, family and sparsity",
)
