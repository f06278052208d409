"""The Hub: files to a repository and back, and what went wrong on the way, in a sentence. No torch.

`huggingface_hub` is imported where it is used: `import ldpruner` does not bring it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ldpruner.errors import ArtifactError, HubError, LDPrunerError
from ldpruner.markdown import merged

log = logging.getLogger(__name__)

CARD = "README.md"
INDEX = "model_index.json"
OWN = ("pruning_plan.json", "record.json", "evaluation.json", "prompts.txt", "generation.json")  # ours beside a pipeline's parts
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", flags=re.ASCII)
_UNREACHED = {"ConnectError", "ConnectTimeout", "ReadTimeout", "TransportError", "ConnectionError", "Timeout", "TimeoutException"}


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `org/name` of the Hub, and no folder or file of that name is here."""
    return _ID.fullmatch(name) is not None and not name.endswith((".json", ".safetensors")) and not Path(name).exists()


def fetch(repo_id: str, name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Where one file of a repository lies in the local cache, downloaded if need be. Raises `HubError`."""
    from huggingface_hub import hf_hub_download

    with told(repo_id):
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))


def header_there(repo_id: str) -> dict[str, Any]:
    """The header of a repository's card, asked for once, without trying again. Raises `HubError`."""
    from huggingface_hub import HfApi

    with told(repo_id):
        data: Any = HfApi().model_info(repo_id, timeout=10).card_data
        return dict(data.to_dict()) if data is not None else {}


def index_of(path: str, revision: str | None = None) -> dict[str, Any]:
    """What model_index.json says in a folder or a repository: the pipeline's class, and its parts."""
    place = fetch(path, INDEX, revision=revision) if is_hub_id(path) else Path(path) / INDEX
    return dict(json.loads(place.read_text(encoding="utf-8")))


def folder_of(path: str, revision: str | None = None) -> Path | None:
    """The folder `path`; of a hub id, that of the local cache, with its card and files of ours. None where there is none."""
    from huggingface_hub import snapshot_download

    if not is_hub_id(path):
        return Path(path) if Path(path).is_dir() else None
    try:
        with told(path):
            return Path(snapshot_download(path, revision=revision, allow_patterns=[CARD, *OWN]))
    except HubError as error:
        log.info("%s; its own prompts and record are left out.", error)
        return None


def files_in(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its path in a repository, hidden ones left out. Raises `ArtifactError` where there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths if not _hidden(path.relative_to(folder))}
    if not files:
        raise ArtifactError(f"{folder}: no such folder, or nothing in it.")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def push(
    files: Mapping[str, Path | str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with ldpruner",
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put files, or texts, into a repository of the Hub in one commit; the address of that commit, or of the pull request.

    A repository or branch that is not there is made. In folders that are written to, what the new files leave over goes:
    weights of another model would lie beside these. What a user wrote into the card that is there stays. Raises `HubError`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise HubError(f"{repo_id}: a pull request goes to main. Leave out the revision, or the pull request.")
    with told(repo_id):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        given = dict(files)
        if CARD in given and CARD in there:
            _merge_card(given, Path(api.hf_hub_download(repo_id, CARD, revision=revision)), repo_id)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, Path) else file.encode())
            for name, file in given.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in _left_over(there, files)]
        done = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr)
        return str(done.pr_url or done.commit_url)


def _merge_card(files: dict[str, Path | str], there: Path, repo_id: str) -> None:
    """Take what a user wrote into the card that is there; where it is not ours to replace, it stays, and that is told."""
    new = files.pop(CARD)
    card = merged(new if isinstance(new, str) else new.read_text(encoding="utf-8"), there.read_text(encoding="utf-8"))
    if card is None:
        log.warning("%s: the %s that is there is not one of these, and stays.", repo_id, CARD)
    else:
        files[CARD] = card


def check_id(repo_id: str) -> None:
    """Raise `HubError` where a repository could not be called so."""
    if _ID.fullmatch(repo_id) is None:
        raise HubError(f"{repo_id}: {_NO_ID}")


def _left_over(there: list[str], files: Mapping[str, Any]) -> list[str]:
    """What lies in folders that are written to, and what we wrote of another pipeline, where this is a whole one."""
    folders = {PurePosixPath(name).parts[0] for name in files if "/" in name}
    gone = set(OWN) if INDEX in files else set()
    gone |= {name for name in there if "/" in name and PurePosixPath(name).parts[0] in folders}
    return [name for name in there if name in gone and name not in files]


@contextmanager
def told(repo_id: str) -> Iterator[None]:
    """Raise `HubError` with one sentence for whatever the Hub, or the way to it, does wrong while the block runs."""
    try:
        yield
    except LDPrunerError:
        raise
    except Exception as error:
        reason = trouble(error)
        if reason is None:
            raise
        raise HubError(f"{repo_id}: {reason}") from error


def trouble(error: BaseException) -> str | None:
    """What an error has to do with the Hub, and what to do; None where it has nothing to do with it."""
    return next((reason for cause in _causes(error) if (reason := _reason(cause)) is not None), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from, the innermost first: that one knows most."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return iter(reversed(seen))


def _reason(error: BaseException) -> str | None:
    from huggingface_hub import constants, errors

    known: tuple[tuple[type[BaseException], str], ...] = (
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and it is not in the local cache. Unset it, or give a folder."),
        (errors.LocalTokenNotFoundError, f"no token was found. {_LOG_IN}"),
        (errors.HFValidationError, _NO_ID),
        (errors.GatedRepoError, f"is gated. Ask for access on its page. {_LOG_IN}"),
        (errors.RevisionNotFoundError, "has no such revision. Name a branch, a tag or a commit that is there."),
    )
    for kind, said in known:
        if isinstance(error, kind):
            return said
    if isinstance(error, errors.HfHubHTTPError):
        return _answer(error)
    if {kind.__name__ for kind in type(error).__mro__} & _UNREACHED:
        return f"the Hub cannot be reached at {constants.ENDPOINT}. Check the connection, or HF_ENDPOINT."
    return None


_NO_ID = "is no hub id. Say org/name, with letters, digits, dots, dashes and underscores."
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."


def _answer(error: Any) -> str:
    """What a status code means; the Hub answers 401 for what is not there, too, where no token was sent."""
    from huggingface_hub import errors

    response = error.response
    status, sent = response.status_code, "authorization" in response.request.headers
    if isinstance(error, errors.EntryNotFoundError):
        return f"has no file {str(response.url).partition('/resolve/')[2].partition('/')[2]}."
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        unseen = "this token may not see it." if sent else f"it is private, and no token was sent. {_LOG_IN}"
        return f"there is no such repository on the Hub, or {unseen}"
    if status == 401:
        return f"the Hub does not accept this token. {_LOG_IN}" if sent else f"the Hub wants a token. {_LOG_IN}"
    said = " ".join((response.headers.get("X-Error-Message") or str(error)).split())[:200].rstrip(".")
    return f"this token may not do that ({said})." if status == 403 else f"the Hub answered {status} ({said})."
