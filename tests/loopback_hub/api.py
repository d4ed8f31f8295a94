"""The Hub's interface: repositories, commits, trees, refs and pull requests."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.loopback_hub.repositories import (
    HubError,
    Repository,
    Store,
    StoredFile,
    file_entry,
    goes_to_lfs,
    tree_entries,
)


PAGE = 1000


@dataclass
class Call:
    """A request, who sends it, and the parts of its path, decoded one by one."""

    request: Request
    store: Store
    user: dict[str, Any] | None
    parts: tuple[str, ...]

    @property
    def endpoint(self) -> str:
        return f"http://{self.request.headers['host']}"

    def repository(self, write: bool = False) -> Repository:
        return self.store.find(self.parts[0], self.parts[1], self.user, write)

    async def json(self) -> dict[str, Any]:
        return json.loads(await self.request.body() or b"{}")

    def flag(self, name: str) -> bool:
        return self.request.query_params.get(name, "").lower() in ("1", "true")


Handler = Callable[[Call], Awaitable[Response]]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
_REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"


def route(methods: str, path: str) -> Callable[[Handler], Handler]:
    """Serve raw (still quoted) paths that match: a revision like `refs%2Fpr%2F1` is one part."""

    def register(handler: Handler) -> Handler:
        ROUTES.extend((method, re.compile(path), handler) for method in methods.split())
        return handler

    return register


@route("GET", "/api/whoami-v2")
async def whoami(call: Call) -> Response:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"accessToken": {"displayName": "test", "role": call.user["role"]}}
    orgs = [{"name": name} for name in call.user.get("orgs", ())]
    return JSONResponse({"type": "user", "name": call.user["user"], "orgs": orgs, "auth": token})


@route("POST DELETE", "/api/repos/(create|delete)")
async def create_or_delete(call: Call) -> Response:
    body = await call.json()
    kind = f"{body.get('type') or 'model'}s"
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    name = f"{body.get('organization') or call.user['user']}/{body['name']}"
    if call.parts[0] == "delete":
        call.store.find(kind, name, call.user, write=True)
        del call.store.repositories[kind, name]
        return JSONResponse({})
    url = f"{call.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
    if (kind, name) in call.store.repositories:
        raise HubError(409, "You already created this repo", url=url)
    private = bool(body.get("private")) or body.get("visibility") == "private"
    call.store.create(kind, name, private, call.user)
    return JSONResponse({"url": url, "name": name})


@route("PUT", f"{_REPO}/settings")
async def settings(call: Call) -> Response:
    body = await call.json()
    repository = call.repository(write=True)
    repository.private = bool(body.get("private")) or body.get("visibility") == "private"
    return JSONResponse({})


@route("GET", f"{_REPO}/auth-check")
async def auth_check(call: Call) -> Response:
    call.repository()
    return JSONResponse({})


@route("GET", f"{_REPO}(?:/revision/([^/]+))?")
async def info(call: Call) -> Response:
    repository = call.repository()
    commit = repository.resolve(call.parts[2] or "main")
    blobs = call.flag("blobs")
    files = [
        {"rfilename": path} | ({key: value for key, value in file_entry(path, file).items() if key in ("size", "lfs")}
                               | {"blobId": file.oid} if blobs else {})
        for path, file in sorted(commit.files.items())
    ]  # fmt: skip
    card = commit.files.get("README.md")
    data = _front_matter((call.store.objects / card.sha256).read_text("utf-8")) if card else None
    return JSONResponse(
        {
            "_id": "0" * 24,
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.id,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": (data or {}).get("tags") or [],
            "cardData": data or {},
            "createdAt": repository.history(commit)[-1].date,
            "lastModified": commit.date,
            "siblings": files,
        }
    )


def _front_matter(text: str) -> dict[str, Any] | None:
    found = re.match(r"---\r?\n(.*?)\n---(\r?\n|$)", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


@route("POST", "/api/validate-yaml")
async def validate_yaml(call: Call) -> Response:
    try:
        _front_matter((await call.json())["content"])
    except yaml.YAMLError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})


@route("POST", f"{_REPO}/preupload/([^/]+)")
async def preupload(call: Call) -> Response:
    body = await call.json()
    pull = call.flag("create_pr")
    known = call.repository(write=not pull).resolve(call.parts[2]).files
    files = []
    for file in body["files"]:
        lfs = goes_to_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
        answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if file["path"] in known:
            answer["oid"] = known[file["path"]].etag
        files.append(answer)
    return JSONResponse({"files": files})


@route("POST", f"{_REPO}/commit/([^/]+)")
async def commit(call: Call) -> Response:
    lines = [json.loads(line) for line in (await call.request.body()).splitlines() if line.strip()]
    pull = call.flag("create_pr")
    repository = call.repository(write=not pull)
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    ref = repository.branch_ref(call.parts[2])
    head = repository.refs[ref]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, head):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.commits[head].files)
    for line in lines:
        _apply(call.store, repository, files, line["key"], line["value"])
    if pull:
        number = len(repository.pulls) + 1
        repository.pulls.append({"num": number, "title": header["summary"], "author": call.user["user"]})
        ref = f"refs/pr/{number}"
    new = repository.commit(
        ref, files, header["summary"], call.user["user"], header.get("description", ""), parent=head
    )
    kind = "" if repository.kind == "models" else f"{repository.kind}/"
    answer = {
        "success": True,
        "commitOid": new.id,
        "commitUrl": f"{call.endpoint}/{kind}{repository.name}/commit/{new.id}",
    }
    if pull:
        answer["pullRequestUrl"] = f"{call.endpoint}/{kind}{repository.name}/discussions/{number}"
    return JSONResponse(answer)


def _apply(
    store: Store, repository: Repository, files: dict[str, StoredFile], key: str, value: dict[str, Any]
) -> None:
    path = value.get("path", "")
    if key == "file":
        files[path] = store.add(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        store.before_commit(repository, value["oid"], value.get("size", 0))
        files[path] = store.stored(repository, value["oid"])
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(400, f"A file to delete does not exist: {path}")
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
            del files[name]


@route("GET", f"{_REPO}/tree/([^/]+)(?:/([^/]+))?")
async def tree(call: Call) -> Response:
    files = call.repository().resolve(call.parts[2]).files
    entries = list(tree_entries(files, call.parts[3] or "", call.flag("recursive")))
    start = int(call.request.query_params.get("cursor", 0))
    headers = {}
    if start + PAGE < len(entries):
        following = call.request.url.include_query_params(cursor=start + PAGE)
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(entries[start : start + PAGE], headers=headers)


@route("POST", f"{_REPO}/paths-info/([^/]+)")
async def paths_info(call: Call) -> Response:
    files = call.repository().resolve(call.parts[2]).files
    wanted = (await call.request.form()).getlist("paths")
    return JSONResponse([file_entry(str(path), files[str(path)]) for path in wanted if path in files])


@route("GET", f"{_REPO}/commits/([^/]+)")
async def commits(call: Call) -> Response:
    repository = call.repository()
    return JSONResponse(
        [
            {
                "id": one.id,
                "title": one.title,
                "message": one.message,
                "date": one.date,
                "authors": [{"user": one.user}],
            }
            for one in repository.history(repository.resolve(call.parts[2]))
        ]
    )


@route("GET", f"{_REPO}/refs")
async def refs(call: Call) -> Response:
    found: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    lists = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, sha in call.repository().refs.items():
        _, kind, name = ref.split("/", 2)
        found[lists[kind]].append({"name": name, "ref": ref, "targetCommit": sha})
    if not call.flag("include_prs"):
        del found["pullRequests"]
    return JSONResponse(found)


@route("POST DELETE", f"{_REPO}/(branch|tag)/([^/]+)")
async def branch_or_tag(call: Call) -> Response:
    body = await call.json()
    repository = call.repository(write=True)
    _, _, what, name = call.parts
    target = name
    if what == "tag" and call.request.method == "POST":  # the path names the revision, the body the tag
        name, target = body["tag"], name
    ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
    if call.request.method == "DELETE":
        if repository.refs.pop(ref, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    elif ref in repository.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    else:
        start = body.get("startingPoint", "main") if what == "branch" else target
        repository.refs[ref] = repository.resolve(start).id
    return JSONResponse({})


@route("GET", f"{_REPO}/discussions")
async def discussions(call: Call) -> Response:
    pulls = call.repository().pulls
    return JSONResponse({"discussions": pulls, "count": len(pulls), "start": 0})
