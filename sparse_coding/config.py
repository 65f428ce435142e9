"""Command line, one-line errors, exit codes, the progress bar and named seeds."""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

C = TypeVar("C")
PASSING_S = 2.0  # nobody asks how long it will take before
LONGEST = 2000  # characters of a line that quotes a file; ours, what a terminal shows at once
# what the system may answer to a read or write at any moment: what it means, what to do
DISK_ERRORS = {
    errno.ENOSPC: ("disk full", "free some space"),
    errno.EDQUOT: ("disk quota exceeded", "free some space"),
    errno.EFBIG: ("file larger than the system allows", "raise the limit (ulimit -f)"),
    errno.EIO: ("input/output error", "see what ails the disk"),
    errno.EROFS: ("read-only disk", "make it writable"),
    errno.EISDIR: ("a directory where a file should be", "move it away"),
}


class UserError(Exception):
    """Bad input or environment: one line that says what is wrong, the value and what to do."""


class Interrupted(Exception):
    """Stopped by a signal after saving; the message says how to go on.

    Args:
        signum: number of the signal; the process exits with 128 + signum (130 Ctrl-C, 143 SIGTERM)
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_flag(config: object, name: str, holds: bool, rule: str) -> None:
    """Raises UserError naming the flag, its value and the rule that it must follow."""
    flag = "--" + name.replace("_", "-")
    require(holds, f"{flag} {getattr(config, name)} must be {rule}")


def one_line(text: object) -> str:
    """The text with line breaks and control characters spelt out, and the middle of a very long one
    left out: it may be out of any file."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in _ends(str(text)))
    return _ends(line)


def _ends(text: str) -> str:
    """The text, or of one that is too long its start and its end, where the remedy stands."""
    half = LONGEST // 2 - 5
    return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"


def run_as_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs main(argv) and exits: 0 or its result, 2 for bad input, 128 + signal if interrupted.

    A disk that takes no more is bad input too; every other exception keeps its traceback, being our
    fault.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):  # names of files may be no UTF-8, a terminal ASCII
            stream.reconfigure(errors="backslashreplace")
    name = os.path.basename(sys.argv[0])
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = _fail(f"{name}: error: {error}", 2)
    except Interrupted as stop:
        code = _fail(f"{name}: {stop}", 128 + stop.signum)
    except KeyboardInterrupt:
        code = _fail(f"{name}: interrupted: the same command goes on", 130)
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit fails again
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" at {os.fsdecode(error.filename)}" if error.filename else ""
        problem, remedy = DISK_ERRORS[error.errno]
        code = _fail(f"{name}: error: {problem}{where}: {remedy}, then run it again", 2)
    sys.exit(code)


def _fail(line: str, code: int) -> int:
    print(one_line(line), file=sys.stderr)
    return code


def parse_flags(default: C, argv: list[str], *, description: str, source: str = "") -> C:
    """The dataclass `default` with the flags of argv over it; --help prints its comments.

    source: the file that the flags are from, if they are of no command line
    Raises:
        UserError: an unknown flag (with the nearest name), a bad value or choice.
    """
    where = source and f"{source}: "
    import tyro  # here, so that a module that needs UserError alone needs no tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, unknown = tyro.cli(
                type(default),
                args=argv,
                default=default,
                description=description,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(where + _of_box(errors.getvalue())) from None
    if unknown:
        raise UserError(where + _unknown_flag(unknown[0], default))
    return config


def given_flags(argv: list[str]) -> set[str]:
    """Names of the flags on the command line, as fields are spelt."""
    flags = (arg.split("=")[0] for arg in argv if arg.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def _unknown_flag(flag: str, default: object) -> str:
    names = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(default)]
    hint = nearest(flag.split("=")[0].replace("_", "-"), names) or "see --help"
    return f"unknown flag {flag}: {hint}"


def nearest(name: str, names: list[str]) -> str:
    """The question whether the nearest of the names was meant; empty if none is near."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {close[0]}?" if close else ""


def _of_box(message: str) -> str:
    """tyro's error box without its frame, its title and the help text below the message."""
    lines = [line.strip(" │╭╰╮╯─-") for line in message.splitlines()]
    body = [line for line in lines[1:] if line]
    for i, line in enumerate(body):
        if line.startswith(("Argument helptext", "For full helptext", "Perhaps")):
            body = body[:i]
            break
    return " ".join(body)


def first_line(error: Exception) -> str:
    """The first line of its message, the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def progress_bar(items: Iterable | None = None, **options: object) -> "tqdm":
    """A bar on stderr, with the time left; 30 s apart where nobody watches, as in a log file.

    options: of tqdm
    """
    from tqdm import tqdm

    interval = 0.1 if sys.stderr and sys.stderr.isatty() else 30.0
    silent = sys.stderr is None
    return tqdm(items, mininterval=interval, dynamic_ncols=True, disable=silent, **options)


def passing_bar(items: Iterable, *, desc: str, **options: object) -> "tqdm":
    """A progress_bar of what mostly takes no time: it is shown from then on when it does, and gone
    at the end."""
    return progress_bar(items, desc=desc, leave=False, delay=PASSING_S, **options)


def pick(cls: type[C], config: object, **more: object) -> C:
    """The dataclass `cls` from those fields of config that it has too; `more` names the others."""
    shared = {field.name for field in dataclasses.fields(cls)} - more.keys()
    return cls(**{name: getattr(config, name) for name in shared}, **more)


def named_seed(*names: object) -> int:
    """A 63-bit seed that depends on all names: named_seed(0, "world") never meets another use.

    sha256 rather than seed + offset, so that streams of neighbouring seeds share nothing.
    """
    return hash63("/".join(map(str, names)).encode())


def hash63(data: bytes) -> int:
    """The first 63 bits of its sha256: a number that fits into int64."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1


def fingerprint(constants: dict) -> str:
    """8 hex digits of the constants, independent of their order."""
    text = repr(sorted(constants.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
