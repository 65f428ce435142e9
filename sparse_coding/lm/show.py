"""What a sweep on a language model shows: figures, report, page of features, exports."""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from sparse_coding.config import require, require_flag
from sparse_coding.figures.report import write_figures, write_report
from sparse_coding.files import write_json
from sparse_coding.lm.evaluation import evaluate
from sparse_coding.lm.features.collected import FeatureCollector, logit_effects, nearest_features
from sparse_coding.lm.features.page import write_feature_page
from sparse_coding.lm.model import direct_logits
from sparse_coding.lm.recipe import LanguageRecipe, feature_density, sae_folder
from sparse_coding.lm.run_figures import DENSITIES, FIGURES, FRONTIERS, write_more_figures
from sparse_coding.lm.target import Subject
from sparse_coding.sae.export import export_dictionary_learning
from sparse_coding.sae.saved import SparseAutoencoder, load_sae
from sparse_coding.sweep.grid import Cell

L1_TERMS = {  # --l1-normalisation -> the term, as every axis label says it
    "per_feature": "l1_alpha · mean Σ codes / n_dict",
    "sum": "l1_alpha · mean Σ codes",
}
SHOWN = "shown.json"  # the choice behind what the folder shows
TITLE = "Sparse autoencoders on a language model"


@dataclass(frozen=True)
class ShowChoice:
    """What is shown of a finished sweep; the names are those of run.py's flags.

    page_l0: features.html shows the autoencoder of lowest fvu with at most this l0
    n_page_tokens: held-out tokens that features.html looks at
    export: format in which autoencoders are written too: none or dictionary_learning
    """

    page_l0: float
    n_page_tokens: int
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
        lead = f"No cell has l0 <= {most_l0:g}: raise l1_alpha; the sparsest"
    n_diverged = sum(not math.isfinite(row["fvu"]) for row in rows)
    text = f"{n_diverged} cells diverged and are left out of this line. " if n_diverged else ""
    return text + (
        f"{lead}: fvu {best['fvu']:.3f} at l0 {best['l0']:.1f}, ce_recovered "
        f"{_or_none(best['ce_recovered'])} (l1_alpha {best['l1_alpha']:.3g}, n_dict "
        f"{best['n_dict']}, {best['dead_fraction']:.1%} dead), on held-out documents. "
        f"Cross-entropy {best['ce_clean']:.3f} nats; ablation by zeros costs "
        f"{best['ce_zero'] - best['ce_clean']:.2f}, by the mean "
        f"{best['ce_mean'] - best['ce_clean']:.2f}, this autoencoder "
        f"{best['ce_spliced'] - best['ce_clean']:.3f}."
    )


def show(
    folder: Path,
    rows: list[dict],
    *,
    cells: list[Cell],
    recipe: LanguageRecipe,
    subject: Subject,
    choice: ShowChoice,
    context: dict,
) -> dict[str, Path]:
    """Writes exports, features.html, figures and report.html; returns the png of each figure.

    Args:
        cells: in the order of the rows
        context: what was run, for the report
    """
    sound = [c for c, row in zip(cells, rows, strict=True) if math.isfinite(row["fvu"])]
    if choice.export == "dictionary_learning":
        _export(folder, sound)
    if sound:
        best = cells[rows.index(best_row(rows, most_l0=choice.page_l0))]
        write_page(folder, best, recipe=recipe, subject=subject, n_tokens=choice.n_page_tokens)
    figures = _draw(folder, rows, cells, recipe=recipe)
    write_report(
        folder,
        title=TITLE,
        verdict=verdict(rows, most_l0=choice.page_l0),
        rows=rows,
        specs=(*FRONTIERS, *_heatmaps(cells), DENSITIES),
        context=context,
        filter_example="expansion_factor>=2 l0<32",
    )
    write_json(folder / SHOWN, asdict(choice))
    return figures


def is_shown(folder: Path, choice: ShowChoice) -> bool:
    """Whether the folder shows what is chosen."""
    return (folder / SHOWN).exists() and json.loads((folder / SHOWN).read_text()) == asdict(choice)


def _heatmaps(cells: list[Cell]) -> tuple:
    """None with --target-l0, where every size has l1_alphas of its own: no grid to draw."""
    return () if cells[0].target_l0 else FIGURES


def _draw(
    folder: Path, rows: list[dict], cells: list[Cell], *, recipe: LanguageRecipe
) -> dict[str, Path]:
    """Writes the figures; the png of each."""
    l1_note = f"L1 term of the loss: {L1_TERMS[recipe.optimisation.l1_normalisation]}"
    figures = write_figures(
        folder,
        rows,
        _heatmaps(cells),
        x_label=f"l1_alpha; {l1_note}",
        y_label="expansion_factor",
        row_key="expansion_factor",
        column_key="l1_alpha",
    )
    densities = {cell: feature_density(sae_folder(folder, cell)) for cell in cells}
    n_tokens = recipe.held_out.n_kept
    return figures | write_more_figures(folder, rows, densities, n_tokens=n_tokens, l1_note=l1_note)


def write_page(
    folder: Path, cell: Cell, *, recipe: LanguageRecipe, subject: Subject, n_tokens: int
) -> None:
    """features.html of one cell.

    n_tokens: held-out tokens looked at
    """
    sae = load_sae(sae_folder(folder, cell)).to(recipe.device)
    held_out = replace(recipe.held_out, n_tokens=n_tokens)
    collector = FeatureCollector(sae.n_dict, held_out.text.context_length)
    for ids, keep, codes in held_out.codes(sae):
        collector.add(ids, codes, keep)
    data = replace(collector.result(), nearest=nearest_features(sae.W_dec))
    effects = logit_effects(sae.W_dec, partial(direct_logits, subject.lm, subject.site))
    if effects is not None:
        data = replace(data, promoted=effects[0], suppressed=effects[1])
    known = sae.about
    write_feature_page(
        folder / "features.html",
        data,
        token_texts=subject.tokenizer.token_texts(),
        title=f"Features of {known['model']}, layer {known['layer']} {known['site']}",
        facts={
            "model": known["model"],
            "site": f"layer {known['layer']}, {known['site']}",
            "autoencoder": f"{cell.name}: n_dict {sae.n_dict}, l1_alpha {known['l1_alpha']:.3g}, "
            f"l0 {known['l0']:.1f}, fvu {known['fvu']:.3f}, ce_recovered "
            f"{_or_none(known['ce_recovered'])}",
            "text": f"{known['dataset']} {known['dataset_revision'] or ''}, held-out documents",
        },
    )


def check_fit(sae: SparseAutoencoder, subject: Subject) -> None:
    """Warns if the autoencoder was trained elsewhere. Raises UserError if it can't be used here."""
    site, name = subject.site, subject.about["model"]
    require(
        sae.activation_dim == site.width,
        f"the autoencoder takes activations of width {sae.activation_dim}, but layer {site.layer} "
        f"{site.name} of {name} has width {site.width}: choose its own --model, --layer and --site",
    )
    for key in (
        "model",
        "weight_hash",
        "layer",
        "site",
        "tokenizer_fingerprint",
        "held_out",
        "tokens_sha256",
        "model_dtype",
    ):
        was, here = sae.about.get(key, subject.about[key]), subject.about[key]
        if was != here:
            print(f"warning: trained on {key} {was}, evaluated on {here}", file=sys.stderr)


def evaluate_one(sae: SparseAutoencoder, recipe: LanguageRecipe) -> dict[str, float]:
    """The metrics of results.csv for an autoencoder from elsewhere; says on what."""
    print(f"{recipe.held_out.n_kept:,} held-out tokens; ce_recovered: against ablation by zeros")
    return evaluate(recipe.held_out, [sae], mean=recipe.statistics.mean)[0].values


def _or_none(ce_recovered: float | None) -> str:
    """It has no value where the ablation costs nothing."""
    if ce_recovered is None or not math.isfinite(ce_recovered):
        return "none (ablation costs nothing)"
    return f"{ce_recovered:.3f}"


def _export(folder: Path, cells: list[Cell]) -> None:
    """Each autoencoder once more, for dictionary_learning: dictionary_learning/<cell>/."""
    for cell in cells:
        sae = load_sae(sae_folder(folder, cell))
        export_dictionary_learning(folder / "dictionary_learning" / cell.name, sae, about=sae.about)
