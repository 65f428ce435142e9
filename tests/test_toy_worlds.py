"""replicate_toy_models.py on synthetic worlds as a user meets it; refusals: test_replicate_….

A tiny world of 100 features, two worlds and two seeds, two families.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.scripts import TRAINING, Server, assert_refused, bytes_under, table
from builders.toy_sweep import COARSE, OFTEN, assert_same_numbers

from sparse_coding.config import named_seed
from sparse_coding.sae.saved import load_sae
from sparse_coding.toy.synth_stream import SynthStream
from sparse_coding.toy.synth_world import digest, make_synth_world, read_world, write_world

N_STEPS = 120
TINY = (
    "--preset synth1k --activation-dim 12 --n-true-features 100 --arch batchtopk jumprelu "
    f"--target-l0 2.5 --batch-size 64 --n-steps {N_STEPS} --n-eval-samples 500 --n-worlds 2 "
    "--n-seeds 2 --wandb-mode disabled --log-every 20 --device cpu"
).split()
ALONE = ("--n-worlds", "1", "--n-seeds", "1")


@pytest.fixture(scope="session")
def finished(toy_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both worlds. Nobody may write to it."""
    cwd = tmp_path_factory.mktemp("worlds")
    done = toy_server.run(*TINY, "--output-dir", "run", cwd=cwd, patch=COARSE)
    assert done.code == 0, done.err
    assert done.err_lines == []
    (cwd / "run/printed").write_text(done.out)
    return cwd / "run"


def test_each_world_is_trained_on_from_each_seed_and_kept(finished: Path):
    rows = table(finished)
    cells = [(row["world"], row["seed"], row["arch"]) for row in rows]
    archs = "batchtopk", "jumprelu"
    assert cells == [(w, s, a) for w in ("42", "43") for s in ("0", "1") for a in archs]
    assert {row["target_l0"] for row in rows} == {"2.5"}
    for seed in (42, 43):
        kept, drawn = read_world(finished / f"world{seed}.npz"), make_synth_world(100, 12, seed)
        assert torch.equal(kept.features, drawn.features)
        assert torch.equal(kept.threshold, drawn.threshold)
    names = {path.name for path in (finished / "saes").iterdir()}
    assert "seed1_world43_dict000025_batchtopk_l0-02.5" in names
    assert len(names) == len(rows) == len({row["f1"] for row in rows})  # nothing is trained twice


def test_rows_are_those_of_a_few_lines_on_the_saved_autoencoder(finished: Path):
    """Of its threshold; as trained by the largest codes of a batch."""
    row = table(finished)[0]
    sae = load_sae(finished / "saes/seed0_world42_dict000025_batchtopk_l0-02.5")
    world = read_world(finished / "world42.npz")
    stream = SynthStream(
        world, batch_size=64, batch_seed=named_seed(0, "evaluation"), device=torch.device("cpu")
    )
    x, on = (torch.cat(parts) for parts in zip(*map(stream.with_truth, range(8)), strict=True))
    near = (torch.nn.functional.normalize(sae.W_dec) @ world.features.T).abs().argmax(dim=1)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    by_batch = torch.cat([codes * largest(codes, 160) for codes in pre.split(64)])
    for codes, suffix in ((pre * (pre > sae.threshold), ""), (by_batch, "_trained")):
        x_hat = codes @ sae.W_dec + sae.b_dec
        fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        fires, truth = codes > 0, on[:, near]
        both = (fires & truth).sum(0).float()
        f1 = torch.where(both > 0, 2 * both / (fires.sum(0) + truth.sum(0)), 0.0).mean()
        assert float(row[f"fvu{suffix}"]) == pytest.approx(float(fvu), rel=1e-4)
        assert float(row[f"f1{suffix}"]) == pytest.approx(float(f1), rel=1e-4)
        assert float(row[f"l0{suffix}"]) == pytest.approx(float(fires.sum() / len(x)))
    assert float(row["l0_trained"]) == 2.5
    assert float(row["explained_variance"]) == pytest.approx(1 - float(row["fvu"]))


def largest(codes: torch.Tensor, n: int) -> torch.Tensor:
    return codes >= codes.flatten().topk(n).values[-1]


def test_the_spread_of_worlds_and_the_figures_are_there(finished: Path):
    printed = (finished / "printed").read_text()
    assert "spread over 2 worlds, and over the seeds of one" in printed
    assert sum(line.startswith(("batchtopk ", "jumprelu ")) for line in printed.splitlines()) == 8
    shown = (finished / "report.html").read_text()
    assert "Which family finds the true features" in shown
    assert (finished / "figures/truth.png").read_bytes().startswith(b"\x89PNG")
    assert len((finished / "figures/truth.csv").read_text().splitlines()) == 9


def test_a_world_out_of_a_run_gives_the_same_numbers_as_its_seed(
    finished: Path, toy_server: Server, tmp_path: Path
):
    world = str(finished / "world42.npz")
    flags = [*TINY, *ALONE, "--world", world, "--output-dir", "run"]
    done = toy_server.run(*flags, cwd=tmp_path)
    assert done.code == 0, done.err
    ours, theirs = (
        [row | {"world": "", "seconds": ""} for row in table(folder)]
        for folder in (tmp_path / "run", finished)
    )
    assert ours == theirs[:2]
    kept = read_world(tmp_path / "run/world.npz")
    assert digest(kept) == digest(read_world(world))
    again = toy_server.run(*flags, cwd=tmp_path)
    assert (again.code, again.err) == (0, "")
    arrays = dict(np.load(world))
    np.savez(tmp_path / "other.npz", **arrays | {"mean": arrays["mean"] * 2})
    (tmp_path / "w.npz").write_bytes((tmp_path / "other.npz").read_bytes())
    other = [*flags[: flags.index(world)], "w.npz", "--output-dir", "run"]
    assert_refused(toy_server.run(*other, cwd=tmp_path), "world", "--fresh")


def test_a_saved_autoencoder_is_evaluated_on_its_own_world(
    finished: Path, toy_server: Server, tmp_path: Path
):
    row = table(finished)[-1]
    folder = finished / f"saes/seed1_world43_dict000025_{row['arch']}_l0-02.5"
    done = toy_server.run("--evaluate", str(folder), cwd=tmp_path)
    assert done.code == 0, done.err
    printed = dict(line.split() for line in done.out.splitlines())
    assert {"f1", "mcc", "uniqueness", "shrinkage"} < printed.keys()
    for column, value in printed.items():
        assert float(value) == pytest.approx(float(row[column]), rel=1e-4), column


def test_killed_five_times_it_ends_with_the_same_bits(
    finished: Path, toy_server: Server, tmp_path: Path
):
    rng, folder = random.Random(1), tmp_path / "run"
    flags = [*TINY, "--output-dir", folder]
    for _ in range(5):
        call = rng.randrange(1, 9)  # of this start
        process = toy_server.start(*flags, patch=OFTEN, pause_at=(TRAINING, call))
        process.wait_until_paused()
        process.kill()
    done = toy_server.run(*flags, patch=OFTEN)
    assert done.code == 0, done.err
    assert_same_numbers(folder, finished)


def test_two_shards_merge_into_the_single_runs_table(
    finished: Path, toy_server: Server, tmp_path: Path
):
    for shard in (["--shard", "1/2"], ["--shard", "2/2"], []):
        done = toy_server.run(*TINY, *shard, "--output-dir", "run", cwd=tmp_path)
        assert done.code == 0, done.err
    assert_same_numbers(tmp_path / "run", finished)


def test_a_damaged_world_of_a_finished_run_is_made_again(
    finished: Path, toy_server: Server, tmp_path: Path
):
    flags = [*TINY, *ALONE, "--n-steps", "20", "--output-dir", "run"]
    assert toy_server.run(*flags, cwd=tmp_path).code == 0
    path = tmp_path / "run/world42.npz"
    data = path.read_bytes()
    for harm in (data[:-50], (finished / "world43.npz").read_bytes(), b""):
        path.write_bytes(harm)
        done = toy_server.run(*flags, cwd=tmp_path)
        assert done.code == 0, done.err
        assert "world42.npz is damaged" in done.err
        assert path.read_bytes() == data
    done = toy_server.run(*flags, "--fresh", cwd=tmp_path)
    assert done.code == 0, done.err
    assert path.read_bytes() == data


def test_sparse_but_wrong_has_its_figures(toy_server: Server, tmp_path: Path):
    flags = "--preset sparse_but_wrong --n-seeds 1 --target-l0 2 11 --n-steps 40 --log-every 20"
    more = ["--n-eval-samples", "2000", "--wandb-mode", "disabled", "--output-dir", "run"]
    done = toy_server.run(*flags.split(), *more, cwd=tmp_path, patch=COARSE)
    assert done.code == 0, done.err
    rows = table(tmp_path / "run")
    assert [row["target_l0"] for row in rows] == ["2", "11"]
    assert all(float(row["s_dec"]) > 0 for row in rows)
    names = set(bytes_under(tmp_path / "run/figures"))
    assert names == {f"{n}.{e}" for n in ("frontier_s_dec", "frontier_mcc") for e in ("png", "csv")}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["constants"]["data_law"] == "correlated"


@pytest.mark.long
def test_the_benchmark_at_a_three_thousandth_of_its_samples(toy_server: Server, tmp_path: Path):
    """64 steps of 4 096 latents of batchtopk; other families take minutes, and are tested in a
    small world. Of 100 steps that make features orthogonal, which do so too, the world has one."""
    write_world(make_synth_world(16384, 768, 42, n_steps=1), tmp_path / "big.npz")
    flags = "--preset synth16k --arch batchtopk --n-seeds 1 --n-steps 64 --n-eval-samples 1000"
    more = "--log-every 64 --world big.npz --wandb-mode disabled --output-dir run"
    done = toy_server.run(*flags.split(), *more.split(), cwd=tmp_path, patch=COARSE)
    assert done.code == 0, done.err
    (row,) = table(tmp_path / "run")
    assert (row["n_dict"], float(row["l0_trained"])) == ("4096", 25)
    assert 0.1 < float(row["explained_variance"]) < 0.85
    assert "published" not in done.out  # their numbers are of a thousand times as many samples
