"""The scatter of two columns: numbers in, a figure and its data out."""

import math

from sparse_coding.figures.scatter import ScatterSpec, draw_scatter, scatter_csv
from sparse_coding.sae.families import FROZEN

SPEC = ScatterSpec("truth", "T", "Look.", "Points", x="ev", y="f1", x_label="ev", y_label="f1")


def row(arch: str, ev: float, f1: float | None) -> dict:
    cell = {"arch": arch, "seed": 0, "world": 42, "n_dict": 8, "target_l0": 2, "l1_alpha": None}
    return cell | {"ev": ev, "f1": f1}


def test_a_point_for_each_autoencoder_in_the_colour_of_its_family_hollow_if_frozen():
    rows = [row("relu", 0.5, 0.4), row("relu", 0.6, 0.5), row(f"relu{FROZEN}", 0.1, 0.2),
            row("topk", 0.7, 0.3), row("topk", math.nan, 0.3), row("topk", 0.2, None)]  # fmt: skip
    axes = draw_scatter(rows, SPEC).axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points == {
        "relu": [[0.5, 0.4], [0.6, 0.5]],
        "topk": [[0.7, 0.3]],
        f"relu{FROZEN}": [[0.1, 0.2]],
    }
    faces = {c.get_label(): len(c.get_facecolor()) for c in axes.collections}
    assert faces == {"relu": 1, "topk": 1, f"relu{FROZEN}": 0}
    edges = {c.get_label(): tuple(c.get_edgecolor()[0]) for c in axes.collections}
    assert edges["relu"] == edges[f"relu{FROZEN}"] != edges["topk"]
    assert "2 diverged" in axes.texts[-1].get_text()


def test_its_data_are_all_rows_with_all_digits():
    text = scatter_csv([row("relu", 1 / 3, 0.4), row("topk", 0.2, None)], SPEC)
    assert text.splitlines() == [
        "arch,seed,world,n_dict,target_l0,l1_alpha,ev,f1",
        "relu,0,42,8,2,,0.3333333333333333,0.4",
        "topk,0,42,8,2,,0.2,",
    ]


def test_nothing_to_draw_is_no_error():
    assert draw_scatter([row("relu", math.nan, math.nan)], SPEC).axes[0].get_legend() is None
