"""Sweeps on a loopback market with real sshd and rsync, and everything that can go wrong there.

Of the faults, of the kills at each call and of the random schedules a part runs here; all with
    RENTAL_SCHEDULES=all python -m pytest tests/rental
"""

import contextlib
import os
import random
import shutil
import signal
import time

import pytest
from builders.rented import (
    FAST,
    JOB,
    World,
    assert_no_secret_shows,
    assert_nothing_lives,
    expected_rows,
    make_checkout,
    market,
    require_lab,
)
from builders.scripts import assert_refused, mounted_tmpfs, served

ALL = os.environ.get("RENTAL_SCHEDULES") == "all"
KILLS = ["signal:KILL", "act+signal:KILL", "act+signal:INT"]
N_CALLS = 24  # of a sweep of two shards before the job runs: the rest are lists, again and again
QUICK = {"sparse_coding.rental.market.TIMEOUT": 1.5, "sparse_coding.rental.remote.PAUSE": 0.2}


long = pytest.mark.skipif(not ALL, reason="RENTAL_SCHEDULES=all, for minutes more")


def some(all_of_them: list, few: list) -> list:
    """Of the parameters of a test; the few take part in every run of the suite."""
    return all_of_them if ALL else few


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    require_lab()
    home = tmp_path_factory.mktemp("rental_server")
    checkout = make_checkout(home / "checkout")
    with served(checkout / "vastai_utils.py", home, patch=QUICK, modules=("vastai",)) as server:
        yield server


@pytest.fixture
def world(server, tmp_path):
    with market(tmp_path, server) as world:
        yield world


def assert_whole(world: World, done) -> None:
    """The sweep came home although something went wrong: the same table, nothing left."""
    assert done.code == 0, done.out + done.err
    assert world.rows() == expected_rows()
    assert_nothing_lives(world)


# --- nothing goes wrong ---


def test_two_shards_come_home_verified_and_merged_and_nothing_is_left(world):
    done = world.sweep("--send-env", "HF_TOKEN", "OTHER")
    assert_whole(world, done)
    assert_no_secret_shows(world, done.out, done.err)
    assert "no machine of it is left" in done.out
    again = world.sweep()
    assert again.code == 0
    assert "done before" in again.out
    assert len(world.lab.ledger()) == 2


def test_one_machine_needs_no_merge_and_the_cheapest_is_taken(world):
    done = world.sweep(instances=1)
    assert_whole(world, done)
    (row,) = world.lab.ledger()
    assert row["offer"] == min(world.lab.offers(), key=lambda o: o["dph_base"])["id"]


def test_the_cost_is_that_of_the_services_ledger(server, tmp_path):
    behaviour = {"provision_s": 0.3, "load_s": 1.0}
    with market(tmp_path, server, behaviour=behaviour) as world:
        job = [*JOB, "--seconds", "3"]
        world.sweep("--poll-seconds", "0.05", instances=1, job=job)
        (record,) = world.records()
        (rental,), (row,) = record["attempts"], world.lab.ledger()
        ran = sum(to - start for start, to in rental["running"])
        rates = rental["rates"]
        ours = rates["gpu"] * ran / 3600
        ours += rates["disk"] * (rental["gone"] - rental["ordered"]) / 3600
        ours += rates["up"] * rental["gb_up"] + rates["down"] * rental["gb_down"]
        assert ours == pytest.approx(row["total"], rel=0.01)


@long
def test_the_calls_keep_the_documented_intervals(server, tmp_path):
    with market(tmp_path, server, rate_limits=0.2) as world:
        done = world.sweep("--api-spacing", "0.2")
        assert_whole(world, done)
        assert [r for r in world.lab.requests() if r["status"] == 429] == []


def test_a_dry_run_says_the_price_and_buys_nothing(world):
    done = world.sweep("--dry-run")
    assert done.code == 0
    assert "2 machines to rent" in done.out
    assert "at most" in done.out
    assert "dry run: nothing bought" in done.out
    assert world.lab.ledger() == []


# --- the service fails ---

LOST = ["act+504", "act+drop", "act+hang", "act+short", "504", "drop"]
ODD = ["null", "object", "empty", "html", "truncated", "410", "500"]
FATES = [
    {"stuck": "loading"},
    {"ssh": "silent"},
    {"host_key_after": 2},
    {"turns": "offline", "turns_after_s": 0.3},
    {"stuck": "created"},
    {"turns": "exited"},
    {"turns": "unknown"},
    {"ssh": "refused"},
]


@pytest.mark.parametrize("action", some(LOST, ["act+drop"]))
def test_a_lost_answer_to_an_order_buys_nothing_twice(world, action):
    world.lab.fault(method="PUT", path="/asks/", action=action, nth=1)
    done = world.sweep(instances=1)
    assert_whole(world, done)
    assert len(world.lab.ledger()) == 1
    assert ("answer to the order was lost" in done.out) == action.startswith("act+")


@long
def test_an_order_that_shows_up_too_late_is_ended_as_a_stray(world):
    world.lab.fault(method="PUT", path="/asks/", action="act+504", nth=1)
    world.lab.behave(times=1, listed_after_s=2.5)
    done = world.sweep(instances=1, job=[*JOB, "--seconds", "0.5"])
    assert_whole(world, done)
    assert len(world.lab.ledger()) == 2
    assert "ends the stray instance" in done.out


@pytest.mark.parametrize("answer", some(ODD, ["null"]))
def test_an_odd_list_is_an_error_and_never_no_instances(world, answer):
    world.lab.fault(path="/api/v1/instances/", action=answer, nth=[1, 4, 5, 9, 10])
    world.lab.fault(method="DELETE", path="/instances/", action="503", first=2)
    done = world.sweep(instances=1)
    assert_whole(world, done)
    assert len(world.lab.ledger()) == 1
    assert min(f["fired"] for f in world.lab.faults_fired()) >= 2


def test_a_list_that_never_answers_soundly_stops_with_the_way_on(world):
    process = world.start_sweep(instances=1, job=[*JOB, "--seconds", "2"])
    process.wait_until(world.lab.live)
    time.sleep(1.5)
    world.lab.fault(path="/api/v1/instances/", action="null")
    process.signal(signal.SIGINT)
    done = process.wait(60)
    assert done.code == 1, done.out + done.err
    assert "look with `status`, end with `destroy` or `reap`" in done.out + done.err
    world.lab.clear_faults()
    assert world.call("reap", "--all", *FAST).code == 0
    assert_nothing_lives(world)


@long
def test_many_429_are_waited_out(world):
    world.lab.fault(path="", action="429", every=3)
    assert_whole(world, world.sweep(instances=1))


@long
def test_null_fields_of_a_row_hurt_nothing(world):
    fields = "start_date,extra_env,status_msg,gpu_util"
    world.lab.fault(path="/instances/", action=f"null-fields:{fields}")
    assert_whole(world, world.sweep(instances=1))


# --- the machine fails ---


def test_a_machine_dearer_than_offered_is_ended_at_once(world):
    world.lab.behave(times=1, price_factor=6.0)
    done = world.sweep(instances=1)
    assert_whole(world, done)
    first, second = world.lab.ledger()
    assert "above --max-dph 0.5" in done.out
    assert first["total"] < 0.01
    assert first["offer"] != second["offer"]


@pytest.mark.parametrize(
    "fate", some(FATES, FATES[5:6]), ids=lambda fate: "-".join(map(str, fate.values()))
)
def test_a_machine_that_does_not_come_up_is_replaced_avoided_and_its_log_kept(world, fate):
    world.lab.behave(times=1, **fate)
    done = world.sweep(instances=1)
    assert_whole(world, done)
    first, second = world.lab.ledger()
    assert first["offer"] != second["offer"]
    (log,) = (world.checkout / "rentals").glob("*/logs/*.txt")
    assert log.read_text().strip()
    (record,) = world.records()
    assert record["avoid"] == [10]


def test_an_outbid_machine_is_ended_and_replaced_from_the_last_checkpoint_without_blame(world):
    world.lab.behave(times=1, outbid_after_s=3.5)
    done = world.sweep("--interruptible", instances=1, job=[*JOB, "--seconds", "0.8"])
    assert_whole(world, done)
    first, _ = world.lab.ledger()
    assert first["states"][-1] == "stopped"
    assert "it was outbid" in done.out
    (record,) = world.records()
    assert record["avoid"] == []
    assert [a["rates"]["gpu"] for a in record["attempts"]] == pytest.approx([0.06, 0.06])


def test_a_machine_that_vanishes_is_replaced_and_what_was_fetched_is_not_done_again(world):
    world.lab.behave(times=1, vanishes_after_s=4.0)
    done = world.sweep(instances=1, job=[*JOB, "--seconds", "0.7"])
    assert_whole(world, done)
    assert len(world.lab.ledger()) == 2
    assert "it vanished" in done.out
    log = next(iter(world.output.glob("metrics-1.jsonl"))).read_text().splitlines()
    assert len(log) == 6, "cells of the first machine were trained again"


@long
def test_cut_connections_are_taken_up_again(world):
    world.lab.behave(times=1, cut_after_bytes=[20_000, 60_000, 3_000, 9_000])
    done = world.sweep(instances=1)
    assert_whole(world, done)


@long
def test_a_full_disk_there_is_said_and_another_machine_taken(world):
    world.lab.behave(times=1, disk_mb=3)
    done = world.sweep(instances=1)
    assert_whole(world, done)
    assert "disk" in done.out


def test_a_full_disk_here_keeps_the_machine_and_the_same_command_fetches(world):
    job = [*JOB, "--seconds", "0.5"]
    with mounted_tmpfs(world.checkout / "rentals", "size=64m"):
        process = world.start_sweep("--pull-minutes", "1", instances=1, job=job)
        process.wait_until(world.lab.live)
        time.sleep(2)
        filler = world.checkout / "rentals" / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(2**16)):
                pass
        done = process.wait(60)
        assert done.code == 2, done.out + done.err
        assert "disk full" in done.err
        assert len(world.lab.live()) == 1
        filler.unlink()
        assert_whole(world, world.sweep(instances=1, job=job))
        assert len(world.lab.ledger()) == 1


@long
def test_a_clock_that_is_an_hour_wrong_ends_a_machine_by_its_lifetime_at_the_latest(world):
    world.lab.behave(times=1, clock_skew_s=-3600)
    process = world.start_sweep("--max-hours", "0.003", instances=1, job=[*JOB, "--seconds", "9"])
    process.wait_until(world.lab.live)
    time.sleep(3)
    process.signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 25
    while world.lab.live() and time.monotonic() < end:
        time.sleep(0.2)
    assert_nothing_lives(world)
    (row,) = world.lab.ledger()
    assert row["how"] == "by itself"


# --- the job fails ---


def test_a_job_that_fails_is_reported_with_its_last_lines_and_not_tried_again(world):
    done = world.sweep(instances=1, job=[*JOB, "--exit", "3"])
    assert done.code == 1
    assert "exit code 3" in done.out
    assert "RuntimeError: the job went wrong" in done.out
    assert len(world.lab.ledger()) == 1
    assert_nothing_lives(world)


@long
def test_a_lifetime_that_is_over_saves_the_state_and_the_same_command_goes_on(world):
    job = [*JOB, "--seconds", "1.5"]
    done = world.sweep("--max-hours", "0.0025", "--pull-minutes", "1", instances=1, job=job)
    assert done.code == 1
    assert "raise --max-hours" in done.out
    assert_nothing_lives(world)
    assert_whole(world, world.sweep(instances=1, job=job))
    log = next(iter(world.output.glob("metrics-1.jsonl"))).read_text().splitlines()
    assert len(log) == 6


# --- the controller fails ---


EVERY_CALL = [(call, how) for call in range(1, N_CALLS + 1) for how in KILLS]
FEW_CALLS = [
    (6, KILLS[1]),
    (8, KILLS[1]),
    (9, KILLS[2]),
]


@pytest.mark.parametrize(("call", "how"), some(EVERY_CALL, FEW_CALLS))
def test_killed_at_a_call_it_leaves_nothing_and_the_same_command_goes_on(world, call, how):
    world.lab.fault(path="", caller="account", nth=call, action=how)
    done = world.sweep()
    if world.lab.faults_fired()[0]["fired"] == 0:
        assert done.code == 0  # so few calls were needed
    elif how.endswith("INT"):
        assert done.code in (0, 130), done.out + done.err  # 0: it was over
        assert_nothing_lives(world)
    else:
        assert done.code == -signal.SIGKILL
    world.lab.clear_faults()
    assert_whole(world, world.sweep())
    assert len(world.lab.ledger()) <= 4


@pytest.mark.parametrize("how", ["signal:KILL", "act+signal:KILL"])
def test_killed_when_results_are_home_it_ends_the_machine_the_next_time(world, how):
    world.lab.fault(method="DELETE", path="/instances/", caller="account", nth=1, action=how)
    assert world.sweep(instances=1).code == -signal.SIGKILL
    assert_whole(world, world.sweep(instances=1))
    assert len(world.lab.ledger()) == 1
    assert "done before" in world.sweep(instances=1).out


@pytest.mark.parametrize("seed", some(list(range(200)), [7]))
def test_a_random_schedule_of_faults_ends_with_the_same_table(server, tmp_path, seed):
    draw = random.Random(seed)
    calls = ["/asks/", "/api/v1/instances/", "/instances/", "/bundles/", "/ssh/", "/users/"]
    answers = ["429", "500", "503", "504", "drop", "html", "null", "empty", "act+504", "act+drop",
               "truncated", "delay:0.3"]  # fmt: skip
    fates = [{"stuck": "loading"}, {"turns": "offline", "turns_after_s": 2.0}, {"ssh": "refused"},
             {"vanishes_after_s": 3.0}, {"price_factor": 9.0}, {"outbid_after_s": 3.0},
             {"cut_after_bytes": [9000, 30_000]}, {"label_after_s": 0.5}, {"listed_after_s": 0.7},
             {"host_key_after": 4}, {"start_refused": True, "outbid_after_s": 2.5}]  # fmt: skip
    with market(tmp_path, server) as world:
        for _ in range(draw.randint(1, 3)):
            rule = {"probability": draw.choice([0.1, 0.3]), "seed": draw.randrange(10**6)}
            world.lab.fault(path=draw.choice(calls), action=draw.choice(answers), **rule)
        for _ in range(draw.randint(0, 2)):
            world.lab.behave(times=1, skip=draw.randint(0, 1), **draw.choice(fates))
        if draw.random() < 0.4:
            at = dict(path="", caller="account", nth=draw.randint(1, 40))
            world.lab.fault(**at, action=draw.choice(KILLS))
        flags = draw.choice([[], ["--interruptible"]])
        outputs = []
        for attempt in range(4):
            if attempt == 2:
                world.lab.clear_faults()
            done = world.sweep(*flags, "--send-env", "HF_TOKEN", timeout_s=120)
            outputs += [done.out, done.err]
            if done.code != -signal.SIGKILL and attempt >= 2:
                assert_nothing_lives(world)
            if done.code == 0:
                break
        assert_whole(world, done)
        assert_no_secret_shows(world, *outputs)


def test_after_a_kill_the_machine_ends_itself_and_reap_finds_nothing(world):
    process = world.start_sweep("--max-hours", "0.002", instances=1, job=[*JOB, "--seconds", "9"])
    process.wait_until(world.lab.live)
    process.signal(signal.SIGKILL)
    process.wait()
    done = world.call("reap", *FAST)
    assert done.code == 0
    assert "not due" in done.out
    end = time.monotonic() + 20
    while world.lab.live() and time.monotonic() < end:
        time.sleep(0.2)
    assert world.lab.live() == []
    assert "nothing to end" in world.call("reap", *FAST).out


def test_reap_ends_what_is_overdue_and_never_started_without_any_file_of_ours(world, tmp_path):
    world.lab.behave(stuck="loading")
    process = world.start_sweep("--max-hours", "0.0006", "--start-minutes", "9", instances=1)
    process.wait_until(world.lab.live)
    process.signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(world.checkout / "rentals")
    time.sleep(2.5)
    done = world.call("reap", *FAST)
    assert done.code == 0
    assert "1 ended" in done.out
    assert_nothing_lives(world)


def test_two_commands_for_one_run_here_exclude_one_another(world):
    process = world.start_sweep(instances=1, job=[*JOB, "--seconds", "0.6"])
    process.wait_until(world.lab.live)
    assert_refused(world.sweep(instances=1, job=[*JOB, "--seconds", "0.6"]), "another process")
    assert_whole(world, process.wait())
    assert len(world.lab.ledger()) == 1
