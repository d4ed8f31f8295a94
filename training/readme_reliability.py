"""README's figures of reliability: whole suites, versions, ways to generate, hostile input, long runs."""

from __future__ import annotations

from typing import Any

from adaptive_llava.training.markdown_table import table


PEER = "stock LLaVA"
PEER_FAMILY = "LLaVA of transformers"


def suites(result: dict[str, Any]) -> str:
    """Passed / skipped / failed of each suite, the presets' worst beside stock LLaVA's."""
    names = result["suites"]
    rows = []
    for version, run in result["runs"].items():
        presets = [preset for preset in run["counts"]["model"] if preset != PEER]
        for who, shown in ((PEER, [PEER]), (f"each of {len(presets)} presets, at worst", presets)):
            cells = [[run["counts"][suite][preset] for preset in shown] for suite in names]
            rows.append([version, who, *(_worst(cell) for cell in cells)])
    commands = sorted({run["command"] for run in result["runs"].values()})
    return f"`{'`, `'.join(commands)}`; passed / skipped / failed:\n\n" + table(
        ["transformers", "model", *(f"{suite.replace('_', ' ')} ({title})" for suite, title in names.items())], rows
    )


def version_matrix(result: dict[str, Any]) -> str:
    """What became of each step under each version."""
    steps = list(result["rows"][0]["steps"])
    rows = [
        [*(row["versions"].get(name, "") for name in ("transformers", "trl", "peft")), *row["steps"].values()]
        for row in result["rows"]
    ]
    return f"`{result['command']}`:\n\n" + table(
        ["transformers", "trl", "peft", *(step.replace("_", " ") for step in steps)], rows
    )


def generation_modes(result: dict[str, Any]) -> str:
    """Modes by what becomes of them with all families of ours."""
    rows = []
    for release in result["releases"]:
        modes: dict[str, list[str]] = {}
        for mode, cells in release["modes"].items():
            said = {outcome.split(":")[0] for family, outcome in cells.items() if family != PEER_FAMILY}
            modes.setdefault(said.pop() if len(said) == 1 else "depends on the family", []).append(mode)
        version = release["versions"].split(",")[0].removeprefix("transformers ")
        rows += [[version, outcome, "; ".join(names)] for outcome, names in modes.items()]
    told = "messages and reasons, and what becomes of stock LLaVA, stand in `results/generation_modes.json`"
    return f"`{result['command']}`; {told}:\n\n" + table(["transformers", "outcome", "modes"], rows)


def hostile_cases(result: dict[str, Any]) -> str:
    """How many cases, and of what."""
    return (
        f"`{result['command']}`: {result['cases']:,} cases of {len(result['properties'])} properties, "
        f"{sum(found['refused'] for found in result['properties'].values()):,} of them refused by name; "
        f"{'every property held' if result['passed'] else 'some properties did not hold'}."
    )


def long_runs(result: dict[str, Any]) -> str:
    """Growth of memory and open files."""
    told = [
        f"{run['steps']:,} {what}: memory {run['memory_mib']['growth']:+.1f} MiB of {run['memory_mib']['late']:.0f}, "
        f"open files {run['open_files']['growth']:+.0f}"
        for what, run in (
            ("steps of TRL's trainer", result["runs"]["fine_tune"]),
            ("batches answered", result["runs"]["generate"]),
        )
    ]
    return f"`{result['command']}`: {'; '.join(told)}."


def _worst(counts: list[dict[str, int]]) -> str:
    most = max(counts, key=lambda count: (count["failed"], -count["passed"]))
    return " / ".join(str(most[name]) for name in ("passed", "skipped", "failed"))
