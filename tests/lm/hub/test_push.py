"""--push against a Hub on the loopback: private, whole after any fault, and no login anywhere."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders.hub import FORBIDDEN, TOKEN, XET_TOKEN, Hub, Repository, argv, served_hub
from builders.scripts import (
    ROOT,
    Done,
    Process,
    assert_refused,
    bytes_under,
    run_script,
)
from builders.sweeps import Sweep

from sparse_coding.config import UserError
from sparse_coding.lm.hub.push import PushChoice, push

PUSH = ("--export", "hub", "--push", "ada/saes")
WEIGHTS = r"PUT /lfs/|POST /v1/xorbs"  # by LFS or by Xet


@dataclass(frozen=True)
class Pusher:
    """A finished sweep below cwd, which has its folder for the Hub; a login below home."""

    sweep: Sweep
    hub: Hub
    cwd: Path
    home: Path

    @property
    def folder(self) -> Path:
        return self.cwd / "run/hub"

    def start(self, *more: str, xet: bool = True, env: dict | None = None) -> Process:
        return self.sweep.server.start(
            *self.sweep.flags,
            *more,
            cwd=self.cwd,
            patch=self.sweep.patch | self.hub.patch(self.home, xet=xet),
            env=self.hub.environment(self.home, xet=xet) | (env or {}),
        )

    def run(self, *more: str, **options) -> Done:
        return self.start(*more, **options).wait()

    def assert_whole(self) -> None:
        """The Hub has what the folder has, and keeps it to itself."""
        repository = self.hub.repositories["ada/saes"]
        assert repository.files == bytes_under(self.folder)
        assert len(repository.files) >= 6
        assert repository.private


@pytest.fixture(scope="module")
def exported(language_sweep, tmp_path_factory) -> Path:
    """cwd of the sweep with its folder for the Hub. Nobody may write to it."""
    cwd = tmp_path_factory.mktemp("exported") / "cwd"
    shutil.copytree(language_sweep.finished, cwd)
    language_sweep.finish("--export", "hub", cwd=cwd)
    return cwd


@pytest.fixture
def hub():
    with served_hub() as hub:
        yield hub


@pytest.fixture
def pusher(hub, exported, language_sweep, tmp_path) -> Pusher:
    shutil.copytree(exported, tmp_path / "cwd")
    pusher = Pusher(language_sweep, hub, tmp_path / "cwd", tmp_path / "home")
    hub.log_in(pusher.home)
    return pusher


def leaks(folder: Path) -> list[str]:
    """Files below the folder in which a login stands."""
    secrets = (TOKEN.encode(), XET_TOKEN.encode())
    return [name for name, data in bytes_under(folder).items() if any(s in data for s in secrets)]


# --- an upload ---


@pytest.mark.parametrize("xet", [True, False])
def test_a_fresh_interpreter_uploads_all_to_a_private_repository_and_leaks_no_login(
    pusher, tmp_path, xet
):
    flags = [*pusher.sweep.flags, *PUSH, "--log-every", "11"]
    env = pusher.hub.environment(pusher.home, xet=xet)
    done = run_script([ROOT / "run.py", *flags], cwd=pusher.cwd, more_environment=env)
    assert done.code == 0, done.err
    assert f"pushed: {pusher.hub.url}/ada/saes (private; " in done.out
    pusher.assert_whole()
    assert pusher.hub.counted("xet-write-token") == xet
    assert pusher.hub.counted("/lfs/") == 0 if xet else 2
    assert len(pusher.hub.repositories["ada/saes"].commits) == 1
    assert TOKEN not in done.out + done.err
    assert not pusher.hub.seen_in_argv
    assert leaks(tmp_path) == ["home/token"]  # where `hf auth login` keeps it


def test_a_login_on_a_command_line_would_be_seen():
    command = [sys.executable, "-c", "input()", TOKEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert TOKEN in argv()
        process.communicate(b"\n")


def test_the_cards_name_the_repository(pusher):
    assert pusher.run(*PUSH).code == 0
    files = pusher.hub.repositories["ada/saes"].files
    (name,) = [n.removesuffix("/cfg.json") for n in files if n.endswith("/cfg.json")]
    for card in ("README.md", f"{name}/README.md"):
        assert f'SAE.from_pretrained("ada/saes", "{name}")' in files[card].decode()


def test_a_second_push_sends_nothing_again_and_the_run_stays_as_it_is(pusher):
    assert pusher.run(*PUSH).code == 0
    before = bytes_under(pusher.cwd / "run")
    sent = pusher.hub.counted(WEIGHTS)
    assert sent > 0
    again = pusher.run(*PUSH)
    assert (again.code, again.err) == (0, "")
    assert bytes_under(pusher.cwd / "run") == before
    assert pusher.hub.counted(WEIGHTS) == sent
    assert len(pusher.hub.repositories["ada/saes"].commits) == 1


def test_a_run_that_is_not_finished_is_trained_and_then_pushed(pusher):
    shutil.rmtree(pusher.cwd / "run")
    done = pusher.run(*PUSH)
    assert done.code == 0, done.err
    pusher.assert_whole()


def test_public_is_what_was_asked_for_and_only_once_it_is_whole(pusher):
    fault = pusher.hub.fault("/commit/", "hold")
    process = pusher.start(*PUSH, "--public")
    process.wait_until(fault.met.is_set)
    assert pusher.hub.repositories["ada/saes"].private
    fault.released.set()
    done = process.wait()
    assert done.code == 0, done.err
    repository = pusher.hub.repositories["ada/saes"]
    assert not repository.private
    assert repository.files == bytes_under(pusher.folder)


# --- faults ---


@pytest.mark.parametrize("xet", [True, False])
def test_faults_in_passing_are_survived(pusher, xet):
    kinds = {"/preupload/": "500", WEIGHTS: "cut", r"/v1/shards|objects/batch": "500"}
    if xet:  # by LFS, huggingface_hub sends a commit once
        kinds["/commit/"] = "lost"
    faults = [pusher.hub.fault(place, kind) for place, kind in kinds.items()]
    done = pusher.run(*PUSH, xet=xet)
    assert done.code == 0, done.err
    assert [fault.met.is_set() for fault in faults] == [True] * len(faults)
    pusher.assert_whole()


@pytest.mark.parametrize("xet", [True, False])
def test_an_upload_that_is_killed_and_interrupted_ends_whole(pusher, xet):
    for place, signum in ((WEIGHTS, signal.SIGKILL), ("/commit/", signal.SIGINT)):
        fault = pusher.hub.fault(place, "hold")
        process = pusher.start(*PUSH, xet=xet)
        process.wait_until(fault.met.is_set)
        process.signal(signum)
        done = process.wait()
        assert pusher.hub.repositories["ada/saes"].files == {}
    assert done.code == 130
    assert done.err_lines[-1] == "run.py: interrupted: the same command goes on"
    assert "Traceback" not in done.err
    done = pusher.run(*PUSH, xet=xet)
    assert done.code == 0, done.err
    pusher.assert_whole()
    if not xet:  # what has arrived is not sent again: of two, one was held
        sent = [request for request in pusher.hub.requests if request.startswith("PUT /lfs/")]
        assert len(pusher.hub.objects) == 2
        assert len(sent) <= 2 + 2


PLACES = ["/repos/create", "/validate-yaml", "GET /api/models/ada/saes$", "/commit/"]


@pytest.mark.parametrize("place", PLACES)
def test_a_hub_that_fails_is_one_line_and_the_same_command_goes_on(pusher, place):
    xet = place != "/commit/"
    pusher.hub.fault(place, "500")
    assert_refused(pusher.run(*PUSH, xet=xet), "--push ada/saes", "500", "the same command goes on")
    pusher.hub.fault(place, "cut")
    assert_refused(pusher.run(*PUSH, xet=xet), "--push ada/saes", "the same command goes on")
    assert pusher.run(*PUSH, xet=xet).code == 0
    pusher.assert_whole()


def test_a_hub_out_of_reach_is_one_line(pusher):
    pusher.hub.shutdown()
    pusher.hub.server_close()
    assert_refused(pusher.run(*PUSH), "--push ada/saes", "the same command goes on")


# --- refusals ---


def test_without_a_login_nothing_begins(pusher):
    (pusher.home / "token").unlink()
    shutil.rmtree(pusher.cwd / "run")
    assert_refused(pusher.run(*PUSH), "--push ada/saes", "no login", "hf auth login")
    assert not (pusher.cwd / "run").exists()
    assert pusher.hub.requests == []


def test_a_login_that_the_hub_does_not_know_is_refused_and_not_repeated(pusher):
    pusher.hub.log_in(pusher.home, "hf_revoked")
    done = pusher.run(*PUSH)
    assert_refused(done, "--push ada/saes", "the login is not valid", "hf auth login")
    assert "hf_revoked" not in done.err + done.out
    assert pusher.hub.repositories == {}


@pytest.mark.parametrize("token", ["hf_a\x07b", "hf_a b", "hf_ä"])
def test_a_login_that_no_header_can_hold_is_refused_and_not_repeated(pusher, token):
    pusher.hub.log_in(pusher.home, token)
    done = pusher.run(*PUSH)
    assert_refused(done, "--push ada/saes", "no token")
    assert token not in done.err
    assert "hf_a" not in done.err


def test_a_repository_of_somebody_else_is_refused(pusher):
    done = pusher.run("--export", "hub", "--push", f"{FORBIDDEN}/saes")
    assert_refused(done, f"--push {FORBIDDEN}/saes", "403", "choose another")


def test_a_public_repository_is_not_written_to_unasked(pusher):
    pusher.hub.repositories["ada/saes"] = Repository(private=False, files={"x": b"y"})
    assert_refused(pusher.run(*PUSH), "ada/saes is public", "--public")
    assert pusher.hub.repositories["ada/saes"].files == {"x": b"y"}
    assert pusher.run(*PUSH, "--public").code == 0
    assert pusher.hub.repositories["ada/saes"].files == {"x": b"y"} | bytes_under(pusher.folder)


def test_where_all_diverged_there_is_nothing_to_push(pusher):
    with pytest.raises(UserError, match="nothing to push: all autoencoders diverged"):
        push(pusher.cwd, PushChoice("hub", "", False))


def test_offline_mode_is_one_line(pusher):
    done = run_script(
        [ROOT / "run.py", *pusher.sweep.flags, *PUSH, "--log-every", "11"],
        cwd=pusher.cwd,
        more_environment=pusher.hub.environment(pusher.home) | {"HF_HUB_OFFLINE": "1"},
    )
    assert_refused(done, "--push ada/saes", "HF_HUB_OFFLINE")


BAD = {
    ("hub", "saes", False): "--push saes must be OWNER/NAME",
    ("hub", "a/b/c", False): "--push a/b/c must be OWNER/NAME",
    ("hub", "ada/sa es", False): "--push ada/sa es must be OWNER/NAME",
    ("hub", TOKEN, False): "--push hf_... must be OWNER/NAME",
    ("none", "ada/saes", False): "--push ada/saes uploads what --export hub writes: add it",
    ("hub", "", True): "--public is for --push OWNER/NAME",
}


@pytest.mark.parametrize("choice", BAD)
def test_flags_that_do_not_fit_are_refused(choice, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError) as refused:
        PushChoice(*choice)
    assert BAD[choice] in str(refused.value)
    assert TOKEN not in str(refused.value)
    PushChoice("hub", "ada/saes", True)


def test_fresh_forgets_the_folder_for_the_hub_too(pusher):
    done = pusher.run("--fresh")
    assert done.code == 0, done.err
    assert "left in" not in done.out
    assert not pusher.folder.exists()


def test_nothing_of_the_upload_is_a_constant_of_the_run(pusher):
    assert pusher.run(*PUSH).code == 0
    constants = json.loads((pusher.cwd / "run/config.json").read_text())["constants"]
    assert {"push", "public", "export"} & constants.keys() == set()
