"""Speed and memory as ratios, each beside its limit, from one run.

    python -m adaptive_llava.training.benchmark
    python -m adaptive_llava.training.benchmark --device cuda --dtype bfloat16 --shape llava-1.5-7b

Every row compares ours with a peer on the same weights: timed rows in interleaved pairs (ours, peer, ours, peer), as
the ratio of their medians with a 95 % interval; others count bytes, operators or graphs. Models have the shapes of
real ones and random weights, which cost the same. A missed bar is printed, not raised, and a row that breaks leaves
the others standing. The file is written after every row; `--resume` goes on with one. To add a row, write a function
`Workload -> Measurement` in `benchmark_rows/` and name it in `benchmark_rows/table.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_rows.table import ROWS
from adaptive_llava.training.benchmark_shapes import SHAPES
from adaptive_llava.training.benchmark_workload import Workload
from adaptive_llava.training.paired_timing import ratio_of_medians


# What a file must have been measured with for a run to go on with it.
_SETTINGS = ("shape", "device", "dtype", "pairs", "row_seconds", "cpu_seconds")


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows asked for, print the table and write it as JSON; 1 if a row broke."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rows: dict[str, dict[str, Any]] = _measured_before(options) if options.resume else {}
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    work = Workload(
        options.shape, options.device, options.dtype, options.pairs, seconds=options.row_seconds, clock=clock
    )
    print(f"{options.shape}, {options.dtype}, {options.device}, {options.threads} threads, {options.pairs} pairs")
    print(f"{'ratio':>7}  {'95 % interval':<16}{'limit':>6} {'bar':>6}  {'':<7}{'ours':>9} {'peer':>9}")
    for name in options.rows:
        if name not in rows:
            work.progress = _progress_line(name, options.pairs)
            rows[name] = _measured(name, work)
            _write(options, rows)
        print(f"\r\033[K{_line(rows[name])}" if sys.stdout.isatty() else _line(rows[name]), flush=True)
    broken = [name for name in options.rows if "error" in rows[name]]
    missed = [name for name in options.rows if rows[name].get("met") is False]
    print(f"{sum(row['took_s'] for row in rows.values()):.0f} s in all; written to {options.output}")
    print(f"missed: {', '.join(missed) or 'none'}; broken: {', '.join(broken) or 'none'}")
    return int(bool(broken))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava.training.benchmark", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="siglip-b-224+qwen2.5-0.5b")
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of a row, all of them against stock")
    parser.add_argument(
        "--row-seconds", type=float, default=20.0, help="other rows begin no further pair after so long (%(default)s)"
    )
    parser.add_argument("--rows", help="comma-separated names; default: all of " + ", ".join(ROWS))
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output file already has")
    parser.add_argument("--cpu-seconds", action="store_true", help="time what the CPU computes, on a busy machine")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, help="default: results/benchmark_<device>.json")
    options = parser.parse_args(arguments)
    options.rows = options.rows.split(",") if options.rows else list(ROWS)
    unknown = sorted(set(options.rows) - set(ROWS))
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; known: {', '.join(ROWS)}")
    if options.pairs < 1 or options.threads < 1:
        parser.error("--pairs and --threads must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    if options.device == "cuda" and options.cpu_seconds:
        parser.error("--cpu-seconds says nothing of a GPU; leave it out")
    options.output = options.output or Path("results") / f"benchmark_{options.device}.json"
    options.command = sys.argv[1:] if arguments is None else arguments
    return options


def _measured_before(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of the output file that need no measuring again, by name."""
    if not options.output.is_file():
        return {}
    report = json.loads(options.output.read_text())
    settings = {name: getattr(options, name) for name in _SETTINGS}
    found = {name: report.get(name) for name in _SETTINGS}
    if found != settings:
        raise SystemExit(f"{options.output} was measured with {found}, not {settings}: leave out --resume.")
    return {row["name"]: row for row in report["rows"] if "error" not in row}


def _measured(name: str, work: Workload) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        row = _row(name, ROWS[name](work))
    except Exception as error:  # one row must not take the others with it
        traceback.print_exc()
        row = {"name": name, "error": f"{type(error).__name__}: {error}"}
    gc.collect()
    return row | {"took_s": round(time.perf_counter() - started, 1)}


def _row(name: str, measured: Measurement) -> dict[str, Any]:
    ratio = ratio_of_medians(measured.pairs)
    fields = {key: value for key, value in asdict(measured).items() if key != "pairs"}
    return {"name": name, **fields, **asdict(ratio), "met": measured.met(ratio), "pairs": measured.pairs}


def _write(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    command = "python -m adaptive_llava.training.benchmark " + " ".join(options.command)
    report = provenance(command.strip(), device=options.device, threads=options.threads)
    report |= {name: getattr(options, name) for name in _SETTINGS}
    report |= {"took_s": round(sum(row["took_s"] for row in rows.values()), 1)}
    report |= {"rows": [rows[name] for name in ROWS if name in rows]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{'broken':>7}  {row['name']}: {row['error'].splitlines()[0]}"
    verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
    limit, bar = ("" if row[name] is None else f"{row[name]:.3f}" for name in ("limit", "bar"))
    scale, unit = (1000, "ms") if row["unit"] == "s" else (1, row["unit"])
    interval = f"{row['low']:.3f} - {row['high']:.3f}"
    sides = f"{row['median'] * scale:>9.4g} {row['peer_median'] * scale:>9.4g} {unit}"
    return f"{row['ratio']:>7.3f}  {interval:<16}{limit:>6} {bar:>6}  {verdict:<7}{sides}  {row['what']}"


def _progress_line(name: str, pairs: int) -> Callable[[int], None]:
    if not sys.stdout.isatty():
        return lambda done: None
    return lambda done: print(f"\r\033[K{name}: pair {done} of at most {pairs}", end="", flush=True)


def provenance(command: str, *, device: str, threads: int) -> dict:
    """What a result file says of where its numbers come from."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": threads, "gpu": gpu},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
