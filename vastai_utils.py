"""Runs sweeps on rented vast.ai GPUs for cents, and leaves none of them billing.

    pip install -r requirements-vast.txt           the vastai package
    python vastai_utils.py doctor                  key, tools, account; buys nothing
    python vastai_utils.py sweep --max-dph 0.5 --max-total 2 --instances 2 \\
        -- python replicate_toy_models.py --preset full

sweep finds the cheapest suitable machines, says what they cost, waits for a yes, trains one shard
on each, fetches and verifies the results, ends the machines, and merges one table. The same command
goes on where it was. Every machine also ends itself at its deadline.

    doctor search                                  look, for nothing
    sweep launch sync run logs fetch ssh           a whole sweep, or by hand, step by step
    status                                         what lives, what it costs
    destroy reap                                   end a run; end all that is past its deadline
    copy-models copy-recent                        models/ there, the newest results here

Any constant below is a flag: --help. How it works, and what it does when something fails:
sparse_coding/rental/README.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import UserError, nearest, parse_flags, require_flag, run_as_script
from sparse_coding.rental.commands import VERBS
from sparse_coding.rental.records import RentalError


@dataclass(frozen=True)
class Config:
    """Every constant, each a flag. What may be spent has no default."""

    # the machine
    gpu_names: tuple[str, ...] = ("RTX 3090", "RTX 4090")  # as vast.ai writes them: any of these
    n_gpus: int = 1  # of one machine
    disk_gb: float = 30.0  # of one machine; fixed for its life, and billed for all of it
    image: str = "pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime"  # of torch as requirements.txt
    image_gb: float = 4.0  # of the image, packed: some hosts bill its traffic
    min_cuda: float = 12.6  # CUDA that the driver must know: that of the image
    min_reliability: float = 0.98  # of the host, as vast.ai measures it
    min_inet_mbps: float = 100.0  # downwards, in Mbit/s
    need_gpu: bool = True  # refuse a machine whose torch computes on no GPU
    interruptible: bool = False  # bid for machines that may be taken away; cheaper

    # money, in dollars: what may be spent has no default
    max_dph: float | None = None  # per hour and machine, disk included
    max_total: float | None = None  # of the whole run, the worst case counted
    max_hours: float = 2.0  # after which a machine ends itself
    hours: float = 0.5  # that a machine is expected to take: for the expected price only
    results_gb: float = 0.5  # that are fetched from one machine: for the price only
    yes: bool = False  # accept the price without being asked
    dry_run: bool = False  # everything up to the purchase

    # the run
    run: str = ""  # its name; default: made from the command, or the newest of rentals/
    instances: int = 1  # machines, one shard on each
    shard: int = 0  # that a command is for, from 1; 0: all
    send_env: tuple[str, ...] = ()  # names of secrets (HF_TOKEN, ...) to send over ssh
    ssh_key: str = "rentals/id_ed25519"  # made when there is none
    follow: bool = False  # logs: go on
    discard: bool = False  # destroy: without fetching first
    all: bool = False  # reap: every machine of ours, whatever its run and deadline

    # patience: a machine that takes longer is given up, and another one is rented
    start_minutes: float = 15.0  # until it is listed and has loaded its image, each
    lost_minutes: float = 5.0  # in which it runs but can't be reached, or is exited or offline
    attempts: int = 3  # machines per shard that may fail
    pull_minutes: float = 5.0  # between two fetches of checkpoints
    poll_seconds: float = 10.0  # between two looks at the machines
    api_spacing: float = 1.0  # times the intervals that vast.ai documents; 0 on loopback


def main(argv: list[str]) -> int:
    """One command; the exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    flags, command = argv[:cut], argv[cut + 1 :]
    name = flags.pop(0) if flags and not flags[0].startswith("-") else ""
    cfg = parse_flags(Config(), flags, description=__doc__)
    if name not in VERBS:
        hint = nearest(name, list(VERBS)) or f"choose {', '.join(VERBS)}"
        raise UserError(f"no command {name}: {hint}" if name else f"which command? {hint}")
    check(cfg)
    try:
        return VERBS[name](cfg, command, Path(__file__).resolve().parent)
    except RentalError as error:
        print(f"vastai_utils.py: {error}", file=sys.stderr)
        return 1


def check(cfg: Config) -> None:
    """Raises UserError for a constant out of its range."""
    for name in ("n_gpus", "instances", "attempts"):
        require_flag(cfg, name, getattr(cfg, name) >= 1, "at least 1")
    for name in ("max_hours", "hours", "poll_seconds"):
        require_flag(cfg, name, getattr(cfg, name) > 0, "above 0")
    for name in ("max_dph", "max_total"):
        value = getattr(cfg, name)
        require_flag(cfg, name, value is None or value > 0, "above 0")
    require_flag(cfg, "disk_gb", cfg.disk_gb >= 8, "at least 8, the least that vast.ai rents")
    require_flag(cfg, "shard", cfg.shard >= 0, "from 1, or 0 for all")
    require_flag(cfg, "api_spacing", cfg.api_spacing >= 0, "at least 0")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run_as_script(main)
