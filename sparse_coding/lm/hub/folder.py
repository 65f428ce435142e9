"""A finished sweep as a repository of the Hugging Face Hub, one folder per autoencoder.

    hub/README.md               the card: where they come from, a table, the frontiers, how to load
    hub/results.csv, hub/figures/*.png
    hub/<hook>/<cell>/          what sae_lens's SAE.from_pretrained(repository, "<hook>/<cell>")
                                loads, and a card of its own

Paths of this machine, as of a local model, are published as their last name.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from sparse_coding.figures.report import short
from sparse_coding.files import (
    CHECKSUM,
    read_json,
    read_record,
    require_free_disk,
    write_atomic,
    write_record,
    written_whole,
)
from sparse_coding.lm.packaged.smollm2 import HUB_ID
from sparse_coding.sae.saelens import AGAIN, CONFIG, read_config
from sparse_coding.sweep.cells import sae_folder
from sparse_coding.sweep.grid import Cell
from sparse_coding.sweep.run_folder import CONFIG as RUN_CONFIG
from sparse_coding.sweep.run_folder import TABLE

HUB, CARD, FIGURES = "hub", "README.md", "figures"
ANY_REPOSITORY = "OWNER/NAME"  # stands in a card until it is known where it is pushed to
TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "sparse_coding"]
COLUMNS = ("arch", "n_dict", "l0", "fvu", "ce_recovered", "dead_fraction")  # of the table
MEANING = """\
All on held-out documents: `l0`, active features per token; `fvu`, share of the variance that is
missing; `ce_recovered` = (ce_zero − ce_spliced) / (ce_zero − ce_clean), of the model's next-token
loss, 1 where nothing is lost; `dead_fraction`, features that never fire there."""
COMMIT = re.compile("[0-9a-f]{40}")
OWN = re.compile(r" --(push[= ]\S+|public)\b")  # of a command: not for those who repeat it


def sae_id(folder: Path, cell: Cell) -> str:
    """By which sae_lens finds the cell in the repository: TransformerLens's name of the hook (or,
    where it has none, our layer and site), and the cell."""
    metadata = read_config(sae_folder(folder, cell))["metadata"]
    ours = metadata["sparse_coding"]
    hook = metadata.get("hook_name") or f"layer{ours['layer']}.{ours['site']}"
    return f"{hook}/{cell.name}"


def write_hub_folder(folder: Path, cells: list[Cell], figures: Iterable[Path]) -> None:
    """Writes hub/ of a run folder that has its table.

    Args:
        cells: whose autoencoders are published
        figures: for the card
    Raises:
        UserError: it would not fit on the disk.
    """
    to = folder / HUB
    for cell in cells:
        ours, theirs = sae_folder(folder, cell), to / sae_id(folder, cell)
        for path in sorted(ours.glob("*.safetensors")):
            _link(path, theirs / path.name)
        config = read_json(ours / CONFIG, remedy=AGAIN)
        config.pop(CHECKSUM, None)
        write_record(theirs / CONFIG, _public(config))
    _link(folder / TABLE, to / TABLE)
    for path in figures:
        _link(path, to / FIGURES / path.name)
    write_cards(folder)


def _link(path: Path, to: Path) -> None:
    """The same file at a second place, which takes no room: no run writes into a file, each is
    replaced. A copy, where the disk has no hard links."""
    with written_whole(to) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            require_free_disk(to.parent, path.stat().st_size)
            shutil.copyfile(path, temporary)


def _public(value: object) -> object:
    """JSON with paths of this machine cut to their last name."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return _public_name(value) if isinstance(value, str) else value


def _public_name(text: str) -> str:
    return Path(text).name if text.startswith(("/", "~", "./", "../")) else text


def _public_command(command: str) -> str:
    """The command with the last names of its paths, and without where it pushes to."""
    words = [word.rpartition("=") for word in OWN.sub("", command).split(" ")]
    return " ".join(flag + sign + _public_name(value) for flag, sign, value in words)


def write_cards(folder: Path, repository: str = ANY_REPOSITORY) -> None:
    """Writes README.md of hub/, and of each autoencoder in it.

    repository: from which the lines on the cards load them
    """
    to = folder / HUB
    of_all = dict(repository=repository, command=_public_command(_command(folder)))
    rows, known = {}, {}
    for path in sorted(to.glob(f"*/*/{CONFIG}")):
        name = path.parent.relative_to(to).as_posix()
        row = read_record(folder / "cells" / f"{path.parent.name}.json")
        rows[name] = {"arch": "relu"} | row  # older versions did not say
        known = read_record(path)["metadata"]
        write_atomic(path.with_name(CARD), _card({name: rows[name]}, known, **of_all))
    rows = dict(sorted(rows.items(), key=lambda row: [row[1][c] for c in ("n_dict", "arch", "l0")]))
    figures = sorted((to / FIGURES).glob("*.png"))
    write_atomic(to / CARD, _card(rows, known, figures=figures, **of_all))


def _command(folder: Path) -> str:
    """With which the run was begun."""
    return read_record(folder / RUN_CONFIG)["command"]


def _card(
    rows: dict[str, dict], metadata: dict, *, repository: str, command: str,
    figures: Iterable[Path] = (),
) -> str:  # fmt: skip
    """Markdown with front matter. rows: by sae_id; metadata: of one of the autoencoders."""
    ours = metadata["sparse_coding"]
    kind = "transcoder" if ours.get("target_site") else "sparse autoencoder"
    what = f"{len(rows)} {kind}s" if len(rows) > 1 else f"A {kind}"
    hook, output = metadata.get("hook_name"), metadata.get("hook_name_out", "before its norm")
    at = f" (`{hook}` in TransformerLens)" * bool(hook)
    at += f", to predict `{ours.get('target_site')}` ({output})" * (kind == "transcoder")
    pictures = "\n\n".join(f"![{path.stem}]({FIGURES}/{path.name})" for path in figures)
    return f"""\
---
{_front_matter(ours)}
---

# {what} on `{ours["model"]}`, layer {ours["layer"]}, {ours["site"]}

Trained with sparse_coding on activations of `{ours["model"]}`, layer {ours["layer"]} (from 0),
`{ours["site"]}`{at}, while it reads `{ours["dataset"]}`. Raw activations in, raw activations out.

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repository}", "{next(iter(rows), "")}")
```

{_table(rows)}

{MEANING}

{pictures}

The command that made it:

```
{command}
```
"""


def _front_matter(ours: dict) -> str:
    """YAML. A model or text that is none of the Hub, which has a commit of each, is left out."""
    from huggingface_hub import ModelCardData

    on_hub = {
        name: bool(COMMIT.fullmatch(str(ours.get(f"{name}_revision"))))
        for name in ("model", "dataset")
    }
    model = ours["model"]
    dataset = re.split("[:@]", ours["dataset"])[0]  # without configuration and split
    return ModelCardData(
        library_name="saelens",
        base_model=HUB_ID if model == "smollm2" else model if on_hub["model"] else None,
        datasets=[dataset] if on_hub["dataset"] else None,
        tags=TAGS,
    ).to_yaml()


def _table(rows: dict[str, dict]) -> str:
    """What each autoencoder reached, by its sae_id."""
    lines = [("sae_id", *COLUMNS), ("---", "---", *["---:"] * (len(COLUMNS) - 1))]
    lines += [(f"`{name}`", *(short(row[c]) for c in COLUMNS)) for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
