"""One checkpoint directory under every supported transformers: load, generate, fine-tune, save, load elsewhere.

    python -m tests.version_matrix [--versions 4.57.6 5.23.0] [--environments .venv-matrix]

Each version gets an environment of its own with the newest TRL and PEFT that accept it, and without this package: the
shipped model comes as remote code from one folder that this interpreter saved. What a version saves after fine-tuning
is loaded by the oldest and by the newest. Prints a table; writes `results/version_matrix.json`; exits with 1 if a step
failed. An environment that is there is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adaptive_llava.training.benchmark import provenance
from adaptive_llava.training.markdown_table import table
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import load_shipped


ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("4.57.6", "5.0", "5.5", "5.10", "5.15", "5.17", "5.20", "5.23.0")
PACKAGES = ("trl", "peft", "accelerate", "datasets")

# In one folder for all environments: they are large, and the same with every transformers.
_SHARED = ("torch", "numpy", "pillow")
_STEPS_FILE = Path(__file__).with_name("steps.py")
_PICTURES = 8
_SHOWN = ("transformers", "trl", "peft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.version_matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help="of transformers (%(default)s)")
    parser.add_argument("--environments", default=".venv-matrix", help="folder to build them in (%(default)s)")
    parser.add_argument("--output", default="results/version_matrix.json", help="file to write (%(default)s)")
    options = parser.parse_args(arguments)
    began = time.time()
    pythons = {version: environment(Path(options.environments).resolve(), version) for version in options.versions}
    with tempfile.TemporaryDirectory() as name:
        rows = run(pythons, Path(name))
    asked = " ".join(["", "--versions", *options.versions]) if options.versions != list(VERSIONS) else ""
    result = provenance(f"python -m tests.version_matrix{asked}", device="cpu", threads=1)
    result |= {"seconds": round(time.time() - began), "rows": rows}
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result))
    return int(any(outcome != "ok" for row in rows for outcome in row["steps"].values()))


def environment(folder: Path, version: str) -> str:
    """The interpreter of the environment for `version`, which is built where it is missing."""
    constraints = ROOT / "constraints.txt"
    shared, place = folder / "shared", folder / version
    python = str(place / "bin" / "python")
    if not (shared / "complete").exists():
        _pip(sys.executable, "--target", str(shared), "--constraint", str(constraints), *_SHARED)
        (shared / "complete").touch()
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        for packages in place.glob("lib/python*/site-packages"):
            (packages / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
        exact = f"transformers=={version}" + (".*" if version.count(".") == 1 else "")
        _pip(python, exact, *PACKAGES)
        (place / "complete").touch()
    return python


def run(pythons: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """One row per version: the packages that ran and what became of each step."""
    write_material(work / "material")
    rows = []
    for version, python in pythons.items():
        found = _run_steps(python, work, ["all", work / "material", work / version])
        rows.append({"asked": version, "versions": found.pop("versions", {}), "steps": found})
    first, *_, last = [*pythons, *pythons]  # one version is both
    for row in rows:
        for end in dict.fromkeys((first, last)):
            saved = work / row["asked"] / "saved"
            found = _run_steps(pythons[end], work, ["elsewhere", work / "material", saved])
            row["steps"][f"loaded by {end}"] = found.get("elsewhere", found.get("start", "no answer"))
    return rows


def write_material(folder: Path) -> None:
    """`checkpoint/` with its remote code, pictures with questions, and what this interpreter answers."""
    folder.mkdir()
    model, processor = load_shipped()
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    asked = []
    for number, picture in enumerate(render(_PICTURES, seed=5, test=True)):
        picture.image.save(folder / f"{number}.png")
        question, answer = picture.questions[0]
        asked.append({"image": f"{number}.png", "question": question, "answer": answer})
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    (folder / "expected.json").unlink(missing_ok=True)
    _run_steps(sys.executable, folder, ["expect", folder, folder])


def report(result: dict[str, Any]) -> str:
    """The table, and below it what failed."""
    rows, failures = [], []
    for row in result["rows"]:
        versions = row["versions"]
        marks = ["ok" if outcome == "ok" else "failed" for outcome in row["steps"].values()]
        rows.append(
            [versions.get("transformers", row["asked"]), versions.get("trl", ""), versions.get("peft", ""), *marks]
        )
        failures += [f"{row['asked']}, {step}: {said}" for step, said in row["steps"].items() if said != "ok"]
    steps = [name.replace("_", " ") for name in result["rows"][0]["steps"]]
    return "\n\n".join([table([*_SHOWN, *steps], rows), *failures])


def _run_steps(python: str, work: Path, arguments: Iterable[Any]) -> dict[str, Any]:
    """What `steps.py` says of each step; of `start`, where it could not even begin."""
    with tempfile.TemporaryDirectory(dir=work) as home:
        # away from this checkout, so that remote code is all there is
        script = shutil.copy(_STEPS_FILE, home)
        variables = {"PATH": os.environ["PATH"], "HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [python, "-P", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("STEPS ")]
    if not told:
        return {"start": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(told[-1].removeprefix("STEPS "))


def _pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
