"""The loopback Hub in a process of its own, and clients in theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
TOKENS = {
    "hf_ada": {"user": "ada", "role": "write", "orgs": ["team"]},
    "hf_ada_read": {"user": "ada", "role": "read"},
    "hf_bob": {"user": "bob", "role": "write"},
}


# A client's process: carries out the orders of its standard input, and tells what came of each.
_CLIENT = """
import contextlib, io, json, os, sys, time, traceback
answers, sys.stdout = sys.stdout, sys.stderr
from adaptive_llava.__main__ import main

time.sleep = lambda seconds: None  # between the client's own retries
for line in sys.stdin:
    order = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": order["token"]} if order["token"] else {})
    out, err = io.StringIO(), io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(order["command"]) if "command" in order else exec(order["code"]) or 0
        except Exception:
            status = 1
            traceback.print_exc()
    told = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.perf_counter() - start}
    print(json.dumps(told), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Step:
    """What a command of this package did: exit status, what it printed, seconds, and its requests."""

    status: int
    out: str
    err: str
    seconds: float
    log: list[dict[str, Any]]

    def requests(self, method: str, part: str = "") -> list[dict[str, Any]]:
        """Those of one method whose path has this part."""
        return [entry for entry in self.log if entry["method"] == method and part in entry["path"]]


def fault(method: str, path: str, times: int = 1, **what: Any) -> dict[str, Any]:
    """An order for the server (see server.py): requests that match fail as `what` says."""
    return {"method": method, "path": path, "times": times, **what}


@dataclass(frozen=True)
class Client:
    """A process in which commands of this package run one after another."""

    hub: RunningHub
    process: subprocess.Popen
    home: Path

    def command(self, *words: object, faults: Iterable[dict] = (), token: str | None = "hf_ada") -> Step:
        """`python -m adaptive_llava words...`, while the server obeys `faults`."""
        return self._order({"command": [str(word) for word in words]}, faults, token)

    def code(self, code: str, faults: Iterable[dict] = (), token: str | None = "hf_ada") -> Step:
        """Some lines of Python."""
        return self._order({"code": code}, faults, token)

    def _order(self, what: dict[str, Any], faults: Iterable[dict], token: str | None) -> Step:
        self.hub.log()
        self.hub.order(*faults)
        self.process.stdin.write(json.dumps(what | {"token": token}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.home / "errors.txt").read_text()[-3000:]
        self.hub.order()
        return Step(**json.loads(line), log=self.hub.log())


@dataclass(frozen=True)
class RunningHub:
    """A server's address and how tests talk to it beside the clients."""

    url: str

    def environment(self, home: Path, token: str | None = "hf_ada", xet: bool = False, **more: str) -> dict[str, str]:
        """Variables of a client's process: this Hub, an own cache, and nothing of the caller's account."""
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(ROOT),
        }
        if token:
            variables["HF_TOKEN"] = token
        if not xet:
            variables["HF_HUB_DISABLE_XET"] = "1"
        return variables | more

    def run(
        self, *arguments: object, home: Path, python: str = sys.executable, **options: Any
    ) -> subprocess.CompletedProcess:
        """`python arguments...` as a client; the result has what it printed, whatever its exit status."""
        home.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [python, *map(str, arguments)],
            env=self.environment(home, **options),
            cwd=home,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def call(self, path: str, body: Any = None, token: str | None = "hf_ada", method: str | None = None) -> Any:
        """One request of the test's own; its JSON answer."""
        request = urllib.request.Request(self.url + path, method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.loads(answer.read())

    def log(self, forget: bool = True) -> list[dict[str, Any]]:
        """The requests since they were last forgotten."""
        return self.call("/_test/log", method="DELETE" if forget else "GET")

    @contextmanager
    def client(self, home: Path, **options: Any) -> Iterator[Client]:
        """A process of a user, with its home folder and cache; `options` as of `environment`, and `python`."""
        home.mkdir(parents=True, exist_ok=True)
        python = options.pop("python", sys.executable)
        with (home / "errors.txt").open("w") as errors:
            process = subprocess.Popen(
                [python, "-c", _CLIENT],
                env=self.environment(home, **options),
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            yield Client(self, process, home)
        finally:
            process.kill()
            process.communicate()

    def order(self, *faults: dict[str, Any]) -> None:
        """Let the next requests that match fail; replaces what was ordered before."""
        self.call("/_test/faults", list(faults))

    def commits(self, repository: str, revision: str = "main") -> list[dict[str, Any]]:
        """The history of a model repository, newest first, without the initial commit."""
        return self.call(f"/api/models/{repository}/commits/{revision}")[:-1]

    def files(self, repository: str, revision: str = "main") -> dict[str, dict[str, Any]]:
        """Entries of the files of a model repository by path."""
        entries = self.call(f"/api/models/{repository}/tree/{revision}?recursive=true")
        return {entry["path"]: entry for entry in entries if entry["type"] == "file"}

    def exists(self, repository: str) -> bool:
        """Whether there is such a model repository."""
        try:
            self.call(f"/api/models/{repository}")
        except urllib.error.HTTPError:
            return False
        return True

    def read(self, repository: str, path: str, revision: str = "main") -> bytes:
        """A small file's content."""
        request = urllib.request.Request(
            f"{self.url}/{repository}/resolve/{revision}/{path}", headers={"Authorization": "Bearer hf_ada"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return answer.read()


@contextmanager
def running_hub(folder: Path) -> Iterator[RunningHub]:
    """Start the server on a free port, and end it with the block.

    Args:
        folder: Empty folder for what it stores.
    """
    (folder / "tokens.json").write_text(json.dumps(TOKENS))
    errors = folder / "errors.txt"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.loopback_hub.server", str(folder)], stderr=stderr, env=environment, cwd=ROOT
        )
    try:
        port = folder / "port.txt"
        deadline = time.monotonic() + 60
        while not port.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The loopback Hub did not start: {errors.read_text()[-2000:]}")
            time.sleep(0.05)
        yield RunningHub(f"http://127.0.0.1:{port.read_text()}")
    finally:
        process.kill()
        process.wait()
