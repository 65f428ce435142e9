"""vastai_utils.py as its user calls it: the real toy script on rented machines, the commands by
hand, and what is refused before anything is bought."""

import json
import math
import os
import shutil
import signal
import subprocess
import time

import pytest
from builders.rented import (
    API_KEY,
    FAST,
    JOB,
    User,
    assert_nothing_lives,
    git,
)
from builders.scripts import ROOT, Done, assert_refused, run_script, table

from sparse_coding.config import UserError
from sparse_coding.rental.preflight import secrets_for, tracked_files
from sparse_coding.rental.records import Attempt, Ledger, Rates
from sparse_coding.rental.run import _words

TOY = ["python", "replicate_toy_models.py", "--preset", "smoke", "--n-steps", "60",
       "--dict-ratio-exp-high", "1", "--l1-exp-high", "0"]  # fmt: skip


# --- the real script ---


@pytest.mark.long
@pytest.mark.share(1)
@pytest.mark.parametrize("kernels", [False, True])
def test_the_toy_figures_come_from_two_machines_as_from_two_shards_here(user, tmp_path, kernels):
    here = {}
    if not kernels:  # whose compilation on each machine takes most of this test
        here["PYTHONPATH"] = str(tmp_path / "no_kernels")
        (tmp_path / "no_kernels").mkdir()
        (tmp_path / "no_kernels" / "llvmlite.py").write_text("raise ImportError('left out')")
        python = user.lab.root / "bin" / "python3"
        python.write_text(
            python.read_text().replace("exec", f"PYTHONPATH={tmp_path}/no_kernels exec")
        )
    flags = ["--poll-seconds", "1", "--max-hours", "0.2"]
    done = user.sweep(*flags, job=["--", *TOY, "--wandb-mode", "offline"], timeout_s=600)
    assert done.code == 0, done.out + done.err
    assert_nothing_lives(user)
    words = [ROOT / "replicate_toy_models.py", *TOY[2:], "--output-dir", "here"]
    words += ["--wandb-mode", "disabled"]
    for shard in (["--shard", "1/2"], ["--shard", "2/2"], []):
        # of this checkout, where kernels are compiled already
        done_here = run_script([*words, *shard], cwd=tmp_path, more_environment=here)
        assert done_here.code == 0, done_here.err
    ours, theirs = table(tmp_path / "here"), table(user.output)
    assert len(ours) == 12
    for row, other in zip(ours, theirs, strict=True):
        same = row.keys() - {"seconds"}
        assert {name: row[name] for name in same} == {name: other[name] for name in same}
    assert (user.output / "figures" / "mmcs.png").stat().st_size > 10_000
    assert len(list((user.output / "wandb").glob("offline-run-*"))) == 3  # shards, and the merge
    assert "to upload: wandb sync" in done.out
    config = json.loads((user.output / "config.json").read_text())
    head = subprocess.run(["git", "-C", user.checkout, "rev-parse", "HEAD"], capture_output=True)
    assert config["git_commit"] == head.stdout.decode().strip()  # although there is no git there
    assert "resumed_by" not in config


# --- by hand ---


def test_a_sweep_by_hand(user):
    def call(*words: str) -> str:
        done = user.call(words[0], "--run", "mine", *FAST, *words[1:])
        assert done.code == 0, done.out + done.err
        return done.out

    call("launch", "--instances", "2")
    assert len(user.lab.live()) == 2
    (user.checkout / "tiny_job.py").write_text((user.checkout / "tiny_job.py").read_text() + "\n")
    assert "are there" in call("sync")
    (user.checkout / "models").mkdir()
    (user.checkout / "models" / "weights.bin").write_bytes(b"123")
    assert "models/ is there" in call("copy-models")
    for number in user.lab.live():
        there = user.lab.home(number) / "sparse_coding"
        assert (there / "models" / "weights.bin").read_bytes() == b"123"
        assert (there / "tiny_job.py").read_text().endswith("\n\n")
    run = user.start("run", "--run", "mine", *FAST, *JOB)
    last = [
        "sparse_coding/outputs/mine/cells/cell-5.json",
        "sparse_coding/outputs/mine/cells/cell-4.json",
    ]
    homes = [user.lab.home(number) for number in user.lab.live()]
    run.wait_until(lambda: all(any((h / name).exists() for h in homes) for name in last))
    assert "runs python tiny_job.py" in run.wait().out
    status = call("status")
    assert status.count("running, RTX 3090, $0.1") == 2
    assert "mine: 0 of 2 shards done" in status
    with (user.lab.home(user.lab.live()[0]) / ".sae" / "job.log").open("ab") as log:
        log.write(b"\x1b]0;title\x07 \xff\n" + 5000 * b"x" + b"\n")
    told = call("logs")
    assert "cell 5" in told
    assert "]0;title \N{REPLACEMENT CHARACTER}" in told
    assert not any(c in told for c in "\x1b\x07")
    assert call("ssh", "--shard", "1", "--", "echo", "hello") == "hello\n"
    assert "fetched: outputs/mine" in call("copy-recent")
    cells = sorted(p.name for p in (user.output / "cells").iterdir())
    assert cells == [f"cell-{i}.json" for i in range(6)]
    assert "no machine of it is left" in call("destroy")
    assert_nothing_lives(user)


def killed(user: User, *flags: str, until) -> None:
    """A sweep whose command is killed, so that its machine lives on."""
    process = user.start_sweep(*flags, instances=1, job=user.held())
    until(process)
    process.signal(signal.SIGKILL)
    process.wait()


def test_destroy_fetches_first_and_refuses_to_lose_what_it_can_not_fetch(user):
    killed(user, until=user.until_held)
    (number,) = user.lab.live()
    shutil.rmtree(user.lab.home(number) / ".sae")
    assert_refused(user.call("destroy", *FAST), "add --discard to lose them")
    assert user.lab.live() == [number]
    assert user.call("destroy", "--discard", *FAST).code == 0
    assert_nothing_lives(user)


def test_status_flags_what_is_overdue_unknown_or_stopped(user):
    flags = ["--max-hours", "0.0008", "--start-minutes", "9"]
    user.lab.behave(stuck="loading")
    killed(user, *flags, until=lambda process: process.wait_until(user.lab.live))
    user.lab.act(user.lab.live()[0], "stop")
    expires = int(user.lab.ledger()[0]["label"].rpartition("=")[2])
    time.sleep(max(0.0, expires - time.time()))
    shutil.rmtree(user.folder)
    line = user.call("status", *FAST).out
    for words in ("OVERDUE: reap ends it", "not rented from here",
                  "its disk is billed in this state too"):  # fmt: skip
        assert words in line


def test_doctor_tries_everything_and_buys_nothing(user):
    done = user.call("doctor", *FAST)
    assert done.code == 0, done.err
    for words in ("ssh and rsync are there", "the key works, credit $", "8 offers of any kind",
                  "0 machines of ours live", "all well"):  # fmt: skip
        assert words in done.out
    assert {r["method"] for r in user.lab.requests()} <= {"GET", "POST"}
    assert user.lab.ledger() == []


def test_search_lists_the_cheapest_first_with_traffic(user):
    done = user.call("search", "--api-spacing", "0", "--image-gb", "10", "--max-dph", "0.13")
    lines = [line for line in done.out.splitlines() if "RTX 3090" in line]
    prices = [float(line.partition("RTX 3090")[2].split()[0][1:-3]) for line in lines]
    assert prices == sorted(prices)
    assert 0 < len(prices) < 8
    assert max(prices) <= 0.13


def test_search_without_a_cap_lists_all(user):
    done = user.call("search", "--api-spacing", "0")
    assert (done.code, done.out.count("RTX 3090")) == (0, 8), done.err


# --- ending ---


def never_ends(user: User, number: int) -> None:
    """The service fails, for ever, to end this machine."""
    user.lab.fault(method="DELETE", path=f"/instances/{number}/", caller="account", action="500")


def assert_named(user: User, done: Done, number: int) -> None:
    """All machines are ended but this one, which is named."""
    assert done.code == 1, done.out + done.err
    assert user.lab.live() == [number]
    (line,) = done.err_lines
    assert f"no usable answer to destroy instance {number} (500" in line


@pytest.mark.parametrize("words", [["reap"], ["reap", "--all"]])
def test_reap_ends_all_that_can_be_ended_and_names_what_is_left(user, words):
    first, *_ = [user.rent(f"sae1/old/{i}/a1/exp=9") for i in (1, 2, 3)]
    never_ends(user, first)
    assert_named(user, user.call(*words, *FAST), first)


def test_destroy_ends_all_that_can_be_ended_and_names_what_is_left(user):
    launched = user.call("launch", "--run", "mine", "--instances", "2", *FAST)
    assert launched.code == 0, launched.err
    first, _ = user.lab.live()
    stray = user.rent(user.lab.ledger()[0]["label"].replace("/a1/", "/a7/"))
    never_ends(user, first)
    done = user.call("destroy", "--discard", *FAST)
    assert stray not in user.lab.live()
    assert_named(user, done, first)
    user.lab.clear_faults()
    assert user.call("destroy", "--discard", *FAST).code == 0
    assert_nothing_lives(user)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_launch_that_is_stopped_leaves_no_machine(user, signum):
    user.lab.behave(stuck="loading")
    process = user.start("launch", "--instances", "2", *FAST)
    process.wait_until(lambda: len(user.lab.live()) == 2)
    process.signal(signum)
    assert process.wait().code == 128 + signum
    assert_nothing_lives(user)


# --- refused before anything is bought ---


def refused(user: User, *words: str, env: dict | None = None) -> str:
    """The one line of a command that is refused; nothing was bought."""
    done = user.start(*words, env=env).wait()
    assert_refused(done)
    assert user.lab.ledger() == []
    return done.err


def test_a_key_that_is_missing_open_to_others_or_wrong_is_refused_with_what_to_do(user):
    sweep, no_key = ["sweep", *FAST, *JOB], {"VAST_API_KEY": ""}
    assert "VAST_API_KEY" in refused(user, *sweep, env=no_key)
    path = user.checkout.parent / ".config" / "vastai" / "vast_api_key"
    path.parent.mkdir(parents=True)
    path.write_text(API_KEY)
    path.chmod(0o644)
    line = refused(user, *sweep, env=no_key)
    assert f"mode 0644): chmod 600 {path}" in line
    assert API_KEY not in line
    line = refused(user, *sweep, env={"VAST_API_KEY": "wrong-canary"})
    assert "refuses the key (404)" in line
    assert "wrong-canary" not in line


@pytest.mark.parametrize("key", [b"", b"\xff\xfe", "5 €".encode(), b"two words", b"a\0b", None])
def test_a_key_file_that_holds_no_key_is_refused(user, key):
    path = user.checkout.parent / ".vast_api_key"
    path.mkdir() if key is None else path.write_bytes(key)
    path.chmod(0o700)
    for words in (["doctor"], ["reap"]):
        line = refused(user, *words, *FAST, env={"VAST_API_KEY": ""})
        assert f"{path} is no file" in line or f"{path} holds no key" in line
    assert "VAST_API_KEY holds no key" in refused(user, *words, *FAST, env={"VAST_API_KEY": "€"})


TORN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b'{"a": 1}',
    9999 * b"[",
    b'{"x": ' + 5000 * b"9" + b"}",
]


@pytest.mark.parametrize(
    "torn", [TORN[1], *(pytest.param(t, marks=pytest.mark.long) for t in TORN)], ids=str
)
def test_a_plan_a_record_or_secrets_that_are_torn_or_foreign_are_one_line(user, torn):
    assert user.call("launch", "--run", "mine", *FAST).code == 0
    folder = user.folder / "mine"
    for name in ("shard-1.json", "plan.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(torn)
        for words in (["destroy"], ["status"]):
            assert_refused(user.call(*words, *FAST), name)
        (folder / name).write_bytes(whole)
    (user.checkout / "secrets.json").write_bytes(torn)
    done = user.call("run", "--send-env", "OTHER", *FAST, *JOB)
    assert_refused(done)
    assert "secrets.json" in done.err
    (folder / "shard-1.json").write_bytes(torn)
    assert user.call("reap", "--all", *FAST).code == 0  # which needs none of these
    assert_nothing_lives(user)


@pytest.mark.parametrize("change", [
    {"shard": 2}, {"done": 1}, {"avoid": 7}, {"avoid": ["x"]}, {"attempts": {"x": 1}},
    {"attempts": [7]}, {"more": 1}, {"attempts": [{}]}, *[{"attempts": odd} for odd in (
        {"expires": "x"}, {"ordered": None}, {"id": "5"}, {"gone": []}, {"running": [7]},
        {"gb_up": math.nan}, {"rates": {"gpu": "x"}}, {"rates": []}, {"number": None},
        {"running": {}}, {"running": [[None, 2]]}, {"gpu_name": None}, {"why": []},
        {"machine_id": []}, {"machine_id": "7"})],
    {"avoid": {}}, {"avoid": "77"},
], ids=str)  # fmt: skip
def test_a_record_with_odd_fields_is_refused(tmp_path, change):
    ledger = Ledger(tmp_path, 1)
    rates = Rates(gpu=0.4, disk=0.1, up=0.02, down=0.01)
    attempt = Attempt(1, 7, "RTX 3090", rates, 1000.0, 8200.0, id=5)
    ledger.enter(ledger.shards[0], attempt)
    path = tmp_path / "shard-1.json"
    row = json.loads(path.read_text())
    if isinstance(change.get("attempts"), dict):
        change = {"attempts": [row["attempts"][0] | change["attempts"]]}
    path.write_text(json.dumps(row | change))
    with pytest.raises(UserError, match=r"shard-1\.json is no record of a shard"):
        Ledger(tmp_path, 1)


def look(user: User, *words: str) -> None:
    """A command that only looks gives up, with one line, in 20 s."""
    began = time.monotonic()
    env = {"VAST_URL": user.lab.url}
    line = refused(user, *words, env=env)
    assert "vast.ai gives no usable answer to " in line
    assert time.monotonic() - began < 20


def test_commands_that_only_look_say_soon_that_the_service_is_not_there(user):
    user.lab.fault(path="", action="drop")
    for words in (["status"], ["search"], ["doctor"]):
        look(user, *words, "--api-spacing", "0.02")


@pytest.mark.long
@pytest.mark.share(4)
@pytest.mark.parametrize("action", ["hang", "drop", "500"])
@pytest.mark.parametrize("words", ["status", "search", "doctor"])
def test_they_say_so_within_twenty_seconds(user, action, words):
    user.lab.fault(path="", action=action)
    look(user, words)


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
        (["--run", ".."], "--run .. must be letters, digits"),
        (["--run", "."], "--run . must be letters, digits"),
        (["--run", "a\nb"], "must be letters, digits"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_sweep_that_can_not_be_is_refused_with_what_to_do(user, flags, words):
    mode = user.checkout.stat().st_mode
    assert words in refused(user, "sweep", *FAST, *flags, *JOB)
    assert user.checkout.stat().st_mode == mode
    assert not (user.checkout / "plan.json").exists()


def test_the_caps_have_no_default_and_the_price_wants_a_yes(user):
    fast = [word for word in FAST if word != "--yes"]
    assert "nobody is there to confirm the price: add --yes" in refused(user, "sweep", *fast, *JOB)
    for name in ("--max-dph", "--max-total"):
        at = fast.index(name)
        line = refused(user, "sweep", *fast[:at], *fast[at + 2 :], *JOB)
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
def test_a_command_that_can_not_be_sharded_is_refused(user, job, words):
    assert words in refused(user, "sweep", *FAST, *job)


def test_a_command_of_one_machine_is_told_of_no_shard():
    plan = {"command": ["python", "job.py", "--x"], "instances": 1}
    alone = ["python", "job.py", "--x", "--output-dir", "outputs/run"]
    assert _words(plan, 1, "run") == alone
    assert _words(plan | {"instances": 2}, 2, "run") == [*alone, "--shard", "2/2"]


def test_tracked_secrets_are_refused_and_a_dirty_tree_is_recorded(user):
    sweep, edited = ["sweep", *FAST, *JOB], user.checkout / "sparse_coding" / "__init__.py"
    git(user.checkout, "add", "-f", "secrets.json")
    assert "secrets.json is tracked by git" in refused(user, *sweep)
    git(user.checkout, "rm", "-q", "--cached", "secrets.json")
    edited.write_text("x = 'hf_" + 30 * "a" + "'\n")
    assert "seems to hold a token" in refused(user, *sweep)
    edited.write_text("# another line\n")
    assert user.call(*sweep[:1], "--dry-run", *sweep[1:]).code == 0
    (plan,) = user.folder.glob("*/plan.json")
    known = json.loads(plan.read_text())
    assert known["git_dirty"] is True
    assert "+# another line" in known["git_diff"]


def test_secrets_need_no_file_where_none_are_sent_or_the_environment_has_them(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TOKEN", "x")
    assert secrets_for((), tmp_path) == b""
    assert secrets_for(("TOKEN",), tmp_path) == b"TOKEN=x\n"


def test_without_rsync_or_outside_git_nothing_is_bought(user, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("ssh", "ssh-keygen", "git"):
        (folder / tool).symlink_to(shutil.which(tool))
    line = refused(user, "sweep", *FAST, *JOB, env={"PATH": str(folder)})
    assert "rsync is missing: install rsync" in line
    shutil.rmtree(user.checkout / ".git")
    assert "is no git checkout" in refused(user, "sweep", *FAST, *JOB)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which command?"),
        (["swep"], "did you mean sweep?"),
        (["fetch", "--run", "none"], "no run none in rentals/"),
        (["logs"], "no run in rentals/ yet"),
    ],
)
def test_commands_without_their_object_are_refused(user, words, told):
    assert told in refused(user, *words, *(FAST if words else []))


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
    code = "from sparse_coding.rental.market import Market; Market('key')"
    start = f"import sys; sys.path.insert(0, '{ROOT}'); sys.modules['vastai'] = None"
    done = run_script(["-c", f"{start}; {code}"], cwd=tmp_path)
    assert "pip install -r requirements-vast.txt" in done.err


def test_our_own_repository_may_be_pushed():
    assert "vastai_utils.py" in tracked_files(ROOT, 64 * "0")


@pytest.mark.parametrize("text", [
    f"key = {API_KEY!r}", "VAST_API_KEY=" + 32 * "0a", '"wandb_api_key": "' + 20 * "0a" + '"',
    "ghp_" + 36 * "a", 10**6 * " " + "sk-" + 32 * "a",
])  # fmt: skip
@pytest.mark.parametrize("large", [0, 1e9])
def test_a_token_is_found_in_any_tracked_file(tmp_path, monkeypatch, text, large):
    monkeypatch.setattr("sparse_coding.rental.preflight.LARGE", large)
    (tmp_path / "sums.txt").write_text(32 * "0a" + "  file\n" + 20 * "0b" + " a commit\n")
    (tmp_path / "empty").touch()
    (tmp_path / os.fsdecode(b"\xff.txt")).touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    assert len(tracked_files(tmp_path, API_KEY)) == 3
    (tmp_path / "empty").write_text(text)
    with pytest.raises(UserError, match="empty seems to hold a token"):
        tracked_files(tmp_path, API_KEY)
