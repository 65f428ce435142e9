"""run.py with --target-site as a user runs it, on small models made here."""

import json
import re

import pytest
import torch
from builders.language_sweep import OFTEN, WIDTH, assert_same_numbers
from builders.models import D
from builders.scripts import assert_refused, bytes_under, table
from safetensors.torch import load_file

from sparse_coding.sae.saved import load_sae

FLAGS = ("--site", "mlp_in", "--target-site", "mlp_out", "--skip", "--arch", "relu", "batchtopk",
         "--target-l0", "4", "--expansion-exp-low", "2", "--expansion-exp-high", "3",
         "--batch-size", "32")  # fmt: skip
WITHOUT_GRID = ("--l1-exp-low", "-8", "--l1-exp-high", "-7")
METRICS = ("fvu", "l0", "mse", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_mean",
           "ce_recovered")  # fmt: skip


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("transcoders")
    done = world.finish(*FLAGS, *WITHOUT_GRID, "--export", "circuit_tracer", cwd=cwd)
    assert f"site: layer 1 of 0 to 1, mlp_in, width {D}, to predict mlp_out" in done.out
    return cwd


def test_a_run_leaves_transcoders_whose_evaluation_needs_no_flag(finished, world):
    rows = table(finished / "run")
    assert [row["arch"] for row in rows] == ["relu", "batchtopk"]
    for row, folder in zip(
        rows, sorted((finished / "run/saes").iterdir(), reverse=True), strict=True
    ):
        sae = load_sae(folder)
        assert sae.transcodes
        assert sae.W_skip.abs().min() > 0
        assert (sae.metadata["site"], sae.metadata["target_site"]) == ("mlp_in", "mlp_out")
        assert sae.metadata["arch"] == row["arch"]
        assert 0 < float(row["fvu"]) < 0.5
        assert float(row["ce_clean"]) < float(row["ce_spliced"]) < float(row["ce_zero"])
        done = world.server.run("--evaluate", folder, "--device", "cpu", cwd=finished)
        assert done.code == 0, done.err
        found = dict(line.split() for line in done.out.splitlines()[-len(METRICS) :])
        assert found == {name: f"{float(row[name]):.6g}" for name in METRICS}


def test_the_store_has_both_sites_and_says_so(finished):
    manifest = json.loads((finished / "acts/manifest.json").read_text())
    assert (manifest["metadata"]["site"], manifest["metadata"]["target_site"]) == (
        "mlp_in",
        "mlp_out",
    )
    chunk = load_file(finished / "acts/chunk-00000.safetensors")["activations"]
    assert chunk.shape[1] == 2 * D
    x, y = chunk.float().split(D, dim=1)
    assert not torch.allclose(x.norm(dim=1).mean(), y.norm(dim=1).mean(), rtol=0.1)


def test_the_page_and_the_report_speak_of_both_sites(finished):
    page = (finished / "run/features.html").read_text()
    assert "layer 1 mlp_in to mlp_out" in page
    assert "Transcoders on a language model" in (finished / "run/report.html").read_text()


def test_each_is_exported_for_circuit_tracer(finished):
    files = {path.rsplit("/", 1)[-1] for path in bytes_under(finished / "run/circuit_tracer")}
    assert files == {"layer_1.safetensors", "config.yaml"}


def test_killed_it_goes_on_to_the_same_bits_and_from_memory_too(finished, world, tmp_path):
    (tmp_path / "killed").mkdir()
    process = world.start(*FLAGS, *WITHOUT_GRID, cwd=tmp_path / "killed", patch=OFTEN)
    process.wait_until(lambda: list((tmp_path / "killed/run").glob("checkpoints/*/step-000001*")))
    process.kill()
    world.finish(*FLAGS, *WITHOUT_GRID, cwd=tmp_path / "killed")
    assert_same_numbers(tmp_path / "killed", finished)
    (tmp_path / "memory").mkdir()
    more = ("--activations-in", "memory")
    world.finish(*FLAGS, *WITHOUT_GRID, *more, cwd=tmp_path / "memory")
    assert_same_numbers(tmp_path / "memory", finished, store=False)


def test_the_hubs_folder_says_that_they_are_transcoders(world, finished):
    world.finish(*FLAGS, *WITHOUT_GRID, "--export", "hub", cwd=finished)
    hub = finished / "run/hub"
    folders = sorted(hub.glob("blocks.1.mlp.hook_in/*/cfg.json"))
    kinds = [json.loads(path.read_text())["architecture"] for path in folders]
    assert sorted(kinds) == ["jumprelu_skip_transcoder", "skip_transcoder"]
    card = (hub / "README.md").read_text()
    assert re.search("# 2 transcoders on `.*`, layer 1, mlp_in", card)
    assert "to predict `mlp_out` (blocks.1.hook_mlp_out)" in card


REFUSED = {
    "--site mlp_in --target-site mlp_act": [
        f"width {WIDTH}",
        f"width {D}",
        "--target-site mlp_act",
    ],
    "--site mlp_act --target-site mlp_out": [f"width {WIDTH}", f"width {D}"],
    "--site mlp_out --target-site mlp_out": ["--target-site mlp_out", "after --site mlp_out"],
    "--site mlp_out --target-site mlp_in": ["--target-site mlp_in", "after --site mlp_out"],
    "--site mlp_out --target-site resid": ["target-site", "resid"],
    "--skip": ["--skip is for --target-site"],
    "--site mlp_in --target-site mlp_out --arch relu matryoshka_refined": ["matryoshka_refined"],
    "--site mlp_in --target-site mlp_out --export dictionary_learning": ["has no transcoders"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_makes_no_transcoder_is_one_line_and_nothing_is_written(flags, world, tmp_path):
    done = world.run(*WITHOUT_GRID, *flags.split(), cwd=tmp_path, timeout_s=30)
    assert_refused(done, *REFUSED[flags])
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "acts").exists()


def test_a_store_and_a_run_of_autoencoders_are_refused(world, finished):
    done = world.run("--site", "mlp_in", *WITHOUT_GRID, "--output-dir", "other", cwd=finished)
    assert_refused(done, "target_site mlp_out there, None here")
    done = world.run("--site", "mlp_in", *WITHOUT_GRID, "--activations-dir", "b", cwd=finished)
    assert_refused(done, "belongs to other constants", "skip True there, None here")


def test_evaluating_at_one_site_alone_is_refused(world, finished):
    (folder, *_) = sorted((finished / "run/saes").iterdir())
    done = world.server.run("--evaluate", folder, "--target-site=", "--device", "cpu", cwd=finished)
    assert_refused(done, "give that site as --target-site")
