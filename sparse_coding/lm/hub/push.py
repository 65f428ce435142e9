"""The folder for the Hugging Face Hub, uploaded by huggingface_hub with the user's own login.

Nothing is asked. What has arrived is not sent again, so an interrupted upload goes on when the same
command is given again. huggingface_hub finds the login itself (HF_TOKEN, or `hf auth login`): it is
never an argument, so that it stands in no log, command line or file of ours.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import DISK_ERRORS, UserError, first_line, require
from sparse_coding.lm.hub.folder import CARD, HUB, write_cards

LOGIN = "`hf auth login`, or HF_TOKEN in the environment"


@dataclass(frozen=True)
class PushChoice:
    """Where the folder for the Hub is uploaded to: run.py's flags of these names.

    push: OWNER/NAME; "": nowhere
    public: for everybody to see, once it is whole
    """

    export: str
    push: str
    public: bool

    def __post_init__(self) -> None:
        """Raises UserError for flags that don't fit, and where there is no login."""
        if not self.push:
            require(not self.public, "--public is for --push OWNER/NAME: drop it, or give both")
            return
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.push)
            good = self.push.count("/") == 1
        except HFValidationError:
            good = False
        # what looks like a token is not repeated
        shown = "hf_..." if self.push.startswith("hf_") else self.push
        require(good, f"--push {shown} must be OWNER/NAME: letters, digits, -, _ and .")
        require(
            self.export == "hub", f"--push {self.push} uploads what --export hub writes: add it"
        )
        token = get_token()
        require(token is not None, f"--push {self.push}: no login for the Hub: {LOGIN}")
        # an error of the HTTP library would repeat what can't stand in a header
        fits = token.isascii() and token.isprintable() and " " not in token
        require(
            fits, f"--push {self.push}: the login is no token, with a strange character: {LOGIN}"
        )


def push(folder: Path, choice: PushChoice) -> None:
    """Uploads hub/ of the run folder, into a private repository unless choice.public.

    Raises:
        UserError: the Hub refuses it, or is out of reach; the repository is public, which was not
            asked for; there is nothing to upload.
    """
    require((folder / HUB / CARD).exists(), "nothing to push: all autoencoders diverged")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it also logs what is no news, as that nothing has changed
    write_cards(folder, choice.push)
    paths = [path for path in (folder / HUB).rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    api = HfApi()
    with _errors_of_hub(choice.push):
        api.create_repo(choice.push, private=True, exist_ok=True)
        was_private = api.model_info(choice.push).private
        require(
            was_private or choice.public,
            f"{choice.push} is public: add --public to push there, or choose another name",
        )
        print(f"pushing {len(paths)} files, {megabytes:,.1f} MB, to {choice.push}", flush=True)
        message = f"{len(list((folder / HUB).glob(f'*/*/{CARD}')))} sparse autoencoders"
        api.upload_folder(repo_id=choice.push, folder_path=folder / HUB, commit_message=message)
        if was_private and choice.public:
            api.update_repo_settings(choice.push, private=False)
    seen = "public" if choice.public else "private; --public shows it to everybody"
    print(f"pushed: {api.endpoint}/{choice.push} ({seen})")


@contextlib.contextmanager
def _errors_of_hub(repository: str) -> Iterator[None]:
    """Turns what huggingface_hub and hf_xet raise into one line that says what to do."""
    from huggingface_hub import errors

    failed, go_on = f"--push {repository}", "the same command goes on with the upload"
    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        why = f"the Hub says {code} ({first_line(error)})"
        if code == 401:
            raise UserError(f"{failed}: the login is not valid: {LOGIN}") from None
        if code in (403, 404):
            remedy = "use a login that may write there, or choose another OWNER/NAME"
            raise UserError(f"{failed}: {why}: {remedy}") from None
        raise UserError(f"{failed}: {why}: {go_on}") from None
    except (OSError, errors.HTTPError, RuntimeError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(f"{failed}: not whole yet ({first_line(error)}): {go_on}") from None
