"""Files of the Hugging Face hub: hf://owner/repo/file, and one line for each of the many ways in which that fails."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from varfast.printable import printable
from varfast.types import InputError

_WANTED = "want hf://owner/repo/file or hf://owner/repo@revision/file, as hf://FoundationVision/var/var_d16.pth"
# The hub's own rule for owners and repositories.
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")
# A repository without a file in it.
_REPOSITORY = re.compile(r"hf://[^/]+/[^/]+/?")
_LINE = 300  # characters of somebody else's text that are shown


def one_line(text: object, limit: int = _LINE) -> str:
    """Somebody else's text as it may stand in a message: one line, printable, cut after `limit` characters."""
    return printable(" ".join(str(text)[: 20 * limit].split()), limit)


def names_repository(address: object) -> bool:
    """Whether an address is a whole repository of the hub: hf://owner/name, with @revision if wanted."""
    return isinstance(address, str) and _REPOSITORY.fullmatch(address) is not None


def repository_of(address: str) -> str | None:
    """owner/name of an hf:// address, without file and revision; None: it is none, or not as the hub names them."""
    owner, _, rest = address.removeprefix("hf://").partition("/")
    name = rest.partition("/")[0].partition("@")[0]
    known = address.startswith("hf://") and _NAME.fullmatch(owner) and _NAME.fullmatch(name)
    return f"{owner}/{name}" if known else None


def is_name(text: str) -> bool:
    """Whether the hub takes it as the name of an owner or a repository."""
    return _NAME.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Whether it may be a branch, a tag or a commit."""
    return _REVISION.fullmatch(text) is not None


def fetch_from_hub(address: str) -> Path:
    """The local file of hf://owner/repo/file or hf://owner/repo@revision/file, downloaded once.

    Raises: InputError with the address and the cause if it is no such address, or the file cannot be had.
    """
    owner, repo, revision, filename = _parts(address)
    from huggingface_hub import constants, hf_hub_download

    if not re.match(r"https?://[^/]", constants.ENDPOINT):
        raise InputError(
            f"checkpoint {address}: HF_ENDPOINT={one_line(constants.ENDPOINT)} has no scheme; set it to "
            f"https://{one_line(constants.ENDPOINT)}, or unset it"
        )
    given: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return Path(hf_hub_download(repo_id=f"{owner}/{repo}", filename=filename, **given))
    except (TypeError, AttributeError, NameError, AssertionError):
        raise  # a bug, of ours or theirs
    # By version the hub's client speaks HTTP by requests, httpx or httpx2, and downloads by hf_xet: their exceptions
    # have no common base, and neither has huggingface_hub's own.
    except Exception as error:
        raise InputError(
            f"checkpoint {address} cannot be fetched and is not in the hub's cache: "
            f"{hub_cause(error, f'{owner}/{repo}', filename, revision)}\n"
            "  check the address and the network, or download the file and give its path"
        ) from error


def _parts(address: str) -> tuple[str, str, str, str]:
    """Owner, repository, revision ("" for the default) and file."""
    owner, _, rest = address.removeprefix("hf://").partition("/")
    repo, _, filename = rest.partition("/")
    repo, at, revision = repo.partition("@")
    if found := re.match(r"(refs/(?:convert|pr)/[^/]+)/", f"{revision}/{filename}"):
        revision, filename = found[1], f"{revision}/{filename}"[found.end() :]
    revision = unquote(revision)
    wrong = ""
    if not (owner and repo and filename):
        wrong = "owner, repository or file is missing"
    elif not _NAME.fullmatch(owner) or not _NAME.fullmatch(repo):
        bad = repo if _NAME.fullmatch(owner) else owner
        wrong = f"{one_line(bad, 100)!r} is no name of the hub (letters, digits, '-', '_' and '.' inside)"
    elif at and not _REVISION.fullmatch(revision):
        wrong = f"{one_line(revision, 100)!r} is no revision (a branch, a tag or a commit)"
    elif "@" in filename.split("/")[0] and not at:
        wrong = "a revision stands behind the repository: hf://owner/repo@revision/file"
    elif any(part in ("", ".", "..") or part != part.strip() or not part.isprintable() for part in filename.split("/")):
        wrong = f"{one_line(filename, 100)!r} is no path of a file in a repository"
    if wrong:
        raise InputError(f"checkpoint {one_line(address)}: {wrong}; {_WANTED}")
    return owner, repo, revision, filename


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it, from the outside in; huggingface_hub wraps what the network said."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: Exception) -> int | None:
    """The code of HTTP that the hub answered with, if that is what happened."""
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error))
    return next((status for status in found if isinstance(status, int)), None)


def hub_cause(error: Exception, repository: str, filename: str, revision: str = "") -> str:
    """One line: what happened where the hub's client, or a library above it, raised `error`, and what helps."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    at = f" at revision {revision}" if revision else ""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            return f"{repository} is gated: accept its terms on {page} and log in (hf auth login, or HF_TOKEN)"
        if isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
            return f"there is no repository {repository}, or it is private and needs hf auth login (or HF_TOKEN)"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{repository} has no revision {revision}; {page} shows what it has"
        if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
            return f"{repository} has no file {filename}{at}; {page}/tree/{revision or 'main'} shows what it has"
        if status == 403:
            return f"{constants.ENDPOINT} refuses it (403): the account or token has no right to {repository}"
        if status == 429:
            return (
                "the hub answers 'too many requests' (429); wait some minutes, or log in (hf auth login, or HF_TOKEN)"
            )
        if isinstance(status, int) and status >= 500:
            return f"{constants.ENDPOINT} has a fault ({status}); try again later"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} has no such file; fetch it where there "
                "is a network, or unset HF_HUB_OFFLINE"
            )
        if isinstance(cause, ImportError) and "socks" in str(cause).lower():
            return f"{_proxy('socks')} is a SOCKS proxy, for which a package is missing: pip install socksio pysocks"
        if isinstance(cause, ValueError) and "proxy" in str(cause).lower():
            return f"{_proxy('')} is no proxy that can be used: {one_line(cause)}"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of the hub's cache {constants.HF_HUB_CACHE} is full; free space, or set HF_HOME elsewhere"
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            return (
                f"the hub's cache {constants.HF_HUB_CACHE} cannot be written ({cause.strerror}); mend it, or set "
                "HF_HOME elsewhere"
            )
    inner = list(_chain(error))
    # The innermost is the network's own word, as "[Errno -2] Name or service not known".
    said = next((one_line(e) for e in reversed(inner) if str(e).strip()), type(error).__name__)
    over = f" (through {_proxy('')})" if _proxies() else ""
    return f"{constants.ENDPOINT}{over}: {said}"


def is_missing_entry(error: Exception) -> bool:
    """Whether the hub, or in its place the cache, has the repository and not the file."""
    from huggingface_hub import errors

    return any(isinstance(cause, errors.EntryNotFoundError) for cause in _chain(error))


def is_offline(error: Exception) -> bool:
    """Whether the hub was not asked, as HF_HUB_OFFLINE says."""
    from huggingface_hub import errors

    return any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in _chain(error))


def _proxies() -> dict[str, str]:
    return {name: os.environ[name] for name in sorted(os.environ) if name.lower() in _PROXY_VARIABLES}


_PROXY_VARIABLES = ("all_proxy", "https_proxy", "http_proxy")


def _proxy(kind: str) -> str:
    """The variable that names a proxy, without a password in it."""
    for name, value in _proxies().items():
        if value.lower().startswith(kind):
            return f"{name}={one_line(re.sub(r'//[^/@]*@', '//...@', value), 100)}"
    return "the proxy"
