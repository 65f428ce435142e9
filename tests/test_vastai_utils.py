"""vastai_utils.py as its user calls it: the real toy script on rented machines, the commands by
hand, and what is refused before anything is bought."""

import json
import os
import shutil
import subprocess
import time

import pytest
from builders.rented import (
    FAST,
    JOB,
    World,
    assert_nothing_lives,
    git,
    make_checkout,
    market,
    require_lab,
)
from builders.scripts import ROOT, assert_refused, run_script, served, table

from sparse_coding.rental.preflight import tracked_files

SCRIPT = ROOT / "vastai_utils.py"
TOY = ["python", "replicate_toy_models.py", "--preset", "smoke", "--n-steps", "60",
       "--dict-ratio-exp-high", "1", "--l1-exp-high", "0", "--wandb-mode", "offline"]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    require_lab()
    home = tmp_path_factory.mktemp("vastai_utils")
    make_checkout(home / "checkout", "replicate_toy_models.py")
    script = home / "checkout" / "vastai_utils.py"
    with served(script, home, patch={}, modules=("vastai",)) as server:
        yield server


@pytest.fixture
def world(server, tmp_path):
    with market(tmp_path, server) as world:
        yield world


# --- the real script ---


def test_the_toy_figures_come_from_two_machines_as_from_two_shards_here(world, tmp_path):
    done = world.sweep("--poll-seconds", "1", job=["--", *TOY], timeout_s=200)
    assert done.code == 0, done.out + done.err
    print(done.out)
    assert_nothing_lives(world)
    for shard in ("1/2", "2/2"):
        # of this checkout, where kernels are compiled already
        words = [ROOT / "replicate_toy_models.py", *TOY[2:], "--output-dir", "here"]
        done_here = run_script([*words, "--shard", shard], cwd=tmp_path)
        assert done_here.code == 0, done_here.err
    assert run_script(words, cwd=tmp_path).code == 0
    ours, theirs = table(tmp_path / "here"), table(world.output)
    assert len(ours) == 12
    for row, other in zip(ours, theirs, strict=True):
        same = row.keys() - {"seconds"}
        assert {name: row[name] for name in same} == {name: other[name] for name in same}
    assert (world.output / "figures" / "mmcs.png").stat().st_size > 10_000
    assert len(list((world.output / "wandb").glob("offline-run-*"))) == 3  # shards, and the merge
    assert "to upload: wandb sync" in done.out
    config = json.loads((world.output / "config.json").read_text())
    head = subprocess.run(["git", "-C", world.checkout, "rev-parse", "HEAD"], capture_output=True)
    assert config["git_commit"] == head.stdout.decode().strip()  # although there is no git there
    assert "resumed_by" not in config


# --- by hand ---


def test_a_round_by_hand(world):
    run = ["--run", "mine"]
    done = world.call("launch", *run, *FAST, "--instances", "2")
    assert done.code == 0, done.out + done.err
    assert len(world.lab.live()) == 2
    (world.checkout / "tiny_job.py").write_text((world.checkout / "tiny_job.py").read_text() + "\n")
    assert "are there" in world.call("sync", *run, *FAST).out
    (world.checkout / "models").mkdir()
    (world.checkout / "models" / "weights.bin").write_bytes(b"123")
    assert "models/ is there" in world.call("copy-models", *run, *FAST).out
    homes = [row["home"] for row in world.lab.instances()]
    for home in homes:
        with open(f"{home}/sparse_coding/models/weights.bin", "rb") as file:
            assert file.read() == b"123"
    assert "runs python tiny_job.py" in world.call("run", *run, *FAST, *JOB).out
    time.sleep(1.5)
    status = world.call("status", *FAST).out
    assert status.count("running, RTX 3090, $0.1") == 2
    assert "mine: 0 of 2 shards done" in status
    assert "cell 5" in world.call("logs", *run, *FAST).out
    assert world.call("ssh", *run, *FAST, "--shard", "1", "--", "echo", "hello").out == "hello\n"
    assert "fetched: outputs/mine" in world.call("copy-recent", *FAST).out
    cells = sorted(p.name for p in (world.checkout / "outputs" / "mine" / "cells").iterdir())
    assert cells == [f"cell-{i}.json" for i in range(6)]
    done = world.call("destroy", *run, *FAST)
    assert done.code == 0, done.out + done.err
    assert "no machine of it is left" in done.out
    assert_nothing_lives(world)


def test_destroy_fetches_first_and_refuses_to_lose_what_it_can_not_fetch(world):
    job = [*JOB, "--seconds", "9"]
    process = world.start_sweep(instances=1, job=job)
    process.wait_until(world.lab.live)
    time.sleep(3)
    os.kill(process.pid, 9)
    process.wait()
    (row,) = world.lab.instances()
    shutil.rmtree(f"{row['home']}/.sae")
    refused = world.call("destroy", *FAST)
    assert refused.code == 2
    assert "add --discard to lose them" in refused.err
    assert len(world.lab.live()) == 1
    assert world.call("destroy", "--discard", *FAST).code == 0
    assert_nothing_lives(world)


def test_doctor_tries_everything_and_buys_nothing(world):
    done = world.call("doctor", *FAST)
    assert done.code == 0, done.err
    for words in ("ssh and rsync are there", "the key works, credit $", "8 offers of any kind",
                  "0 machines of ours live", "all well"):  # fmt: skip
        assert words in done.out
    assert {r["method"] for r in world.lab.requests()} <= {"GET", "POST"}
    assert world.lab.ledger() == []


def test_search_lists_the_cheapest_first_with_traffic(world):
    done = world.call("search", "--api-spacing", "0", "--image-gb", "10", "--max-dph", "0.13")
    lines = [line for line in done.out.splitlines() if "RTX 3090" in line]
    prices = [float(line.split()[4]) for line in lines]
    assert prices == sorted(prices)
    assert 0 < len(prices) < 8
    assert max(prices) <= 0.13


def test_status_flags_what_is_overdue_unknown_or_stopped(world):
    process = world.start_sweep("--max-hours", "0.0008", "--start-minutes", "9", instances=1)
    process.wait_until(world.lab.live)
    os.kill(process.pid, 9)
    process.wait()
    (number,) = world.lab.live()
    world.lab.act(id=number, what="stop")
    time.sleep(3)
    shutil.rmtree(world.checkout / "rentals")
    line = world.call("status", *FAST).out
    assert "OVERDUE: reap ends it" in line
    assert "not rented from here" in line
    assert "its disk is billed in this state too" in line
    assert "1 ended" in world.call("reap", *FAST).out


# --- refused before anything is bought ---


def refused(world: World, *words: str, env: dict | None = None) -> str:
    """The one line of a sweep that is refused; nothing was bought, no run is noted."""
    done = world.start(*words, env=env).wait()
    assert_refused(done)
    assert world.lab.ledger() == []
    return done.err


def test_without_a_key_the_place_for_it_is_named(world):
    assert "VAST_API_KEY" in refused(world, "sweep", *FAST, *JOB, env={"VAST_API_KEY": ""})


def test_a_key_file_that_others_can_read_is_refused_with_the_command_that_helps(world):
    path = world.checkout.parent / ".config" / "vastai" / "vast_api_key"
    path.parent.mkdir(parents=True)
    path.write_text("abc")
    path.chmod(0o644)
    line = refused(world, "sweep", *FAST, *JOB, env={"VAST_API_KEY": ""})
    assert f"mode 0644): chmod 600 {path}" in line
    assert "abc" not in line.split("chmod")[0]


def test_a_wrong_key_is_refused_in_one_line(world):
    line = refused(world, "sweep", *FAST, *JOB, env={"VAST_API_KEY": "wrong-canary"})
    assert "refuses the key (404)" in line
    assert "wrong-canary" not in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-names", "RTX 309O"], "did you mean RTX 3090"),
        (["--max-dph", "0.05"], "the cheapest of them costs $0.1"),
        (["--max-total", "0.001"], "is above --max-total 0.001: raise it, or lower --max-hours"),
        (["--instances", "9"], "9 machines are needed, 8 fit"),
        (["--min-cuda", "99"], "none of 8 offers"),
        (["--send-env", "NO_SUCH_NAME"], "neither the environment nor secrets.json has it"),
        (["--disk-gb", "4"], "--disk-gb 4.0 must be at least 8"),
        (["--max-dph", "0"], "--max-dph 0.0 must be above 0"),
        (["--instances", "0"], "--instances 0 must be at least 1"),
        (["--gpus", "x"], "did you mean --n-gpus?"),
        (["--run", "a/b"], "--run a/b must be letters, digits"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_sweep_that_can_not_be_is_refused_with_what_to_do(world, flags, words):
    assert words in refused(world, "sweep", *FAST, *flags, *JOB)


def test_the_caps_have_no_default_and_the_price_wants_a_yes(world):
    fast = [word for word in FAST if word != "--yes"]
    assert "nobody is there to confirm the price: add --yes" in refused(world, "sweep", *fast, *JOB)
    for name in ("--max-dph", "--max-total"):
        at = fast.index(name)
        line = refused(world, "sweep", *fast[:at], *fast[at + 2 :], *JOB)
        assert f"{name} is missing: say how many dollars" in line


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ([], "give the command after --"),
        (["--", "bash", "x.sh"], "give the command after --"),
        (["--", "python", "new.py"], "new.py is not tracked by git"),
        (["--", "python", "tiny_job.py", "--shard", "1/2"], "--shard is set by the sweep"),
        (["--", "python", "tiny_job.py", "--output_dir=x"], "--output-dir is set by the sweep"),
        (["--", "python", "replicate_toy_models.py"], "--preset is missing"),
    ],
)
def test_a_command_that_can_not_be_sharded_is_refused(world, job, words):
    assert words in refused(world, "sweep", *FAST, *job)


def test_tracked_secrets_are_refused_and_a_dirty_tree_is_recorded(world):
    git(world.checkout, "add", "-f", "secrets.json")
    assert "secrets.json is tracked by git" in refused(world, "sweep", *FAST, *JOB)
    git(world.checkout, "rm", "-q", "--cached", "secrets.json")
    (world.checkout / "sparse_coding" / "__init__.py").write_text("x = 'hf_" + 30 * "a" + "'\n")
    assert "seems to hold a token" in refused(world, "sweep", *FAST, *JOB)
    (world.checkout / "sparse_coding" / "__init__.py").write_text("# another line\n")
    done = world.sweep(instances=1)
    assert done.code == 0, done.err
    (plan,) = (world.checkout / "rentals").glob("*/plan.json")
    known = json.loads(plan.read_text())
    assert known["git_dirty"] is True
    assert "+# another line" in known["git_diff"]


def test_without_rsync_or_outside_git_nothing_is_bought(world, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("ssh", "ssh-keygen", "git"):
        (folder / tool).symlink_to(shutil.which(tool))
    line = refused(world, "sweep", *FAST, *JOB, env={"PATH": str(folder)})
    assert "rsync is missing: install rsync" in line
    shutil.rmtree(world.checkout / ".git")
    assert "is no git checkout" in refused(world, "sweep", *FAST, *JOB)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which command?"),
        (["swep"], "did you mean sweep?"),
        (["fetch", "--run", "none"], "no run none in rentals/"),
        (["logs"], "no run in rentals/ yet"),
        (["destroy", "--all"], "add --discard to say so"),
    ],
)
def test_commands_without_their_object_are_refused(world, words, told):
    assert told in refused(world, *words, *(FAST if words else []))


def test_help_and_import_need_neither_torch_nor_vastai(tmp_path):
    code = """
import atexit, sys
sys.path.insert(0, sys.argv[1])
import vastai_utils
atexit.register(lambda: print("loaded:", {"torch", "vastai"} & set(sys.modules)))
vastai_utils.main(["--help"])
"""
    done = run_script(["-c", code, ROOT], cwd=tmp_path)
    assert done.code == 0, done.err
    assert "--max-dph" in done.out
    assert done.out.endswith("loaded: set()\n")


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path):
    code = (
        "import sys; sys.modules['vastai'] = None; from sparse_coding.rental.market import Market; "
    )
    code += "Market('key')"
    done = run_script(["-c", f"import sys; sys.path.insert(0, '{ROOT}'); {code}"], cwd=tmp_path)
    assert "pip install -r requirements-vast.txt" in done.err


def test_our_own_repository_may_be_pushed():
    assert "vastai_utils.py" in tracked_files(ROOT)
