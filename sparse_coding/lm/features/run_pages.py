"""The pages of a run: features.html of its best autoencoder, features/<cell>.html of the others.

A page holds one autoencoder and lists all, so that none grows with their number.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from sparse_coding.config import passing_bar
from sparse_coding.files import tensors_checksum
from sparse_coding.lm.features.collected import (
    FeatureCollector,
    FeatureData,
    logit_effects,
    nearest_features,
)
from sparse_coding.lm.features.names import WEIGHTS, Names
from sparse_coding.lm.features.page import PageLink, Place, write_feature_page, write_names
from sparse_coding.lm.model import direct_logits
from sparse_coding.lm.recipe import LanguageRecipe
from sparse_coding.lm.target import Target
from sparse_coding.sae.saved import SparseAutoencoder, load_sae
from sparse_coding.sweep.cells import sae_folder
from sparse_coding.sweep.grid import Cell, asked_of

FIRST, OTHERS = "features.html", "features"
MOST_FEATURES = 2**17  # whose contexts are collected in one pass over the text, in some 10 KB each


def page_paths(cells: list[Cell], best: Cell) -> dict[Cell, str]:
    """Where the page of each cell is, below the run folder."""
    return {cell: FIRST if cell == best else f"{OTHERS}/{cell.name}.html" for cell in cells}


def write_pages(
    folder: Path,
    rows: dict[Cell, dict],
    *,
    best: Cell,
    recipe: LanguageRecipe,
    target: Target,
    n_tokens: int,
    names: Names,
) -> dict[Cell, str]:
    """Writes the page of every cell; where each is, below the folder.

    Args:
        rows: of results.csv, of the cells that get a page, in the order of the list
        best: one of them, whose page is features.html
        n_tokens: held-out tokens looked at
    """
    paths = page_paths(list(rows), best)
    texts = target.tokenizer.token_texts()
    for group in _groups(list(rows)):
        saes = [load_sae(sae_folder(folder, cell)).to(recipe.device) for cell in group]
        collected = _collected(saes, recipe, n_tokens)
        for cell, sae in passing_bar(list(zip(group, saes, strict=True)), desc="pages"):
            known = sae.metadata
            checksum = tensors_checksum(sae_folder(folder, cell) / WEIGHTS) or ""
            write_feature_page(
                folder / paths[cell],
                _with_decoder(collected.pop(0), sae, target),
                token_texts=texts,
                title=f"Features of {known['model']}, layer {known['layer']} {sites_of(known)}",
                facts=_facts(cell, rows[cell], known),
                place=_place(cell, checksum, rows=rows, paths=paths, names=names),
            )
    for path in set(folder.glob(f"{OTHERS}/seed*.html")) - {folder / p for p in paths.values()}:
        path.unlink()  # of an earlier choice
    return paths


def rename_features(folder: Path, names: Names) -> bool:
    """Writes the names into the pages that are there; False if one can't be read: it is to be
    written anew."""
    pages = [folder / FIRST, *folder.glob(f"{OTHERS}/seed*.html")]
    return all(write_names(page, names) for page in pages)


def _groups(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Cells of together at most MOST_FEATURES features, or single ones."""
    group: list[Cell] = []
    for cell in cells:
        if group and sum(c.n_dict for c in group) + cell.n_dict > MOST_FEATURES:
            yield group
            group = []
        group.append(cell)
    yield group


def _collected(
    saes: list[SparseAutoencoder], recipe: LanguageRecipe, n_tokens: int
) -> list[FeatureData]:
    """What the features of each respond to, from one pass of the model over the text."""
    held_out = replace(recipe.held_out, n_tokens=n_tokens)
    known = saes[0].metadata
    of_site, of_target = (known.get(name) or math.inf for name in ("max_norm", "target_max_norm"))
    max_norm = (of_site, of_target) if held_out.site.target else of_site
    collectors = [FeatureCollector(sae.n_dict, held_out.text.context_length) for sae in saes]
    for ids, keep, codes_of_each in held_out.codes(saes, max_norm=max_norm):
        for collector, codes in zip(collectors, codes_of_each, strict=True):
            collector.add(ids, codes, keep)
    return [collector.result() for collector in collectors]


def _with_decoder(data: FeatureData, sae: SparseAutoencoder, target: Target) -> FeatureData:
    """With what rows of W_dec say: nearest features, and tokens where the site permits."""
    data = replace(data, nearest=nearest_features(sae.W_dec))
    written = target.site.target or target.site
    effects = logit_effects(sae.W_dec, partial(direct_logits, target.lm, written))
    return replace(data, promoted=effects[0], suppressed=effects[1]) if effects else data


def _place(
    cell: Cell, checksum: str, *, rows: dict[Cell, dict], paths: dict[Cell, str], names: Names
) -> Place:
    """The other pages of the run, as that of one cell refers to them."""
    up = "" if paths[cell] == FIRST else "../"
    several_seeds = len({c.seed for c in rows}) > 1
    links = []
    for c, row in rows.items():
        seed = f", seed {c.seed}" * several_seeds
        text = f"{asked_of(row)}, n_dict {c.n_dict}{seed}: {_measured(row)}"
        links.append(PageLink(c.name, text, up + paths[c]))
    return Place(cell.name, checksum, tuple(links), f"{up}report.html", names)


def _facts(cell: Cell, row: dict, known: dict) -> dict[str, str]:
    return {
        "model": known["model"],
        "site": f"layer {known['layer']}, {sites_of(known)}",
        "autoencoder": f"{cell.name}: {asked_of(row)}, n_dict {cell.n_dict}, {_measured(row)}",
        "text": f"{known['dataset']} {known['dataset_revision'] or ''}, held-out documents",
    }


def sites_of(known: dict) -> str:
    """Where the autoencoder of these metadata stands, in words."""
    target = known.get("target_site")
    return f"{known['site']} to {target}" if target else known["site"]


def _measured(row: dict) -> str:
    found = f"l0 {row['l0']:.1f}, fvu {row['fvu']:.3f}"
    return f"{found}, ce_recovered {recovered(row['ce_recovered'])}"


def recovered(ce_recovered: float | None) -> str:
    """It has no value where the ablation costs nothing."""
    if ce_recovered is None or not math.isfinite(ce_recovered):
        return "none (ablation costs nothing)"
    return f"{ce_recovered:.3f}"
