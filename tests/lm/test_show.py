"""What a finished sweep shows: the best cell, the verdict, and the files that it names."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from builders.lm import DISK, codes_of, demo_target, held_out_of, massive_, recipe_of, tiny_target

from sparse_coding.config import UserError
from sparse_coding.files import tensors_checksum, write_json
from sparse_coding.lm import show as show_module
from sparse_coding.lm.activations import harvest
from sparse_coding.lm.features import run_pages
from sparse_coding.lm.features.run_pages import page_paths, write_pages
from sparse_coding.lm.recipe import COLUMNS, feature_density, sae_folder, with_activations
from sparse_coding.lm.show import (
    DENSITIES,
    FIGURES,
    FRONTIERS,
    ShowChoice,
    best_row,
    check_fit,
    draw_figures,
    evaluate_one,
    is_shown,
    rename,
    say_left_out,
    show,
    verdict,
)
from sparse_coding.sae.saved import SparseAutoencoder, load_sae, save_sae
from sparse_coding.sweep.cells import row_path
from sparse_coding.sweep.grid import make_grid

NAN = math.nan


def row(fvu: float, l0: float, **values) -> dict:
    """A row of results.csv."""
    known = dict(arch="relu", target_l0=None, l1_alpha=0.01, n_dict=64, dead_fraction=0.125,
                 ce_clean=3.0, ce_spliced=3.1, ce_zero=5.0, ce_mean=4.0,
                 ce_recovered=0.95)  # fmt: skip
    return known | {"fvu": fvu, "l0": l0} | values


# --- the best cell ---


def test_the_best_cell_has_the_lowest_fvu_among_the_sparse_enough():
    rows = [row(0.05, 90), row(0.2, 20), row(0.1, 32), row(0.15, 31)]
    assert best_row(rows, most_l0=32) is rows[2]
    assert best_row(rows, most_l0=31.5) is rows[3]
    assert best_row(rows, most_l0=1000) is rows[0]


def test_where_none_is_sparse_enough_the_sparsest_is_best():
    rows = [row(0.05, 90), row(0.2, 60), row(0.1, 70)]
    assert best_row(rows, most_l0=32) is rows[1]


def test_a_diverged_cell_is_never_the_best_unless_all_are():
    rows = [row(NAN, 0), row(math.inf, 1), row(0.3, 20), row(0.1, 50)]
    assert best_row(rows, most_l0=32) is rows[2]
    assert best_row(rows[:2] + rows[3:], most_l0=32) is rows[3]
    assert best_row(rows[:1], most_l0=32) is rows[0]


def test_the_verdict_says_how_good_the_best_is_and_what_ablation_costs():
    rows = [row(0.05, 90), row(0.0912, 20.04)]
    assert verdict(rows, most_l0=32) == (
        "Best at l0 <= 32: fvu 0.091 at l0 20.0, ce_recovered 0.950 (relu, l1_alpha 0.01, n_dict "
        "64, 12.5% dead), on held-out documents. Cross-entropy 3.000 nats; ablation by zeros costs "
        "2.00, by the mean 1.00, this one 0.100."
    )


def test_the_verdict_counts_the_diverged_cells():
    rows = [row(NAN, 0, ce_recovered=NAN), row(0.1, 20), row(math.inf, 3)]
    text = verdict(rows, most_l0=32)
    assert text.startswith("2 cells diverged and are left out of this line. Best at l0 <= 32")
    assert "fvu 0.100" in text
    assert verdict(rows[::2], most_l0=32).startswith("All 2 cells diverged")


def test_the_verdict_does_not_promise_an_l0_that_no_cell_has():
    text = verdict([row(0.05, 90), row(0.2, 60)], most_l0=32)
    assert text.startswith("No cell has l0 <= 32")
    assert "fvu 0.200 at l0 60.0" in text
    assert "Best at l0 <= 32" not in text


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"n_page_tokens": 0}, "--n-page-tokens 0"), ({"page_l0": 0.0}, "--page-l0 0.0"),
     ({"page_l0": NAN}, "--page-l0 nan")],
)  # fmt: skip
def test_constants_out_of_range_are_refused_by_their_flag(change, flag):
    choice = ShowChoice(page_l0=32.0, n_page_tokens=100, pages="all", names=(), export="none")
    with pytest.raises(UserError, match=flag):
        replace(choice, **change)


# --- an autoencoder from elsewhere ---


def sae_of(width: int, **metadata) -> SparseAutoencoder:
    rng = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(12, width, generator=rng), dim=1)
    return SparseAutoencoder(W.T.clone(), torch.zeros(12), W, torch.zeros(width), metadata)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "gpt2-xl"),
        ("weight_hash", "0" * 16),
        ("layer", 2),
        ("site", "mlp_out"),
        ("tokenizer_fingerprint", "0" * 16),
        ("held_out", 0.1),
    ],
)
def test_an_autoencoder_trained_elsewhere_is_warned_of_by_what_differs(root, capsys, name, value):
    target = tiny_target(root)
    ours = target.metadata
    capsys.readouterr()  # the bars of making it
    check_fit(sae_of(40, **ours), target)
    check_fit(sae_of(40), target)  # says nothing of where it comes from
    assert capsys.readouterr().err == ""
    check_fit(sae_of(40, **(ours | {name: value})), target)
    expected = f"warning: trained on {name} {value}, evaluated on {ours[name]}\n"
    assert capsys.readouterr().err == expected


def test_a_site_before_a_norm_has_no_hook_of_transformer_lens_and_takes_no_foreign_one(
    root, tmp_path
):
    target = tiny_target(root, kind="gemma2", site="mlp_out")
    sae = sae_of(target.site.width)
    tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    save_sae(tmp_path / "sae", tensors, metadata=target.provenance)
    assert "hook_name" not in json.loads((tmp_path / "sae/cfg.json").read_text())["metadata"]
    check_fit(load_sae(tmp_path / "sae"), target)
    foreign = sae_of(target.site.width, hook_name="blocks.1.hook_mlp_out")
    with pytest.raises(UserError, match=r"blocks\.1\.hook_mlp_out of .* stands behind a norm"):
        check_fit(foreign, target)


# --- all files ---


@pytest.fixture(scope="module")
def shown(root, tmp_path_factory):
    """(folder, rows, cells, recipe, target, figures) of a small sweep on the demo model."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_coding.figures.heatmap.DPI", 20)
        patch.setattr(harvest, "CHUNK_BYTES", 20 * 128 * 256 * 2)
        target = demo_target(root)  # where ce_recovered has values to draw
        cells = make_grid(256, seeds=range(1), l1_exps=range(-12, -9), size_exps=range(-2, 0))
        run = dict(folder=folder, cells=cells)
        recipe = with_activations(recipe_of(target), target, **run, place=DISK)
        task = recipe.prepare(cells)
        for step in range(60):
            task.ensemble.step_(task.batch_at(step))
        for cell, (one, tensors) in zip(cells, task.evaluate(), strict=True):
            recipe.save(folder, cell, tensors, one | {"seconds": 1.0})
            write_json(folder / row_path(cell), one | {"seconds": 1.0})
        rows = recipe.merged(folder, cells)
        choice = ShowChoice(page_l0=8.0, n_page_tokens=2000, pages="all", names=(),
                            export="dictionary_learning")  # fmt: skip
        figures = show(folder, rows, cells=cells, recipe=recipe, target=target, choice=choice,
                       context={"command": "python run.py --some-flag"})  # fmt: skip
    return folder, rows, cells, recipe, target, figures


def test_show_writes_every_figure_with_its_data_and_names_them(shown):
    folder, *_, figures = shown
    pngs = {p.name for p in (folder / "figures").glob("*.png")}
    assert {path.name for path in figures.values()} == pngs
    assert len(pngs) > 5
    for path in figures.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        with open(path.with_suffix(".csv"), newline="") as file:
            assert len(list(csv.reader(file))) > 1, path


def test_the_report_has_the_verdict_every_cell_and_what_was_run(shown):
    folder, rows, *_ = shown
    report = (folder / "report.html").read_text()
    assert verdict(rows, most_l0=8.0).replace("<", "&lt;") in report
    assert "python run.py --some-flag" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def page_of(path) -> dict:
    """What a page says of its autoencoder and its names."""
    (named,) = re.findall('<script type="application/json" id="named">([^<]*)<', path.read_text())
    return json.loads(named)


def test_every_cell_has_a_page_the_best_features_html_and_each_lists_all(shown):
    folder, rows, cells, *_ = shown
    best = cells[rows.index(best_row(rows, most_l0=8.0))]
    assert len({r["l0"] for r in rows}) > 1
    pages = page_paths(cells, best)
    assert pages[best] == "features.html"
    there = {str(p.relative_to(folder)) for p in folder.rglob("*.html")}
    assert there == {*pages.values(), "report.html"}
    for cell, one in zip(cells, rows, strict=True):
        path = folder / pages[cell]
        page = path.read_text()
        assert page_of(path)["cell"] == cell.name
        checksum = tensors_checksum(sae_folder(folder, cell) / "sae_weights.safetensors")
        assert page_of(path)["checksum"] == checksum
        listed = re.findall(r'<option value="([^"]*)" data-cell="([^"]*)"', page)
        assert [name for _, name in listed] == [c.name for c in cells]
        assert {(path.parent / href).resolve() for href, _ in listed} == {
            (folder / p).resolve() for p in pages.values()
        }
        assert f"l0 {one['l0']:.1f}, fvu {one['fvu']:.3f}" in page


def test_the_rows_of_the_report_are_linked_to_the_pages(shown):
    folder, rows, cells, *_ = shown
    pages = page_paths(cells, cells[rows.index(best_row(rows, most_l0=8.0))])
    report = (folder / "report.html").read_text()
    assert re.findall('<a href="(features[^"]*)">page</a>', report) == [
        quote(pages[cell]) for cell in cells
    ]


def test_names_are_given_to_pages_that_are_there_and_taken_away_again(shown, tmp_path):
    folder, rows, cells, *_ = shown
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    pages = page_paths(cells, cells[rows.index(best_row(rows, most_l0=8.0))])
    before = {name: (run / name).read_bytes() for name in pages.values()}
    about = page_of(run / pages[cells[2]])
    names = {"3": "a <b>name</b>\u202e", "0": "another"}
    given = tmp_path / "named_features.json"
    given.write_text(json.dumps({"cell": about["cell"], "checksum": about["checksum"],
                                 "names": names, "by": "a test"}))  # fmt: skip
    choice = ShowChoice(page_l0=8.0, n_page_tokens=2000, pages="all", names=(),
                        export="dictionary_learning")  # fmt: skip
    named = replace(choice, names=(str(given),))
    assert is_shown(run, choice)
    assert is_shown(run, named)
    assert rename(run, named)
    ours = page_of(run / pages[cells[2]])
    assert ours["names"] == {"0": "another", "3": "a <b>name</b>⟨202E⟩"}
    for cell in cells:
        assert page_of(run / pages[cell])["n_named"] == {cells[2].name: 2}
    report = (run / "report.html").stat().st_mtime_ns
    assert rename(run, named)  # nothing to do
    assert rename(run, choice)
    assert {name: (run / name).read_bytes() for name in pages.values()} == before
    assert (run / "report.html").stat().st_mtime_ns == report
    (run / pages[cells[2]]).write_text("damaged")
    assert not rename(run, named)
    assert not rename(run, named)  # and is not taken for done


def test_the_page_looks_at_held_out_text_by_the_raw_autoencoder(shown, tmp_path, monkeypatch):
    folder, rows, cells, recipe, target, _ = shown
    shutil.copytree(folder / "saes", tmp_path / "saes")
    seen = {}

    def keep(path, data, **more) -> None:
        seen.update(data=data, **more)

    monkeypatch.setattr(run_pages, "write_feature_page", keep)
    write_pages(tmp_path, {cells[4]: rows[4]}, best=cells[4], recipe=recipe, target=target,
                n_tokens=2000, names={})  # fmt: skip
    data = seen["data"]
    held_out = held_out_of(target, n_tokens=2000)
    assert data.n_tokens == held_out.n_kept
    sae = load_sae(sae_folder(folder, cells[4]))
    _, kept, codes = codes_of(held_out, sae)
    codes = codes[kept]
    assert data.n_active.tolist() == (codes > 0).sum(dim=0).tolist()
    assert data.max_activation.tolist() == pytest.approx(codes.amax(dim=0).tolist(), rel=1e-5)
    assert len(seen["token_texts"]) == target.lm.vocab_size
    cosine = sae.W_dec @ sae.W_dec.T - 2 * torch.eye(sae.n_dict)
    assert data.nearest.index[:, 0].tolist() == cosine.argmax(dim=1).tolist()
    # the direct path: down projection, final norm's gain, unembedding
    gpt2 = target.lm.model
    effect = sae.W_dec @ gpt2.transformer.h[1].mlp.c_proj.weight
    effect = (effect - effect.mean(dim=1, keepdim=True)) * gpt2.transformer.ln_f.weight
    logits = effect @ gpt2.lm_head.weight.T
    assert data.promoted.index[:, 0].tolist() == logits.argmax(dim=1).tolist()
    assert data.suppressed.index[:, 0].tolist() == logits.argmin(dim=1).tolist()


def test_a_page_can_be_made_where_ablation_costs_nothing(root, tmp_path):
    target = tiny_target(root)
    recipe = recipe_of(target)
    (cell,) = make_grid(40, seeds=range(1), l1_exps=range(-9, -8), size_exps=range(1))
    ((one, tensors),) = recipe.prepare([cell]).evaluate()
    assert math.isnan(one["ce_recovered"])
    recipe.save(tmp_path, cell, tensors, one)
    write_pages(tmp_path, {cell: row(0.5, 3) | one}, best=cell, recipe=recipe, target=target,
                n_tokens=200, names={})  # fmt: skip
    assert "ce_recovered none (ablation costs nothing)" in (tmp_path / "features.html").read_text()
    assert cell.name in (tmp_path / "features.html").read_text()


def test_what_was_left_out_is_said_and_the_page_leaves_it_out_too(
    root, tmp_path, capsys, monkeypatch
):
    target = massive_(tiny_target(root, site="resid_post", held_out=0.3))
    recipe = recipe_of(target)
    (cell,) = cells = make_grid(16, seeds=range(1), l1_exps=range(-9, -8), size_exps=range(1))
    ((one, tensors),) = recipe.prepare(cells).evaluate()
    recipe.save(tmp_path, cell, tensors, one | {"seconds": 1.0})
    n, text = say_left_out(tmp_path, cells)
    known = recipe.statistics
    assert n == int(tensors["n_left_out"]) > 0
    assert f"{known.n_left_out:,} of the first {known.n_rows:,} activations, {n:,} held-out" in text
    assert capsys.readouterr().out == text + "\n"
    pages = []
    monkeypatch.setattr(run_pages, "write_feature_page", lambda _, data, **__: pages.append(data))
    write_pages(tmp_path, {cell: row(0.5, 3)}, best=cell, recipe=recipe, target=target,
                n_tokens=1000, names={})  # fmt: skip
    assert pages[0].n_tokens == recipe.held_out.n_kept - n
    evaluate_one(load_sae(sae_folder(tmp_path, cell)), recipe)
    said = capsys.readouterr().out
    assert f"{recipe.held_out.n_kept - n:,} held-out tokens;" in said
    assert f"left out: {n:,}, of norms above {known.max_norm:.4g}" in said


def test_every_autoencoder_is_exported_with_the_same_output(shown):
    folder, _, cells, recipe, *_ = shown
    x = recipe.chunks.load(0).float()[:50]
    for cell in cells:
        state = torch.load(folder / "dictionary_learning" / cell.name / "ae.pt", weights_only=True)
        codes = torch.relu((x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"])
        x_hat = codes @ state["decoder.weight"].T + state["bias"]
        sae = load_sae(sae_folder(folder, cell))
        assert torch.allclose(x_hat, sae.decode(sae.encode(x)), atol=1e-4)


def test_a_library_gets_the_families_that_it_has_and_no_others(tmp_path):
    relu = sweep()[0]
    topk = [replace(relu, arch="topk", target_l0=k) for k in (2, 3)]
    for cell in (relu, *topk):
        save_sae(sae_folder(tmp_path, cell), sae_of(16).tensors, metadata={}, top_k=cell.target_l0)
    refined = replace(relu, arch="matryoshka_refined", target_l0=2)
    with pytest.raises(UserError, match="--export hub: sae_lens has no class that refines"):
        show_module._export(tmp_path, [*topk, refined], "hub")
    show_module._export(tmp_path, [], "hub")  # all diverged: nothing to publish
    assert not (tmp_path / "hub").exists()
    with pytest.raises(UserError, match="--export sparsify: it has topk alone, not relu: choose"):
        show_module._export(tmp_path, [*topk, relu], "sparsify")
    assert not (tmp_path / "sparsify").exists()
    show_module._export(tmp_path, topk, "sparsify")
    exported = {path.name for path in (tmp_path / "sparsify").iterdir()}
    assert exported == {cell.name for cell in topk}


def test_the_density_figures_data_are_counts_of_the_saved_densities(shown):
    folder, _, cells, *_ = shown
    with open(folder / "figures" / "densities.csv", newline="") as file:
        bins = list(csv.DictReader(file))
    n_counted = 0
    for cell in cells:
        density = feature_density(sae_folder(folder, cell))
        counts = {one["log10_low"]: int(one["n_features"]) for one in bins
                  if one["cell"] == cell.name}  # fmt: skip
        assert sum(counts.values()) == cell.n_dict
        assert counts[""] == (density == 0).sum()
        for low in (-2.0, -1.5, -1.25):
            within = (density >= 10**low) & (density < 10 ** (low + 0.25))
            assert counts[str(low)] == within.sum()
            n_counted += int(within.sum())
    assert n_counted > 100


def test_a_sweep_with_a_diverged_cell_is_shown_without_it(shown, tmp_path, monkeypatch):
    """And what was shown is on record, for a later choice."""
    monkeypatch.setattr("sparse_coding.figures.heatmap.DPI", 20)
    folder, rows, cells, recipe, target, _ = shown
    (tmp_path / "features").mkdir()
    (tmp_path / "features/seed0_of_an_earlier_choice.html").touch()
    best = rows.index(best_row(rows, most_l0=8.0))
    for k, cell in enumerate(cells):
        sae = load_sae(sae_folder(folder, cell))
        broken = {name: t * NAN if k == best else t for name, t in sae.tensors.items()}
        density = torch.zeros(cell.n_dict) if k == best else torch.full((cell.n_dict,), 0.01)
        more = {"density": density, "n_left_out": torch.tensor(0)}
        recipe.save(tmp_path, cell, broken | more, rows[k])
    bad = dict.fromkeys(("fvu", "mse", "ce_spliced", "ce_recovered"), NAN)
    with_nan = [one | bad if k == best else one for k, one in enumerate(rows)]
    choice = ShowChoice(page_l0=8.0, n_page_tokens=500, pages="best", names=(),
                        export="dictionary_learning")  # fmt: skip
    show(tmp_path, with_nan, cells=cells, recipe=recipe, target=target, choice=choice,
         context={})  # fmt: skip
    exported = {path.name for path in (tmp_path / "dictionary_learning").iterdir()}
    assert exported == {cell.name for cell in cells} - {cells[best].name}
    next_best = cells[with_nan.index(best_row(with_nan, most_l0=8.0))]
    assert page_of(tmp_path / "features.html")["cell"] == next_best.name
    assert list((tmp_path / "features").iterdir()) == []
    assert "1 cells diverged" in (tmp_path / "report.html").read_text()
    assert is_shown(tmp_path, choice)
    assert not is_shown(tmp_path, replace(choice, page_l0=9.0))
    assert not is_shown(tmp_path / "elsewhere", choice)


# --- figures ---


def sweep() -> list:
    return make_grid(16, seeds=range(1), l1_exps=range(-2, 1), size_exps=range(2))


def results() -> list[dict]:
    """Each column and row has a value of its own, so that a mix-up shows."""
    rows = []
    for i, cell in enumerate(sweep()):
        row = {name: (j + 1) / 100 + i / 1000 for j, name in enumerate(COLUMNS)}
        row |= {
            "seed": 0,
            "arch": "relu",
            "target_l0": None,
            "l1_alpha": cell.l1_alpha,
            "n_dict": cell.n_dict,
        }
        row |= {"expansion_factor": cell.size_ratio}
        rows.append(row | ({"mmcs_with_larger": None} if cell.size_exp else {}))
    return rows


def test_every_figure_is_written_with_its_data_from_the_columns_of_results_csv(tmp_path):
    rows = results()
    density = {cell: np.full(cell.n_dict, 0.01) for cell in sweep()}
    paths = draw_figures(tmp_path, rows, density, n_tokens=1000, l1_note="sum")
    assert list(paths) == [spec.name for spec in (*FIGURES, *FRONTIERS, DENSITIES)]
    for spec in (*FIGURES, *FRONTIERS):
        with open(paths[spec.name].with_suffix(".csv"), newline="") as file:
            means = {float(line["mean"]) for line in csv.DictReader(file) if line["mean"]}
        assert means == {row[spec.column] for row in rows if row[spec.column] is not None}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


def test_no_two_figures_share_a_file_and_each_says_what_to_look_for():
    specs = (*FIGURES, *FRONTIERS, DENSITIES)
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(len(spec.explanation.split(". ")) >= 2 for spec in specs)
