"""What is checked here before a machine is rented: tools, files, secrets."""

import mmap
import os
import re
import shutil
import subprocess
from pathlib import Path

from sparse_coding.config import require
from sparse_coding.files import read_json, require_private
from sparse_coding.sweep.run_folder import git_state as commit_of

SECRET_FILES = {"secrets.json", ".env", "id_rsa", "id_ed25519", "vast_api_key", ".vast_api_key",
                ".netrc", "credentials"}  # fmt: skip
# shapes of keys, in case one gets into a tracked file: vast.ai's are 64 hex digits, as sums are,
# those of W&B 40, as commits are
TOKEN = (rb"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{36}|"
         rb"(?i:vast|wandb)[^\n]{0,40}\b([0-9a-f]{64}|[0-9a-f]{40}))\b")  # fmt: skip
USAGE = "give the command after --, for example: -- python replicate_toy_models.py"
OURS = {"replicate_toy_models.py", "run.py"}
LARGE = 50e6  # bytes of one tracked file, above which pushing it is worth a word
VERSION = 3  # of rsync, at least: what macOS calls rsync is older or another program


def require_tools() -> None:
    """Raises UserError without ssh, ssh-keygen or a current rsync."""
    for tool, package in (("ssh", "openssh-client"), ("ssh-keygen", "openssh-client"),
                          ("rsync", "rsync")):  # fmt: skip
        found = shutil.which(tool)
        require(bool(found), f"{tool} is missing: install {package} (apt or brew)")
    line = subprocess.run(["rsync", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"version v?(\d+)", line)
    require(
        bool(version) and int(version[1]) >= VERSION and "openrsync" not in line,
        "rsync is older than 3.0: install a current one (brew install rsync)",
    )


def tracked_files(root: Path, key: str) -> list[str]:
    """Files that are pushed: those that git tracks, as they are now. Raises UserError if root is
    no checkout, or a secret is among them.

    key: of the account
    """
    command = ["git", "-C", str(root), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True)
    require(done.returncode == 0, f"{root} is no git checkout: what git tracks is what is pushed")
    names = os.fsdecode(done.stdout).split("\0")
    files = [name for name in names if name and (root / name).is_file()]
    token = re.compile(TOKEN + b"|" + re.escape(key.encode()))
    for name in files:
        path = root / name
        secret = path.name in SECRET_FILES or path.suffix in (".pem", ".key")
        require(not secret, f"{name} is tracked by git and would be pushed to a stranger's "
                f"machine: git rm --cached {name}, and make new keys")  # fmt: skip
        if path.stat().st_size > LARGE:
            print(f"warning: {name} has {path.stat().st_size / 1e6:.0f} MB and is pushed as well")
        with open(path, "rb") as file:
            size = path.stat().st_size
            found = size and token.search(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        require(not found, f"{name} seems to hold a token and would be pushed: take it out first")
    return files


def require_script(command: list[str], root: Path, files: list[str]) -> None:
    """Raises UserError unless the command is python and a tracked script, with no flags of ours."""
    require(len(command) >= 2 and command[0] in ("python", "python3"), USAGE)
    require(command[1] in files, f"{command[1]} is not tracked by git in {root}: git add it, or "
            "name it as it is called from there")  # fmt: skip
    flags = {word.split("=")[0].replace("_", "-") for word in command}
    for flag in ("--shard", "--output-dir", "--fresh"):
        require(flag not in flags, f"{flag} is set by the sweep: leave it out of the command")
    require(
        bool(flags & {"--preset", "--verify"}) or command[1] not in OURS,
        f"--preset is missing: what {command[1]} does by default depends on the machine",
    )


def git_state(root: Path) -> dict:
    """Commit, and the changes since, for the record. No host name, no path."""
    diff = subprocess.run(["git", "-C", str(root), "diff", "HEAD"], capture_output=True)
    return commit_of(root) | {"git_diff": diff.stdout.decode(errors="replace")}


def secrets_for(names: tuple[str, ...], root: Path) -> bytes:
    """NAME=value lines for --send-env: from the environment, else from secrets.json. Raises
    UserError if neither has one, or others can read secrets.json."""
    path = root / "secrets.json"
    stored = {}
    if names and path.exists():
        require_private(path)
        stored = read_json(path, remedy="mend it: {NAME: value, ...}")
    lines = []
    for name in names:
        value = os.environ.get(name) or stored.get(name) or stored.get(name.lower())
        require(bool(value), f"--send-env {name}: neither the environment nor secrets.json has it")
        require(
            isinstance(value, str) and value.isprintable(), f"--send-env {name} is no line of text"
        )
        lines.append(f"{name}={value}\n")
    return "".join(lines).encode()
