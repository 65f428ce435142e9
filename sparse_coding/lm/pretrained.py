"""A transformers causal language model from a local folder, the cache or the hub.

Nothing of the model's own code is run and nothing is unpickled; weights that are missing or
misshapen are an error, where transformers would fill in random ones with a warning.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from sparse_coding.config import UserError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_pretrained(
    name: str, dtype: torch.dtype, *, revision: str = "", architectures: tuple[str, ...]
) -> "PreTrainedModel":
    """The model of a folder of save_pretrained or of a hub id, on the CPU.

    A hub id is looked up in the cache first, without a request; then it is downloaded.

    Args:
        revision: commit, tag or branch of a hub id; "": main
        architectures: the config.model_type that are welcome
    Raises:
        UserError: no such model, hub out of reach, an incomplete model, another architecture.
    """
    path = Path(name).expanduser()
    require(not path.is_file(), f"{name} is a file, but no .pt of nanoGPT: give the model's folder")
    with _quiet():
        if not path.is_dir():
            return _from_hub(name, dtype, revision or "main", architectures)
        require(not revision, f"revision {revision} is for a hub id, but {name} is a local folder")
        require(
            (path / "config.json").is_file(),
            f"{name} has no config.json: give a folder of save_pretrained, a nanoGPT ckpt.pt or a "
            "hub id",
        )
        try:
            return _load(str(path), dtype, architectures, local_files_only=True)
        except OSError as error:
            raise UserError(f"{name} can't be loaded: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bar and no report of transformers: what matters in it is checked here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def require_reachable(name: str, revision: str) -> None:
    """Raises UserError for a hub id of which nothing is cached while the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return
    try:
        snapshot_download(name, revision=revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        _require_on_hub(name, revision)


def _from_hub(
    name: str, dtype: torch.dtype, revision: str, architectures: tuple[str, ...]
) -> "PreTrainedModel":
    with contextlib.suppress(OSError):  # not in the cache, or not whole
        return _load(name, dtype, architectures, revision=revision, local_files_only=True)
    _require_on_hub(name, revision)
    try:
        return _load(name, dtype, architectures, revision=revision)
    except OSError as error:
        raise UserError(f"{name} can't be loaded from the hub: {_first_line(error)}") from error


def _require_on_hub(name: str, revision: str) -> None:
    """One request, so that a hub out of reach is said at once (downloads retry for 23 s)."""
    from huggingface_hub import HfApi, errors

    no_such = f"no such model: {name} is no local folder and"
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except errors.HFValidationError:
        raise UserError(f"{no_such} no hub id") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{no_such} not on the hub (or private: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision} on the hub") from None
    except (OSError, errors.HTTPError) as error:
        fetch = f"hf download {name}" + f" --revision {revision}" * (revision != "main")
        raise UserError(
            f"{name} is no local folder and not in the cache, and the hub is out of reach "
            f"({_first_line(error)}): fetch it beforehand with `{fetch}`"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load(
    name: str, dtype: torch.dtype, architectures: tuple[str, ...], **where: object
) -> "PreTrainedModel":
    """Raises OSError if files are missing, UserError if they are no model for us."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # else the hub's bot is asked, in a thread, to add safetensors to repositories without
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        kind = config.model_type
        known = ", ".join(architectures)
        require(kind in architectures, f"{name}: architecture {kind} is not one of {known}")
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below
            output_loading_info=True,
            **where,
        )
    except (ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{name} can't be loaded: {_first_line(error)}") from error
    wrong = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
    require(not wrong, f"{name}: {len(wrong)} weights are missing or misshapen, as {wrong[:1]}")
    return model
