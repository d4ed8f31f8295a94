"""LLaVA-1.5-7B converted, trained and evaluated with each preset, on a node of 8 GPUs with access to the Hub.

    make reproduce-7b DATA=my/llava_data
    python -m adaptive_llava.training.reproduce_7b --data my/llava_data --presets stf-mbtf llava-mini --dry-run
    python -m adaptive_llava.training.reproduce_7b --table

Steps, and what the data folder must hold, are in `recipes/reproduction/steps_7b.yaml`. A step whose outputs are there
is skipped, so that the same command goes on where it was stopped. `--dry-run` prints every command and what is
missing, and runs nothing. `--table` prints the papers' figures beside ours; `-` is what was not run, or what no paper
says.
No run at this size has been made for this repository: the commands are what is tested.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_llava import PRESETS
from adaptive_llava.training.published_figures import published_figures
from adaptive_llava.training.reproduction_steps import RECIPES, describe_steps, read_steps, run_steps


BASE = "llava-hf/llava-1.5-7b-hf"
TABLE = RECIPES / "reproduction" / "steps_7b.yaml"


def comparison(work: Path) -> list[str]:
    """The table of published and own figures, one line per preset and token budget, in Markdown.

    Args:
        work: The folder of the runs; a score that is not there is a `-`.
    """
    figures = published_figures()
    benchmarks = figures["benchmarks"]
    lines = ["| preset | tokens | " + " | ".join(row["title"] for row in benchmarks.values()) + " |"]
    lines.append("|---" * (len(benchmarks) + 2) + "|")
    for preset in PRESETS:
        published = figures["accuracy"].get(preset, {})
        scores = {name: own_scores(work / preset / "scores" / name, row) for name, row in benchmarks.items()}
        budgets = {budget for own in scores.values() for budget in own}
        shown = {str(published["visual_tokens"])} if published else set()
        for budget in sorted(budgets | shown, key=lambda text: (text == "auto", text.zfill(9))) or ["-"]:
            here = published if budget in shown else {}
            cells = (f"{here.get(name, '-')} / {_rounded(own.get(budget))}" for name, own in scores.items())
            lines.append(f"| {preset} | {budget} | " + " | ".join(cells) + " |")
    lines += ["", "Each cell: paper / ours."]
    lines += [f"{preset}: {figures['sources'][row['source']]}." for preset, row in figures["accuracy"].items()]
    return lines


def own_scores(folder: Path, benchmark: Mapping[str, Any]) -> dict[str, float]:
    """Our figure of one benchmark by token budget, in the paper's unit; empty if it was not evaluated.

    Args:
        folder: What `python -m adaptive_llava evaluate` has written.
        benchmark: Which of the metric's figures is published, and its scale.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["budgets"]
    return {str(row["budget"]): row["figures"][benchmark["figure"]] * benchmark["scale"] for row in rows}


def main(arguments: list[str] | None = None) -> int:
    """Run, print or compare, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava.training.reproduce_7b", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", default=BASE, help="folder or Hub id of LLaVA-1.5-7B (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/reproduce-7b"), help="all outputs (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="training and evaluation data (%(default)s)")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), metavar="PRESET", help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="print every command, and run none")
    parser.add_argument("--table", action="store_true", help="print the papers' figures beside ours")
    options = parser.parse_args(arguments)
    if options.table:
        print("\n".join(comparison(options.work)))
        return 0
    benchmarks = published_figures()["benchmarks"]
    metrics = {name: row["metric"] for name, row in benchmarks.items() if "metric" in row}
    folders = {"work": options.work, "data": options.data}
    steps = read_steps(TABLE, metrics, base=options.base, systems=options.presets, **folders)
    if options.dry_run:
        print("\n".join(describe_steps(steps)))
        return 0
    try:
        run_steps(steps)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(comparison(options.work)))
    return 0


def _rounded(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"


if __name__ == "__main__":
    sys.exit(main())
