"""Results are taken only as their sums say, and merged only if they agree."""

import hashlib
import json
import shutil
import threading
import tracemalloc
from pathlib import Path

import pytest

from sparse_coding.config import UserError
from sparse_coding.rental.provisioner import say
from sparse_coding.rental.remote import Remote, RemoteError, Results, Stopped, wrong_files
from sparse_coding.rental.run import merge

STATE = {"cells/a.json": "1", "cells/b.json": "2", "metrics.jsonl": "x\n"}


def make(folder: Path, files: dict[str, str]) -> str:
    """Files with their sums; sha256 of the sums."""
    shutil.rmtree(folder, ignore_errors=True)
    lines = []
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        lines.append(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class There:
    """Stands for Remote: a snapshot in a folder; `spoil` happens to what arrives."""

    def __init__(self, folder: Path):
        self.folder, self.state, self.pulls = folder, make(folder, STATE), 0
        self.spoil = []  # one function per pull, on what has arrived

    def ask(self, verb: str, **options) -> dict:
        assert verb == "snapshot"
        return {"state": self.state}

    def pull_folder(self, source: str, folder: Path, *, known: Path | None) -> None:
        self.pulls += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        if self.spoil:
            self.spoil.pop(0)(folder)


@pytest.fixture
def there(tmp_path):
    return There(tmp_path / "there")


def flip(folder: Path) -> None:
    (folder / "cells" / "a.json").write_text("9")


def test_a_state_is_taken_once(there, tmp_path):
    results = Results(tmp_path, 1)
    assert results.pull(there) is True
    assert (results.verified / "cells" / "b.json").read_text() == "2"
    assert results.pull(there) is False
    assert there.pulls == 1
    assert Results(tmp_path, 1).state == there.state


def test_a_flipped_byte_is_fetched_again(there, tmp_path):
    there.spoil = [flip, lambda folder: (folder / "metrics.jsonl").unlink()]
    results = Results(tmp_path, 1)
    results.pull(there)
    assert there.pulls == 3
    assert wrong_files(results.verified) == []


def test_what_stays_wrong_is_refused_and_the_state_before_is_kept(there, tmp_path):
    results = Results(tmp_path, 1)
    results.pull(there)
    there.state = make(there.folder, STATE | {"cells/c.json": "3"})
    there.spoil = [flip, flip, flip]
    with pytest.raises(RemoteError, match=r"fetched 3 times, .*a\.json"):
        results.pull(there)
    assert wrong_files(results.verified) == []
    assert not (results.verified / "cells" / "c.json").exists()


def test_files_that_no_sum_names_are_wrong(there, tmp_path):
    there.spoil = [lambda folder: (folder / "extra.pkl").write_text("x")]
    results = Results(tmp_path, 1)
    results.pull(there)
    assert there.pulls == 2
    assert not (results.verified / "extra.pkl").exists()


@pytest.mark.parametrize("name", ["/{ours}", "../{up}", "cells/../../{up}", "./x", "cells//a.json",
                                  "", "..", "cells", "a\0b", 300 * "a"])  # fmt: skip
def test_sums_that_name_what_is_not_below_their_folder_are_refused_and_touch_nothing(
    there, tmp_path, name
):
    ours = tmp_path / "ours.txt"
    ours.write_text("ours")
    line = f"{64 * '0'}  {name.format(ours=ours, up=ours.name)}\n"
    there.spoil = 3 * [lambda folder: (folder / "SHA256SUMS").open("a").write(line)]
    results = Results(tmp_path, 1)
    with pytest.raises(RemoteError, match="fetched 3 times"):
        results.pull(there)
    assert ours.read_text() == "ours"
    assert not results.verified.exists()


@pytest.mark.parametrize("sums", [b"\xff\xfe\n", b"no sum\n", b"00  a\n", b"", 9 * b"x", b"\n"])
def test_sums_that_are_none_are_fetched_again_then_refused(there, tmp_path, sums):
    there.spoil = [lambda folder: (folder / "SHA256SUMS").write_bytes(sums)]
    assert Results(tmp_path, 1).pull(there)
    there.state = make(there.folder, STATE | {"cells/c.json": "3"})
    there.spoil = 3 * [lambda folder: (folder / "SHA256SUMS").write_bytes(sums)]
    with pytest.raises(RemoteError, match="fetched 3 times"):
        Results(tmp_path, 1).pull(there)


def test_sums_larger_than_those_of_half_a_million_files_are_none(there, monkeypatch):
    sums = there.folder / "SHA256SUMS"
    size = sums.stat().st_size
    for most, wrong in ((size, []), (size - 1, [sums])):
        monkeypatch.setattr("sparse_coding.rental.remote.MOST_SUMS", most)
        assert wrong_files(there.folder) == wrong


def test_a_command_killed_between_two_renames_finds_the_old_state_again(there, tmp_path):
    results = Results(tmp_path, 1)
    results.pull(there)
    results.verified.rename(results.old)
    again = Results(tmp_path, 1)
    assert again.state == there.state
    assert wrong_files(again.verified) == []


STATUS = {"running": True, "exit": None, "line": "", "tail": ""}


@pytest.mark.parametrize(("verb", "text"), [
    ("status", "no JSON"), ("status", "[]"), ("status", "null"), ("status", "{}"), ("status", ""),
    ("status", 9999 * "["), ("status", '{"exit": ' + 5000 * "9" + "}"),
    ("snapshot", '{"state": 1}'), *[("status", json.dumps(STATUS | odd)) for odd in (
        {"line": 5}, {"line": None}, {"tail": ["x"]}, {"exit": "0"}, {"exit": {}}, {"running": 1},
    )],
    ("check 2 any", '{"python": "", "gpu": "", "free_gb": "x", "missing": {}, "problems": []}'),
    ("check 2 any", '{"python": "", "gpu": "", "free_gb": 1, "missing": {}, "problems": "x"}'),
    ("check 2 any", f'{{"python": "", "gpu": "", "free_gb": {10**400}, "missing": {{}}, '
                    '"problems": []}'),
])  # fmt: skip
def test_an_answer_of_a_machine_that_is_none_is_a_failure_of_it(tmp_path, monkeypatch, verb, text):
    remote = Remote(1, (("127.0.0.1", 1),), tmp_path, tmp_path / "key", threading.Event())
    monkeypatch.setattr(Remote, "run", lambda self, command, **options: text)
    with pytest.raises(RemoteError, match=f"no answer to {verb}, but "):
        remote.ask(verb)


@pytest.mark.parametrize("words", [["cat", "/dev/zero"], ["sh", "-c", "cat /dev/zero >&2"],
                                   ["sh", "-c", "exec 2>&-; exec cat /dev/zero"]])  # fmt: skip
def test_a_machine_that_never_ends_what_it_says_fills_no_memory(tmp_path, monkeypatch, words):
    remote = Remote(1, (("127.0.0.1", 1),), tmp_path, tmp_path / "key", threading.Event())
    monkeypatch.setattr(Remote, "ssh_command", lambda self, *command: words)
    tracemalloc.start()
    with pytest.raises(RemoteError, match="told more than 4 MB"):
        remote.run("status", timeout=30)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_a_command_gets_its_input_and_is_heard_to_its_end(tmp_path, monkeypatch):
    remote = Remote(1, (("127.0.0.1", 1),), tmp_path, tmp_path / "key", threading.Event())
    monkeypatch.setattr(Remote, "ssh_command", lambda self, *command: ["sh", "-c", *command])
    assert remote.run("cat; echo c", stdin=b"a\xff\nb\n") == "a\ufffd\nb\nc\n"
    assert remote.run("exec 0<&-; echo c", stdin=10**6 * b"x") == "c\n"  # which reads nothing
    with pytest.raises(RemoteError, match=r"^d$"):
        remote.run("echo d >&2; exit 3")
    with pytest.raises(RemoteError, match="did not end in 0 s"):
        remote.run("sleep 9", timeout=0.3)
    remote.stop.set()
    for command in ("sleep 9", "true"):
        with pytest.raises(Stopped):
            remote.run(command)


def test_bytes_are_counted_in_both_directions_those_of_transfers_that_were_cut_too(
    tmp_path, monkeypatch
):
    said = "Total bytes sent: 1,234\nTotal bytes received: 56,789\n"
    ends = [(23, said, "cut"), (0, said, "")]
    monkeypatch.setattr(Remote, "_finish", lambda *arguments, **options: ends.pop(0))
    remote = Remote(1, (("h", 22),), tmp_path, tmp_path / "key", threading.Event(), scale=0.0)
    remote.push(tmp_path, ["a"])
    assert (remote.up, remote.down) == (2 * 1234, 2 * 56789)


def test_what_a_machine_says_gets_onto_the_screen_without_control_characters(capfd):
    say("a\x1b[2Jb\rc\x07\x9b\u202e \ud800\nd\0", 3)
    line = capfd.readouterr().out
    assert line.endswith(" shard 3: a [2Jb c\nd\n")


def test_two_shards_make_one_folder_and_a_cell_twice_must_be_the_same(tmp_path):
    first, second = Results(tmp_path, 1), Results(tmp_path, 2)
    make(first.verified, {"cells/a.json": "1", "config.json": "{shard 1}"})
    make(second.verified, {"cells/b.json": "2", "cells/a.json": "1", "config.json": "{shard 2}"})
    merge([first, second], tmp_path / "out")
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.json"))
    assert names == ["cells/a.json", "cells/b.json", "config.json"]
    merge([first, second], tmp_path / "out")  # again: nothing happens
    make(second.verified, {"cells/a.json": "other"})
    with pytest.raises(UserError, match=r"a\.json is there already with other contents"):
        merge([first, second], tmp_path / "out")


@pytest.mark.parametrize("names", [("a", "a/b.json"), ("a/b.json", "a")])
def test_a_file_of_one_shard_where_another_has_a_folder_is_refused(tmp_path, names):
    shards = [Results(tmp_path, 1), Results(tmp_path, 2)]
    for results, name in zip(shards, names, strict=True):
        make(results.verified, {name: "1"})
    with pytest.raises(UserError, match="is there already with other contents"):
        merge(shards, tmp_path / "out")


def test_a_state_that_was_edited_at_home_is_not_merged(tmp_path):
    results = Results(tmp_path, 1)
    make(results.verified, STATE)
    flip(results.verified)
    with pytest.raises(UserError, match=r"a\.json has changed since it was fetched"):
        merge([results], tmp_path / "out")


@pytest.mark.parametrize(("code", "n_calls"), [(10, 3), (12, 3), (30, 3), (255, 3), (1, 1)])
def test_a_connection_that_was_cut_is_made_again(tmp_path, monkeypatch, code, n_calls):
    remote = Remote(1, (("a", 1), ("b", 1)), tmp_path, tmp_path / "key", threading.Event(), scale=0)
    ends = [(code, "", "Broken pipe"), (code, "", "Broken pipe"), (0, "", "")]
    monkeypatch.setattr(remote, "_finish", lambda *_, **__: ends.pop(0))
    if n_calls == 3:
        remote.pull_folder("there", tmp_path / "here")
    else:  # a wrong command line stays one
        with pytest.raises(RemoteError, match="rsync 1: Broken pipe"):
            remote.pull_folder("there", tmp_path / "here")
    assert len(ends) == 3 - n_calls
