"""Speed and memory as ratios, each beside its limit, from one run.

    python -m adaptive_llava.training.benchmark
    python -m adaptive_llava.training.benchmark --device cuda --dtype bfloat16 --shape clip-l-336+qwen2.5-0.5b

Every row times two sides in interleaved pairs (ours, peer, ours, peer) on the same weights and prints the ratio of
their medians with a 95 % interval. Models have the shapes of real ones and random weights, which cost the same. A
missed bar is printed, not raised. To add a row, write one function `Workload -> Measurement` and name it in `ROWS`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from adaptive_llava.training.benchmark_workload import SHAPES, TEXT_TOKENS, Workload
from adaptive_llava.training.flop_counts import count_flops, prefill_flops
from adaptive_llava.training.paired_timing import Pairs, Ratio, ratio_of_medians


# Rows that compare token counts differ by far more than the noise; memory hardly varies between processes.
COUNT_PAIRS = 12
MEMORY_PAIRS = 3
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}  # freed memory goes back
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Measurement:
    """What a row measured.

    Attributes:
        what: One line for the table.
        pairs: One `(ours, peer)` per pair.
        unit: Unit of the pairs, `"s"` or `"MB"`.
        limit: The ratio that arithmetic or physics allows, printed beside the measured one.
        bar: Largest acceptable ratio; `None` where a row only reports.
        interval_bar: Largest acceptable upper end of the interval.
        notes: Further numbers for the JSON.
    """

    what: str
    pairs: Pairs
    unit: str
    limit: float
    bar: float | None = None
    interval_bar: float | None = None
    notes: dict = field(default_factory=dict)

    def met(self, ratio: Ratio) -> bool | None:
        """Whether the bar is met; `None` without one."""
        if self.bar is None:
            return None
        return ratio.ratio <= self.bar and (self.interval_bar is None or ratio.high <= self.interval_bar)


def identity_prefill(work: Workload) -> Measurement:
    """Forward of tower and language model, one placeholder per image, against stock LLaVA."""
    return _identity_prefill(work, "prefill, identity / LlavaForConditionalGeneration, one placeholder", 1)


def identity_prefill_expanded(work: Workload) -> Measurement:
    """The same with exactly the ids stock LLaVA gets."""
    return _identity_prefill(work, "prefill, the same with one placeholder per visual token", work.patches)


def _identity_prefill(work: Workload, what: str, placeholders: int) -> Measurement:
    pixels = work.pixels_of_one
    compact, expanded = work.prompt(1, placeholders), work.prompt(1, work.patches)
    pairs = work.time(
        lambda: work.identity(**compact, pixel_values=pixels, logits_to_keep=1),
        lambda: work.stock(**expanded, pixel_values=pixels, logits_to_keep=1),
    )
    return Measurement(what, pairs, "s", 1.0, 1.02, 1.05)


def identity_first_token(work: Workload) -> Measurement:
    """`generate` up to the first scored position, against stock LLaVA."""
    pairs = work.generation_pairs[0]
    return Measurement("time to first token in generate, identity / stock", pairs, "s", 1.0, 1.02, 1.05)


def identity_decode(work: Workload) -> Measurement:
    """Every further token of `generate`, against stock LLaVA."""
    pairs, steps = work.generation_pairs[1], work.shape.new_tokens - 1
    return Measurement(f"decode per token ({steps} steps), identity / stock", pairs, "s", 1.0, 1.02, 1.05)


def identity_memory(work: Workload) -> Measurement:
    """Peak memory of `generate` with the model in it, each side in fresh processes."""
    reports = []
    for done in range(min(MEMORY_PAIRS, work.pairs)):
        reports.append((_measured_apart(work, "identity"), _measured_apart(work, "stock")))
        work.progress(done + 1)
    pairs = [(ours["peak_mb"], peer["peak_mb"]) for ours, peer in reports]
    above = [(ours["above_model_mb"], peer["above_model_mb"]) for ours, peer in reports]
    return Measurement(
        "peak memory of generate, identity / stock", pairs, "MB", 1.0, 1.02, notes={"above_loaded_model_mb": above}
    )


def dfmr_share(work: Workload) -> Measurement:
    """Router and pooling over three images that go to the three rungs, as a share of the tower."""
    model = work.dfmr.model
    pixels = work.pixels(3)
    with torch.no_grad():
        features = model.extract_features(pixels)

    def route_and_pool() -> None:
        model.router(features)
        model.compressor(features, [0, 1, 2])

    pairs = work.time(route_and_pool, lambda: model.vision_tower(pixels))
    what = f"DFMR routing + pooling of {work.patches} patches / vision tower"
    return Measurement(what, pairs, "s", 0.0, 0.005 if work.device == "cpu" else 0.01)


def prefill_fewer(work: Workload) -> Measurement:
    """Language model given encoded images, second count of the shape over the first."""
    return _prefill_at(work, work.shape.prefill_tokens[1])


def prefill_fewest(work: Workload) -> Measurement:
    """Language model given encoded images, third count of the shape over the first."""
    return _prefill_at(work, work.shape.prefill_tokens[2])


def _prefill_at(work: Workload, tokens: int) -> Measurement:
    full, rows = work.shape.prefill_tokens[0], work.batch
    prompt, few, many = work.prompt(rows), work.encoded(tokens, rows), work.encoded(full, rows)
    pairs = work.time(
        lambda: work.identity(**prompt, encoded_images=few, logits_to_keep=1),
        lambda: work.identity(**prompt, encoded_images=many, logits_to_keep=1),
        most=COUNT_PAIRS,
    )
    limit = prefill_flops(work.text, tokens + TEXT_TOKENS) / prefill_flops(work.text, full + TEXT_TOKENS)
    what = f"prefill of the language model, {tokens} / {full} tokens + {TEXT_TOKENS} text, batch {rows}"
    return Measurement(what, pairs, "s", limit, limit * (1.15 if work.device == "cpu" else 1.10))


def end_to_end_factor_2(work: Workload) -> Measurement:
    """Tower and language model, windows of 2x2 patches pooled, over all patches."""
    return _end_to_end(work, 1)


def end_to_end_factor_3(work: Workload) -> Measurement:
    """Tower and language model, windows of 3x3 patches pooled, over all patches."""
    return _end_to_end(work, 0)


def _end_to_end(work: Workload, rung: int) -> Measurement:
    model, rows = work.dfmr, work.batch
    prompt, pixels, counts = work.prompt(rows), work.pixels(rows), model.config.visual_token_counts
    pairs = work.time(
        lambda: model(**prompt, pixel_values=pixels, visual_rungs=[rung] * rows, logits_to_keep=1),
        lambda: model(**prompt, pixel_values=pixels, visual_rungs=[2] * rows, logits_to_keep=1),
        most=COUNT_PAIRS,
    )
    few, many = (count_flops(model.config, counts[index], TEXT_TOKENS) for index in (rung, 2))
    what = f"prefill with the tower, {counts[rung]} / {counts[2]} tokens + {TEXT_TOKENS} text, batch {rows}"
    shares = [cost.vision_tower / cost.end_to_end for cost in (few, many)]
    return Measurement(what, pairs, "s", few.end_to_end / many.end_to_end, notes={"tower_share_of_flops": shares})


ROWS: dict[str, Callable[[Workload], Measurement]] = {
    "identity_prefill": identity_prefill,
    "identity_prefill_expanded": identity_prefill_expanded,
    "identity_first_token": identity_first_token,
    "identity_decode": identity_decode,
    "identity_memory": identity_memory,
    "dfmr_share": dfmr_share,
    "prefill_fewer": prefill_fewer,
    "prefill_fewest": prefill_fewest,
    "end_to_end_factor_2": end_to_end_factor_2,
    "end_to_end_factor_3": end_to_end_factor_3,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows asked for, print the table and write it as JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        work = Workload(options.shape, options.device, options.dtype)
        print(json.dumps(_peak_memory(work, options.memory_of)))
        return 0
    transformers.logging.set_verbosity_error()
    names = options.rows.split(",") if options.rows else list(ROWS)
    work = Workload(options.shape, options.device, options.dtype, options.pairs)
    print(f"{options.shape}, {options.dtype}, {options.device}, {options.threads} threads, {options.pairs} pairs")
    print(f"{'ratio':>7}  {'95 % interval':<16}{'limit':>6} {'bar':>6}  {'':<7}{'ours':>9} {'peer':>9}")
    rows, started = [], time.perf_counter()
    for name in names:
        work.progress = _progress_line(name, options.pairs)
        row_started = time.perf_counter()
        measured = ROWS[name](work)
        row = _row(name, measured) | {"took_s": round(time.perf_counter() - row_started, 1)}
        rows.append(row)
        print(f"\r\033[K{_line(row)}" if sys.stdout.isatty() else _line(row), flush=True)
    report = _provenance(options) | {"took_s": round(time.perf_counter() - started, 1), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['took_s']:.0f} s in all; written to {options.output}")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava.training.benchmark", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="siglip-b-224+qwen2.5-0.5b")
    parser.add_argument(
        "--pairs",
        type=int,
        default=30,
        help=f"timed pairs of the rows against stock; others take at most {COUNT_PAIRS}",
    )
    parser.add_argument("--rows", help="comma-separated names; default: all of " + ", ".join(ROWS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, help="default: results/benchmark_<device>.json")
    parser.add_argument("--memory-of", choices=["identity", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set((options.rows or "").split(",")) - set(ROWS) - {""})
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; known: {', '.join(ROWS)}")
    if options.pairs < 1 or options.threads < 1:
        parser.error("--pairs and --threads must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    options.output = options.output or Path("results") / f"benchmark_{options.device}.json"
    options.command = sys.argv[1:] if arguments is None else arguments
    return options


def _row(name: str, measured: Measurement) -> dict:
    ratio = ratio_of_medians(measured.pairs)
    fields = {key: value for key, value in asdict(measured).items() if key != "pairs"}
    return {"name": name, **fields, **asdict(ratio), "met": measured.met(ratio), "pairs": measured.pairs}


def _line(row: dict) -> str:
    verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
    bar = "" if row["bar"] is None else f"{row['bar']:.3f}"
    scale, unit = (1000, "ms") if row["unit"] == "s" else (1, row["unit"])
    interval = f"{row['low']:.3f} - {row['high']:.3f}"
    sides = f"{row['median'] * scale:>9.4g} {row['peer_median'] * scale:>9.4g} {unit}"
    return f"{row['ratio']:>7.3f}  {interval:<16}{row['limit']:>6.3f} {bar:>6}  {verdict:<7}{sides}  {row['what']}"


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


def _provenance(options: argparse.Namespace) -> dict:
    command = "python -m adaptive_llava.training.benchmark " + " ".join(options.command)
    return provenance(command, device=options.device, threads=options.threads) | {
        name: getattr(options, name) for name in ("shape", "device", "dtype", "pairs")
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _measured_apart(work: Workload, side: str) -> dict[str, float]:
    command = [sys.executable, "-m", "adaptive_llava.training.benchmark", "--memory-of", side, "--shape", work.name]
    command += ["--device", work.device, "--dtype", work.dtype, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | _ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_memory(work: Workload, side: str) -> dict[str, float]:
    model, pixels = getattr(work, side), work.pixels(1)
    prompt = work.prompt(1, 1 if side == "identity" else work.patches)
    work.__dict__.pop("stock", None)  # ours has taken over its parts; only what a user would hold counts
    gc.collect()
    before = _start_peak(work.device)
    model.generate(**prompt, pixel_values=pixels, max_new_tokens=2, do_sample=False)
    peak = _peak(work.device)
    return {"peak_mb": peak / 1e6, "above_model_mb": (peak - before) / 1e6}


def _start_peak(device: str) -> int:
    # bytes in use now; the peak counts from here, so that building the model does not hide what running it takes
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _PROCESS.is_dir():
        (_PROCESS / "clear_refs").write_text("5")
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if _PROCESS.is_dir():  # not `ru_maxrss`, which on Linux starts at what the parent process had
        lines = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
