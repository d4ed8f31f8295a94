"""The server: `python -m tests.loopback_hub.server FOLDER`, where tokens.json stands and port.txt will.

Every request is written down, and any may be made to fail:

* `GET /_test/log`: the requests so far, oldest first; `DELETE` empties it.
* `POST /_test/faults`: a list of `{"method", "path", ...}` with a regular expression for the raw path, `"times"`, and
  one of these kinds:
  `"status"`: that answer;
  `"cut_after"`: the connection ends after so many bytes of the request's body;
  `"hold_after"`: after so many bytes nothing more is read, until the client is gone;
  `"cut_answer"`: the request is carried out, but no answer comes;
  `"truncate_after"`: the connection ends after so many bytes of the answer's body;
  `"hold_answer_after"`: after so many bytes of it nothing more comes, until the client is gone;
  `"commit_first"`: somebody else commits to this repository before.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tests.loopback_hub import transfers  # noqa: F401, registers its routes
from tests.loopback_hub.api import ROUTES, Call
from tests.loopback_hub.repositories import HubError, Store
from tests.loopback_hub.xet import take_from_xet


class LoopbackHub:
    """An ASGI application. It keeps its own table of routes, since those of a framework see decoded paths."""

    def __init__(self, store: Store):
        self.store = store
        store.before_commit = partial(take_from_xet, store)
        self.log: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        path = scope["raw_path"].decode()
        request = Request(scope, receive)
        if path.startswith("/_test/"):
            await (await self._test(request, path))(scope, receive, send)
            return
        fault = self._fault(scope["method"], path)
        entry = self._entry(request, path)
        self.log.append(entry)
        await self._serve(request, path, _Wires(scope, receive, send, entry, fault))

    async def _serve(self, request: Request, path: str, wires: _Wires) -> None:
        if "commit_first" in wires.fault:
            self._commit_as_somebody_else(*wires.fault["commit_first"])
        try:
            if "status" in wires.fault:
                await request.body()
                status = wires.fault["status"]
                response: Response = JSONResponse({"error": "injected"}, status, {"X-Error-Message": "injected"})
            else:
                request = Request(wires.scope, wires.receive)
                response = await self._answer(request, path)
            await response(wires.scope, wires.receive, wires.send)
        except (ClientDisconnect, OSError, _Cut):
            wires.entry["status"] = 0
            wires.real_receive.__self__.transport.abort()  # uvicorn's own; ASGI knows no way to cut a connection

    async def _answer(self, request: Request, path: str) -> Response:
        try:
            user = self._user(request)
            for method, pattern, handler in ROUTES:
                found = pattern.fullmatch(path)
                if found and method == request.method:
                    parts = tuple(part if part is None else unquote(part) for part in found.groups())
                    return await handler(Call(request, self.store, user, parts))
            raise HubError(404, f"No such address: {request.method} {path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message, "X-Request-Id": "test"} | error.headers
            if error.code:
                headers["X-Error-Code"] = error.code
            body = {"error": error.message} | error.body
            return JSONResponse(body, error.status, headers)

    def _user(self, request: Request) -> dict[str, Any] | None:
        _, _, token = request.headers.get("authorization", "").partition(" ")
        if token and token not in self.store.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.store.tokens.get(token)

    def _fault(self, method: str, path: str) -> dict[str, Any]:
        for fault in self.faults:
            if fault["times"] > 0 and fault["method"] == method and re.search(fault["path"], path):
                fault["times"] -= 1
                return fault
        return {}

    @staticmethod
    def _entry(request: Request, path: str) -> dict[str, Any]:
        return {
            "method": request.method,
            "path": path,
            "host": request.headers["host"].split(":")[0],
            "with_token": "authorization" in request.headers,
            "range": request.headers.get("range"),
            "status": 0,
            "bytes_in": 0,
            "bytes_out": 0,
        }

    async def _test(self, request: Request, path: str) -> Response:
        if path == "/_test/log":
            answer = list(self.log)
            if request.method == "DELETE":
                self.log.clear()
            return JSONResponse(answer)
        self.faults = await request.json()
        return JSONResponse({})

    def _commit_as_somebody_else(self, kind: str, name: str) -> None:
        repository = self.store.repositories[kind, name]
        head = repository.resolve("main")
        files = head.files | {"NOTES": self.store.add(b"mine", lfs=False)}
        repository.commit("refs/heads/main", files, "somebody else's", "someone", parent=head.id)


class _Cut(Exception):
    """The fault asked for the end of the connection."""


class _Wires:
    """A request's `receive` and `send`, which count bytes and break where the fault says."""

    def __init__(self, scope, receive, send, entry: dict[str, Any], fault: dict[str, Any]):
        self.scope, self.real_receive, self.real_send = scope, receive, send
        self.entry, self.fault = entry, fault

    async def receive(self):
        message = await self.real_receive()
        self.entry["bytes_in"] += len(message.get("body", b""))
        if self.entry["bytes_in"] >= self.fault.get("cut_after", float("inf")):
            raise _Cut
        if self.entry["bytes_in"] >= self.fault.get("hold_after", float("inf")):
            self.entry["held"] = True
            while message["type"] != "http.disconnect":
                message = await self.real_receive()
        return message

    async def send(self, message) -> None:
        if "cut_answer" in self.fault:
            raise _Cut
        if message["type"] == "http.response.start":
            self.entry["status"] = message["status"]
        body = message.get("body", b"")
        limit = self.fault.get("truncate_after", self.fault.get("hold_answer_after", float("inf")))
        if self.entry["bytes_out"] + len(body) > limit:
            body = body[: int(limit) - self.entry["bytes_out"]]
            await self.real_send({**message, "body": body, "more_body": True})
            await asyncio.sleep(0.1)  # what was sent must leave before the connection is cut
            if "hold_answer_after" in self.fault:
                self.entry["held"] = True
                while (await self.real_receive())["type"] != "http.disconnect":
                    pass
            raise _Cut
        self.entry["bytes_out"] += len(body)
        await self.real_send(message)


class _Server(uvicorn.Server):
    """Tells its port once it listens."""

    def __init__(self, config: uvicorn.Config, folder: Path):
        super().__init__(config)
        self.folder = folder

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        unfinished = self.folder / "port.partial"
        unfinished.write_text(str(port))
        os.replace(unfinished, self.folder / "port.txt")


def main(folder: Path) -> None:
    """Serve until killed."""
    tokens = json.loads((folder / "tokens.json").read_text())
    app = LoopbackHub(Store(folder / "store", tokens))
    _Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"), folder).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
