"""Names of features, by hand or by a tool, in files: named_features.json.

    {"cell": "seed0_dict000512_l1exp-13",       the autoencoder, by its folder below saes/
     "checksum": "9f3c...",                     of its sae_weights.safetensors: this one, no other
     "names": {"275": "keyword def, mostly of methods"}}

Other keys are ignored, so that a tool may say what it is. A page of features saves such a file.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from sparse_coding.config import UserError, require
from sparse_coding.files import Damaged, read_json, tensors_checksum
from sparse_coding.sae.saelens import read_config

LONGEST = 200  # characters of a name: it is to be read in a list
WEIGHTS = "sae_weights.safetensors"
FORMAT = 'wanted is {"cell": "...", "checksum": "...", "names": {"12": "..."}}'

Names = dict[str, dict[int, str]]  # cell -> feature -> name


def read_names(paths: Sequence[str], saes: Path) -> Names:
    """The names that the files give to features of a run.

    saes: the folder of its autoencoders
    Raises:
        UserError: a file that can't be read or is of another form, is of an autoencoder that is not
            there, or of another one of the same place in the grid; a feature that it hasn't; a name
            that is empty or longer than LONGEST; two files of one autoencoder.
    """
    found: Names = {}
    for path in map(Path, paths):
        content = read_json(path, remedy=FORMAT)
        cell, names = content.get("cell"), content.get("names")
        is_ours = isinstance(cell, str) and isinstance(names, dict)
        require(is_ours, f"{path} is no file of names: {FORMAT}")
        require(cell not in found, f"--names: two files are of {cell}: put them into one")
        n_dict = _n_dict_of(path, saes, cell, content.get("checksum"))
        found[cell] = {_feature(path, key, n_dict): _name(path, key, names[key]) for key in names}
    return found


def _n_dict_of(path: Path, saes: Path, cell: str, checksum: object) -> int:
    """Raises UserError unless the run has this very autoencoder."""
    is_there = os.path.isdir(saes)  # False for a name that is too long
    found = saes.glob(f"seed*/{WEIGHTS}") if is_there else ()
    trained = sorted(weights.parent.name for weights in found)
    require(
        cell in trained,
        f"--names {path}: it is of {cell}, which is not in {saes}: give the names of one of "
        f"{', '.join(trained)}" if trained else
        f"--names {path}: nothing is trained yet in {saes}: run it first without --names",
    )  # fmt: skip
    try:
        here, n_dict = tensors_checksum(saes / cell / WEIGHTS), read_config(saes / cell)["d_sae"]
    except Damaged as error:
        raise UserError(f"{error.what}: run it without --names, which trains it again") from None
    require(
        checksum == here,
        f"--names {path}: its checksum is {str(checksum)[:12]}, that of {saes / cell} is "
        f"{str(here)[:12]}: these are names of another autoencoder",
    )
    return n_dict


def _feature(path: Path, key: str, n_dict: int) -> int:
    is_one = key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key
    require(
        is_one and int(key) < n_dict,
        f"--names {path}: there is no feature {key[:20]!r}: numbers are 0 to {n_dict - 1}",
    )
    return int(key)


def _name(path: Path, key: str, name: object) -> str:
    is_one = isinstance(name, str) and 0 < len(name.strip()) <= LONGEST
    require(
        is_one,
        f"--names {path}: the name of feature {key} is {str(name)[:20]!r}: wanted is a text of 1 "
        f"to {LONGEST} characters",
    )
    return name.strip()
