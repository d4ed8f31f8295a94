"""What a push and a load cost in requests and bytes, and what a user sees when the Hub or the network fails.

    python -m tests.loopback_hub.traffic --output results/hub_traffic.json [--other other/bin/python]

Every figure and every message is of a run against the loopback Hub, with the client of this interpreter and of
`--other`. `seconds` are without the start of Python; the waits between a client's own retries are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fresh_process import run_without_package
from tests.loopback_hub.running import ROOT, Client, RunningHub, Step, fault, running_hub


CHECKPOINT = ROOT / "training" / "study" / "checkpoint"
_FOR_EVER = 99
_KINDS = {
    "create": r"POST /api/repos/create",
    "check card": r"POST /api/validate-yaml",
    "preupload": r"POST .*/preupload/.*",
    "large files: ask": r"POST .*/objects/batch",
    "large files: send": r"PUT /_lfs/.*",
    "large files: check": r"POST /_lfs_verify/.*",
    "commit": r"POST .*/commit/.*",
    "repository": r"GET /api/[^/]+/[^/]+/[^/]+(/revision/.*)?",
    "list files": r"GET /api/.*/tree/.*",
    "file: head": r"HEAD .*/resolve/.*",
    "file: content": r"GET .*/resolve/.*",
    "file: content from the other origin": r"(HEAD|GET) /_cdn/.*",
}

# By what fails in a push: the faults; what the client does by itself is in the figures.
PUSH_FAULTS: dict[str, dict[str, Any]] = {
    "creating the repository answers 503": {"method": "POST", "path": "/repos/create", "status": 503},
    "listing the files answers 500": {"method": "GET", "path": "/tree/", "status": 500},
    "asking how to upload answers 500": {"method": "POST", "path": "/preupload/", "status": 500},
    "sending the weights is cut once": {"method": "PUT", "path": "/_lfs/", "times": 1, "cut_after": 9000},
    "sending the weights is cut every time": {"method": "PUT", "path": "/_lfs/", "cut_after": 9000},
    "the storage answers 503 every time": {"method": "PUT", "path": "/_lfs/", "status": 503},
    "the commit answers 500": {"method": "POST", "path": "/commit/", "status": 500},
    "the commit is cut on its way": {"method": "POST", "path": "/commit/", "cut_after": 1000},
    "the answer to the commit is lost": {"method": "POST", "path": "/commit/", "times": 1, "cut_answer": True},
    "somebody else commits in between": {"method": "POST", "path": "/preupload/", "times": 1, "commit_first": True},
}
# By what fails in a load or in `verify`.
LOAD_FAULTS: dict[str, dict[str, Any]] = {
    "config.json answers 503": {"method": "HEAD", "path": "config.json", "status": 503},
    "a code file answers 500": {"method": "GET", "path": "/modeling_.*py", "status": 500},
    "the weights answer 503 once": {"method": "GET", "path": "/_cdn/", "times": 1, "status": 503},
    "the weights are cut off once": {"method": "GET", "path": "/_cdn/", "times": 1, "truncate_after": 500_000},
    "the weights are cut off every time": {"method": "GET", "path": "/_cdn/", "truncate_after": 500_000},
}
# By whose: the token and the revision of a load that is refused.
REFUSED_LOADS = {
    "private, without a token": {"name": "ada/private", "token": None},
    "private, another user's token": {"name": "ada/private", "token": "hf_bob"},
    "a token that is not valid": {"name": "ada/public", "token": "hf_wrong"},
    "a revision that is not there": {"name": "ada/public", "token": "hf_ada", "revision": "v9"},
    "a repository that is not there": {"name": "ada/nothing", "token": "hf_ada"},
}

_LOAD = """
from transformers import AutoModelForImageTextToText, AutoProcessor
for auto in (AutoProcessor, AutoModelForImageTextToText):
    auto.from_pretrained("ada/public", trust_remote_code=True)
"""
_LOAD_INTO = """
from transformers import AutoModelForImageTextToText
options = {{"revision": {revision!r}, "cache_dir": {cache!r}}}
AutoModelForImageTextToText.from_pretrained({name!r}, trust_remote_code=True, **options)
"""
_VERSIONS = """
import huggingface_hub, transformers
print(f"huggingface_hub {huggingface_hub.__version__}, transformers {transformers.__version__}")
"""


def with_card_by_hand(folder: Path) -> Path:
    """A copy of the checkpoint whose card is pushed as it is, so that a push is one commit with one large file."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    return folder


def figures(log: list[dict[str, Any]], seconds: float | None = None) -> dict[str, Any]:
    """Requests by kind, and the bytes of their bodies."""
    found = Counter(_kind(f"{entry['method']} {entry['path']}") for entry in log)
    told: dict[str, Any] = {
        "requests": sum(found.values()),
        "by_kind": dict(sorted(found.items())),
        "bytes_sent": sum(entry["bytes_in"] for entry in log),
        "bytes_received": sum(entry["bytes_out"] for entry in log),
    }
    return told if seconds is None else told | {"seconds": round(seconds, 3)}


def _kind(request: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, request)), "other")


def measure(hub: RunningHub, folder: Path, python: str = sys.executable) -> dict[str, Any]:
    """All figures and faults with one client.

    Args:
        hub: A Hub without repositories of ada's.
        folder: Empty folder for the client.
        python: Interpreter with the client.
    """
    checkpoint = with_card_by_hand(folder / "checkpoint")
    with hub.client(folder / "client", python=python) as client:
        report: dict[str, Any] = {"client": client.code(_VERSIONS).out.strip()}
        for name in ("first push", "the same push again"):
            report[name] = _figures(client.command("push", checkpoint, "ada/public"))
        carded = shutil.copytree(checkpoint, folder / "carded", ignore=shutil.ignore_patterns("README.md"))
        for name in ("first push, with a card of ours", "the same push again, with a card of ours"):
            report[name] = _figures(client.command("push", carded, "ada/carded"))
        results = checkpoint / "results.json"
        results.write_text(results.read_text() + "\n")
        report["a push with one changed file"] = _figures(client.command("push", checkpoint, "ada/public"))
        report["verify"] = _figures(client.command("verify", "ada/public"))
        report["load where the package is absent, empty cache"] = _load_afresh(hub, folder / "loader", python)
        report["faults of a push"] = [_push_with(client, checkpoint, what) for what in PUSH_FAULTS]
        client.command("push", checkpoint, "ada/private", "--private")
        report["faults of a load"] = [_load_with(client, folder, what) for what in LOAD_FAULTS]
        report["refused loads"] = [
            {"case": what, "seen": _seen(_load(client, folder / what, **options))}
            for what, options in REFUSED_LOADS.items()
        ]
    return report


def _figures(step: Step) -> dict[str, Any]:
    assert step.status == 0, step.err
    return figures(step.log, step.seconds)


def _load_afresh(hub: RunningHub, home: Path, python: str) -> dict[str, Any]:
    home.mkdir()
    variables = {key: value for key, value in hub.environment(home, token=None).items() if key != "PYTHONPATH"}
    hub.log()
    run_without_package(_LOAD, folder=home, python=python, variables=variables)
    return figures(hub.log())


def _push_with(client: Client, checkpoint: Path, what: str) -> dict[str, Any]:
    """A first push that meets a fault, what is visible then, and a second push without."""
    number = list(PUSH_FAULTS).index(what)
    name = f"ada/fault-{number}"
    order: dict[str, Any] = {"times": _FOR_EVER} | PUSH_FAULTS[what]
    if "commit_first" in order:
        order["commit_first"] = ["models", name]
    broken = client.command("push", checkpoint, name, faults=[fault(**order)])
    visible = _pushed_files(client.hub, name)
    again = client.command("push", checkpoint, name)
    return {
        "fault": what,
        "seen": _seen(broken),
        "files_visible_after": visible,
        "sent_by_the_next_push": len([entry for entry in again.requests("PUT") if entry["status"] == 200]),
        "next_push": again.out.splitlines()[0].split(":")[0].split(", at ")[0],
        "files_visible_at_last": _pushed_files(client.hub, name),
    }


def _pushed_files(hub: RunningHub, name: str) -> int:
    """How many files a reader sees that the push has brought."""
    if not hub.exists(name):
        return 0
    return len(set(hub.files(name)) - {".gitattributes", "NOTES"})


def _load_with(client: Client, folder: Path, what: str) -> dict[str, Any]:
    broken = _load(client, folder / what, "ada/public", faults=[fault(**{"times": _FOR_EVER} | LOAD_FAULTS[what])])
    again = _load(client, folder / what, "ada/public")
    return {"fault": what, "seen": _seen(broken), "next_load": _seen(again)}


def _load(
    client: Client, cache: Path, name: str, revision: str = "main", token: str | None = "hf_ada", faults=()
) -> Step:
    return client.code(_LOAD_INTO.format(name=name, revision=revision, cache=str(cache)), faults=faults, token=token)


def _seen(step: Step) -> str:
    """The error that ended it, without ports, ids and folders; "success" without one."""
    if step.status == 0:
        return "success"
    lines = [line for line in step.err.splitlines() if line.strip()]
    begin = [at for at, line in enumerate(lines) if re.match(r"([\w.]*(Error|Exception)|python -m .*): ", line)]
    said = " ".join(lines[begin[-1] if begin else -1 :])
    for pattern, plain in (
        (r"http://(127\.0\.0\.1|localhost):\d+", "HUB"),
        (r"\?signature=\w+", ""),
        (r", '\(Request ID: [\w-]+\)'", ""),
        (r"[0-9a-f]{40,64}", "<id>"),
    ):
        said = re.sub(pattern, plain, said)
    return said[:400]


def main(arguments: list[str] | None = None) -> None:
    """Measure with every client, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results") / "hub_traffic.json")
    parser.add_argument(
        "--other", type=lambda path: str(Path(path).absolute()), help="interpreter with another generation of clients"
    )
    options = parser.parse_args(arguments)
    reports = []
    for python in filter(None, (sys.executable, options.other)):
        with tempfile.TemporaryDirectory() as place:
            for name in ("hub", "client"):
                Path(place, name).mkdir()
            with running_hub(Path(place, "hub")) as hub:
                reports.append(measure(hub, Path(place, "client"), python))
    size = sum(path.stat().st_size for path in CHECKPOINT.iterdir())
    told = {"checkpoint_bytes_without_code": size, "clients": reports}
    options.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
