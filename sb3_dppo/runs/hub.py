"""The Hugging Face hub, as a place of shared folders."""

import re
import tempfile
from pathlib import Path
from typing import Any

from sb3_dppo.runs.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

# Nothing else is read from the hub.
FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(folder: str | Path, revision: str | None) -> Path:
    """
    :param folder: A folder, or "user/name", a model on the hub. What exists as a folder is one.
    :param revision: Branch, tag or commit on the hub; ``None``: its main branch.
    :return: The folder, in huggingface_hub's cache if it came from the hub.
    :raises FileNotFoundError: If there is no such model, or the hub can't be reached and the cache doesn't have it.
    :raises ValueError: For a revision of a folder that is not on the hub.
    """
    is_local = Path(folder).exists() or not isinstance(folder, str) or REPO_ID.fullmatch(folder) is None
    if is_local:
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is of a model on the hub, 'user/name', and not of folder={str(folder)!r}."
            )
        return Path(folder)
    from huggingface_hub import snapshot_download  # only for those who ask for it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"folder={folder!r} is no folder that exists, and no model that you can get from the Hugging Face hub or its "
            f"cache ({reason}). A private one needs `hf auth login`, or HF_TOKEN."
        ) from error


def push_to_hub(model: Any, repo_id: str, returns: Any, private: bool | None, token: str | None, commit_message: str) -> str:
    """See :meth:`sb3_dppo.DPPO.push_to_hub`."""
    if REPO_ID.fullmatch(repo_id) is None:
        raise ValueError(f"repo_id={repo_id!r} must be of the form 'user/name'.")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        model.save_pretrained(folder, returns=returns, repo_id=repo_id)  # before anything is made on the hub
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, allow_patterns=list(FILES))
    return str(url)
