"""Sweeps on a loopback market with real sshd and rsync, and everything that can go wrong there.

Of the faults, of the kills at each call and of the random schedules a part runs in every suite,
more with --long, and all of them, for half an hour, with --torture.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time

import pytest
from builders.rented import (
    FAST,
    HASTY,
    JOB,
    Screen,
    assert_no_secret_shows,
    assert_nothing_lives,
    assert_whole,
    renting,
)
from builders.scripts import assert_refused, mounted_tmpfs

long = pytest.mark.long


def some(few: list, more: list) -> list:
    """Parameters of a test: the few take part in every run of the suite."""
    return [*few, *(pytest.param(*p, marks=long) if isinstance(p, tuple) else
                    pytest.param(p, marks=long) for p in more)]  # fmt: skip


# --- nothing goes wrong ---


def test_two_shards_are_fetched_verified_and_merged_no_secret_shows_and_nothing_is_left(user):
    done = user.sweep("--send-env", "HF_TOKEN", "OTHER")
    assert_whole(user, done, machines=2)
    assert_no_secret_shows(user, done.out, done.err)
    assert "no machine of it is left" in done.out
    again = user.sweep()
    assert "done before" in again.out
    assert_whole(user, again, machines=2)


@long
def test_one_machine_needs_no_merge_and_the_cheapest_is_taken(user):
    assert_whole(user, user.sweep(instances=1), machines=1)
    (row,) = user.lab.ledger()
    assert row["offer"] == min(user.lab.offers(), key=lambda o: o["dph_base"])["id"]


@long
def test_the_cost_is_that_of_the_services_ledger(user):
    user.lab.behave(provision_s=0.3, load_s=1.0)
    done = user.sweep("--poll-seconds", "0.05", instances=1, job=[*JOB, "--seconds", "3"])
    (record,) = user.records()
    (attempt,), (row,) = record["attempts"], user.lab.ledger()
    ran = sum(to - start for start, to in attempt["running"])
    rates = attempt["rates"]
    ours = rates["gpu"] * ran / 3600
    ours += rates["disk"] * (attempt["gone"] - attempt["ordered"]) / 3600
    ours += rates["up"] * attempt["gb_up"] + rates["down"] * attempt["gb_down"]
    assert ours == pytest.approx(row["total"], rel=0.01)
    assert f"this sweep cost about ${ours:.4f}" in done.out


@long
def test_the_calls_keep_the_documented_intervals(vast_server, tmp_path):
    with renting(tmp_path, vast_server, rate_limits=0.15) as user:  # .05 for what a call takes
        assert_whole(user, user.sweep("--api-spacing", "0.2"))
        assert [r for r in user.lab.requests() if r["status"] == 429] == []


def test_a_dry_run_says_the_price_and_buys_nothing(user):
    done = user.sweep("--dry-run")
    assert done.code == 0
    for words in ("2 machines to rent", "at most", "dry run: nothing bought"):
        assert words in done.out
    assert user.lab.ledger() == []


# --- the service fails ---


@pytest.mark.parametrize(
    "action", some(["act+drop"], ["act+504", "act+hang", "act+short", "504", "drop", "410"])
)
def test_a_lost_answer_to_an_order_buys_nothing_twice(user, action):
    user.lab.fault(method="PUT", path="/asks/", action=action, nth=1)
    done = user.sweep(instances=1)
    assert_whole(user, done, machines=1)
    assert ("answer to the order was lost; it is instance" in done.out) == action.startswith("act+")
    assert user.records()[0]["avoid"] == []


@long
def test_an_order_that_shows_up_too_late_is_ended_as_a_stray(user):
    user.lab.fault(method="PUT", path="/asks/", action="act+504", nth=1)
    user.lab.behave(times=1, listed_after_s=2.5)
    process = user.start_sweep(instances=1, job=user.held())
    process.wait_until(lambda: len(user.lab.ledger()) == 2 and len(user.lab.live()) == 1)
    user.let_go()
    done = process.wait()
    assert_whole(user, done, machines=2)
    assert "ends the stray instance" in done.out


ODD = ["null", "object", "empty", "html", "truncated", "410", "500"]


@long
@pytest.mark.parametrize("answer", ODD)
def test_an_odd_list_is_an_error_and_never_no_instances(user, answer):
    user.lab.fault(path="/api/v1/instances/", action=answer, nth=[1, 4, 5, 9, 10])
    user.lab.fault(method="DELETE", path="/instances/", action="503", first=2)
    assert_whole(user, user.sweep(instances=1), machines=1)
    assert min(user.lab.fired()) >= 2


@long
def test_a_list_that_never_answers_soundly_stops_with_the_way_on(user):
    process = user.start_sweep(instances=1, job=user.held())
    user.until_held(process)
    user.lab.fault(path="/api/v1/instances/", action="null")
    process.signal(signal.SIGINT)
    done = process.wait()
    assert done.code == 1, done.out + done.err
    assert "look with `status`, end with `destroy` or `reap`" in done.out + done.err
    user.lab.clear_faults()
    assert user.call("reap", "--all", *FAST).code == 0
    assert_nothing_lives(user)


@long
@pytest.mark.parametrize("fault", [
    {"path": "", "action": "429", "every": 3},
    {"path": "/instances/", "action": "null-fields:start_date,extra_env,status_msg,gpu_util"},
])  # fmt: skip
def test_refusals_for_haste_and_null_fields_hurt_nothing(user, fault):
    user.lab.fault(**fault)
    assert_whole(user, user.sweep(instances=1), machines=1)


# --- the machine fails ---


def test_a_machine_dearer_than_offered_is_ended_at_once(user):
    user.lab.behave(times=1, price_factor=6.0)
    done = user.sweep(instances=1)
    assert_whole(user, done, machines=2)
    first, second = user.lab.ledger()
    assert "above --max-dph 0.5" in done.out
    assert first["total"] < 0.01
    assert first["offer"] != second["offer"]


FATES = [{"stuck": "loading"}, {"stuck": "created"}, {"ssh": "silent"}, {"ssh": "refused"},
         {"host_key_after": 2}, {"turns": "offline", "turns_after_s": 0.3}, {"turns": "exited"},
         {"turns": "unknown"}]  # fmt: skip


@long
@pytest.mark.parametrize("fate", FATES, ids=str)
def test_a_machine_that_does_not_come_up_is_replaced_and_avoided(user, fate):
    user.lab.behave(times=1, **fate)
    assert_whole(user, user.sweep(*HASTY, instances=1), machines=2)
    first, second = user.lab.ledger()
    assert first["offer"] != second["offer"]
    assert user.records()[0]["avoid"] == [10]


@pytest.mark.parametrize(
    ("what", "flags", "said", "avoided"),
    some(
        [("outbid", ["--interruptible"], "it was outbid", [])],
        [("vanish", [], "it vanished", [10])],
    ),
)
def test_a_machine_that_is_taken_away_is_replaced_and_what_was_fetched_is_not_done_again(
    user, what, flags, said, avoided
):
    process = user.start_sweep(*flags, instances=1, job=user.held())
    user.until_fetched(process)
    user.lab.act(user.lab.live()[0], what)
    process.wait_until(lambda: len(user.lab.ledger()) == 2)
    user.let_go()
    done = process.wait()
    assert_whole(user, done, machines=2)
    assert said in done.out
    assert user.trained() == 6, "cells of the first machine were trained again"
    (record,) = user.records()
    assert record["avoid"] == avoided
    if flags:  # one fixed bid, a fifth above the lowest
        assert record["attempts"][0]["rates"]["gpu"] == pytest.approx(1.2 * 0.05)


@long
def test_a_machine_that_comes_back_at_another_address_goes_on(user):
    process = user.start_sweep(instances=1, job=user.held())
    user.until_held(process)
    (number,) = user.lab.live()
    user.lab.act(number, "offline")
    asked = len(user.lab.requests())
    process.wait_until(lambda: len(user.lab.requests()) > asked + 1)
    user.lab.act(number, "recover")
    user.let_go()
    assert_whole(user, process.wait(), machines=1)


@long
@pytest.mark.parametrize("fate", [{"direct": False}, {"cut_after_bytes": [20_000, 60_000, 3_000]},
                                  {"lingers_s": 1.0}], ids=str)  # fmt: skip
def test_bad_lines_a_dead_address_and_a_late_end_hurt_nothing(user, fate):
    user.lab.behave(times=1, **fate)
    assert_whole(user, user.sweep(instances=1), machines=1)


@long
def test_a_full_disk_there_is_said_and_another_machine_taken(user):
    user.lab.behave(times=1, disk_mb=2)
    done = user.sweep(instances=1)
    assert_whole(user, done, machines=2)
    assert "disk" in done.out


@long
def test_a_full_disk_here_keeps_the_machine_and_the_same_command_fetches(user):
    with mounted_tmpfs(user.folder, "size=64m"):
        process = user.start_sweep(instances=1, job=user.held())
        user.until_fetched(process)
        filler = user.folder / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(2**16)):
                pass
        user.let_go()
        done = process.wait()
        assert done.code == 2, done.out + done.err
        assert "disk full" in done.err
        assert "keeps instance" in done.out
        assert len(user.lab.live()) == 1
        filler.unlink()
        assert_whole(user, user.sweep(instances=1, job=[*JOB, "--hold", user.hold]), machines=1)


@long
def test_a_clock_that_is_an_hour_wrong_ends_a_machine_by_its_lifetime_at_the_latest(user):
    user.lab.behave(times=1, clock_skew_s=-3600)
    process = user.start_sweep("--max-hours", "0.006", instances=1, job=user.held())
    user.until_held(process)
    process.signal(signal.SIGKILL)
    process.wait_until(lambda: not user.lab.live())
    process.wait()
    assert user.lab.ledger()[0]["how"] == "by itself"


# --- the job fails ---


def test_a_job_that_fails_is_reported_with_its_last_lines_and_not_tried_again(user):
    done = user.sweep(instances=1, job=[*JOB, "--exit", "3"])
    assert done.code == 1
    assert "exit code 3" in done.out
    assert "RuntimeError: the job went wrong" in done.out
    assert len(user.lab.ledger()) == 1
    assert_nothing_lives(user)


@long
def test_a_job_that_is_killed_there_is_started_again_on_the_same_machine(user):
    process = user.start_sweep(instances=1, job=user.held())
    user.until_held(process)
    home = user.lab.home(user.lab.live()[0])
    os.kill(json.loads((home / ".sae" / "status.json").read_text())["pid"], signal.SIGKILL)
    user.let_go()
    assert_whole(user, process.wait(), machines=1)
    assert user.trained() == 6


@long
def test_a_time_that_is_up_saves_the_state_and_the_same_command_goes_on(user):
    flags = ["--max-hours", "0.006", "--pull-minutes", "1"]
    done = user.sweep(*flags, instances=1, job=user.held())
    assert done.code == 1
    assert "raise --max-hours" in done.out
    assert_nothing_lives(user)
    user.let_go()
    assert_whole(user, user.sweep(instances=1, job=[*JOB, "--hold", user.hold]), machines=2)
    assert user.trained() == 6


# --- the controller fails ---

KILLS = ["signal:KILL", "act+signal:KILL", "act+signal:INT"]
N_CALLS = 24  # of a sweep of two shards before the job runs: the rest are lists, again and again
EVERY_CALL = [(call, how) for call in range(1, N_CALLS + 1) for how in KILLS]


@long
@pytest.mark.share(24)
@pytest.mark.parametrize(("call", "how"), EVERY_CALL)
def test_killed_at_a_call_it_leaves_nothing_and_the_same_command_goes_on(user, call, how):
    user.lab.fault(path="", caller="account", nth=call, action=how)
    done = user.sweep()
    if user.lab.fired() == [0]:
        assert done.code == 0  # so few calls were needed
    elif how.endswith("INT"):
        assert done.code in (0, 130), done.out + done.err  # 0: it was over
        assert_nothing_lives(user)
    else:
        assert done.code == -signal.SIGKILL
    user.lab.clear_faults()
    assert_whole(user, user.sweep())
    assert len(user.lab.ledger()) <= 4


@pytest.mark.parametrize(("method", "path", "how"), some(
    [
        ("PUT", "/asks/", "act+signal:KILL"),  # when a machine is ordered
        ("POST", "/ssh/", "act+signal:KILL"),  # when it is reached and set up
        ("DELETE", "/instances/", "signal:KILL"),  # when its results are fetched
    ],
    [("PUT", "/asks/", "signal:KILL"), ("DELETE", "/instances/", "act+signal:KILL")],
))  # fmt: skip
def test_killed_in_a_phase_the_same_command_goes_on_with_the_same_machine(user, method, path, how):
    user.lab.fault(method=method, path=path, caller="account", nth=1, action=how)
    assert user.sweep(instances=1).code == -signal.SIGKILL
    assert_whole(user, user.sweep(instances=1), machines=1)
    assert "done before" in user.sweep(instances=1).out


@pytest.mark.parametrize(
    "signum", some([signal.SIGKILL], [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
)
def test_while_the_job_runs_a_second_command_is_refused_and_a_killed_one_goes_on(user, signum):
    process = user.start_sweep(instances=1, job=user.held())
    user.until_held(process)
    job = [*JOB, "--hold", user.hold]
    for words in (["sweep", *job], ["destroy"], ["fetch"]):
        assert_refused(user.call(words[0], *FAST, *words[1:]), "another process")
    process.signal(signum)
    killed = signum == signal.SIGKILL
    assert process.wait().code == (-signum if killed else 128 + signum)
    assert len(user.lab.live()) == killed  # Ctrl-C, a closed terminal: fetched, and ended
    user.let_go()
    assert_whole(user, user.sweep(instances=1, job=job), machines=1 if killed else 2)
    assert user.trained() == 6


@pytest.mark.parametrize(("what", "signum"), [("close", signal.SIGHUP), ("stop", signal.SIGINT)])
def test_machines_end_whatever_happens_to_the_screen(user, what, signum):
    screen = Screen()
    process = user.start_sweep(job=user.held(), stdout=screen.name)
    user.until_fetched(process)
    getattr(screen, what)()
    process.signal(signum)
    assert process.wait().code == 128 + signum
    assert_nothing_lives(user)


def test_a_sweep_under_nohup_outlives_its_terminal(user):
    process = user.start_sweep(job=user.held(), before=("ignore_hangup", {}))
    user.until_fetched(process)
    process.signal(signal.SIGHUP)
    user.let_go()
    assert_whole(user, process.wait(), machines=2)


CALLS = ["/asks/", "/api/v1/instances/", "/instances/", "/bundles/", "/ssh/", "/users/"]
ANSWERS = ["429", "500", "503", "504", "drop", "html", "null", "empty", "act+504", "act+drop",
           "truncated", "delay:0.3"]  # fmt: skip
RANDOM_FATES = [
    {"stuck": "loading"}, {"turns": "offline", "turns_after_s": 2.0}, {"ssh": "refused"},
    {"vanishes_after_s": 3.0}, {"price_factor": 9.0}, {"outbid_after_s": 3.0},
    {"cut_after_bytes": [9000, 30_000]}, {"label_after_s": 0.5}, {"listed_after_s": 0.7},
    {"host_key_after": 4}, {"turns": "offline", "turns_after_s": 1.5, "recovers_after_s": 1.0},
]  # fmt: skip


@pytest.mark.share(40)
@pytest.mark.parametrize("seed", some([7], [n for n in range(200) if n != 7]))
def test_a_random_schedule_of_faults_ends_with_the_same_table(user, seed):
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 3)):
        rule = {"probability": draw.choice([0.1, 0.3]), "seed": draw.randrange(10**6)}
        user.lab.fault(path=draw.choice(CALLS), action=draw.choice(ANSWERS), **rule)
    for _ in range(draw.randint(0, 2)):
        user.lab.behave(times=1, skip=draw.randint(0, 1), **draw.choice(RANDOM_FATES))
    if draw.random() < 0.4:
        at = dict(path="", caller="account", nth=draw.randint(1, 40))
        user.lab.fault(**at, action=draw.choice(KILLS))
    flags = draw.choice([[], ["--interruptible"]])
    outputs = []
    for attempt in range(4):
        if attempt == 2:
            user.lab.clear_faults()
        done = user.sweep(*HASTY, *flags, "--send-env", "HF_TOKEN", timeout_s=120)
        outputs += [done.out, done.err]
        if done.code != -signal.SIGKILL and attempt >= 2:
            assert_nothing_lives(user)
        if done.code == 0:
            break
    assert_whole(user, done)
    assert_no_secret_shows(user, *outputs)


def test_after_a_kill_the_machine_ends_itself_and_reap_finds_nothing(user):
    process = user.start_sweep("--max-hours", "0.0015", instances=1, job=user.held())
    process.wait_until(user.lab.live)
    process.signal(signal.SIGKILL)
    process.wait()
    assert "not due" in user.call("reap", *FAST).out
    process.wait_until(lambda: not user.lab.live())
    assert user.lab.ledger()[0]["how"] == "by itself"
    done = user.call("reap", *FAST)
    assert (done.code, "nothing to end" in done.out) == (0, True)


def test_reap_ends_what_is_overdue_and_never_started_without_any_file_of_ours(user):
    user.lab.behave(stuck="loading")
    process = user.start_sweep("--max-hours", "0.0006", "--start-minutes", "9", instances=1)
    process.wait_until(user.lab.live)
    process.signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(user.folder)
    expires = int(user.lab.ledger()[0]["label"].rpartition("=")[2])  # it stands in the label
    process.wait_until(lambda: time.time() > expires)
    done = user.call("reap", *FAST)
    assert (done.code, "1 ended" in done.out) == (0, True)
    assert_nothing_lives(user)


@long
def test_a_machine_of_this_run_that_no_record_knows_is_ended_as_a_stray(user):
    process = user.start_sweep(instances=1, job=user.held())
    user.until_held(process)
    process.signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(user.folder)
    user.let_go()
    done = user.sweep(instances=1, job=[*JOB, "--hold", user.hold])
    assert_whole(user, done, machines=2)
    assert "ends the stray instance" in done.out
