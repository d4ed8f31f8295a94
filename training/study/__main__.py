"""Does per-image routing pay? Small models, controlled: same weights, same pictures, oracle and shuffled controls.

    python -m adaptive_llava.training.study --config training/study/cpu.yaml
    python -m adaptive_llava.training.study --config training/study/accelerator.yaml --workers 1 --minutes 9

What is compared, how, and what will be called an effect stands in `PLAN.md`, which is older than every result. Models
are trained one piece at a time (`arms`); a piece that is done is never done again, so a run can be stopped at any
time, and one with `--minutes` stops by itself. When the last piece is done, the results are written to `--output`:
`<name>.json`, `<name>.md` and plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_llava.training.study.pieces import commit, run_pieces
from adaptive_llava.training.study.settings import Settings, read_settings


OUT_OF_TIME = 75  # exit status: the same command goes on
FOLDER = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when the results are written, 75 when time was up before."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.study", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--config", default=str(FOLDER / "cpu.yaml"), help="YAML file of settings (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (%(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be continued by the same command")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies steps and pictures (%(default)s)")
    parser.add_argument("--work", help="folder for what is to be continued (study_work/<name>)")
    parser.add_argument("--output", default=str(FOLDER / "results"), help="folder for the results (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        settings = read_settings(options.config)
        if not options.scale > 0 or options.workers < 1:
            raise ValueError(
                f"`--scale {options.scale}` must be above 0, and `--workers {options.workers}` at least 1."
            )
    except (OSError, ValueError) as error:
        parser.exit(2, f"study: {error}\n")
    if options.scale != 1:
        settings = settings.scaled(options.scale)
    work = Path(options.work or Path("study_work") / settings.name)
    deadline = time.time() + 60 * options.minutes if options.minutes else float("inf")
    if not run_pieces(settings, work, options.workers, deadline):
        print(f"Time is up. The same command goes on from {work}.", flush=True)
        return OUT_OF_TIME
    write_results(settings, work, Path(options.output), circumstances(options.config, work, settings.device))
    return 0


def circumstances(config: str, work: Path, device: str) -> dict[str, Any]:
    """The command, commits, machine and time of a run."""
    from adaptive_llava.training.benchmark import provenance

    pieces = [json.loads(path.read_text()) for path in sorted(work.glob("seed_*/*.seconds"))]
    command = f"python -m adaptive_llava.training.study --config training/study/{Path(config).name}"
    return provenance(command, device=device, threads=1) | {
        "trained_at": sorted({piece["commit"] for piece in pieces}),
        "analysed_at": commit(),
        "cpu_seconds": round(sum(piece["cpu_seconds"] for piece in pieces)),
    }


def write_results(settings: Settings, work: Path, output: Path, around: dict[str, Any]) -> None:
    """Analyse the evidence and write the JSON file, the tables and the plots."""
    import dataclasses

    from adaptive_llava.training.study.analysis import analyse, load_evidence
    from adaptive_llava.training.study.report import draw, tables

    output.mkdir(parents=True, exist_ok=True)
    results = {**around, "settings": dataclasses.asdict(settings)} | analyse(settings, load_evidence(settings, work))
    (output / f"{settings.name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = tables(results)
    (output / f"{settings.name}.md").write_text(text, encoding="utf-8")
    draw(results, output)
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
