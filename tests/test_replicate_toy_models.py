"""replicate_toy_models.py as a user meets it: bad input, resume, shards, signals, what is on disk.

Every run is a process of its own in another directory, without network. The sweep is tiny, see
builders/toy_sweep.py.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.faults import KINDS as FAULTS
from builders.scripts import (
    ROOT,
    TRAINING,
    Done,
    Server,
    assert_refused,
    bytes_under,
    mounted_tmpfs,
    run_script,
    table,
    temporaries,
)
from builders.sweeps import Sweep
from builders.toy_sweep import (
    COARSE,
    L1_EXPS,
    MINIMAL,
    N_STEPS,
    OFTEN,
    SEEDS,
    TINY,
    WIDTHS,
    assert_same_numbers,
)

from sparse_coding.sae.families import PREFIXES

SCRIPT = ROOT / "replicate_toy_models.py"
SMALL_MEMORY = ("--max-memory-gb", "0.00073")  # two or more groups of cells per seed
N_CALLS = N_STEPS // 20 * 2  # of it per seed, as records are 20 steps apart
OF_TRUTH = "mcc,uniqueness,f1,precision,recall,explained_variance,shrinkage"
AS_TRAINED = "fvu_trained,l0_trained,f1_trained,precision_trained,recall_trained,shrinkage_trained"
HEADER = (
    "seed,world,arch,target_l0,l1_alpha,dict_ratio,n_dict,n_steps,mmcs,mmcs_dict_to_truth,"
    f"mmcs_with_larger,n_recovered,{OF_TRUTH},s_dec,n_dead,n_revived,l0,fvu,mse,{AS_TRAINED},l1,"
    "seconds"
)
# no meaning for relu on its grid
OF_OTHERS = {"target_l0", "s_dec", *AS_TRAINED.split(",")}
FIGURES = ("mmcs", "dead_features", "mmcs_with_larger", "reconstruction_loss")
needs_cpu_torch = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(scope="session")
def finished(toy_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny sweep, run once. Nobody may write to it."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    done = toy_server.run(*TINY, "--output-dir", "run", cwd=cwd, patch=COARSE)
    assert done.code == 0, done.err
    assert done.err_lines == []
    return cwd / "run"


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- bad input ---------------------------------------------------------------------------------

BAD_FLAGS = {
    "--n-stepz 5": ["--n-stepz", "did you mean --n-steps?"],
    "--n-stepz=5": ["--n-stepz", "did you mean --n-steps?"],
    "--n_activ 1": ["--n_activ", "did you mean --n-active?"],
    "junk": ["junk", "--help"],
    "--n-steps 5 6": ["6", "--help"],
    "--n-steps 0": ["--n-steps 0", "at least 1"],
    "--n-steps -5": ["--n-steps -5", "at least 1"],
    "--n-steps x": ["--n-steps", "'x'", "int"],
    "--n-steps": ["--n-steps", "value"],
    "--n-steps 1.5": ["--n-steps", "'1.5'"],
    "--l1-exp-low 3 --l1-exp-high 3": ["--l1-exp-high 3", "above the low end 3"],
    "--preset full --n-active 600": ["--n-active 600", "--n-true-features 512"],
    "--n-active nan": ["--n-active nan", "--n-true-features"],
    "--lr 0": ["--lr 0", "above 0"],
    "--lr inf": ["--lr inf"],
    "--shard 3/2": ["--shard 3/2", "i/N"],
    "--shard 0/2": ["--shard 0/2", "i/N"],
    "--shard x": ["--shard x", "i/N"],
    "--preset foo": ["'foo'", "--preset", "smoke", "quick", "full"],
    "--preset smoke --dict-ratio-exp-low -9": ["64 x 2^-9", "raise the low end"],
    "--preset smoke --max-memory-gb 0.000001": ["GB", "--max-memory-gb"],
    "--verify --n-steps 100": ["--n-steps 100", "5000", "--verify"],
    "--verify --preset smoke": ["--verify", "--preset"],
    "--fresh --shard 1/2": ["--fresh", "shard"],
    "--arch foo": ["'foo'", "--arch", "batchtopk"],
    "--preset smoke --arch topk --target-l0 3 600": ["--target-l0 600", "32 features", "topk"],
    "--arch topk --l1-exp-low -4": ["--l1-exp-low", "--arch relu"],
    "--arch matryoshka --prefixes 0.5 0.25 1": ["--prefixes", "ascend"],
    "--prefixes 0.5 1": ["--prefixes", "--arch matryoshka"],
    "--world 3": ["--world", "--data-law synth", "drop it"],
    "--preset synth1k --n-active 3": ["--n-active", "--data-law post", "drop it"],
    "--preset synth1k --world none.npz": ["none.npz is no world", "loadings"],
    "--preset synth1k --n-true-features 84": ["--n-true-features 84", "at least 85", "tree"],
    "--preset synth1k --target-l0 257": ["--target-l0 257", "256 features"],
    "--preset synth1k --arch topk": ["--target-l0", "5.5", "whole numbers", "topk"],
    "--preset synth1k --n-eval-samples 0": ["--n-eval-samples 0", "at least 1"],
    "--preset sparse_but_wrong --n-true-features 101": ["--n-true-features 101", "100"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_line_naming_value_and_remedy_and_nothing_is_written(
    flags: str, toy_server: Server, tmp_path: Path
):
    done = toy_server.run(*flags.split(), "--wandb-mode", "disabled", cwd=tmp_path, timeout_s=20)
    assert_refused(done, *BAD_FLAGS[flags])
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


@needs_cpu_torch
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--device cuda", ["--device cuda", "--device cpu"]),
        ("--precision tf32", ["--precision tf32", "float32, bf16, bf16x3"]),
    ],
)
def test_what_needs_cuda_is_refused_without_it(
    flags: str, words: list[str], toy_server: Server, tmp_path: Path
):
    assert_refused(toy_server.run(*flags.split(), cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


@needs_cpu_torch
def test_bf16_is_refused_on_a_cpu_without_it(toy_server: Server, tmp_path: Path):
    lacks = {"sparse_coding.sae.engines.cpu_bf16.NEEDED": []}
    for flag in ("bf16", "bf16x3"):
        done = toy_server.run("--precision", flag, cwd=tmp_path, patch=lacks)
        assert_refused(done, f"--precision {flag}", "neither AMX nor AVX512_BF16", "use float32")
    assert list(tmp_path.iterdir()) == []


@needs_cpu_torch
@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx2"), reason="MKL multiplies bf16 with AVX2"
)
def test_the_precision_is_part_of_what_a_folder_holds(toy_server: Server, tmp_path: Path):
    flags = [*TINY, "--output-dir", "run", "--shard", "1/2"]
    has = {"sparse_coding.sae.engines.cpu_bf16.NEEDED": ["avx2"]}
    assert toy_server.run(*flags, "--precision", "bf16", cwd=tmp_path, patch=has).code == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["constants"]["precision"] == "bf16"
    assert_refused(toy_server.run(*flags, cwd=tmp_path), "precision", "bf16", "float32")


def test_the_error_is_one_line_in_a_fresh_interpreter_too(tmp_path: Path):
    assert_refused(run_script([SCRIPT, "--n_stepz", "5"], cwd=tmp_path), "--n-steps?")
    assert list(tmp_path.iterdir()) == []


def test_only_the_constants_of_the_chosen_preset_are_checked(toy_server: Server, tmp_path: Path):
    """full has n_active 5: too many for 4 true features, but smoke has 3."""
    flags = [*TINY, "--n-true-features", "4", "--n-steps", "1", "--shard", "1/18"]
    assert toy_server.run(*flags, cwd=tmp_path).code == 0


def test_an_output_directory_that_is_a_file_or_below_one_is_refused(
    toy_server: Server, tmp_path: Path
):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for path in (file, file / "below"):
        done = toy_server.run(*TINY, "--output-dir", path, cwd=tmp_path)
        assert_refused(done, f"--output-dir {path}", "choose another")
    assert bytes_under(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("path", ["/proc/no", "x" * 300, "/dev/null/x"])
def test_an_output_directory_that_cannot_be_made_is_refused(
    path: str, toy_server: Server, tmp_path: Path
):
    done = toy_server.run(*TINY, "--output-dir", path, cwd=tmp_path)
    assert_refused(done, "--output-dir", "choose another")


def test_a_folder_without_permission_is_refused(toy_server: Server, tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    done = toy_server.run(*TINY, "--output-dir", tmp_path / "run")
    tmp_path.chmod(0o700)
    assert_refused(done, "can't be written", "choose another")


def test_a_read_only_disk_is_refused(toy_server: Server, tmp_path: Path):
    with mounted_tmpfs(tmp_path / "disk", "ro"):
        done = toy_server.run(*TINY, "--output-dir", tmp_path / "disk/run")
    assert_refused(done, "--output-dir", "choose another")


def test_a_full_disk_is_refused_before_anything_is_written(toy_server: Server, tmp_path: Path):
    with mounted_tmpfs(tmp_path / "disk", "size=8k"):
        (tmp_path / "disk/mine.txt").write_text("x" * 4000)
        done = toy_server.run(*TINY, "--output-dir", tmp_path / "disk/run")
        assert bytes_under(tmp_path / "disk") == {"mine.txt": b"x" * 4000}
    assert_refused(done, "disk full", "free some space")


def test_a_disk_that_fills_up_while_training_is_one_line_and_the_same_command_goes_on(
    finished: Path, toy_server: Server, tmp_path: Path
):
    folder, filler = tmp_path / "disk/run", tmp_path / "disk/filler"
    with mounted_tmpfs(tmp_path / "disk", "size=80m"):
        process = toy_server.start(
            *TINY, "--output-dir", folder, patch=OFTEN, pause_at=(TRAINING, 5)
        )
        process.wait_until_paused()
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        process.resume()
        done = process.wait()
        assert list(folder.rglob("*.tmp")) == []
        assert not (folder / "DONE").exists()
        filler.unlink()
        again = toy_server.run(*TINY, "--output-dir", folder)
        assert again.code == 0, again.err
        assert again.err_lines == []
        assert_same_numbers(folder, finished)
    assert done.code == 2, done.err
    assert len(done.err_lines) == 1, done.err
    assert "error: disk full" in done.err_lines[0]
    assert "free some space" in done.err_lines[0]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_write_that_fails_is_one_line_and_the_same_command_goes_on(
    kind: str, toy_sweep: Sweep, tmp_path: Path
):
    n = toy_sweep.n_operations((kind,))
    for k in (1, 2, n // 2, n):
        toy_sweep.assert_fails_and_goes_on(tmp_path / f"{kind}{k}", kind, k)


@pytest.mark.parametrize("n_bytes", [1500, 6000])
def test_a_limit_on_the_size_of_files_is_one_line_and_the_same_command_goes_on(
    n_bytes: int, minimal: Path, toy_server: Server, tmp_path: Path
):
    """6 000 bytes are enough for an autoencoder, but not for a checkpoint."""
    limit = ("limit_file_size", {"n_bytes": n_bytes})
    done = toy_server.run(*TINY, *MINIMAL, cwd=tmp_path, patch=OFTEN | COARSE, before=limit)
    assert_refused(done, "file larger than the system allows", "ulimit -f")
    assert temporaries(tmp_path) == []
    assert toy_server.run(*TINY, *MINIMAL, cwd=tmp_path, patch=COARSE).code == 0
    assert_same_numbers(tmp_path / "run", minimal)


def test_a_folder_that_is_not_ours_is_refused_and_not_even_fresh_deletes_it(
    toy_server: Server, tmp_path: Path
):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    for config in (None, "[1]", '{"constants": 3}', "{tor"):
        if config is not None:
            (tmp_path / "thesis/config.json").write_text(config)
        before = bytes_under(tmp_path)
        done = toy_server.run(*TINY, "--output-dir", "thesis", "--fresh", cwd=tmp_path)
        assert_refused(done, "--output-dir thesis", "choose another")
        assert bytes_under(tmp_path) == before


def test_fresh_deletes_nothing_for_a_run_that_cannot_start(finished: Path, toy_server: Server):
    before = bytes_under(finished)
    flags = ["--output-dir", finished, "--fresh", "--max-memory-gb", "0.000001"]
    assert_refused(toy_server.run(*TINY, *flags), "GB")
    assert bytes_under(finished) == before


def test_a_folder_of_other_constants_is_refused_with_their_names_and_stays_as_it_is(
    finished: Path, toy_server: Server
):
    before = bytes_under(finished)
    flags = [*TINY, "--output-dir", finished, "--n-steps", "241", "--l1-normalisation", "sum"]
    done = toy_server.run(*flags)
    assert_refused(done, "n_steps 240 there, 241 here", "l1_normalisation", "--fresh")
    assert "seed" not in done.err.split("constants")[1].replace(str(finished), "")
    assert bytes_under(finished) == before


# --- flags that are right ----------------------------------------------------------------------


def test_help_shows_every_constant_with_its_meaning_and_default(tmp_path: Path):
    source = SCRIPT.read_text().split("class Config:")[1].split("\nPRESETS")[0]
    fields = re.findall(r"^    (\w+): [^#]+? = ([^#]+?)(?:  # (.+))?$", source, flags=re.MULTILINE)
    assert len(fields) > 20
    done = run_script([SCRIPT, "--help"], cwd=tmp_path, more_environment={"COLUMNS": "200"})
    assert done.code == 0
    assert done.err == ""
    shown = " ".join(done.out.replace("│", " ").split())
    for name, default, comment in fields:
        assert f"--{name.replace('_', '-')}" in shown
        with contextlib.suppress(SyntaxError):
            value = eval(default, {"PREFIXES": PREFIXES})
            texts = [" ".join(map(str, value))] if isinstance(value, tuple) else [default, value]
            assert any(f"default: {text}" in shown for text in texts)
        assert comment in shown
    assert list(tmp_path.iterdir()) == []


@needs_cpu_torch
def test_auto_is_quick_without_cuda_and_the_first_line_says_so_and_where_the_price_of_full_is(
    toy_server: Server, tmp_path: Path
):
    process = toy_server.start("--wandb-mode", "disabled", cwd=tmp_path)
    process.wait_until(lambda: "results go to" in process.out())
    process.kill()
    first_line = process.out().splitlines()[0]
    assert re.match(r"quick: 102 SAEs .*--preset full: 153 SAEs.* README.md", first_line)
    assert next((tmp_path / "outputs").iterdir()).name.startswith("replicate_toy_models-quick-")


def test_a_flag_wins_over_the_preset_and_underscores_work(finished: Path):
    constants = json.loads((finished / "config.json").read_text())["constants"]
    assert constants["n_steps"] == N_STEPS  # 600 in smoke
    assert constants["n_active"] == 3.0  # smoke's; 5 in full


def test_underscores_and_equals_signs_mean_the_same_constants(finished: Path, toy_server: Server):
    flags = [flag.replace("-", "_").replace("__", "--", 1) for flag in TINY if flag[0] == "-"]
    assert "--n_steps" in flags
    underscored = [f.replace("-", "_").replace("__", "--", 1) if f[:2] == "--" else f for f in TINY]
    before = bytes_under(finished)
    done = toy_server.run(*underscored, f"--output-dir={finished}", f"--n-steps={N_STEPS}")
    assert done.code == 0, done.err
    assert bytes_under(finished) == before


# --- what a run leaves -------------------------------------------------------------------------


def test_the_table_has_the_promised_columns_and_one_row_per_cell_of_both_seeds(finished: Path):
    rows = table(finished)
    assert ",".join(rows[0]) == HEADER
    cells = [(int(r["seed"]), int(r["n_dict"]), float(r["l1_alpha"])) for r in rows]
    assert cells == [(s, n, 10 ** (e / 4)) for s in SEEDS for n in WIDTHS for e in L1_EXPS]
    assert {r["n_steps"] for r in rows} == {str(N_STEPS)}
    assert [r["mmcs_with_larger"] == "" for r in rows] == [r["n_dict"] == "32" for r in rows]
    empty = {k for r in rows for k, v in r.items() if v == "" and k != "mmcs_with_larger"}
    assert empty == OF_OTHERS


def test_the_run_folder_has_exactly_the_promised_files(finished: Path):
    from safetensors.torch import load_file

    names = set(bytes_under(finished))
    stems = [f"seed{s}_dict{n:06d}_l1exp{e:+03d}" for s in SEEDS for n in WIDTHS for e in L1_EXPS]
    expected = {"config.json", "metrics.jsonl", "results.csv", "report.html", "DONE"}
    expected |= {"world.safetensors"} | {
        f"saes/{stem}/{file}" for stem in stems for file in ("cfg.json", "sae_weights.safetensors")
    }
    expected |= {f"figures/{name}.{end}" for name in FIGURES for end in ("png", "csv")}
    assert names - {f"cells/{stem}.json" for stem in stems} == expected

    world = load_file(finished / "world.safetensors")
    assert {name: tuple(t.shape) for name, t in world.items()} == {
        f"seed{s}.{what}": shape
        for s in SEEDS
        for what, shape in (("features", (16, 8)), ("covariance", (16, 16)))
    }
    assert not torch.equal(world["seed0.features"], world["seed1.features"])
    sae = load_file(finished / "saes" / stems[0] / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in sae.items()} == {
        "W_enc": (8, 8), "b_enc": (8,), "W_dec": (8, 8), "b_dec": (8,)
    }  # fmt: skip
    torch.testing.assert_close(sae["W_dec"].norm(dim=1), torch.ones(8))


def test_metrics_are_json_with_namespaced_keys_and_each_step_once(finished: Path):
    found = records(finished)
    steps = [(r["seed"], r["group"], r["step"]) for r in found]
    assert len(set(steps)) == len(steps) == len(SEEDS) * N_STEPS // 20
    keys = {key for r in found for key in r} - {"step", "seed", "group"}
    assert {key.split("/")[0] for key in keys} == {"train", "metrics", "perf"}


def test_config_json_says_what_was_run_and_nothing_about_the_machine_owner(finished: Path):
    text = (finished / "config.json").read_text()
    config = json.loads(text)
    assert config["constants"]["n_seeds"] == 2
    assert config["command"].startswith("python replicate_toy_models.py --preset smoke")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert config["git_commit"] == (head.stdout.strip() or None)
    assert config["git_dirty"] in ((True, False) if head.stdout else (None,))
    assert {"python", "torch", "numpy"} <= config["versions"].keys()
    assert config["device"].startswith("CPU")
    assert os.uname().nodename not in text
    assert str(finished.parent) not in text


def test_the_report_needs_no_network(finished: Path):
    html = (finished / "report.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", html) == []
    assert re.findall(r"""(?:url\(|@import)\s*["']?\s*(?:https?:)?//""", html) == []
    assert html.count("data:image/png;base64,") == len(FIGURES)


# --- the same numbers, however they are made ---------------------------------------------------


def test_a_second_run_has_the_same_bits_and_fresh_runs_again(
    finished: Path, toy_server: Server, tmp_path: Path
):
    assert toy_server.run(*TINY, "--output-dir", "run", cwd=tmp_path, patch=COARSE).code == 0
    assert_same_numbers(tmp_path / "run", finished, figures=True)
    (tmp_path / "run/results.csv").write_text("")
    (tmp_path / "link").symlink_to("run")
    again = toy_server.run(*TINY, "--output-dir", "link", "--fresh", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "to train: 18 SAEs" in again.out
    assert_same_numbers(tmp_path / "run", finished)


def test_the_same_command_again_says_that_it_is_done_and_where_and_changes_no_file(
    finished: Path, toy_server: Server
):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix != ".lock"}
    done = toy_server.run(*TINY, "--output-dir", finished)
    assert done.code == 0
    assert done.err == ""
    assert "done" in done.out
    assert str(finished / "report.html") in done.out
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix != ".lock"}
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_two_shards_and_the_command_without_give_the_single_runs_table(
    finished: Path, toy_server: Server, tmp_path: Path
):
    flags = [*TINY, "--output-dir", "run"]
    first = toy_server.run(*flags, "--shard", "1/2", cwd=tmp_path)
    assert first.code == 0, first.err
    assert "9 of 18 cells are left" in first.out
    assert "without --shard" in first.out
    assert not (tmp_path / "run/results.csv").exists()
    second = toy_server.run(*flags, "--shard", "2/2", cwd=tmp_path)
    assert second.code == 0, second.err
    merged = toy_server.run(*flags, cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert (tmp_path / "run/DONE").exists()
    assert_same_numbers(tmp_path / "run", finished)


def test_shards_of_two_machines_merge_when_their_folders_are_copied_together(
    finished: Path, toy_server: Server, tmp_path: Path
):
    for i in (1, 2):
        flags = ["--output-dir", f"machine{i}", "--shard", f"{i}/2"]
        assert toy_server.run(*TINY, *flags, cwd=tmp_path).code == 0
        shutil.copytree(tmp_path / f"machine{i}", tmp_path / "both", dirs_exist_ok=True)
    merged = toy_server.run(*TINY, "--output-dir", "both", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert "to train: 18" not in merged.out
    assert_same_numbers(tmp_path / "both", finished)


@pytest.mark.long
def test_torchrun_gives_the_single_runs_table(finished: Path, tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_script([*torchrun, SCRIPT, *TINY, "--output-dir", "run"], cwd=tmp_path)
    assert done.code == 0, done.err
    assert_same_numbers(tmp_path / "run", finished)


def test_a_shard_without_cells_is_no_error(toy_server: Server, tmp_path: Path):
    done = toy_server.run(*TINY, "--shard", "100/100", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "18 of 18 cells are left" in done.out


def test_a_cell_is_the_same_bits_alone_in_the_grid_and_in_groups_split_by_memory(
    finished: Path, toy_server: Server, tmp_path: Path
):
    split = toy_server.run(*TINY, *SMALL_MEMORY, "--output-dir", "split", cwd=tmp_path)
    assert split.code == 0, split.err
    assert int(re.search(r"(\d+) groups", split.out)[1]) >= 4
    assert_same_numbers(tmp_path / "split", finished)
    one = "--l1-exp-low -1 --l1-exp-high 0 --dict-ratio-exp-low 0 --dict-ratio-exp-high 1"
    alone = toy_server.run(*TINY, *one.split(), "--output-dir", "alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    files = bytes_under(tmp_path / "alone/saes")
    assert len(files) == 2 * len(SEEDS)
    for name, data in files.items():
        assert (finished / "saes" / name).read_bytes() == data


def test_a_saved_autoencoder_is_evaluated_on_its_own_world(
    finished: Path, toy_server: Server, tmp_path: Path
):
    """Also from a folder that has been moved, and without any flag."""
    for row in (table(finished)[1], table(finished)[-1]):
        e = round(4 * math.log10(float(row["l1_alpha"])))
        name = f"seed{row['seed']}_dict{int(row['n_dict']):06d}_l1exp{e:+03d}"
        shutil.copytree(finished / "saes" / name, tmp_path / name)
        done = toy_server.run("--evaluate", name, cwd=tmp_path)
        assert done.code == 0, done.err
        printed = dict(line.split() for line in done.out.splitlines())
        of_one = ["mmcs", "mmcs_dict_to_truth", "n_recovered", *OF_TRUTH.split(",")]
        of_one += ["n_dead", "l0", "fvu", "mse", "l1"]
        assert list(printed) == of_one
        for column, value in printed.items():
            assert float(value) == pytest.approx(float(row[column]), rel=1e-5, abs=1e-9), column
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("seed")} == set()


def test_evaluation_of_what_is_no_autoencoder_of_this_width_is_refused(
    finished: Path, toy_server: Server, tmp_path: Path
):
    folder = next((finished / "saes").iterdir())
    done = toy_server.run("--evaluate", str(folder), "--activation-dim", "9", cwd=tmp_path)
    assert_refused(done, "width 8", "--activation-dim 9")
    assert_refused(toy_server.run("--evaluate", "nowhere", cwd=tmp_path), "no such folder: nowhere")


def test_what_a_stranger_writes_into_cfg_json_chooses_the_world_and_nothing_else(
    finished: Path, toy_server: Server, tmp_path: Path
):
    folder = next((finished / "saes").iterdir())
    shutil.copytree(folder, tmp_path / "sae")
    path = tmp_path / "sae/cfg.json"
    config = json.loads(path.read_text())
    del config["checksum"]
    own = config["metadata"]["sparse_coding"]["flags"]

    def evaluated(flags: object) -> Done:
        config["metadata"]["sparse_coding"]["flags"] = flags
        path.write_text(json.dumps(config))
        return toy_server.run("--evaluate", "sae", cwd=tmp_path)

    plain = evaluated(own)
    evil = {"output_dir": "evil", "fresh": True, "preset": "full", "no_such_flag": 3}
    assert evaluated(own | evil) == plain
    assert plain.code == 0, plain.err
    for flags, named in (
        (own | {"n_active": "many"}, ["--n-active", "many"]),
        (own | {"n_active": [3]}, ["n_active [3] is no number or text"]),
        (own | {"data_law": "theirs"}, ["--data-law", "theirs"]),
        ([1, 2], ["flags is no object"]),
        (own | {"n_true_features": 10**7}, ["--n-true-features 10000000 needs"]),
    ):
        assert_refused(evaluated(flags), *named)
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_a_folder_from_before_november_2026_is_merged(
    finished: Path, toy_server: Server, tmp_path: Path
):
    """There a dictionary was a file of its own, and lr was called learning_rate."""
    old, since = tmp_path / "old", {"arch": "relu", "n_revived": "", "world": ""}
    since |= dict.fromkeys(OF_TRUTH.split(","), "")
    shutil.copytree(finished, old)
    for weights in old.glob("saes/*/sae_weights.safetensors"):
        (old / "dictionaries").mkdir(exist_ok=True)
        weights.rename(old / "dictionaries" / f"{weights.parent.name}.safetensors")
    shutil.rmtree(old / "saes")
    for path in old.glob("cells/*.json"):
        row = json.loads(path.read_text())
        then = [name for name in HEADER.split(",") if name not in {*since, *OF_OTHERS}]
        path.write_text(json.dumps({column: row[column] for column in then}))
    config = json.loads((old / "config.json").read_text())
    for name in ("arch", "target_l0", "prefixes", "world", "n_worlds", "n_eval_samples",
                 "decoder_rows"):  # fmt: skip
        del config["constants"][name]
    config["constants"]["learning_rate"] = config["constants"].pop("lr")
    del config["checksum"]
    (old / "config.json").write_text(json.dumps(config))
    for name in ("results.csv", "DONE"):
        (old / name).unlink()
    done = toy_server.run(*TINY, "--output-dir", str(old), cwd=tmp_path)
    assert done.code == 0, done.err
    assert table(old) == [row | since for row in table(finished)]
    assert (old / "DONE").exists()


# --- stopped, killed, damaged ------------------------------------------------------------------


def test_runs_killed_at_random_moments_end_with_the_same_bits_and_leave_no_litter(
    finished: Path, toy_server: Server, tmp_path: Path
):
    rng, folder = random.Random(0), tmp_path / "run"
    flags = [*TINY, *SMALL_MEMORY, "--output-dir", folder]
    for call in (2, 30, 5, 9, 40, 3):  # of this start: in the first group, or in a later one
        process = toy_server.start(*flags, patch=OFTEN, pause_at=(TRAINING, call))
        process.wait_until_paused()
        process.kill()
        assert any(folder.glob("checkpoints/*/step-*"))
    for _ in range(4):  # anywhere, start-up included
        with contextlib.suppress(pytest.fail.Exception):
            toy_server.start(*flags, patch=OFTEN).wait(rng.uniform(0, 0.3))  # kills it
    last = toy_server.run(*flags, patch=OFTEN)
    assert last.code == 0, last.err
    assert last.err_lines == []
    assert_same_numbers(folder, finished)
    steps = [(r["seed"], r["group"], r["step"]) for r in records(folder)]
    assert len(set(steps)) == len(steps)
    litter = [p.name for p in folder.rglob("*") if p.name.endswith(".tmp")]
    assert litter == []
    assert not (folder / "checkpoints").exists()


def test_a_kill_while_the_very_first_file_is_written_does_not_lock_the_folder_up(
    toy_server: Server, tmp_path: Path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.json.4194305.tmp").write_text('{"const')
    flags = [*TINY, "--n-steps", "1", "--output-dir", "run"]
    done = toy_server.run(*flags, cwd=tmp_path)
    assert done.code == 0, done.err
    assert list((tmp_path / "run").rglob(".*.tmp")) == []


def interrupted(toy_server: Server, folder: Path, signum: int) -> Done:
    """A run in the folder, stopped by the signal in its second seed, two checkpoints written."""
    point = (TRAINING, N_CALLS + 10)
    process = toy_server.start(*TINY, "--output-dir", folder, patch=OFTEN, pause_at=point)
    process.wait_until_paused()
    process.signal(signum)
    process.resume()
    return process.wait()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_saves_and_says_how_to_go_on(
    signum: int, code: int, finished: Path, toy_server: Server, tmp_path: Path
):
    folder = tmp_path / "run"
    done = interrupted(toy_server, folder, signum)
    assert done.code == code, done.err
    assert len(done.err_lines) == 1, done.err
    assert re.search(r"saved at step \d+ of 240", done.err_lines[0])
    assert "same command" in done.err_lines[0]
    step = int(re.search(r"step (\d+)", done.err_lines[0])[1])
    newest = max(p.name for p in folder.glob("checkpoints/*/step-*.safetensors"))
    assert newest == f"step-{step:08d}.safetensors"
    again = toy_server.run(*TINY, "--output-dir", folder)
    assert again.code == 0, again.err
    assert_same_numbers(folder, finished)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_before_training_leaves_a_folder_that_the_same_command_finishes(
    signum: int, code: int, toy_server: Server, tmp_path: Path
):
    flags = [*TINY, "--n-steps", "1", "--output-dir", tmp_path / "run"]
    process = toy_server.start(*flags, pause_at=("sparse_coding.sweep.training.groups_to_train", 1))
    process.wait_until_paused()
    process.signal(signum)
    process.resume()
    done = process.wait()
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert len(done.err_lines) <= 1
    assert toy_server.run(*flags).code == 0


@pytest.mark.parametrize("harm", ["truncated", "one bit"])
@pytest.mark.parametrize("n_damaged", [1, 2])
def test_a_damaged_checkpoint_falls_back_to_the_previous_or_to_the_start(
    n_damaged: int, harm: str, finished: Path, toy_server: Server, tmp_path: Path
):
    folder = tmp_path / "run"
    interrupted(toy_server, folder, signal.SIGTERM)
    checkpoints = sorted(folder.glob("checkpoints/*/step-*.safetensors"), reverse=True)
    assert len(checkpoints) == 2
    for i, path in enumerate(checkpoints[:n_damaged]):
        content = path.read_bytes()
        harmed = content[: 1000 if i == 0 else 0] if harm == "truncated" else flipped(content, -40)
        path.write_bytes(harmed)
    done = toy_server.run(*TINY, "--output-dir", folder)
    assert done.code == 0, done.err
    warnings = [line for line in done.err.replace("\r", "\n").split("\n") if "warning" in line]
    assert len(warnings) == n_damaged, done.err
    for path, line in zip(checkpoints, warnings, strict=False):
        assert path.name in line
    assert_same_numbers(folder, finished)
    steps = [(r["seed"], r["group"], r["step"]) for r in records(folder)]
    assert len(set(steps)) == len(steps) == len(SEEDS) * N_STEPS // 20


def flipped(data: bytes, place: int) -> bytes:
    """With one bit changed."""
    changed = bytearray(data)
    changed[place] ^= 64
    return bytes(changed)


WRITTEN = ["cells/{}.json", "saes/{}/sae_weights.safetensors", "saes/{}/cfg.json", "results.csv",
           "DONE", "metrics.jsonl", "world.safetensors"]  # fmt: skip


@pytest.mark.parametrize("harm", ["one bit", "torn", "empty", "missing"])
@pytest.mark.parametrize("name", WRITTEN)
def test_whatever_is_damaged_in_a_finished_run_is_said_and_made_again(
    name: str, harm: str, minimal: Path, toy_server: Server, tmp_path: Path
):
    shutil.copytree(minimal, tmp_path / "run")
    cell = min(path.stem for path in (minimal / "cells").iterdir())
    path = tmp_path / "run" / name.format(cell)
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        place = content.index(b":") + 4 if name.startswith("cells") else len(content) // 2
        path.write_bytes({"one bit": flipped(content, place), "torn": content[:-5]}.get(harm, b""))
    done = toy_server.run(*TINY, *MINIMAL, cwd=tmp_path, patch=COARSE)
    assert done.code == 0, done.err
    assert_same_numbers(tmp_path / "run", minimal)
    # an empty DONE is that of an older version, a row that is missing is one that is not done yet
    silent = name == "metrics.jsonl" or (name == "DONE" and harm in ("empty", "missing"))
    silent |= name.startswith("cells") and harm == "missing"
    assert len(done.err_lines) == (not silent), done.err
    assert all("is damaged (" in line and "again" in line for line in done.err_lines)


def test_true_features_of_another_run_are_made_again(
    minimal: Path, toy_server: Server, tmp_path: Path
):
    shutil.copytree(minimal, tmp_path / "run")
    (sae, *_) = (minimal / "saes").glob("*/sae_weights.safetensors")
    shutil.copy(sae, tmp_path / "run/world.safetensors")
    done = toy_server.run(*TINY, *MINIMAL, cwd=tmp_path)
    assert "world.safetensors is damaged (it holds other tensors)" in done.err
    assert_same_numbers(tmp_path / "run", minimal)


def test_of_two_fresh_starts_at_once_one_is_refused_at_every_moment(
    minimal: Path, toy_server: Server, tmp_path: Path
):
    shutil.copytree(minimal, tmp_path / "run")
    for place in ("_forget_all", "write_record"):  # before all is deleted, and after
        pause_at = (f"sparse_coding.sweep.run_folder.{place}", 1)
        flags = [*TINY, *MINIMAL, "--fresh"]
        first = toy_server.start(*flags, cwd=tmp_path, patch=COARSE, pause_at=pause_at)
        first.wait_until_paused()
        second = toy_server.run(*flags, cwd=tmp_path, patch=COARSE)
        first.resume()
        assert first.wait().code == 0
        assert_refused(second, "another process", "run")
        assert_same_numbers(tmp_path / "run", minimal)


def test_fresh_leaves_what_no_run_wrote_and_says_so(
    minimal: Path, toy_server: Server, tmp_path: Path
):
    shutil.copytree(minimal, tmp_path / "run")
    (tmp_path / "run/notes.txt").write_text("years of work")
    (tmp_path / "run/other").mkdir()
    (tmp_path / "run/other/results.csv").write_text("mine")
    done = toy_server.run(*TINY, *MINIMAL, "--fresh", cwd=tmp_path, patch=COARSE)
    assert done.code == 0, done.err
    assert "left in run, since no run wrote it: notes.txt, other/results.csv" in done.out
    assert (tmp_path / "run/notes.txt").read_text() == "years of work"
    assert (tmp_path / "run/other/results.csv").read_text() == "mine"
    assert_same_numbers(tmp_path / "run", minimal)


def test_a_directory_whose_name_is_no_utf8_is_written_and_named(
    minimal: Path, toy_server: Server, tmp_path: Path
):
    folder = os.fsdecode(b"caf\xe9 \xff")
    for _ in range(2):
        done = toy_server.run(
            *TINY, *MINIMAL, "--output-dir", folder, cwd=tmp_path, patch=OFTEN | COARSE
        )
        assert done.code == 0, done.err
        assert done.err_lines == []
        assert "caf\\udce9 \\udcff" in done.out
    assert_same_numbers(tmp_path / folder, minimal)
    refused = toy_server.run(*TINY, "--output-dir", folder, cwd=tmp_path)
    assert_refused(refused, "caf\\udce9", "n_steps 40 there")


def test_a_second_process_in_the_folder_is_refused_and_harms_nothing(
    finished: Path, toy_server: Server, tmp_path: Path
):
    flags = [*TINY, "--output-dir", "run"]
    first = toy_server.start(*flags, cwd=tmp_path, pause_at=(TRAINING, 3))
    first.wait_until_paused()
    second = toy_server.run(*flags, cwd=tmp_path)
    fresh = toy_server.run(*flags, "--fresh", cwd=tmp_path)
    first.resume()
    done = first.wait()
    assert_refused(second, "another process", "run")
    assert_refused(fresh, "another process", "run")
    assert done.err_lines == []
    assert done.code == 0, done.err
    assert_same_numbers(tmp_path / "run", finished)


def test_the_merging_command_is_refused_while_a_shard_is_running(
    toy_server: Server, tmp_path: Path
):
    flags = [*TINY, "--output-dir", "run"]
    shard = toy_server.start(*flags, "--shard", "1/2", cwd=tmp_path, pause_at=(TRAINING, 3))
    shard.wait_until_paused()
    merging = toy_server.run(*flags, cwd=tmp_path)
    shard.resume()
    assert_refused(merging, "another process", "run")
    assert shard.wait().code == 0


# --- around the run ----------------------------------------------------------------------------


def test_no_heavy_package_is_imported_without_need(tmp_path: Path):
    code = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0][:-23]);"
        "atexit.register(lambda: print('\\n'.join(sys.modules)));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [*TINY, "--n-steps", "1", "--n-seeds", "1"]
    done = run_script(["-c", code, str(SCRIPT), *flags], cwd=tmp_path)
    assert done.code == 0, done.err
    modules = set(done.out.split())
    assert {"torch", "matplotlib"} <= modules
    # torch._dynamo loads triton by itself where it is installed; our kernels for it are for CUDA
    heavy = {
        "transformers",
        "datasets",
        "wandb",
        "vastai",
        "pandas",
        "sparse_coding.sae.engines.gpu_kernels",
    }
    assert modules & heavy == set()


def test_an_offline_wandb_run_holds_the_summary(tmp_path: Path):
    flags = [*TINY, "--n-steps", "20", "--n-seeds", "1", "--wandb-mode", "offline"]
    done = run_script([SCRIPT, *flags, "--output-dir", "run"], cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err_lines == []
    (record,) = tmp_path.rglob("offline-run-*/run-*.wandb")
    assert record.is_relative_to(tmp_path / "run")
    data = record.read_bytes()
    for key in (b"summary/cells", b"figures/mmcs", b"metrics/mmcs", b"train/mse"):
        assert key in data


def test_closed_standard_streams_do_not_end_a_run(tmp_path: Path):
    """As some job schedulers start their jobs."""
    flags = [*TINY, "--n-steps", "1", "--n-seeds", "1", "--shard", "1/9", "--output-dir", "run"]
    code = "import os, sys; os.closerange(0, 3); os.execv(sys.argv[1], sys.argv[1:])"
    done = run_script(["-c", code, sys.executable, SCRIPT, *flags], cwd=tmp_path)
    assert done.code == 0
    assert len(list((tmp_path / "run/cells").iterdir())) == 1


def test_a_reader_that_goes_away_does_not_end_a_run_with_a_traceback(
    toy_server: Server, tmp_path: Path
):
    """python replicate_toy_models.py | head -1"""
    flags = " ".join([*TINY, "--n-steps", "1", "--n-seeds", "1"])
    python = sys.executable
    shell = f"{python} {SCRIPT} {flags} | true"
    command = ["-c", "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])", shell]
    assert "Traceback" not in run_script(command, cwd=tmp_path).err
