"""Xet uploads without a content-addressed server: hf_xet also writes to a folder on the disk.

This exercises chunking and the order of calls, not xet's own protocol over the network.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import JSONResponse, Response

from tests.loopback_hub.api import Call, route
from tests.loopback_hub.repositories import Repository, Store


_RECORD = 48  # bytes of every record of a shard
_HAS_CHECKS, _HAS_SHA256 = 1 << 31, 1 << 30
_END = b"\xff" * 32


def _folder(store: Store) -> Path:
    return store.objects.parent / "xet"


@route("GET", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/xet-(write|read)-token/([^/]+)")
async def xet_token(call: Call) -> Response:
    """Where to put chunks: a folder."""
    call.store.find(call.parts[0], call.parts[1], call.user, write=call.parts[2] == "write")
    _folder(call.store).mkdir(exist_ok=True)
    url, expires = f"local://{_folder(call.store)}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)


def take_from_xet(store: Store, repository: Repository, sha256: str, size: int) -> None:
    """Make an object of a file that came as chunks, if it did.

    Args:
        store: Where the object goes.
        repository: Which may then name it.
        sha256: Of the whole file.
        size: Its bytes.
    """
    if sha256 in repository.received or not _folder(store).is_dir():
        return
    xet_hash = dict(_files_in_shards(_folder(store))).get(sha256)
    if xet_hash is None:
        return
    from hf_xet import XetFileInfo, XetSession

    with tempfile.TemporaryDirectory(dir=store.objects.parent) as place:
        copy = shutil.copytree(_folder(store), Path(place, "xet"))  # the client may still hold its database
        whole = Path(place, "whole")
        with XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
            group.start_download_file(XetFileInfo(xet_hash, size), str(whole))
        whole.replace(store.objects / sha256)
    repository.received.add(sha256)


def _files_in_shards(folder: Path) -> Iterator[tuple[str, str]]:
    """Pairs of sha256 and xet hash, of all files whose chunks came."""
    for shard in folder.rglob("*.mdb"):
        content = shard.read_bytes()
        at = _RECORD  # past the header
        while content[at : at + 32] != _END:
            xet_hash, (flags, entries) = content[at : at + 32], struct.unpack("<II", content[at + 32 : at + 40])
            at += _RECORD * (1 + entries * (2 if flags & _HAS_CHECKS else 1))
            if flags & _HAS_SHA256:
                yield _hex(content[at : at + 32]), _hex(xet_hash)
                at += _RECORD


def _hex(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
