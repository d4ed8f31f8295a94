"""Steps of a long reproduction, from a table of commands: what each needs, what it makes, and running them in order.

A table is a YAML file, see `recipes/reproduction/steps_7b.yaml`: steps that all systems share, kinds of steps of one
system, and for each system its steps in order.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


RECIPES = Path(__file__).resolve().parent / "recipes"
_PROGRAMS = {"python": [sys.executable]}  # others stand beside this interpreter


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: What it is called, like `stf/finetune`.
        command: Program and arguments, as printed.
        inputs: Files and folders that must be there before it starts.
        outputs: What it makes; where all of it is there, the step is done.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]

    @property
    def done(self) -> bool:
        """Whether all outputs are there."""
        return all(path.exists() for path in self.outputs)

    def missing(self, made: Collection[Path] = ()) -> list[Path]:
        """Inputs that are neither there nor made by an earlier step."""
        return [path for path in self.inputs if not path.exists() and path not in made]

    def __str__(self) -> str:
        return shlex.join(self.command)


def read_steps(
    table: Path,
    metrics: Mapping[str, str],
    *,
    base: str,
    work: Path,
    data: Path,
    systems: Sequence[str] | None = None,
) -> list[Step]:
    """All steps of a table in order: the shared ones that are needed, then those of each system and its evaluations.

    Args:
        table: The YAML file.
        metrics: Metric of each benchmark.
        base: Folder or Hub id of the checkpoint that all systems start from.
        work: Folder for all outputs.
        data: Folder of the user's data.
        systems: Which systems; all by default.

    Raises:
        ValueError: A system that the table does not have.
    """
    plan = yaml.safe_load(table.read_text(encoding="utf-8"))
    unknown = sorted(set(systems or ()) - set(plan["systems"]))
    if unknown:
        raise ValueError(f"`systems={unknown!r}` are not in {table.name}. Known: {', '.join(plan['systems'])}.")
    places = {"base": base, "work": str(work), "data": str(data), "recipes": str(RECIPES)}
    own = [step for system in systems or plan["systems"] for step in _steps_of(system, plan, metrics, places)]
    needed = {path for step in own for path in step.inputs}
    shared = (_step(name, row, places) for name, row in plan["shared"].items())
    return [*(step for step in shared if needed.intersection(step.outputs)), *own]


def _steps_of(
    system: str, plan: Mapping[str, Any], metrics: Mapping[str, str], places: Mapping[str, str]
) -> Iterable[Step]:
    values = {**places, "preset": system, "options": "", "processes": "8"}
    for entry in plan["systems"][system]["steps"]:
        kind, own = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        row, here = plan["steps"][kind], values | {name: str(text) for name, text in own.items() if name != "inputs"}
        folder = row["model"].format(**here)
        made = {"inputs": [*row["inputs"], *own.get("inputs", ())], "outputs": [f"{folder}/config.json"]}
        yield _step(f"{system}/{kind}", row | made, here)
        values["model"] = folder
    budgets = ",".join(map(str, plan["systems"][system]["budgets"]))
    for benchmark, metric in metrics.items():
        names = {"benchmark": benchmark, "metric": metric, "budgets": budgets}
        yield _step(f"{system}/evaluate/{benchmark}", plan["steps"]["evaluate"], values | names)


def _step(name: str, row: Mapping[str, Any], values: Mapping[str, str]) -> Step:
    inputs, outputs = (
        tuple(Path(path.format(**values)) for path in row.get(key, ())) for key in ("inputs", "outputs")
    )
    # filled word by word, so that a folder with a space in its name stays one argument
    command = row["command"].replace("{options}", values.get("options", ""))
    return Step(name, tuple(word.format(**values) for word in command.split()), inputs, outputs)


def describe_steps(steps: Sequence[Step]) -> list[str]:
    """Every command with what stands in its way, in lines that a shell would run."""
    lines: list[str] = []
    made: set[Path] = set()
    for step in steps:
        missing = [str(path) for path in step.missing(made)]
        state = "done" if step.done else f"needs {', '.join(missing)}" if missing else "can run in its turn"
        lines += [f"# {step.name}: {state}", str(step)]
        made.update(step.outputs)
    return lines


def run_steps(steps: Sequence[Step]) -> None:
    """Run what is not done, in order.

    Raises:
        ValueError: An input is missing, before anything has run if no earlier step makes it; or a step that ended well
            has not made its outputs.
        SystemExit: A command failed, with its status.
    """
    made: set[Path] = set()
    absent = []
    for step in steps:
        if not step.done:
            absent += [f"{path} (for {step.name})" for path in step.missing(made)]
        made.update(step.outputs)
    if absent:
        raise ValueError(f"These inputs are missing: {'; '.join(absent)}. Put them there, or leave their systems out.")
    for step in steps:
        if step.done:
            print(f"# {step.name}: done, {step.outputs[0]} is there", flush=True)
            continue
        _check(step.missing(), f"The step {step.name!r} needs", "An earlier step should have made it; run again.")
        print(f"# {step.name}\n{step}", flush=True)
        program, *arguments = step.command
        beside = str(Path(sys.executable).with_name(program))
        status = subprocess.run([*_PROGRAMS.get(program, [beside]), *arguments], check=False).returncode
        if status:
            raise SystemExit(f"The step {step.name!r} ended with status {status}. The same command goes on from here.")
        _check([path for path in step.outputs if not path.exists()], f"The step {step.name!r} has not made", "")


def _check(missing: Sequence[Path], what: str, rule: str) -> None:
    if missing:
        raise ValueError(f"{what} {', '.join(map(str, missing))}, which is not there. {rule}".strip())
