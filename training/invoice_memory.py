"""Peak memory of a training step by token budget and batch size, each measured in a process of its own.

    python -m adaptive_llava.training.invoice_memory --model my_model --config documents_qlora.yaml \\
        --budgets 16,64,144 --batches 1,4 --output results/invoice_memory.json

Two steps of the recipe on noise, with answers of one length. On a CPU the figure is the peak of the resident set in
MiB, on a GPU what torch allocated there at most; `loaded` is the same before the first step. Options of the recipe may
follow on the command line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adaptive_llava.training.document_pages import DocumentPage, write_conversations
from adaptive_llava.training.documents_day import RECIPE


STEPS = 2
_RESET_PEAK = "5"  # what Linux takes for it, see proc_pid_clear_refs(5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    options, of_recipe = parser.parse_known_args(arguments)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return 0
    rows = []
    for batch in options.batches:
        for budget in options.budgets:
            job = {
                "model": options.model,
                "config": options.config,
                "of_recipe": of_recipe,
                "budget": budget,
                "batch": batch,
                "answer_length": options.answer_length,
            }
            rows.append({"budget": budget, "batch": batch, **_in_fresh_process(job)})
            print(f"batch {batch:>4}, budget {budget:>5}: {rows[-1]['peak_mib']} MiB", flush=True)
    results = {
        "recipe": Path(options.config).name,
        "options": of_recipe,
        "answer_length": options.answer_length,
        **{name: rows[0][name] for name in ("device", "parameters", "dtype")},
        "rows": [{name: row[name] for name in ("budget", "batch", "loaded_mib", "peak_mib")} for row in rows],
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table_of(results)}\nwritten: {options.output}")
    return 0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train `STEPS` steps in this process.

    Args:
        job: `model`, `config`, `of_recipe` (options), `budget` (tokens per page), `batch` (pages per step) and
            `answer_length` (characters).
    """
    from adaptive_llava.training.sft import build_trainer, fine_tune, parse_arguments

    before: dict[str, Any] = {}

    def build(model: Any, *parts: Any, **named: Any) -> Any:
        before.update(
            loaded_mib=_reset_peak(),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        return build_trainer(model, *parts, **named)

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_conversations(_noise(Path(folder), job["batch"], job["answer_length"]), rows)
        given = {
            "config": job["config"],
            "model_name_or_path": job["model"],
            "dataset_name": rows,
            "output_dir": Path(folder) / "out",
            "visual_token_budget": job["budget"],
            "per_device_train_batch_size": job["batch"],
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "save_strategy": "no",
        }
        options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        fine_tune(*parse_arguments([*job["of_recipe"], *options]), build=build)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**before, "peak_mib": _peak(), "device": device}


def table_of(results: dict[str, Any]) -> str:
    """Peak MiB above the loaded model, a line per batch size and a column per budget."""
    budgets = sorted({row["budget"] for row in results["rows"]})
    lines = ["MiB above the loaded model", f"{'batch':>8}" + "".join(f"{budget:>7} tok" for budget in budgets)]
    for batch in sorted({row["batch"] for row in results["rows"]}):
        above = {
            row["budget"]: row["peak_mib"] - row["loaded_mib"] for row in results["rows"] if row["batch"] == batch
        }
        lines.append(f"{batch:>8}" + "".join(f"{above[budget]:>11}" for budget in budgets))
    return "\n".join(lines)


def _in_fresh_process(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "adaptive_llava.training.invoice_memory", "--measure", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"`--batches {job['batch']}` with `--budgets {job['budget']}` could not be measured: "
            f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _noise(folder: Path, count: int, answer_length: int) -> list[DocumentPage]:
    rng = np.random.default_rng(0)
    pages = []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        pages.append(DocumentPage(path.name, str(path), {"text": "x" * answer_length}, ""))
    return pages


def _reset_peak() -> int:
    """Memory now, in MiB; peaks are counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() // 2**20
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return _resident("VmRSS:")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else _resident("VmHWM:")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.invoice_memory",
        description="Peak memory of a training step by token budget and batch size.",
        epilog="Other options are those of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder or Hub id of an adaptive LLaVA model")
    parser.add_argument("--config", default=RECIPE, help="recipe (%(default)s)")
    parser.add_argument("--budgets", type=_numbers, default=[1, 16, 64, 256], help="tokens per page (%(default)s)")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16], help="pages per step (%(default)s)")
    parser.add_argument("--answer-length", type=int, default=200, help="characters of an answer (%(default)s)")
    parser.add_argument("--output", default="results/invoice_memory.json", help="file to write (%(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
