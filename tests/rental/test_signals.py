"""No machine is left, whatever signal comes in whatever phase, whatever becomes of the screen."""

import signal

import pytest
from builders.rented import FAST, JOB, Screen, User, assert_nothing_lives

MARKET, CONTROLLER = (
    "sparse_coding.rental.market.Market",
    "sparse_coding.rental.controller.Controller",
)
PROVISIONER = "sparse_coding.rental.provisioner.Provisioner"
PHASES = {  # where a command is when the signal comes
    "launch": [f"{MARKET}.offers", f"{MARKET}.buy", f"{PROVISIONER}.locate", f"{CONTROLLER}.reach",
               f"{CONTROLLER}.set_up"],
    "sweep": [f"{MARKET}.offers", f"{MARKET}.buy", f"{PROVISIONER}.locate", f"{CONTROLLER}.reach",
              f"{CONTROLLER}.set_up", f"{CONTROLLER}.submit", f"{CONTROLLER}.attend",
              f"{CONTROLLER}.pull", f"{PROVISIONER}.end", f"{MARKET}.destroy", f"{MARKET}.exists"],
    "destroy": ["sparse_coding.rental.commands.open_run", f"{MARKET}.instances",
                f"{CONTROLLER}.reach", f"{CONTROLLER}.pull", f"{PROVISIONER}.end",
                f"{MARKET}.destroy", f"{MARKET}.exists"],
    "reap": [f"{MARKET}.instances", f"{MARKET}.destroy", f"{MARKET}.exists"],
}  # fmt: skip
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "HUP": signal.SIGHUP,
           "closed": signal.SIGHUP, "stopped": signal.SIGINT}  # fmt: skip
FEW = [("launch", f"{CONTROLLER}.set_up", "TERM"), ("destroy", f"{CONTROLLER}.pull", "closed"),
       ("reap", f"{MARKET}.instances", "INT")]  # fmt: skip
ALL = [(verb, phase, how) for verb, phases in PHASES.items() for phase in phases for how in SIGNALS]


def interrupted(user: User, words: list[str], phase: str, how: str) -> int:
    """The exit code of a command that gets the signal in its phase, once no machine is left."""
    screen = Screen()
    options = {"stdout": screen.name} if how in ("closed", "stopped") else {}
    process = user.start(*words, pause_at=(phase, 1), **options)
    process.wait_until_paused()
    if how in ("closed", "stopped"):
        getattr(screen, "close" if how == "closed" else "stop")()
    process.signal(SIGNALS[how])
    process.resume()
    if words[0] != "fetch":
        process.wait_until(lambda: not user.lab.live())
    if how == "stopped":  # what it prints afterwards may wait
        screen.go_on()
    return process.wait().code


def with_machines(user: User, verb: str) -> list[str]:
    """The command's words, given on machines of an earlier one where it needs them."""
    if verb in ("launch", "sweep"):
        return [verb, "--instances", "2", *FAST, *(JOB if verb == "sweep" else [])]
    if verb == "reap":
        for shard in (1, 2):
            user.rent(f"sae1/old/{shard}/a1/exp=9")
        return ["reap", *FAST]
    process = user.start_sweep(job=user.held())
    user.until_fetched(process)
    process.signal(signal.SIGKILL)
    process.wait()
    assert len(user.lab.live()) == 2
    return [verb, *FAST]


@pytest.mark.share(40)
@pytest.mark.parametrize(
    ("verb", "phase", "how"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in FEW)],
)
def test_a_signal_in_any_phase_leaves_no_machine(user, verb, phase, how):
    code = interrupted(user, with_machines(user, verb), phase, how)
    assert_nothing_lives(user)
    if verb == "launch":  # never taken for a success
        assert code in (128 + SIGNALS[how], -SIGNALS[how], 1)


@pytest.mark.long
@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("phase", [f"{MARKET}.instances", f"{CONTROLLER}.pull"])
def test_a_fetch_that_is_stopped_ends_nothing_and_loses_nothing(user, phase, how):
    words = with_machines(user, "fetch")
    code = interrupted(user, words, phase, how)
    assert code in (128 + SIGNALS[how], -SIGNALS[how])
    assert len(user.lab.live()) == 2
    user.let_go()
    assert user.call(*words).code == 0
    assert user.call("destroy", *FAST).code == 0
    assert_nothing_lives(user)


@pytest.mark.long
@pytest.mark.parametrize("how", ["INT", "TERM", "HUP"])
@pytest.mark.parametrize(("verb", "phase"), [
    ("launch", f"{CONTROLLER}.set_up"), ("sweep", f"{CONTROLLER}.submit"),
    ("destroy", f"{CONTROLLER}.pull"), ("reap", f"{MARKET}.destroy"),
])  # fmt: skip
def test_stopped_while_one_machine_can_not_be_ended_all_others_are_and_it_is_named(
    user, verb, phase, how
):
    process = user.start(*with_machines(user, verb), pause_at=(phase, 1))
    process.wait_until_paused()
    process.wait_until(lambda: len(user.lab.live()) == 2)
    (number, _) = user.lab.live()
    user.lab.fault(method="DELETE", path=f"/{number}/", caller="account", action="500")
    process.signal(SIGNALS[how])
    process.resume()
    done = process.wait()
    assert done.code == 1, done.out + done.err
    assert user.lab.live() == [number]
    assert f"destroy instance {number} " in done.err
