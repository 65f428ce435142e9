"""run.py as a user meets it: three families of models, resume, shards, streaming, bad input.

Every run is a process of its own in another directory, without network, on models of two layers
that are made here, and on some hundred short documents.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from builders.faults import KINDS as FAULTS
from builders.language_sweep import (
    CONTEXT,
    HARVEST,
    HARVEST_IN_MEMORY,
    N_STEPS,
    OFTEN,
    PLACES,
    SMALLEST,
    WIDTH,
    World,
    assert_same_numbers,
    documents,
)
from builders.models import ARGS, hooked, nanogpt_state, save_checkpoint
from builders.scripts import (
    ROOT,
    SMALL,
    TRAINING,
    Done,
    assert_done,
    assert_refused,
    bytes_under,
    mounted_tmpfs,
    run_script,
    table,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

# what even a short run cannot leave to the defaults
FEW = ["--n-tokens", "4000", "--batch-size", "64", "--n-eval-tokens", "500",
       "--n-page-tokens", "500", "--expansion-exp-high", "1", "--wandb-mode", "disabled",
       "--device", "cpu"]  # fmt: skip
ALL_FIGURES = {name: value for name, value in SMALL.items() if value != []}
HEADER = (
    "seed,arch,target_l0,l1_alpha,expansion_factor,n_dict,n_tokens,fvu,l0,mse,fvu_trained,"
    "l0_trained,dead_fraction,n_revived,ce_clean,ce_spliced,ce_zero,ce_mean,ce_recovered,"
    "mmcs_with_larger,n_matched_larger,seconds"
)
OF_OTHERS = ["target_l0", "fvu_trained", "l0_trained"]  # no meaning for relu on its grid
METRICS = ["fvu", "l0", "mse", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_mean",
           "ce_recovered"]  # fmt: skip
FIGURES = ["fvu", "l0", "dead_fraction", "ce_recovered", "mmcs_with_larger", "frontier_fvu",
           "frontier_ce", "densities"]  # fmt: skip


def cells_of(*sizes: int, seeds: tuple[int, ...] = (0,)) -> list[str]:
    """Names of the cells of the tiny sweep, in the order of the table."""
    names = [f"dict{n:06d}_l1exp{e:+03d}" for n in sizes for e in (-8, -7)]
    return [f"seed{seed}_{name}" for seed in seeds for name in names]


CELLS = cells_of(32, 64)


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny sweep ran once, into run/ and acts/. Nobody may write to it."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    world.finish(cwd=cwd, patch=ALL_FIGURES)
    return cwd


def litter(cwd: Path) -> list[str]:
    return [p.name for p in cwd.rglob("*") if p.name.endswith(".tmp")]


def page_of(path: Path) -> dict:
    """What a page says of its autoencoder and its names."""
    (named,) = re.findall('<script type="application/json" id="named">([^<]*)<', path.read_text())
    return json.loads(named)


# --- what a run leaves -------------------------------------------------------------------------


def assert_whole(run: Path, cells: list[str], figures: list[str]) -> None:
    """The run folder has exactly the promised files, and its pages need no network."""
    best = page_of(run / "features.html")["cell"]
    expected = {"config.json", "metrics.jsonl", "results.csv", "report.html", "features.html"}
    expected |= {"shown.json"} | {f"features/{cell}.html" for cell in cells if cell != best}
    saved = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    expected |= {"DONE"} | {f"saes/{cell}/{name}" for cell in cells for name in saved}
    expected |= {f"figures/{name}.{end}" for name in figures for end in ("png", "csv")}
    assert set(bytes_under(run)) - {f"cells/{cell}.json" for cell in cells} == expected
    report = (run / "report.html").read_text()
    assert report.count("data:image/png;base64,") == len(figures)
    for page in (path.read_text() for path in run.rglob("*.html")):
        assert re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page) == []


def test_a_run_leaves_the_promised_files_and_the_same_command_says_so_and_changes_none(
    finished, world
):
    assert_whole(finished / "run", CELLS, FIGURES)
    files = [p for p in finished.rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files}
    again = world.run(cwd=finished)
    assert again.code == 0
    assert again.err == ""
    assert "done: run: report.html" in again.out
    assert {p: p.stat().st_mtime_ns for p in files} == before
    assert len(files) == len([p for p in finished.rglob("*") if p.is_file()])


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt_neox", "--site attn_concat --packing documents"),
        ("llama", "--site resid_post --layer 0 --l1-normalisation per_feature --n-seeds 2"),
    ],
)
def test_other_families_sites_and_options_leave_the_same_files(kind, more, world, tmp_path):
    world.finish(*more.split(), kind=kind, cwd=tmp_path)
    seeds = (0, 1) if "seeds" in more else (0,)
    cells = cells_of(8, 16, seeds=seeds)
    assert_whole(tmp_path / "run", cells, ["densities"])
    rows = table(tmp_path / "run")
    assert [int(row["seed"]) for row in rows] == [seed for seed in seeds for _ in range(4)]
    by_seed = [[row["fvu"] for row in rows if row["seed"] == str(seed)] for seed in seeds]
    assert by_seed[0] != by_seed[1:]
    assert all(0 < float(row["fvu"]) < 1.1 for row in rows)
    if kind == "llama":
        assert {(row["ce_zero"], row["ce_recovered"]) for row in rows} == {
            (rows[0]["ce_clean"], "nan")
        }
    for path in (tmp_path / "run/saes").rglob("cfg.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_the_table_has_the_promised_columns_and_one_row_per_cell(finished):
    rows = table(finished / "run")
    assert ",".join(rows[0]) == HEADER
    cells = [(int(r["n_dict"]), float(r["expansion_factor"]), float(r["l1_alpha"])) for r in rows]
    assert cells == [(n, n / WIDTH, 10 ** (e / 4)) for n in (32, 64) for e in (-8, -7)]
    assert {(r["seed"], r["n_tokens"]) for r in rows} == {("0", str(N_STEPS * 64))}
    for row in rows:
        empty = ["mmcs_with_larger", "n_matched_larger"] if row["n_dict"] == "64" else []
        empty = OF_OTHERS + empty
        assert [name for name, value in row.items() if value == ""] == empty
        ce = {name: float(row[f"ce_{name}"]) for name in ("clean", "spliced", "zero", "mean")}
        assert 0 < float(row["fvu"]) < 1
        assert 0 < float(row["l0"]) <= int(row["n_dict"])
        assert ce["clean"] < ce["spliced"] < ce["zero"]
        recovered = (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"])
        assert float(row["ce_recovered"]) == pytest.approx(recovered, abs=1e-9)


def test_stored_rows_are_those_of_a_hook_of_the_tests_own(finished, world):
    """Every row of the first chunk, in float16, is an activation of the model on some training
    text, and none is there twice."""
    from transformers import AutoModelForCausalLM

    target = open_again(finished, world)
    ids = torch.from_numpy(target.train.rows(0, 128))
    model = AutoModelForCausalLM.from_pretrained(world.root / "gpt2", dtype=torch.float32).eval()
    keep = (ids != 0) & (torch.arange(CONTEXT) > 0)
    expected = hooked(model, "gpt2", 1, "mlp_act", ids)[0][keep]
    rows = load_file(finished / "acts/chunk-00000.safetensors")["activations"].float()
    assert rows.shape == expected.shape
    # no two rows are equal up to rounding, so the order of a projection is that of the rows
    by = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    ours, theirs = rows[(rows @ by).argsort()], expected.half().float()
    torch.testing.assert_close(ours, theirs[(theirs @ by).argsort()], atol=2e-3, rtol=0)


def test_no_training_row_is_of_a_held_out_document(finished, world):
    """By the document ids in the chunks, and by the documents that are evaluated."""
    target = open_again(finished, world)
    held_out = set(target.held_out.document_ids(0, target.held_out.n_rows).tolist())
    chunks = sorted((finished / "acts").glob("chunk-*"))
    trained_on = {i for p in chunks for i in load_file(p)["document_ids"].tolist()}
    by_text = {number(text) for text in documents()}
    assert len(chunks) == 7
    assert trained_on | held_out <= by_text
    assert len(held_out) > 50
    assert held_out & trained_on == set()
    assert max(held_out) < 0.2 * 2**63 <= min(trained_on)


def number(text: str) -> int:
    """The first 63 bits of a document's sha256, little-endian."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def open_again(finished: Path, world: World):
    """The target of the finished run."""
    from sparse_coding.lm.target import ModelChoice, TextChoice, open_target

    model = ModelChoice(str(world.root / "gpt2"), "", "auto", 1, "mlp_act", "auto", "float16")
    text = TextChoice(str(world.text), "", "text", CONTEXT, "packed", 0.2, 100_000_000)
    return open_target(model, text, finished / "acts", device=torch.device("cpu"))


def test_evaluate_prints_the_numbers_of_the_table(finished, world, tmp_path):
    """From another directory, where the text is encoded and read anew."""
    for cell, row in list(zip(CELLS, table(finished / "run"), strict=True))[1:3]:
        flags = [*world.flags(), "--evaluate", finished / "run/saes" / cell]
        done = world.server.run(*flags, cwd=tmp_path)
        assert_done(done)
        assert printed(done.out) == {name: f"{float(row[name]):.6g}" for name in METRICS}
    assert not list(tmp_path.rglob("chunk-*"))
    assert not (tmp_path / "outputs").exists()


def printed(out: str) -> dict[str, str]:
    """What --evaluate prints, by name."""
    return dict(line.split() for line in out.splitlines()[-len(METRICS) :])


def test_evaluate_needs_no_flag_to_print_the_numbers_of_the_table(world, tmp_path):
    checkpoint = nanogpt_checkpoint(tmp_path / "out/ckpt.pt", 320)
    column = pyarrow.parquet.read_table(world.text).rename_columns(["body", "meta"])
    pyarrow.parquet.write_table(column, tmp_path / "body.parquet")
    flags = ["--model", checkpoint, "--tokenizer", world.root / "gpt2/tokenizer.json"]
    flags += ["--dataset", tmp_path / "body.parquet", "--text-column", "body"]
    world.finish(*flags, cwd=tmp_path)
    sae = tmp_path / "run/saes" / CELLS[0]
    again = world.server.run("--evaluate", sae, "--device", "cpu", cwd=tmp_path)
    assert again.code == 0, again.err
    row = table(tmp_path / "run")[0]
    assert printed(again.out) == {name: f"{float(row[name]):.6g}" for name in METRICS}


# --- the same numbers, however they are made ---------------------------------------------------


def test_shards_and_then_the_command_without_give_the_single_runs_table(finished, world, tmp_path):
    """Both start at once: one harvests while the other waits."""
    first = world.start("--shard", "1/2", cwd=tmp_path, pause_at=(HARVEST, 2))
    first.wait_until_paused()
    second = world.start("--shard", "2/2", cwd=tmp_path)
    second.wait_until(lambda: "waiting for another process" in second.out())
    first.resume()
    for shard in (first, second):
        done = shard.wait()
        assert_done(done)
        assert "without --shard" in done.out
    assert not (tmp_path / "run/results.csv").exists()
    world.finish(cwd=tmp_path)
    assert (tmp_path / "run/DONE").exists()
    assert bytes_under(tmp_path / "acts") == bytes_under(finished / "acts")
    for ours, theirs in zip(table(tmp_path / "run"), table(finished / "run"), strict=True):
        for name in set(HEADER.split(",")) - {"arch", "seconds"}:
            assert float(ours[name] or 0) == pytest.approx(float(theirs[name] or 0), rel=1e-4)


def test_streamed_activations_give_the_same_bits_and_only_the_text_is_on_disk(
    finished, world, tmp_path
):
    done = world.finish("--max-disk-gb", "0", cwd=tmp_path)
    assert "over --max-disk-gb 0: computed as they are read" in done.out
    assert_same_numbers(tmp_path, finished, store=False)
    assert {name.split("/")[0] for name in bytes_under(tmp_path / "acts")} == {"text"}


def test_activations_in_memory_give_the_same_bits_also_after_kills_and_only_the_text_is_on_disk(
    finished, world, tmp_path
):
    flags = ("--activations-in", "memory")
    for point in ((HARVEST_IN_MEMORY, 3), (TRAINING, 10)):
        process = world.start(*flags, cwd=tmp_path, patch=OFTEN, pause_at=point)
        process.wait_until_paused()
        process.kill()
        assert {name.split("/")[0] for name in bytes_under(tmp_path / "acts")} == {"text"}
    assert 0 < step(tmp_path) < N_STEPS
    done = world.finish(*flags, cwd=tmp_path)
    assert "MB in the memory of the cpu" in done.out
    assert_same_numbers(tmp_path, finished, store=False)
    assert {name.split("/")[0] for name in bytes_under(tmp_path / "acts")} == {"text"}
    assert litter(tmp_path) == []


def test_activations_that_no_memory_holds_are_refused_and_go_onto_the_disk_if_asked(
    world, tmp_path
):
    none_free = {"sparse_coding.sweep.hardware.MEMORY_SHARE": 1e-9}
    flags = (*SMALLEST, "--max-memory-gb", "1")
    in_memory = ("--activations-in", "memory")
    refused = world.run(*flags, *in_memory, cwd=tmp_path, patch=SMALL | none_free)
    assert_refused(refused, "--activations-in memory: ", " activations need 0.00 GB, ",
                   "free beside training are 0.00 GB of the cpu", "--n-tokens")  # fmt: skip
    assert not (tmp_path / "run").exists()
    world.finish(*flags, cwd=tmp_path, patch=SMALL | none_free)
    again = world.run(*flags, *in_memory, cwd=tmp_path, patch=SMALL | none_free)
    assert again.code == 0  # the run is the same one, and finished


def test_a_store_is_used_again_by_a_sweep_of_other_constants_and_grows_with_n_tokens(
    finished, world, tmp_path
):
    world.finish("--n-tokens", "4000", cwd=tmp_path)
    assert len(list((tmp_path / "acts").glob("chunk-*"))) == 3
    (tmp_path / "run").rename(tmp_path / "run of less")
    before = bytes_under(tmp_path / "acts")
    other = world.finish("--n-tokens", "4000", "--lr", "1e-4", cwd=tmp_path)
    assert "harvest:" not in other.err
    assert bytes_under(tmp_path / "acts") == before
    shutil.rmtree(tmp_path / "run")
    world.finish(cwd=tmp_path)
    assert_same_numbers(tmp_path, finished)
    shutil.rmtree(tmp_path / "run")
    world.finish("--n-tokens", "4000", cwd=tmp_path)
    assert bytes_under(tmp_path / "run/saes") == bytes_under(tmp_path / "run of less/saes")


# --- stopped, killed, damaged ------------------------------------------------------------------


def n_chunks(cwd: Path) -> int:
    return len(list((cwd / "acts").glob("chunk-*")))


def step(cwd: Path) -> int:
    """Of the newest checkpoint."""
    saved = cwd.glob("run/checkpoints/*/step-*.safetensors")
    return max((int(path.stem[5:]) for path in saved), default=0)


def test_runs_killed_in_harvest_and_training_end_with_the_same_bits_and_no_litter(
    finished, world, tmp_path
):
    left = []
    for point in ((HARVEST, 2), (HARVEST, 3), (TRAINING, 3), (TRAINING, 10)):
        process = world.start(cwd=tmp_path, patch=OFTEN, pause_at=point)
        process.wait_until_paused()
        process.kill()
        left.append((n_chunks(tmp_path), step(tmp_path)))
    assert left[:2] == [(1, 0), (3, 0)]
    assert [n for n, _ in left[2:]] == [7, 7]
    assert 0 < left[2][1] < left[3][1] < N_STEPS
    world.finish(cwd=tmp_path)
    assert_same_numbers(tmp_path, finished)
    assert litter(tmp_path) == []
    assert not (tmp_path / "run/checkpoints").exists()


def test_runs_killed_at_random_moments_end_with_the_same_bits_and_no_litter(
    finished, world, tmp_path
):
    rng = random.Random(0)
    for _ in range(6):
        with contextlib.suppress(pytest.fail.Exception):
            world.start(cwd=tmp_path).wait(rng.uniform(0.1, 1.2))  # kills it
    world.finish(cwd=tmp_path)
    assert_same_numbers(tmp_path, finished)
    assert litter(tmp_path) == []


@pytest.mark.parametrize("phase", ["harvest", "training"])
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(phase, finished, world, tmp_path):
    point = {"harvest": (HARVEST, 3), "training": (TRAINING, 6)}
    process = world.start(cwd=tmp_path, pause_at=point[phase])
    process.wait_until_paused()
    process.signal(signal.SIGINT)
    process.resume()
    ended = process.wait()
    assert ended.code == 130, ended.err
    (line,) = ended.err_lines
    assert "the same command goes on" in line
    if phase == "training":
        assert f"saved at step {step(tmp_path)} of {N_STEPS}" in line
    assert n_chunks(tmp_path) == (3 if phase == "harvest" else 7)
    assert litter(tmp_path) == []
    world.finish(cwd=tmp_path)
    assert_same_numbers(tmp_path, finished)


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


DAMAGES = {
    "truncated": lambda data: data[: min(1000, len(data) - 9)],
    "empty": lambda data: b"",
    "header": lambda data: flipped(data, 4),
    "flipped": lambda data: flipped(data, -100),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["chunk-00002.safetensors", "text/tokens.bin", "text/documents.npy", "text/corpus.json"]
)
def test_what_is_damaged_of_text_and_activations_is_said_and_made_again(
    name, damage, finished, world, tmp_path
):
    shutil.copytree(finished / "acts", tmp_path / "acts")
    path = tmp_path / "acts" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    done = world.run(cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(done.err_lines) == 1, done.err
    (line,) = done.err_lines
    assert f"{name} is damaged (" in line
    assert "again" in line
    assert_same_numbers(tmp_path, finished)


@pytest.mark.parametrize("name", ["run/config.json", "acts/manifest.json"])
def test_a_damaged_record_of_what_all_depends_on_is_refused_by_name(
    name, finished, world, tmp_path
):
    """What the numbers there depend on is not known any more."""
    for folder in ("acts", "run"):
        shutil.copytree(finished / folder, tmp_path / folder)
    path = tmp_path / name
    path.write_bytes(path.read_bytes().replace(b'"held_out": 0.2', b'"held_out": 0.3'))
    (tmp_path / "run/DONE").unlink()
    assert_refused(world.run(cwd=tmp_path), f"{name} is damaged", "choose another")


@pytest.mark.parametrize("harm", ["one bit", "gone"])
@pytest.mark.parametrize(
    "name", ["cells/{}.json", "saes/{}/cfg.json", "saes/{}/sae_weights.safetensors",
             "saes/{}/sparsity.safetensors"],
)  # fmt: skip
def test_a_finished_run_is_not_done_where_a_cell_is_damaged(name, harm, language_sweep, tmp_path):
    shutil.copytree(language_sweep.finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run" / name.format(CELLS[0])
    content = path.read_bytes()
    path.unlink()
    if harm == "one bit":
        path.write_bytes(flipped(content, content.index(b":") + 4 if "json" in name else -40))
    done = language_sweep.run(cwd=tmp_path)
    assert done.code == 0, done.err
    language_sweep.assert_same(tmp_path)
    is_named = f"{path.relative_to(tmp_path)} is damaged (" in done.err
    assert is_named != (name.startswith("cells") and harm == "gone"), done.err


def test_a_directory_where_a_file_should_be_is_named(language_sweep, tmp_path):
    for name in ("run/results.csv", "run/DONE", "run/shown.json", "run/.run.lock",
                 f"run/saes/{CELLS[0]}/sae_weights.safetensors"):  # fmt: skip
        cwd = tmp_path / name.replace("/", " ")
        shutil.copytree(language_sweep.finished, cwd)
        (cwd / name).unlink()
        (cwd / name).mkdir()
        assert_refused(language_sweep.run(cwd=cwd), f"at {name}: move it away")


# --- other models and texts --------------------------------------------------------------------


def nanogpt_checkpoint(path: Path, vocab_size: int) -> Path:
    """As nanoGPT's train.py writes it after torch.compile."""
    args = ARGS | {"n_head": 2, "block_size": 32, "vocab_size": vocab_size}
    state = {f"_orig_mod.{name}": weight for name, weight in nanogpt_state(args).items()}
    path.parent.mkdir(exist_ok=True)
    return save_checkpoint(path, args, state)


def test_a_nanogpt_checkpoint_is_read_with_bytes_as_tokens(world, tmp_path):
    checkpoint = nanogpt_checkpoint(tmp_path / "out/ckpt.pt", 256)
    flags = ["--tokenizer", "bytes", "--model", checkpoint]
    world.finish(*flags, cwd=tmp_path)
    ids = np.fromfile(tmp_path / "acts/text/tokens.bin", np.uint16)
    assert bytes(ids.astype(np.uint8)) == "".join(documents()).encode()
    config = json.loads((tmp_path / f"run/saes/{CELLS[0]}/cfg.json").read_text())
    assert config["metadata"]["sparse_coding"]["tokenizer"] == "bytes"
    assert config["d_in"] == WIDTH


def test_a_nanogpt_checkpoint_with_its_tokenizer_and_bin_beside_it(world, tmp_path):
    checkpoint = nanogpt_checkpoint(tmp_path / "out/ckpt.pt", 320)
    shutil.copy(world.root / "gpt2/tokenizer.json", tmp_path / "out")
    bpe = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    ids = np.array([i for text in documents() for i in (*bpe.encode(text).ids, 0)], np.uint16)
    ids.tofile(tmp_path / "train.bin")
    flags = ["--model", checkpoint, "--dataset", tmp_path / "train.bin"]
    done = world.finish(*flags, cwd=tmp_path)
    assert "400 documents" in done.out
    assert (tmp_path / "train.bin").read_bytes() == ids.tobytes()
    assert not (tmp_path / "acts/text/tokens.bin").exists()
    assert "done: run: report.html" in world.run(*flags, cwd=tmp_path).out


def test_a_nanogpt_checkpoint_of_characters_without_its_meta_pkl_shows_numbers(world, tmp_path):
    checkpoint = nanogpt_checkpoint(tmp_path / "out/ckpt.pt", 65)
    (np.arange(30_000) * 7919 % 63).astype(np.uint16).tofile(tmp_path / "val.bin")
    flags = ["--model", checkpoint, "--dataset", "val.bin", *SMALLEST]
    assert_refused(world.run(*flags, cwd=tmp_path), "no tokenizer", "65 ids", ".bin ids")
    world.finish(*flags, "--tokenizer", "ids", cwd=tmp_path)
    config = json.loads((tmp_path / f"run/saes/{CELLS[0]}/cfg.json").read_text())
    assert config["metadata"]["sparse_coding"]["tokenizer"] == "ids"


def test_a_nanogpt_checkpoint_needs_only_the_bin_of_prepare(world, tmp_path):
    checkpoint = nanogpt_checkpoint(tmp_path / "models/ckpt.pt", 300)
    argv = ["--source", str(world.text), "--vocab-size", "300", "--held-out", "0.5"]
    prepare = ROOT / "nanogpt_config/prepare.py"
    assert run_script([prepare, *argv, "--output-dir", "data"], cwd=tmp_path).code == 0
    places = ["--model", "models/ckpt.pt", "--dataset", "data/val.bin", *PLACES]
    done = world.server.run(*places, *FEW, cwd=tmp_path)
    assert_done(done)
    # the middle layer, the longest context
    assert "site: layer 1 of 0 to 1, mlp_act, width 64" in done.out
    manifest = json.loads((tmp_path / "acts/manifest.json").read_text())["metadata"]
    assert (manifest["layer"], manifest["context_length"]) == (1, 32)
    assert manifest["tokenizer"] == "vocab:tokenizer.json"
    found = [(row["arch"], row["target_l0"]) for row in table(tmp_path / "run")]  # the default
    wanted = [(arch, l0) for arch in ("batchtopk", "relu") for l0 in ("16", "32", "64")]
    assert sorted(found) == sorted(wanted)

    checkpoint.rename(tmp_path / "models/other.pt")
    nanogpt_checkpoint(checkpoint, 290)
    refused = world.server.run(*places[:4], "--output-dir", "r2", *FEW, cwd=tmp_path)
    assert_refused(refused, "vocab:tokenizer.json has 300 ids, the model 290")


def test_a_target_l0_is_reached_without_heat_maps_and_the_epochs_are_said_once(world, tmp_path):
    more = ["--target-l0", "4", "--n-tokens", "60000", "--expansion-exp-low", "0"]
    done = world.finish(*more, cwd=tmp_path, patch=ALL_FIGURES)
    (line,) = [line for line in done.out.splitlines() if "epochs" in line]
    assert re.fullmatch(r"60,000 tokens requested, 27,936 available = 2\.1 epochs", line)
    (row,) = table(tmp_path / "run")
    assert row["n_tokens"] == str(60000 // 64 * 64)
    assert float(row["l0"]) == pytest.approx(4, rel=0.35)
    assert not (tmp_path / "run/figures/fvu.png").exists()
    assert (tmp_path / "run/figures/frontier_fvu.png").exists()
    assert [p.name for p in (tmp_path / "run/saes").iterdir()] == ["seed0_dict000064_l0-0004"]
    assert "heat" not in (tmp_path / "run/report.html").read_text().split("<script")[0].lower()


def test_massive_activations_are_left_out_and_that_is_said(world, tmp_path):
    """The same when streamed and killed; --evaluate leaves out the same."""
    bpe = Tokenizer.from_file(str(world.root / "gpt2/tokenizer.json"))
    counts = np.bincount([i for text in documents() for i in bpe.encode(text).ids], minlength=320)
    token = int(np.abs(counts - 60).argmin())  # of some 30 000 tokens
    for place in ("stored", "streamed"):
        shutil.copytree(world.root / "gpt2", tmp_path / place / "model")
        path = tmp_path / place / "model/model.safetensors"
        weights = load_file(path)
        weights["transformer.wte.weight"][token] *= 300
        save_file(weights, path, metadata={"format": "pt"})
    flags = ["--model", "model", "--site", "resid_post", "--layer", "0"]
    done = world.finish(*flags, cwd=tmp_path / "stored")
    assert re.search(
        r"^left out: \d+ of the first [\d,]+ activations, of norms above", done.out, re.M
    )
    assert re.search(r"activations, [1-9]\d* held-out tokens$", done.out, re.M)
    assert "held-out tokens" in (tmp_path / "stored/run/report.html").read_text()
    streamed = dict(cwd=tmp_path / "streamed", patch=OFTEN)
    more = [*flags, "--max-disk-gb", "0"]
    process = world.start(*more, **streamed, pause_at=(TRAINING, 6))
    process.wait_until_paused()
    process.kill()
    world.finish(*more, **streamed)
    assert_same_numbers(tmp_path / "streamed", tmp_path / "stored", store=False)

    cell, row = cells_of(8, 16)[0], table(tmp_path / "stored/run")[0]
    sae = tmp_path / "stored/run/saes" / cell
    again = world.server.run("--evaluate", sae, "--device", "cpu", cwd=tmp_path / "stored")
    assert printed(again.out) == {name: f"{float(row[name]):.6g}" for name in METRICS}
    unlimited = world.run(*flags, "--max-norm-multiple", "0", cwd=tmp_path / "stored")
    assert_refused(unlimited, "max_norm_multiple 10.0 there, 0.0 here")
    unlimited = ["--max-norm-multiple", "0", "--output-dir", "all"]
    all_of_them = world.finish(*flags, *unlimited, cwd=tmp_path / "stored")
    assert "left out" not in all_of_them.out
    other = table(tmp_path / "stored/all")[0]
    assert other["ce_clean"] == row["ce_clean"]
    assert float(other["mse"]) > 2 * float(row["mse"])


# --- bad input ---------------------------------------------------------------------------------

BAD_FLAGS = {
    "--expansion-exp-lwo 1": ["--expansion-exp-lwo", "did you mean --expansion-exp-low?"],
    "--layer 2": ["layer: 2", "0 to 1"],
    "--export saelens": ["'saelens'", "--export", "dictionary_learning"],
    "--expansion-exp-low -20": ["64 x 2^-20", "raise the low end"],
    "--n-tokens 63": ["--n-tokens 63", "--batch-size 64"],
    "--context-length 33": ["--context-length 33", "at most 32"],
    "--target-l0 0": ["--target-l0", "at least 1"],
    "--text-column txt": ["'txt'", "--text-column", "text, meta"],
    "--model no/such/folder": ["no such model", "no/such/folder"],
    "--model openai-community/gpt2": ["openai-community/gpt2", "out of reach", "hf download"],
    "--dataset nowhere/pile": ["nowhere/pile", "hub", "hf download"],
    "--dataset nowhere/pile:en@dev": ["hub", "`hf download nowhere/pile --repo-type dataset`"],
    "--tokenizer no/such": ["no/such", "out of reach"],
    "--evaluate nowhere": ["no such folder", "nowhere"],
    "--batch-size 20000 --n-tokens 40000 --max-text-tokens 9000": ["fewer than --batch-size 20000"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_input_is_one_line_naming_value_and_remedy_and_makes_no_output_directory(
    flags, world, tmp_path
):
    done = world.run(*flags.split(), cwd=tmp_path, timeout_s=20)
    assert_refused(done, *BAD_FLAGS[flags])
    assert not (tmp_path / "run").exists()
    assert litter(tmp_path) == []


# --- bad files and folders ---------------------------------------------------------------------


def test_a_folder_named_like_a_bin_is_refused(world, tmp_path):
    (tmp_path / "train.bin").mkdir()
    done = world.run("--dataset", "train.bin", cwd=tmp_path)
    assert_refused(done, "train.bin", ".parquet")


OTHERS = {
    "--model {root}/gpt_neox": ["model", "gpt_neox here"],
    "--layer 0": ["layer 1 there, 0 here"],
    "--store-dtype bfloat16": ["store_dtype float16 there, bfloat16 here"],
    "--held-out 0.1": ["held_out 0.2 there, 0.1 here"],
    "--dataset {root}/other.txt": ["dataset", "train.parquet"],
    "--max-text-tokens 30000": ["max_tokens 100000000, not 30000"],
}


@pytest.mark.parametrize("flags", OTHERS)
def test_a_store_of_something_else_is_refused_with_what_differs_and_stays_as_it_is(
    flags, finished, world, tmp_path
):
    before = bytes_under(finished / "acts")
    more = flags.format(root=world.root).split()
    done = world.run("--activations-dir", finished / "acts", *more, cwd=tmp_path)
    assert_refused(done, str(finished / "acts"), *OTHERS[flags])
    assert bytes_under(finished / "acts") == before
    assert bytes_under(tmp_path) == {}


@pytest.mark.parametrize("make", ["file", "below a file", "foreign", "foreign chunks"])
def test_an_activations_directory_that_is_not_ours_is_refused_and_stays_as_it_is(
    make, world, tmp_path
):
    mine = tmp_path / "mine"
    if "file" in make:
        mine.write_text("years of work")
    else:
        mine.mkdir()
        name = "chunk-00000.safetensors" if make == "foreign chunks" else "thesis.tex"
        (mine / name).write_text("years of work")
    path = mine / "below" if make == "below a file" else mine
    before = bytes_under(tmp_path)
    done = world.run("--activations-dir", path, cwd=tmp_path)
    assert_refused(done, f"--activations-dir {path}", "choose")
    assert bytes_under(tmp_path) == before


@pytest.mark.parametrize("place", ["--activations-dir", "--output-dir"])
@pytest.mark.parametrize("path", ["/proc/no", "x" * 300])
def test_a_directory_that_cannot_be_made_is_refused(place, path, world, tmp_path):
    done = world.run(place, path, cwd=tmp_path)
    assert_refused(done, place, "choose another")


def test_an_output_directory_that_is_a_file_or_foreign_is_refused_before_the_harvest(
    world, tmp_path
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        done = world.run("--output-dir", name, cwd=tmp_path)
        assert_refused(done, f"--output-dir {name}", "choose another")
    assert not list(tmp_path.rglob("chunk-*"))
    assert (tmp_path / "folder/thesis.tex").read_text() == "mine"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["thesis.tex"]


def test_a_run_folder_of_other_constants_is_refused_with_their_names(finished, world):
    before = bytes_under(finished)
    done = world.run("--lr", "0.01", cwd=finished)
    assert_refused(done, "lr 0.001 there, 0.01 here", "--fresh")
    assert bytes_under(finished) == before


def test_weights_that_changed_between_two_starts_are_refused_when_streaming(world, tmp_path):
    """With a store its manifest refuses them, too."""
    shutil.copytree(world.root / "gpt2", tmp_path / "model")
    flags = ["--model", "model", "--max-disk-gb", "0"]
    world.finish(*flags, "--shard", "1/2", cwd=tmp_path)
    path = tmp_path / "model/model.safetensors"
    weights = {name: weight * 1.1 for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    assert_refused(world.run(*flags, cwd=tmp_path), "--output-dir run", "model_files")
    assert not (tmp_path / "run/results.csv").exists()


@pytest.mark.parametrize("kind", FAULTS)
def test_a_write_that_fails_is_one_line_and_the_same_command_goes_on(
    kind, language_sweep, tmp_path
):
    n = language_sweep.n_operations((kind,))
    for k in (n // 3, n):
        language_sweep.assert_fails_and_goes_on(tmp_path / f"{kind}{k}", kind, k)


def test_names_that_are_no_utf8_are_read_and_written(finished, world, tmp_path):
    text, run, acts = (os.fsdecode(name + b"\xe9") for name in (b"text", b"run", b"acts"))
    (tmp_path / text).mkdir()
    for n, document in enumerate(documents()):
        (tmp_path / text / os.fsdecode(b"%03d\xff.txt" % n)).write_text(document)
    flags = ["--dataset", text, "--output-dir", run, "--activations-dir", acts]
    for _ in range(2):
        world.finish(*SMALLEST, *flags, cwd=tmp_path)
    (sae,) = (tmp_path / run / "saes").iterdir()
    done = world.server.run("--evaluate", sae, "--device", "cpu", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (
        bytes_under(tmp_path / acts / "text")["tokens.bin"]
        == (finished / "acts/text/tokens.bin").read_bytes()
    )


def change_a_weight(folder: Path) -> None:
    """By less than bfloat16 can tell."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.0.mlp.c_fc.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(weights, path, metadata={"format": "pt"})


def change_the_config(folder: Path) -> None:
    """In a way that no weight shows."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3}))


@pytest.mark.parametrize("change", [change_a_weight, change_the_config])
def test_what_another_model_gave_is_never_reported_nor_used_again(change, world, tmp_path):
    shutil.copytree(world.root / "gpt2", tmp_path / "model")
    few = ["--model", "model", "--n-tokens", "640", "--expansion-exp-high", "0"]
    world.finish(*few, cwd=tmp_path)
    (tmp_path / "model/notes.txt").write_text("retrained tomorrow")
    assert "done: run: report.html" in world.finish(*few, cwd=tmp_path).out
    before = bytes_under(tmp_path / "run")
    change(tmp_path / "model")
    assert_refused(world.run(*few, cwd=tmp_path), "--output-dir run", "model_files", "--fresh")
    refused = world.run(*few, "--fresh", cwd=tmp_path)
    assert_refused(refused, "--activations-dir acts holds other activations", "model_files")
    assert bytes_under(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "acts")
    world.finish(*few, "--fresh", cwd=tmp_path)


def test_a_hub_id_means_its_commit_and_another_commit_is_another_run(world, tmp_path):
    repo, commits = tmp_path / "hub/models--me--mine", ("a" * 40, "b" * 40)
    for commit, kind in zip(commits, ("gpt2", "gpt_neox"), strict=True):
        shutil.copytree(world.root / kind, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    cached = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": True}
    patch = SMALL | {f"huggingface_hub.constants.{k}": value for k, value in cached.items()}
    few = ["--model", "me/mine", "--n-tokens", "640", "--expansion-exp-high", "0"]
    (repo / "refs/main").write_text(commits[0])
    world.finish(*few, cwd=tmp_path, patch=patch)
    constants = json.loads((tmp_path / "run/config.json").read_text())["constants"]
    manifest = json.loads((tmp_path / "acts/manifest.json").read_text())["metadata"]
    assert constants["model_revision"] == manifest["model_revision"] == commits[0]
    assert "done: run" in world.finish(*few, cwd=tmp_path, patch=patch).out
    (repo / "refs/main").write_text(commits[1])
    refused = world.run(*few, cwd=tmp_path, patch=patch)
    assert_refused(refused, f"model_revision {commits[0]} there, {commits[1]} here")
    pinned = [*few, "--model-revision", commits[0]]
    assert "done: run" in world.finish(*pinned, cwd=tmp_path, patch=patch).out


def test_a_resume_without_a_store_checks_the_model_that_it_resumes_on(world, tmp_path):
    """Here the cache of the hub was changed, which no constant shows."""
    repo, commit = tmp_path / "hub/models--me--mine", "a" * 40
    folder = repo / "snapshots" / commit
    shutil.copytree(world.root / "gpt2", folder)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    cached = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": True}
    patch = OFTEN | {f"huggingface_hub.constants.{k}": value for k, value in cached.items()}
    flags = ["--model", "me/mine", "--max-disk-gb", "0"]
    process = world.start(*flags, cwd=tmp_path, patch=patch, pause_at=(TRAINING, 3))
    process.wait_until_paused()
    process.kill()
    before, weights = bytes_under(tmp_path / "run"), load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"] *= 1.1
    original = (folder / "model.safetensors").read_bytes()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused = world.run(*flags, cwd=tmp_path, patch=patch)
    assert_refused(refused, "--output-dir run was begun on other activations", "weight_hash")
    assert bytes_under(tmp_path / "run") == before
    (folder / "model.safetensors").write_bytes(original)
    world.finish(*flags, cwd=tmp_path, patch=patch)


def test_a_full_disk_is_refused_before_the_harvest(world, tmp_path):
    with mounted_tmpfs(tmp_path / "disk", "size=1m"):
        done = world.run("--activations-dir", tmp_path / "disk/acts", cwd=tmp_path)
        assert litter(tmp_path) == []
    assert_refused(done, "disk full", "free some space")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_in_the_harvest_is_one_line_and_the_same_command_goes_on(
    finished, world, tmp_path
):
    disk = tmp_path / "disk"
    with mounted_tmpfs(disk, "size=100m"):
        process = world.start(cwd=disk, pause_at=(HARVEST, 2))
        process.wait_until_paused()
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(2**16)):
                pass
        process.resume()
        assert_refused(process.wait(), "disk full", "free some space")
        assert litter(disk) == []
        (disk / "filler").unlink()
        world.finish(cwd=disk)
        assert_same_numbers(disk, finished)


def test_evaluate_refuses_another_width_and_warns_of_another_model(finished, world, tmp_path):
    sae = finished / "run/saes" / CELLS[0]
    flags = [*world.flags(), "--evaluate", sae]
    wrong = world.server.run(*flags, "--site", "resid_post", cwd=tmp_path)
    assert_refused(wrong, "width 64", "has width 16")
    other = world.server.run(*world.flags("gpt_neox"), "--evaluate", sae, cwd=tmp_path)
    assert other.code == 0, other.err
    assert len(other.err_lines) == 2, other.err
    assert f"warning: trained on model {world.root / 'gpt2'}" in other.err_lines[0]
    assert "warning: trained on weight_hash" in other.err_lines[1]
    assert set(printed(other.out)) == set(METRICS)
    layer = world.server.run(*flags, "--layer", "0", cwd=tmp_path)
    assert layer.err_lines == ["warning: trained on layer 1, evaluated on 0"]


def foreign(folder: Path, finished: Path, **metadata: object) -> Path:
    """One of the finished run's autoencoders as SAELens would have saved it."""
    shutil.copytree(finished / "run/saes" / CELLS[0], folder)
    config = json.loads((folder / "cfg.json").read_text())
    told = {"hook_name": "blocks.1.mlp.hook_post", "context_size": CONTEXT}
    config["metadata"] = told | metadata
    del config["checksum"]
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_what_a_strangers_autoencoder_wants_is_honoured_or_refused(finished, world, tmp_path):
    gpt2 = {"model_name": str(world.root / "gpt2"), "dataset_path": str(world.text)}
    flags = ["--device", "cpu", "--held-out", "0.2", "--n-eval-tokens", "1000000"]

    def evaluated(name: str, *more: str, **metadata: object) -> Done:
        sae = foreign(tmp_path / name, finished, **gpt2 | metadata)
        return world.server.run("--evaluate", sae, *flags, *more, cwd=tmp_path)

    plain = evaluated("plain")
    assert plain.code == 0, plain.err
    assert re.search(r"^1,000,000 held-out tokens requested, [\d,]+ available$", plain.out, re.M)
    bos = evaluated("bos", prepend_bos=True)
    assert "rows begin with bos" in bos.out
    assert printed(bos.out)["ce_clean"] != printed(plain.out)["ce_clean"]
    unknown = evaluated("unknown", hook_name="blocks.1.hook_mlp_in")
    assert_refused(unknown, "blocks.1.hook_mlp_in", "--layer", "--site")
    given = evaluated("given", "--layer", "1", "--site", "mlp_act", hook_name="blocks.1.hook_x")
    assert printed(given.out) == printed(plain.out)
    options = {"first_n_layers": 1}
    assert_refused(evaluated("cut", model_from_pretrained_kwargs=options), "first_n_layers 1")
    own = {"flags": {"output_dir": "evil", "activations_dir": "evil", "layer": "one"}}
    assert_refused(evaluated("typed", sparse_coding=own), "does not say model, site")
    own["flags"] |= {"model": gpt2["model_name"], "site": "mlp_act"}
    assert_refused(evaluated("typed2", sparse_coding=own), "typed2/cfg.json: ", "--layer", "one")
    own["flags"] |= {"layer": 1, "dataset": gpt2["dataset_path"], "context_length": CONTEXT}
    assert printed(evaluated("own", sparse_coding=own).out) == printed(plain.out)
    assert not (tmp_path / "evil").exists()


def test_evaluate_of_a_folder_that_is_torn_is_refused(finished, world, tmp_path):
    shutil.copytree(finished / "run/saes" / CELLS[0], tmp_path / "sae")
    (tmp_path / "sae/sae_weights.safetensors").write_bytes(b"x" * 100)
    flags = [*world.flags(), "--evaluate", tmp_path / "sae"]
    assert_refused(world.server.run(*flags, cwd=tmp_path), "sae_weights", "again")
    assert_refused(world.server.run(*flags[:-1], tmp_path, cwd=tmp_path), "cfg.json")


# --- around the run ----------------------------------------------------------------------------


def test_a_finished_run_is_still_exported_and_shown_anew_when_asked(finished, world, tmp_path):
    """--export and --page-l0 change no number, so they may come later."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    l0 = [float(row["l0"]) for row in table(finished / "run")]
    more = ["--export", "dictionary_learning", "--page-l0", f"{1.001 * min(l0):.6f}"]
    world.finish(*more, cwd=tmp_path)
    exported = {p.parent.name for p in (tmp_path / "run").glob("dictionary_learning/*/ae.pt")}
    assert exported == set(CELLS)
    assert page_of(tmp_path / "run/features.html")["cell"] == CELLS[l0.index(min(l0))]
    world.finish(*more, "--pages", "best", cwd=tmp_path)
    assert list((tmp_path / "run/features").iterdir()) == []


def test_names_come_later_without_the_model_and_are_refused_for_another_autoencoder(
    finished, world, tmp_path
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before, pages = bytes_under(tmp_path / "run"), page_of(tmp_path / "run/features.html")
    names = tmp_path / "named_features.json"
    names.write_text(json.dumps(pages | {"names": {"7": "<i>seven</i>"}}))
    needs_no_model = {"sparse_coding.lm.target.open_target": None}
    world.finish("--names", names, cwd=tmp_path, patch=SMALL | needs_no_model)
    assert page_of(tmp_path / "run/features.html")["names"] == {"7": "<i>seven</i>"}
    assert page_of(tmp_path / "run/features.html")["n_named"] == {pages["cell"]: 1}
    named = bytes_under(tmp_path / "run")
    changed = {name for name in before if before[name] != named[name]}
    assert changed == {"shown.json", *(name for name in before if name.startswith("features"))}

    for wrong, said in [
        (pages | {"names": {"7": "x"}, "checksum": "0" * 64}, "names of another autoencoder"),
        (pages | {"names": {"7": "x"}, "cell": "seed9"}, CELLS[0]),
        (pages | {"names": {"64": "x"}}, "there is no feature '64'"),
        ({"7": "seven"}, "no file of names"),
    ]:
        names.write_text(json.dumps(wrong))
        assert_refused(world.run("--names", names, cwd=tmp_path), said)
    names.write_text(json.dumps(pages | {"names": {"7": "x"}}))
    assert_refused(world.run("--names", names, "--fresh", cwd=tmp_path), "--fresh")
    elsewhere = ["--names", names, "--output-dir", "elsewhere"]
    assert_refused(world.run(*elsewhere, cwd=tmp_path), "run it first without --names")
    assert not (tmp_path / "elsewhere").exists()
    assert bytes_under(tmp_path / "run") == named
    world.finish(cwd=tmp_path, patch=SMALL | needs_no_model)
    after = bytes_under(tmp_path / "run")
    assert {name for name in before if before[name] != after[name]} <= {"shown.json"}


def test_a_fresh_interpreter_imports_no_wandb_and_asks_no_hub(world, tmp_path):
    code = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0][:-6]);"
        "atexit.register(lambda: print('\\n'.join(sys.modules)));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = [*world.flags(), *PLACES, "--n-tokens", "640", "--shard", "1/2"]
    done = run_script(["-c", code, str(ROOT / "run.py"), *flags], cwd=tmp_path)
    assert_done(done)
    modules = set(done.out.split())
    assert {"torch", "transformers"} <= modules
    assert modules & {"datasets", "wandb", "vastai", "pandas", "tiktoken"} == set()
