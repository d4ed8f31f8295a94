"""Contents: large uploads, and downloads with redirects to another origin."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from starlette.responses import FileResponse, JSONResponse, Response

from tests.loopback_hub.api import Call, route
from tests.loopback_hub.repositories import HubError, Repository, StoredFile


_KEY = secrets.token_bytes(16)
_KIND = r"/(?:(datasets|spaces)/)?"


def _signature(path: str) -> str:
    return hmac.new(_KEY, path.encode(), "sha256").hexdigest()


def _signed(path: str) -> str:
    """An address that needs no token: clients send none there."""
    return f"{path}?signature={_signature(path)}"


def _check_signature(call: Call) -> None:
    signature = call.request.query_params.get("signature", "")
    if not hmac.compare_digest(signature, _signature(call.request.scope["raw_path"].decode())):
        raise HubError(403, "The address has no valid signature.")


def _find(call: Call) -> Repository:
    kind, name = call.parts[:2]
    return call.store.find(kind or "models", name, call.user)


@route("POST", _KIND + r"([^/]+/[^/]+)\.git/info/lfs/objects/batch")
async def batch(call: Call) -> Response:
    """Which objects are missing, and where to put them."""
    repository = _find(call)
    if call.user is None or call.user["role"] != "write":
        raise HubError(403, "Forbidden: you must use a write token.")
    objects = (await call.json())["objects"]
    place = f"{repository.kind}/{repository.name}"
    for wanted in objects:
        if wanted["oid"] not in repository.received:
            href = call.endpoint + _signed(f"/_lfs/{place}/{wanted['oid']}")
            verify = f"{call.endpoint}/_lfs_verify/{place}"
            wanted["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
    return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")


@route("PUT", "/_lfs/(models|datasets|spaces)/([^/]+/[^/]+)/([0-9a-f]{64})")
async def put_object(call: Call) -> Response:
    """Takes an object; it appears only whole and with the right sha256."""
    _check_signature(call)
    kind, name, oid = call.parts
    partial = call.store.objects / f"{oid}.{secrets.token_hex(4)}.partial"
    found = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            async for chunk in call.request.stream():
                file.write(chunk)
                found.update(chunk)
        if found.hexdigest() != oid:
            raise HubError(400, "The content does not have this sha256.")
        partial.replace(call.store.objects / oid)
    finally:
        partial.unlink(missing_ok=True)
    call.store.repositories[kind, name].received.add(oid)
    return Response()


@route("POST", "/_lfs_verify/(models|datasets|spaces)/([^/]+/[^/]+)")
async def verify(call: Call) -> Response:
    body = await call.json()
    if call.store.stored(call.repository(), body["oid"]).size != body["size"]:
        raise HubError(400, "The object has another size.")
    return JSONResponse({})


@route("HEAD GET", _KIND + "([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
async def resolve(call: Call) -> Response:
    """A file of a revision. Large ones stand on another origin, to which clients must not send their token."""
    commit = _find(call).resolve(call.parts[2])
    headers = {"X-Repo-Commit": commit.id}
    file: StoredFile | None = commit.files.get(call.parts[3])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    if not file.lfs:
        return _content(call, file.sha256, headers | {"ETag": f'"{file.etag}"'})
    headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    other_origin = call.endpoint.replace("127.0.0.1", "localhost")
    headers["Location"] = other_origin + _signed(f"/_cdn/{file.sha256}")
    return Response(status_code=302, headers=headers)


@route("HEAD GET", "/_cdn/([0-9a-f]{64})")
async def cdn(call: Call) -> Response:
    _check_signature(call)
    return _content(call, call.parts[0], {"ETag": f'"{call.parts[0]}"'})


def _content(call: Call, sha256: str, headers: dict[str, str]) -> Response:
    path = call.store.objects / sha256
    return FileResponse(path, headers=headers, media_type="application/octet-stream")
