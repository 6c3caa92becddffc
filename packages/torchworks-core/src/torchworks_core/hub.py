# SPDX-License-Identifier: Apache-2.0
"""Push and pull a folder to and from the Hugging Face hub (extra ``[hub]``).

Every failure is one `TorchworksError`; no message, argument or chained
exception of it holds a token.
"""

import os
import re
from collections.abc import Callable
from http.client import responses
from pathlib import Path
from typing import Any

from torchworks_core.errors import InvalidValue, MissingExtra, MissingFile, NotReady

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git\Z)){_PART}(?:/{_PART})?", re.ASCII)
# Whose exceptions without an answer mean that there was no connection.
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload all of ``folder`` to a model repository and return the commit's address.

    Args:
        folder: An existing folder.
        repo_id: ``"name"`` or ``"namespace/name"``; created if there is none.
        token: The hub's own settings if None.
        private: For a new repository; the account's default if None.
        revision: An existing branch; the main one if None.
        create_pr: Open a pull request on an existing repository instead, and
            return its address.
        commit_message: The hub's default if None.

    Raises:
        InvalidValue, MissingFile: before any request.
        MissingExtra: huggingface_hub is not installed.
        NotReady: the hub refused or cannot be reached.
    """
    _check_id(repo_id)
    if not Path(folder).is_dir():
        raise MissingFile(f"folder {str(folder)!r}", "there is no such folder")

    options = {"revision": revision, "create_pr": create_pr}
    options["commit_message"] = commit_message

    def push(client: Any) -> Any:
        api = client.HfApi(token=token)
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)

    done = _call(push, f"push to {repo_id!r}", token)
    return str(done.pr_url or done.commit_url)


def pull_folder(
    repo_id: str,
    *,
    revision: str | None = None,
    allow_patterns: str | list[str] | None = None,
    token: str | None = None,
) -> Path:
    """Download a model repository into the hub's cache and return its folder.

    Args:
        repo_id: ``"name"`` or ``"namespace/name"``.
        revision: Branch, tag or commit; the main branch if None.
        allow_patterns: Only files that match one of these, as ``"*.json"``.
        token: The hub's own settings if None.

    Raises:
        InvalidValue: ``repo_id`` cannot be one; no request was made.
        MissingExtra: huggingface_hub is not installed.
        NotReady: the hub refused, or cannot be reached and nothing is cached.
    """
    _check_id(repo_id)
    options = {"revision": revision, "allow_patterns": allow_patterns, "token": token}
    what = f"pull of {repo_id!r}"
    found = _call(lambda hub: hub.snapshot_download(repo_id, **options), what, token)
    return Path(found)


def _check_id(repo_id: str) -> None:
    if not isinstance(repo_id, str) or not _REPO_ID.fullmatch(repo_id):
        do = "Use 'namespace/name' of letters, digits, '-', '_' and '.'"
        raise InvalidValue(f"repo_id {repo_id!r}", "it is no name of a repository", do)


def _call(task: Callable[[Any], Any], what: str, token: str | None) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        do = "pip install 'torchworks-core[hub]'"
        raise MissingExtra(what, "huggingface_hub is missing", do) from error
    try:
        return task(huggingface_hub)
    except Exception as error:
        problem = _explain(error, what, [token, huggingface_hub.get_token()])
    # Outside of the except block: the client's exception keeps the request,
    # whose headers hold the token, and would be chained as the context.
    raise problem


def _explain(error: Exception, what: str, tokens: list[str | None]) -> NotReady:
    status, kind = _status(error), type(error)
    offline = isinstance(error, (ConnectionError, TimeoutError, FileNotFoundError))
    do = "Check the name, and log in with 'hf auth login' or give token="
    if status is not None:
        why = f"the hub answered {status} {responses.get(status, '')}"
    elif offline or kind.__module__.startswith(_CLIENTS):
        why = f"the hub can't be reached ({kind.__name__})"
        do = "Check the network and HF_ENDPOINT, and unset HF_HUB_OFFLINE"
    else:
        secrets = [re.escape(token) for token in tokens if token] + [r"\bhf_\w+"]
        text = re.sub("|".join(secrets), "***", " ".join(str(error).split()))
        why = f"{kind.__name__}: {text[:200]}"
    return NotReady(f"{what} failed", why, do)


def _status(error: BaseException | None) -> int | None:
    """Return the hub's answer, which the client may hide behind its own error."""
    if error is None:
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status or _status(error.__cause__ or error.__context__)
