"""A Hub on loopback: as much of its HTTP API as `huggingface_hub` needs to create, push, list and read repositories.

Repositories are in memory: branches of commits, each a dict from path to bytes. Files go up the way the Hub asks for,
small ones inside the commit and weights by LFS. Whoever sends the token is its owner, and sees private ones.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "someone", "hf_for_tests"


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision):
        commit = self.branches.get(revision, revision)
        return commit, self.commits.get(commit)

    def commit(self, branch, changes):
        old = self.branches[branch]
        new = {path: data for path, data in {**self.commits[old], **changes}.items() if data is not None}
        oid = hashlib.sha1(repr((old, sorted(new.items()))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = new, oid
        return oid


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; it keeps what it has and what it was asked."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def files(self, name, revision="main"):
        return self.repositories[name].files(revision)[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(data),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status, code, message):
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for pattern, handle in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                named = match.groupdict()
                repository = self.hub.repositories.get(named.pop("name", ""))
                if "(?P<name>" in pattern:
                    if repository is None or (repository.private and not owner):
                        return self._error(404 if owner else 401, "RepoNotFound", "Repository not found")
                    named["repository"] = repository
                if self.command == "POST" and not owner:
                    return self._error(403, "Forbidden", "You need a token to write")
                return handle(self, body=body, **named)
        return self._error(404, "NotFound", f"This server knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # What there is to ask.

    def who(self, body):
        self._answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(
            name, private="private" in (asked.get("visibility"), asked.get("private") and "private")
        )
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, body, repository, revision):
        start = json.loads(body or b"{}").get("startingPoint", "main")
        if revision in repository.branches:
            return self._answer(409, {"error": "Branch exists"})
        repository.branches[revision] = repository.branches.get(start, start)
        self._answer(200, {})

    def preupload(self, body, repository, revision):
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".bin")) else "regular"}
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def lfs_batch(self, body, repository):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "wrong hash"})
        self.hub.blobs[oid] = body
        self._answer(200)

    def commit(self, body, repository, revision):
        changes = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        oid = repository.commit(revision, changes)
        self._answer(
            200,
            {"commitUrl": f"{self.hub.url}/{repository.name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None},
        )

    def info(self, body, repository, revision="main"):
        commit, files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._answer(
            200,
            {"id": repository.name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []},
        )

    def tree(self, body, repository, revision):
        files = repository.files(revision)[1]
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(files.items())
        ]
        self._answer(200, entries)

    def resolve(self, body, repository, revision, path):
        commit, files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in files:
            return self._error(404, "EntryNotFound", f"{path} does not exist")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'}
        self._answer(200, files[path], {**headers, "Content-Type": "application/octet-stream"})


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.who),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", lambda self, body: self._answer(200, {"errors": [], "warnings": []})),
    (rf"POST /api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
