"""Uploads an export to the hub, only if the user named a repository; it is private unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from posttrain.errors import UserError, first_line


def check_push(name: str) -> None:
    """Raises UserError, before anything is written, for a name that is none or where nobody is logged in."""
    try:
        validate_repo_id(name)
        # The hub accepts names without an owner, which are those of its own models.
        if name.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(f"push: '{name}' is no hub id: {first_line(error)}; write owner/name") from error
    if huggingface_hub.get_token() is None:
        raise UserError("push: no token; run `hf auth login`, or set HF_TOKEN to one that may write")


def push(output: Path, card: Path | None, name: str, private: bool) -> str:
    """Uploads a directory, or a file with its card as README.md; returns the address. Call `check_push` before."""
    api, message = huggingface_hub.HfApi(), f"posttrain: {output.name}"
    try:
        api.create_repo(name, private=private, exist_ok=True)  # of one that is there the visibility stays
        if card is None:  # a directory, which holds its card
            api.upload_folder(repo_id=name, folder_path=output, commit_message=message)
        else:
            files = [CommitOperationAdd(output.name, str(output)), CommitOperationAdd("README.md", str(card))]
            api.create_commit(name, files, commit_message=message)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"push: {name} did not take it: {first_line(error)}; {output} is whole, push it once more with"
            f" `hf upload {name} {output}`"
        ) from error
    return f"{api.endpoint}/{name}"
