"""Handing a folder to the Hugging Face hub, and one line for each of the ways in which that fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from varfast.types import InputError
from varfast.weights.hub import hub_cause, is_name, is_offline, is_revision, one_line, status_of

_LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token=..."


def upload_folder(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model of varfast",
) -> str:
    """Upload files of a folder in one commit; the repository, and the branch, are made if they are not there.

    An index and shards of a larger model that were uploaded before are removed: they would be read in place of these.

    Args:
        names: of the files; others in the folder stay here.
        repo_id: owner/name, or name for the own namespace.
        private, token, revision: as of varfast.Policy.push_to_hub.
    Returns: address of the commit.
    Raises: InputError, which says what to do, without a login, a right or a network.
    """
    repo_id = check_upload(repo_id, token, revision)
    from huggingface_hub import HfApi

    stale = ["model-*-of-*.safetensors", "model.safetensors.index.json"]
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            commit_message=commit_message,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in names],
            delete_patterns=[pattern for pattern in stale if not _matches(pattern, names)],
        )
    except (TypeError, AttributeError, NameError, AssertionError):
        raise  # a bug, of ours or theirs
    # The hub's client raises exceptions of several HTTP libraries, which have no common base: see hub.fetch_from_hub.
    except Exception as error:
        raise InputError(
            f"{repo_id} cannot be uploaded: {_cause(error, repo_id)}\n  the same call tries again"
        ) from error
    return str(commit.commit_url)


def _matches(pattern: str, names: Sequence[str]) -> bool:
    from fnmatch import fnmatch

    return any(fnmatch(name, pattern) for name in names)


def check_upload(repo_id: str, token: str | None = None, revision: str | None = None) -> str:
    """What can be known before anything is written. Returns: owner/name or name, without hf://.

    Raises: InputError if the hub has no such names, or nobody is logged in.
    """
    from huggingface_hub import get_token

    plain = repo_id.removeprefix("hf://")
    parts = plain.split("/")
    if len(parts) > 2 or not all(map(is_name, parts)):
        raise InputError(
            f"{one_line(repo_id, 100)!r} is no repository of the hub; want owner/name (letters, digits, '-', '_' and "
            "'.' inside)"
        )
    if revision is not None and not is_revision(revision):
        raise InputError(f"revision={one_line(revision, 80)} is no name of a branch; use letters, digits and -_./")
    if not (token or get_token()):
        raise InputError(f"{plain} cannot be written: there is no login for the hub; {_LOGIN}")
    return plain


def _cause(error: Exception, repo_id: str) -> str:
    status = status_of(error)
    if status == 401:
        return f"the hub does not accept the login (401); {_LOGIN}"
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403): make one with the right to write on the hub's page of access "
            "tokens, or choose a repository of your own"
        )
    if is_offline(error):
        return "HF_HUB_OFFLINE is set; unset it"
    return hub_cause(error, repo_id, "")
