"""named_features.json: read for the autoencoder that it is of, or refused in one line."""

import json

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.files import tensors_checksum
from sparse_coding.lm.features.names import LONGEST, WEIGHTS, read_names
from sparse_coding.sae.saved import save_sae

CELL, OTHER = "seed0_dict000012_l1exp-13", "seed0_dict000012_l1exp-12"


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """The folder of two autoencoders with 12 features."""
    folder = tmp_path_factory.mktemp("run") / "saes"
    for seed, cell in enumerate((CELL, OTHER)):
        W = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        tensors = {"W_enc": W.T, "b_enc": torch.zeros(12), "W_dec": W, "b_dec": torch.zeros(4)}
        save_sae(folder / cell, tensors, metadata={})
    return folder


@pytest.fixture
def file(saes, tmp_path):
    """file(of, names, **more) writes one and returns its path."""

    def write(of=CELL, names=None, **more) -> str:
        checksum = tensors_checksum(saes / of / WEIGHTS)
        content = {"cell": of, "checksum": checksum, "names": names or {"3": "three"}} | more
        path = tmp_path / f"{of}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def test_names_are_read_for_the_autoencoders_that_they_are_of(saes, file):
    first = file(names={"0": " a name ", "11": "x" * LONGEST}, by="a tool", model={"id": 1})
    second = file(OTHER, {"4": "ünïcode 🙂"})
    assert read_names([first, second], saes) == {
        CELL: {0: "a name", 11: "x" * LONGEST},
        OTHER: {4: "ünïcode 🙂"},
    }
    assert read_names([], saes / "nowhere") == {}


def test_names_of_another_autoencoder_are_refused(saes, file):
    swapped = file(checksum=tensors_checksum(saes / OTHER / WEIGHTS))
    with pytest.raises(UserError, match=r"its checksum is \w{12}, .* names of another autoencoder"):
        read_names([swapped], saes)
    with pytest.raises(UserError, match=f"it is of ../{CELL}, which is not in .*{OTHER}, {CELL}$"):
        read_names([file(cell=f"../{CELL}")], saes)
    with pytest.raises(UserError, match=r"nothing is trained yet .* run it first without --names"):
        read_names([file()], saes / "nowhere")


def test_two_files_of_one_autoencoder_are_refused(saes, file):
    with pytest.raises(UserError, match=f"two files are of {CELL}: put them into one"):
        read_names([file(), file()], saes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"12": "a"}, "there is no feature '12': numbers are 0 to 11"),
        ({"-1": "a"}, "no feature '-1'"),
        ({"03": "a"}, "no feature '03'"),
        ({"": "a"}, "no feature ''"),
        ({"def": "a"}, "no feature 'def'"),
        ({"٣": "a"}, "no feature '٣'"),
        ({"9" * 5000: "a"}, "no feature '9999"),
        ({"3": ""}, "name of feature 3 is ''"),
        ({"3": " \n"}, "name of feature 3 is"),
        ({"3": 7}, "name of feature 3 is '7'"),
        ({"3": "x" * (LONGEST + 1)}, f"a text of 1 to {LONGEST} characters"),
    ],
)
def test_what_is_no_name_of_a_feature_is_refused(saes, file, names, said):
    with pytest.raises(UserError) as refused:
        read_names([file(names=names)], saes)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("change", [{"cell": 3}, {"names": ["a"]}, {"names": 3}])
def test_a_file_of_another_form_is_refused_with_the_form_that_is_wanted(saes, file, change):
    with pytest.raises(UserError, match=r'no file of names: wanted is \{"cell": "\.\.\."'):
        read_names([file(**change)], saes)


def test_a_damaged_autoencoder_is_said_with_what_helps(saes, file, tmp_path):
    path = file()
    (tmp_path / "saes" / CELL).mkdir(parents=True)
    (tmp_path / "saes" / CELL / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"is damaged .* run it without --names"):
        read_names([path], tmp_path / "saes")
