"""Whatever the rental service or a machine says in any field: refused, ignored or made printable.

Never a traceback, no command run at home, nothing written outside the run's folder, and no machine
left that can be ended. Calls are made in children that are watched (builders/confined.py), and
whole sweeps on real ssh.
"""

import json
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from builders.confined import faults, read_all
from builders.mutations import dumped
from builders.readers import INSTANCE, READERS, Bench
from builders.rented import (
    API_KEY,
    FAST,
    HASTY,
    assert_nothing_lives,
    assert_whole,
    git,
)
from builders.vast import api
from builders.vast.instance import script
from builders.vast.server import FakeVast

import vastai_utils
from sparse_coding.config import run_as_script
from sparse_coding.rental import market

pytest.importorskip("vastai")
pytestmark = pytest.mark.long

HOSTILE = [
    "a\n  ProxyCommand touch {canary}", "-oProxyCommand=touch {canary}", "--rsh=touch {canary}",
    "$(touch {canary})", "`touch {canary}`", "; touch {canary} #", "..", "../../x", "{canary}",
    "sae1/../1/a1/exp=9", "sae1/x/1/a1/exp=" + "9" * 4000, "a\0b",
    "a\x1b[2J\x07\x9b", "\u202e\u2028",
    "\ud800", "%h", "x" * 10**6, "\n" * 10**5, "", " ", -1, 0, 1.5, float("nan"), float("inf"),
    -float("inf"), 1e308, 10**400, 2**63, True, None, [], {}, [[]], {"a": {"b": [None]}},
    "@deep@", "@5000 digits@",
]  # fmt: skip
OF_ROWS = sorted({*INSTANCE, "intended_status", "machine_id", "is_bid", "start_date", "end_date",
                  "num_gpus", "onstart", "extra_env", "disk_space"})  # fmt: skip
OF_OFFERS = ["id", "machine_id", "gpu_name", "num_gpus", "dph_total", "dph_base", "storage_cost",
             "min_bid", "inet_up_cost", "inet_down_cost", "reliability", "reliability2",
             "inet_down", "duration", "geolocation", "rentable", "cuda_max_good"]  # fmt: skip
OF_ENVELOPES = ["instances", "next_token", "success", "total_instances", "offers"]
NEEDED = {
    "id",
    "label",
    "instances",
    "next_token",
}  # without which a machine can't be ended by a list


def some(values: list, thorough: bool, seed: str, n: int = 4) -> list[str]:
    """Numbers of the values: all, or a seeded few."""
    numbers = [str(i) for i in range(len(values))]
    return numbers if thorough else random.Random(seed).sample(numbers, n)


def value_of(number: str, folder: Path) -> object:
    """One of HOSTILE, as it comes out of JSON."""
    text = dumped(HOSTILE[int(number)])
    return text.replace("{canary}", str(folder / "canary"))


def with_raw(body: dict, path: list, raw: str) -> str:
    """The JSON of the body with the raw text at the path: some of it no dump would write."""
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "@raw@"
    return json.dumps(body).replace('"@raw@"', raw)


def called(*words: str) -> int:
    """vastai_utils.py's exit code, its lines judged."""
    marks = [Path(name).stat().st_size for name in ("stdout", "stderr")]
    sys.argv = ["vastai_utils.py", *words]
    try:
        run_as_script(vastai_utils.main)
    except SystemExit as stop:
        code = stop.code
    texts = []
    for name, mark in zip(("stdout", "stderr"), marks, strict=True):
        with open(name, newline="", errors="surrogateescape") as file:
            file.seek(mark)
            texts.append(file.read())
    for line in "".join(texts).split("\n"):
        assert line.isprintable(), repr(line)[:300]
        assert len(line) < 2000, line[:300]
    assert code in (0, 1, 2), texts
    assert len(texts[1].splitlines()) == (code > 0), texts[1][:500]
    return code


class Rented:
    """Two machines of ours, of which the service says what it likes about the first."""

    def __init__(self, folder: Path, place: Callable[[str, str], None]):
        self.folder, self.place, self.lab = folder, place, None

    def __call__(self, number: str) -> None:
        threading.stack_size(2**18)  # a child may have many threads
        os.environ |= {"VAST_API_KEY": API_KEY, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        market.TRIES = 2
        folder = self.folder / f"lab-{number}"
        offers = [{"gpu_name": "RTX 3090", "dph_base": 0.1 + i} for i in range(3)]
        with FakeVast(folder, offers=offers, api_key=API_KEY, sandboxes=False) as lab:
            os.environ["VAST_URL"] = lab.url
            self.place(lab, value_of(number, self.folder))
        assert not (self.folder / "canary").exists()


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_hostile_field_of_an_instance_keeps_no_other_from_being_ended(tmp_path, thorough, name):
    def place(lab: FakeVast, raw: str) -> None:
        first, second = (
            lab.market.create(offer["id"], {"label": f"sae1/r/{i}/a1/exp=9", "image": "x"}).number
            for i, offer in enumerate(lab.offers()[:2], 1)
        )
        rows = [api.row_of(lab.market.contracts[n]) for n in (first, second)]
        body = with_raw({"instances": rows, "next_token": None}, ["instances", 0, name], raw)
        lab.fault(method="GET", path="/api/v1/instances/", action="object", body=body)
        called("status", "--api-spacing", "0")
        called("reap", "--all", "--api-spacing", "0")
        unreadable = "[" * 100 in raw or "7" * 5000 in raw  # no JSON: there is no list at all
        if name not in NEEDED and not unreadable:
            assert lab.live() == []
        else:
            assert lab.live() in ([], [first], [first, second])

    numbers = some(HOSTILE, thorough, name)
    outcomes = read_all(numbers, Rented(tmp_path, place), tmp_path)
    assert not faults(outcomes), faults(outcomes)


@pytest.mark.parametrize("name", OF_OFFERS)
def test_a_hostile_field_of_an_offer_is_refused_or_printable(tmp_path, thorough, name):
    def place(lab: FakeVast, raw: str) -> None:
        request = api.Request("POST", "", {}, {}, "account")
        rows = lab.api.search(request)["offers"]
        body = with_raw({"offers": rows}, ["offers", 0, name], raw)
        lab.fault(path="/bundles/", action="object", body=body)
        called("search", "--api-spacing", "0")
        called("search", "--interruptible", "--api-spacing", "0")

    outcomes = read_all(some(HOSTILE, thorough, name), Rented(tmp_path, place), tmp_path)
    assert not faults(outcomes), faults(outcomes)


@pytest.mark.parametrize("name", OF_ENVELOPES)
def test_a_hostile_envelope_is_no_empty_list(tmp_path, thorough, name):
    def place(lab: FakeVast, raw: str) -> None:
        lab.market.create(lab.offers()[0]["id"], {"label": "sae1/r/1/a1/exp=9", "image": "x"})
        rows = [api.row_of(contract) for contract in lab.market.contracts.values()]
        body = {"instances": rows, "next_token": None, "success": True, "total_instances": 1}
        lab.fault(path="/instances/", method="GET", action="object",
                  body=with_raw(body, [name], raw))  # fmt: skip
        lab.fault(path="/bundles/", action="object", body=with_raw({"offers": []}, [name], raw))
        code = called("status", "--api-spacing", "0")
        assert code or name != "instances" or raw == "[]"
        called("search", "--api-spacing", "0")

    outcomes = read_all(some(HOSTILE, thorough, name), Rented(tmp_path, place), tmp_path)
    assert not faults(outcomes), faults(outcomes)


# --- what a machine says ---

ANSWERS = {
    "check of a machine": ("python", "gpu", "free_gb", "missing", "problems"),
    "status of a machine": ("running", "exit", "line", "tail"),
}


@pytest.mark.parametrize(
    ("reader", "name"), [(r, n) for r, names in ANSWERS.items() for n in names]
)
def test_a_hostile_answer_of_a_machine_is_one_failure_of_it(tmp_path, thorough, reader, name):
    def damage(content: bytes, number: str) -> bytes:
        raw = value_of(number, tmp_path)
        if name in ("missing", "problems") and int(number) % 2:
            raw = f"{{{raw}: 1}}" if name == "missing" and raw[0] == '"' else f"[{raw}]"
        return with_raw(json.loads(content), [name], raw).encode()

    bench = Bench(READERS[reader], tmp_path, damage)
    outcomes = read_all(some(HOSTILE, thorough, name), bench, tmp_path)
    assert not faults(outcomes), faults(outcomes)
    assert not (tmp_path / "canary").exists()
    screen = (tmp_path / "stdout").read_text(errors="surrogateescape")
    assert all(line.isprintable() and len(line) < 1000 for line in screen.split("\n"))


def test_hostile_names_in_the_sums_of_a_machine_stay_in_their_folder(tmp_path, thorough):
    def damage(content: bytes, number: str) -> bytes:
        odd = HOSTILE[int(number)]
        name = odd.replace("{canary}", str(tmp_path / "canary")) if isinstance(odd, str) else odd
        line = f"{64 * '0'}  {name}\n" if isinstance(name, str) else f"{name}\n"
        return content + line.encode("utf-8", "surrogatepass")

    bench = Bench(READERS["SHA256SUMS"], tmp_path, damage)
    outcomes = read_all(some(HOSTILE, thorough, "sums", 12), bench, tmp_path)
    assert not faults(outcomes), faults(outcomes)
    assert {outcome.kind for outcome in outcomes} == {"refused"}


# --- whole sweeps ---


def assert_printable(*outputs: str) -> None:
    for output in outputs:
        assert all(line.isprintable() for line in output.split("\n")), output
        assert "Traceback" not in output


def test_a_sweep_on_rows_full_of_hostile_texts_is_whole(user, tmp_path, monkeypatch):
    canary, real = tmp_path / "canary", api.row_of
    proxy = f"127.0.0.1\n  ProxyCommand touch {canary}"

    def row_of(contract) -> dict:
        odd = dict.fromkeys(("status_msg", "gpu_name", "onstart"), f"\x1b[2J\n-o$(touch {canary})")
        return real(contract) | odd | {"ssh_host": proxy, "gpu_util": "x", "extra_env": [odd]}

    monkeypatch.setattr(api, "row_of", row_of)
    done = user.sweep(instances=1)
    assert_whole(user, done, machines=1)
    assert_printable(done.out, done.err)
    assert not canary.exists()


def test_a_proxy_command_in_an_address_is_never_run(user, tmp_path, monkeypatch):
    canary, real = tmp_path / "canary", api.row_of
    odd = {
        "public_ipaddr": f"127.0.0.1\n  ProxyCommand touch {canary}",
        "ssh_host": "-oProxyCommand=x",
    }
    monkeypatch.setattr(api, "row_of", lambda contract: real(contract) | odd)
    done = user.sweep("--attempts", "1", *HASTY, instances=1)
    assert done.code == 1, done.err
    assert_printable(done.out, done.err)
    assert_nothing_lives(user)
    assert not canary.exists()


ODD_JOB = """
import os, sys
out = sys.argv[sys.argv.index("--output-dir") + 1]
os.makedirs(out + "/cells", exist_ok=True)
if "SPARSE_CODING_GIT_STATE" not in os.environ:
    sys.exit()  # at home
odd = b"\\x1b[2J\\xff\\xfe\\x00 a\\r" + b"x" * 1000000 + b"\\n" * 5000 + b"no end of line"
sys.stdout.buffer.write(odd)
sys.stdout.flush()
for name, to in (("passwd", "/etc/passwd"), ("up", "../.."), ("cells/loop", "loop")):
    os.path.lexists(f"{out}/{name}") or os.symlink(to, f"{out}/{name}")
os.path.lexists(out + "/pipe") or os.mkfifo(out + "/pipe")
for name in NAMES:
    open(os.path.join(os.fsencode(out), name), "w").close()
"""
NAMES = [
    b"cells/a\nb.json",
    b"cells/\xff.json",
    b"cells/-rf",
    b"cells/\x1b[2J",
    b"cells/" + b"n" * 200,
]


@pytest.mark.parametrize("names", [[], *([name] for name in NAMES)], ids=repr)
def test_a_job_that_leaves_hostile_files_and_lines_ends_and_so_does_its_machine(
    user, thorough, names
):
    if names and not thorough:
        pytest.skip("with --torture")
    (user.checkout / "odd_job.py").write_text(f"NAMES = {names!r}\n{ODD_JOB}")
    for words in (["add", "odd_job.py"], ["commit", "-qm", "odd"]):
        git(user.checkout, "-c", "user.name=a", "-c", "user.email=a@b.invalid", *words)
    before = set(user.checkout.rglob("*"))
    done = user.sweep("--attempts", "1", *HASTY, instances=1, job=["--", "python", "odd_job.py"])
    assert done.code in (0, 1, 2), done.err
    assert_printable(done.out, done.err)
    assert_nothing_lives(user)
    new = {
        p.relative_to(user.checkout).parts[0] for p in user.checkout.rglob("*") if p not in before
    }
    assert new <= {"rentals", "outputs"}
    brought = [p for name in ("rentals", "outputs") for p in (user.checkout / name).rglob("*")]
    assert not [path for path in brought if path.is_symlink() or path.is_fifo()]


def lie_of(verb: str, command: str) -> str:
    """Lines of a python3 that answers the verb itself."""
    return f'case "$*" in *"remote_job {verb}"*) {command}; exit;; esac'


STATUS = '{"running": true, "exit": null, "line": "\\\\u001b[2J", "tail": "\\\\u001b"}'
CHECK = '{"python": "", "gpu": "", "missing": {}, "problems": [], "free_gb": 1%0400d}'
LIES = {
    "no end of output": lie_of("status", "cat /dev/zero"),
    "no end of errors": lie_of("status", "cat /dev/zero >&2"),
    "a status full of escapes": lie_of("status", f"printf '{STATUS}'"),
    "no JSON": lie_of("status", "echo '\x1b[2J{'"),
    "a check of huge numbers": lie_of("check", f"printf '{CHECK}' 0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_machine_that_lies_is_given_up_in_bounded_memory(user, thorough, lie):
    if lie != "no end of output" and not thorough:
        pytest.skip("with --torture")
    path = user.lab.root / "bin" / "python3"
    shebang, rest = path.read_text().split("\n", 1)
    script(path, f"{shebang}\n{LIES[lie]}\n{rest}")
    process = user.start_sweep("--attempts", "1", "--max-hours", "0.005", *HASTY, instances=1,
                               before=("limit_data", {"n_bytes": 10**9}))  # fmt: skip
    done = process.wait(60)
    assert done.code in (0, 1), done.err
    assert "Error(" not in done.out, done.out
    assert_printable(done.out, done.err)
    assert_nothing_lives(user)


def test_the_lines_of_a_log_are_printable_whatever_stands_there(user):
    assert user.call("launch", "--run", "mine", *FAST).code == 0
    (number,) = user.lab.live()
    log = user.lab.home(number) / ".sae" / "job.log"
    log.write_bytes(b"\x1b[2J\xff\0\x9b a\r" + b"x" * 10**6 + b"\n\xe2\x80\xae\n")
    done = user.call("logs", *FAST)
    assert done.code == 0, done.err
    assert_printable(done.out)
    assert max(map(len, done.out.split("\n"))) <= 2000
    assert user.call("destroy", "--discard", *FAST).code == 0
    assert_nothing_lives(user)
