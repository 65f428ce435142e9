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

Constants are flags: --help, from sparse_coding/rental/settings.py. --max-dph and --max-total have
no default, since they spend. How it works, and what it does when something fails:
sparse_coding/rental/README.md.
"""

import sys
from pathlib import Path

from sparse_coding.config import UserError, nearest, parse_flags, run_as_script
from sparse_coding.rental.commands import VERBS
from sparse_coding.rental.records import RentalError
from sparse_coding.rental.settings import Config


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    flags, command = argv[:cut], argv[cut + 1 :]
    name = flags.pop(0) if flags and not flags[0].startswith("-") else ""
    cfg = parse_flags(Config(), flags, description=__doc__)
    if name not in VERBS:
        hint = nearest(name, list(VERBS)) or f"choose {', '.join(VERBS)}"
        raise UserError(f"no command {name}: {hint}" if name else f"which command? {hint}")
    cfg.check()
    try:
        return VERBS[name](cfg, command, Path(__file__).resolve().parent)
    except RentalError as error:
        print(f"vastai_utils.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run_as_script(main)
