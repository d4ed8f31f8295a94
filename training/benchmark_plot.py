"""What fewer visual tokens save: the benchmark's measured prefill beside its limits, as a picture.

python -m adaptive_llava.training.benchmark_plot results/benchmark_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_prefill(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Prefill time over that of all tokens, by visual tokens, with what FLOPs and linear layers allow; a PNG.

    Raises:
        ValueError: The report has no row of prefill at fewer tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _prefill_rows(report)
    if not rows:
        raise ValueError("The report has no rows `prefill_<tokens>`. Measure them: --rows prefill_144,prefill_64")
    tokens = sorted(rows)
    measured = [rows[count] for count in tokens]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [row["ratio"] for row in measured]
    ends = [[row["ratio"] - row["low"] for row in measured], [row["high"] - row["ratio"] for row in measured]]
    axes.errorbar(tokens, values, yerr=ends, marker="o", capsize=3, label="measured")
    for name, label in (("linear_layers_ratio", "linear layers alone"), ("flops_ratio", "FLOPs")):
        axes.plot(tokens, [row["notes"][name] for row in measured], linestyle="--", label=label)
    axes.set(xlabel="visual tokens", ylabel="prefill time / time at all tokens", xscale="log", ylim=(0, None))
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    axes.set_title(f"{report['shape']}, {report['dtype']}, {report['device']}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=110, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a report beside it."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava.training.benchmark_plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("report", type=Path, help="JSON file of the benchmark")
    options = parser.parse_args(arguments)
    picture = options.report.with_suffix(".png")
    draw_prefill(json.loads(options.report.read_text()), picture)
    print(f"Written to {picture}")
    return 0


def _prefill_rows(report: Mapping[str, Any]) -> dict[int, Any]:
    named = ((re.fullmatch(r"prefill_(\d+)", row["name"]), row) for row in report["rows"] if "error" not in row)
    return {int(found.group(1)): row for found, row in named if found}


if __name__ == "__main__":
    sys.exit(main())
