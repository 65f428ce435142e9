"""Figures of a sweep on disk, and report.html: one file that shows a whole run.

    figures/<name>.png, figures/<name>.csv    write_figures, one pair per HeatmapSpec
    report.html                               write_report, after write_figures

The report needs nothing beside it and no network: the figures are data: URIs, style and script are
inline. Its table is results.csv, shown with four significant digits.
"""

import base64
import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from sparse_coding.figures.heatmap import (
    HeatmapSpec,
    draw_heatmap,
    heatmap_csv,
    pivot,
    png_bytes,
    ratio_labels,
)
from sparse_coding.files import write_atomic

EMPTY = "–"
DATA_FILES = ("results.csv", "config.json", "metrics.jsonl")  # linked to where they exist


class Shown(Protocol):
    """What the report needs to know of a figure, a heat-map or not."""

    name: str  # figures/<name>.png and figures/<name>.csv are there
    title: str
    explanation: str
    alt: str


def write_figures(
    folder: Path,
    rows: list[dict],
    specs: Sequence[HeatmapSpec],
    *,
    x_label: str,
    y_label: str,
    row_key: str,
    column_key: str,
    row_notes: dict[str, list[str]] | None = None,
) -> dict[str, Path]:
    """Writes figures/<name>.png with its data beside it; returns the png of each name.

    `row_notes[name]` stands at the right of the figure's rows, one note per row_key, ascending.
    Rows with an n_dict have it in their labels: "1/8 (64)".
    """
    sizes = {row[row_key]: row["n_dict"] for row in rows if "n_dict" in row}
    paths = {}
    for spec in specs:
        heatmap = pivot(rows, spec.column, row_key=row_key, column_key=column_key)
        figure = draw_heatmap(
            heatmap,
            spec,
            x_label=x_label,
            y_label=f"{y_label} (n_dict)" if sizes else y_label,
            row_labels=ratio_labels(heatmap.row_values, [sizes[v] for v in sorted(sizes)]),
            row_notes=(row_notes or {}).get(spec.name),
        )
        paths[spec.name] = write_figure(folder, spec.name, figure, csv=heatmap_csv(heatmap))
    return paths


def write_figure(folder: Path, name: str, figure: Figure, *, csv: str) -> Path:
    """Writes figures/<name>.png and its data beside it; the path of the png."""
    path = folder / "figures" / f"{name}.png"
    write_atomic(path, png_bytes(figure))
    write_atomic(path.with_suffix(".csv"), csv)
    return path


def write_report(
    folder: Path,
    *,
    title: str,
    verdict: str,
    rows: list[dict],
    specs: Sequence[Shown],
    context: dict,
    filter_example: str = "dict_ratio>=1 mmcs>0.9",
    pages: Sequence[str | None] = (),
) -> Path:
    """Writes report.html from the rows and the figures that are in `folder` already.

    `pages` are what rows are linked to, below the folder: one each, None without.
    `context` says what was run. "command" is shown as code, every dict ("config", "versions") as a
    table of its own, anything else ("git commit", "device", "seconds") as a line; in this order.
    """
    templates = environment(Path(__file__).parent, short=short, full=full, duration=duration)
    html = templates.get_template("report_template.html").render(
        title=title,
        verdict=verdict,
        figures=[_figure(folder, spec) for spec in specs],
        filter_example=filter_example,
        columns=list(rows[0]) if rows else [],
        rows=list(zip_longest(rows, pages)),
        has_pages=any(pages),
        command=context.get("command"),
        facts={k: v for k, v in context.items() if k != "command" and not isinstance(v, dict)},
        tables={k: v for k, v in context.items() if isinstance(v, dict)},
        data_files=[name for name in DATA_FILES if (folder / name).exists()],
    )
    path = folder / "report.html"
    write_atomic(path, html)
    return path


def short(value: object) -> str:
    """A table cell: floats with four significant digits, integers and text whole."""
    if value is None or value == "":
        return EMPTY
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return EMPTY
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def full(value: object) -> str:
    """All digits, for the tooltip and for sorting; nothing where `short` shows a dash."""
    return "" if short(value) == EMPTY else str(value)


def duration(seconds: float) -> str:
    """Seconds, and the same in hours and minutes where it is that long.

    >>> duration(5025.3)
    '5025.3 s (1 h 23 min 45 s)'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (hours + minutes > 0)
    return f"{seconds:.1f} s" + (f" ({' '.join(parts)} {rest} s)" if parts else "")


def _figure(folder: Path, spec: Shown) -> dict[str, object]:
    png = (folder / "figures" / f"{spec.name}.png").read_bytes()
    return {
        "spec": spec,
        "uri": "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
        "csv": f"figures/{spec.name}.csv",
    }


def environment(folder: Path, **filters: Callable) -> Environment:
    """For the templates of the folder: values are escaped, a name without a value is an error."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,  # every value is text from outside: flags, versions, file names
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment
