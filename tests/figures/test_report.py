"""report.html and the figure files: self-contained, escaped, complete, the same bytes twice."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparse_coding.figures.heatmap import HeatmapSpec
from sparse_coding.figures.report import duration, full, short, write_figures, write_report

SPECS = (
    HeatmapSpec("mmcs", "mmcs", "Features found", "mmcs", "A band. It nears 1.", 0, 1),
    HeatmapSpec("dead", "n_dead", "Dead features", "n_dead", "They die. Many.", 0, 100),
)
ATTACK = "<script>alert('x')</script>"


def sweep_rows() -> list[dict]:
    """3 l1_alphas x 2 dict_ratios; mmcs is empty for the larger one."""
    return [
        {
            "l1_alpha": 10 ** (e / 4),
            "dict_ratio": ratio,
            "n_dict": int(512 * ratio),
            "mmcs": 0.123456789 * (e + 4) if ratio < 1 else None,
            "n_dead": 16384 + e,
        }
        for e in (-3, -2, -1)
        for ratio in (0.5, 1.0)
    ]


def draw(folder: Path) -> dict[str, Path]:
    return write_figures(
        folder,
        sweep_rows(),
        SPECS,
        x_label="l1_alpha (L1 divided by n_dict)",
        y_label="dict_ratio",
        row_key="dict_ratio",
        column_key="l1_alpha",
        row_notes={"mmcs": ["chance .18", "chance .19"]},
    )


def report(folder: Path, **changes) -> str:
    draw(folder)
    arguments = {
        "title": "Toy sweep",
        "verdict": "mmcs reaches .98 (wanted .90)",
        "rows": sweep_rows(),
        "specs": SPECS,
        "context": {
            "command": "python replicate_toy_models.py --preset smoke",
            "device": "cpu",
            "seconds": 83.4,
            "config": {"n_steps": 5000, "note": ATTACK, "wandb_project": None},
            "versions": {"torch": "2.9.0"},
        },
    }
    return write_report(folder, **{**arguments, **changes}).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what the tests ask about: tags with attributes, and each table row's texts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append((self.tags[-1][1], []))

    def handle_data(self, data):
        if self.cells:
            self.cells[-1][1].append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for t, attributes in self.tags if t == tag and name in attributes]

    def result_cells(self) -> list[tuple[str, str]]:
        """(shown, full) of each cell of the results table."""
        with_title = [(a, "".join(data).strip()) for a, data in self.cells if "title" in a]
        return [(data, attributes["title"]) for attributes, data in with_title]


def test_each_figure_is_a_png_with_its_data_beside_it(tmp_path):
    paths = draw(tmp_path)
    assert paths["mmcs"] == tmp_path / "figures" / "mmcs.png"
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["dead.csv", "dead.png", "mmcs.csv", "mmcs.png"]
    with open(tmp_path / "figures" / "dead.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {float(row["mean"]) for row in rows} == {16381, 16382, 16383}  # colour stops at 100


def test_the_figure_files_and_the_report_have_the_same_bytes_twice(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert report(first) == report(second)
    for name in ("mmcs.png", "mmcs.csv", "dead.png"):
        assert (first / "figures" / name).read_bytes() == (second / "figures" / name).read_bytes()


def test_the_report_refers_to_nothing_on_the_network(tmp_path):
    html = report(tmp_path)
    page = Page(html)
    assert re.search(r"https?://|//cdn|@import|url\(", html) is None
    assert all(
        source.startswith("data:image/png;base64,") for source in page.attributes("img", "src")
    )
    assert page.attributes("script", "src") == []
    assert page.attributes("link", "href") == []
    assert "default-src 'none'" in html  # and the browser would refuse it


def test_every_figure_is_shown_with_its_explanation_and_a_link_to_its_data(tmp_path):
    html = report(tmp_path)
    page = Page(html)
    assert len(page.attributes("img", "src")) == len(SPECS)
    assert all(spec.explanation in html for spec in SPECS)
    links = set(page.attributes("a", "href"))
    assert {"figures/mmcs.csv", "figures/dead.csv"} <= links
    targets = {link[1:] for link in links if link.startswith("#")}
    assert targets <= {attributes.get("id") for _, attributes in page.tags}


def test_only_files_that_exist_are_linked(tmp_path):
    assert "results.csv" not in Page(report(tmp_path)).attributes("a", "href")
    (tmp_path / "results.csv").write_text("seed\n")
    assert "results.csv" in Page(report(tmp_path)).attributes("a", "href")


def test_the_table_has_a_row_per_cell_with_all_digits_in_the_tooltip(tmp_path):
    rows = sweep_rows()
    cells = Page(report(tmp_path)).result_cells()
    assert len(cells) == len(rows) * len(rows[0])
    expected = ["0.1778", "0.5", "256", "0.1235", "16381"]  # the first row: e = -3, dict_ratio 1/2
    assert [shown for shown, _ in cells[:5]] == expected
    assert [float(digits) for _, digits in cells[:5]] == list(rows[0].values())
    assert cells[8] == ("–", "")  # mmcs of the second row


def test_every_column_can_be_sorted_with_the_keyboard(tmp_path):
    page = Page(report(tmp_path))
    assert page.attributes("th", "aria-sort") == ["none"] * len(sweep_rows()[0])
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert buttons == [{"type": "button"}] * len(sweep_rows()[0])


@pytest.mark.parametrize("place", ["title", "verdict", "command", "config"])
def test_text_from_outside_is_escaped_wherever_it_stands(tmp_path, place):
    changes = {
        "title": {"title": ATTACK},
        "verdict": {"verdict": ATTACK},
        "command": {"context": {"command": ATTACK}},
        "config": {},
    }[place]
    html = report(tmp_path, **changes)
    assert ATTACK not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert html.count("<script>") == 1  # ours


def test_the_report_says_what_was_run(tmp_path):
    html = report(tmp_path)
    wanted = ["mmcs reaches .98 (wanted .90)", "--preset smoke", "n_steps", "5000", "2.9.0"]
    assert [text for text in (*wanted, "83.4 s (1 min 23 s)", "cpu") if text not in html] == []


def test_a_report_of_an_unfinished_sweep_can_be_written(tmp_path):
    html = write_report(
        tmp_path, title="Empty", verdict="no cells yet", rows=[], specs=(), context={}
    ).read_text(encoding="utf-8")
    assert "All 0 cells" in html


@pytest.mark.parametrize(
    ("value", "shown", "digits"),
    [
        (None, "–", ""),
        (float("nan"), "–", ""),
        (0.31622776601683794, "0.3162", "0.31622776601683794"),
        (1.62345e-5, "1.623e-5", "1.62345e-05"),
        (16384, "16384", "16384"),
        (100.0, "100", "100.0"),
        (0.0, "0", "0.0"),
        ("post", "post", "post"),
    ],
)
def test_values_are_shown_short_and_kept_whole(value, shown, digits):
    assert (short(value), full(value)) == (shown, digits)


def test_durations_are_readable():
    assert duration(12.34) == "12.3 s"
    assert duration(83.41) == "83.4 s (1 min 23 s)"
    assert duration(3605) == "3605.0 s (1 h 0 min 5 s)"
