"""The part of the Hub's HTTP interface that pushing and loading use, on this machine, for as long as a test runs.

Repositories lie in memory: commits of files by path. Weights (`.safetensors`) go the way of large files: asked about in a
batch, uploaded by their SHA-256, named in the commit, and given out by a redirect. What `huggingface_hub` sends is answered
as the Hub answers it, status codes and error headers included; what it does not use is not here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    import pytest

WRITES, READS = "hf_writes", "hf_reads"  # the two tokens that it knows

Files = dict[str, bytes]


@dataclass
class Repo:
    """One repository: what each commit holds, and where each branch stands."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=lambda: {sha_of(b"first"): {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": sha_of(b"first")})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches[revision]]

    def commit(self, branch: str, files: Files, message: str) -> str:
        self.messages.append(message)
        sha = sha_of(f"{len(self.messages)} {message}".encode())
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class Hub:
    """The state of the stand-in, for tests to look at."""

    url: str
    store: str  # where large files are: another host, to which clients send no token
    repos: dict[str, Repo] = field(default_factory=dict)
    large: Files = field(default_factory=dict)  # by SHA-256
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path of every request


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer that is no success, with the header by which clients tell what is missing."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


def sha_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def blob_of(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return sha_of(b"blob %d\0" % len(data) + data)


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    """Finds the answer to a request by its path; `hub` is set by `stand_in`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names that http.server looks for

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.chunks()
        try:
            for methods, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    handle(self, *match.groups(), body=body)
                    return
            raise Refusal(404, f"nothing answers to {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.give(json.dumps({"error": str(refusal), **refusal.more}).encode(), refusal.status, **headers)

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def give(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, data: Any, status: int = 200) -> None:
        self.give(json.dumps(data).encode(), status)

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if given not in (None, WRITES, READS):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return given

    def repo(self, name: str) -> Repo:
        """The repository, where this token may see it; the Hub does not tell a private one from one that is not there."""
        token, found = self.token, self.hub.repos.get(name)
        if found is None or (found.private and token is None):
            raise Refusal(
                404 if token else 401, "Repository not found" if token else "Invalid username or password.", "RepoNotFound"
            )
        return found

    def writable(self, name: str) -> Repo:
        repo = self.repo(name)
        self.check_writes()
        return repo

    def check_writes(self) -> None:
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        if self.token != WRITES:
            raise Refusal(403, "You don't have the rights to create a model under this namespace")

    def commit_of(self, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.repo(name)
        sha = repo.at(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha


def create(self: Handler, *, body: bytes) -> None:
    self.check_writes()
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in self.hub.repos:
        raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    self.hub.repos[name] = Repo(private=private)
    self.tell({"url": f"{self.hub.url}/{name}"})


def validate(self: Handler, *, body: bytes) -> None:
    """What the Hub's own check of a card's header would refuse is not known here: whatever parses passes."""
    assert json.loads(body)["content"].startswith("---\n")
    self.tell({"errors": [], "warnings": []})


def preupload(self: Handler, name: str, revision: str, *, body: bytes) -> None:
    self.writable(name)
    repo, sha = self.commit_of(name, revision)
    asked = json.loads(body)["files"]
    self.tell({"files": [known(repo.commits[sha], entry["path"]) for entry in asked]})


def known(files: Files, path: str) -> dict[str, Any]:
    mode = "lfs" if is_large(path) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid_of(path, files[path]) if path in files else None}


def oid_of(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(path) else blob_of(data)


def batch(self: Handler, name: str, *, body: bytes) -> None:
    self.writable(name)
    objects = []
    for entry in json.loads(body)["objects"]:
        here = entry["oid"] in self.hub.large
        actions = {} if here else {"actions": {"upload": {"href": f"{self.hub.store}/{entry['oid']}", "header": {}}}}
        objects.append({**entry, **actions})
    self.tell({"transfer": "basic", "objects": objects})


def upload(self: Handler, oid: str, *, body: bytes) -> None:
    assert self.headers.get("Authorization") is None
    assert hashlib.sha256(body).hexdigest() == oid
    self.hub.large[oid] = body
    self.give(b"")


def commit(self: Handler, name: str, revision: str, *, body: bytes) -> None:
    repo = self.writable(name)
    _, sha = self.commit_of(name, revision)
    files, message = dict(repo.commits[sha]), ""
    for line in map(json.loads, body.splitlines()):
        key, value = line["key"], line["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.hub.large[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise Refusal(400, f"{key} is not known here")
    request = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
    made = repo.commit(f"refs/pr/{len(repo.messages) + 1}" if request else revision, files, message)
    place = f"{self.hub.url}/{name}"
    asked = {"pullRequestUrl": f"{place}/discussions/1"} if request else {}
    self.tell({"success": True, "commitOid": made, "commitUrl": f"{place}/commit/{made}", "hookOutput": "", **asked})


def branch(self: Handler, name: str, new: str, *, body: bytes) -> None:
    repo = self.writable(name)
    if new in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{new}")
    repo.branches[new] = repo.branches["main"]
    self.tell({})


def info(self: Handler, name: str, revision: str | None, *, body: bytes) -> None:
    repo, sha = self.commit_of(name, revision or "main")
    from huggingface_hub import ModelCard  # not above: it settles its address when it is imported

    files = repo.commits[sha]
    header = ModelCard(files["README.md"].decode()).data.to_dict() if "README.md" in files else None
    siblings = [{"rfilename": path} for path in sorted(files)]
    facts = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": []}
    self.tell({**facts, "siblings": siblings, "cardData": header})


def tree(self: Handler, name: str, revision: str, *, body: bytes) -> None:
    repo, sha = self.commit_of(name, revision)
    self.tell([listed(path, data) for path, data in sorted(repo.commits[sha].items())])


def listed(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "oid": blob_of(data), "size": len(data), "path": path}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {**entry, "lfs": lfs} if is_large(path) else entry


def resolve(self: Handler, name: str, revision: str, path: str, *, body: bytes) -> None:
    repo, sha = self.commit_of(name, revision)
    data = repo.commits[sha].get(path)
    if data is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": sha, "ETag": f'"{oid_of(path, data)}"', "Content-Type": "application/octet-stream"}
    if not is_large(path):
        self.give(data, **headers)
        return
    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
    self.give(b"", 302, **headers, **linked, Location=f"{self.hub.store}/{oid_of(path, data)}")


def large(self: Handler, oid: str, *, body: bytes) -> None:
    assert self.headers.get("Authorization") is None
    self.give(self.hub.large[oid], **{"Content-Type": "application/octet-stream"})


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate),
    (("POST",), rf"/api/models/{NAME}/preupload/(.+)", preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    (("POST",), rf"/api/models/{NAME}/commit/(.+)", commit),
    (("POST",), rf"/api/models/{NAME}/branch/(.+)", branch),
    (("PUT",), "/large/([0-9a-f]+)", upload),
    (("GET", "HEAD"), "/large/([0-9a-f]+)", large),
    (("GET",), rf"/api/models/{NAME}(?:/revision/(.+))?", info),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+)", tree),
    (("GET", "HEAD"), rf"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_port
    hub = Hub(url=f"http://127.0.0.1:{port}", store=f"http://localhost:{port}/large")
    server.RequestHandlerClass = type("OurHandler", (Handler,), {"hub": hub})
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def go_online(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path, token: str | None = WRITES) -> None:
    """Let `huggingface_hub`, which settled its address when it was imported, talk to `address` in this process."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def online_environment(address: str) -> dict[str, str]:
    """What sets another process to talk to `address`."""
    return {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": address, "HF_TOKEN": READS}
