"""What a prompt costs at every token count: FLOPs by part, cache bytes, and times beside what the FLOPs predict.

    python -m adaptive_llava profile --shape clip-s-224+qwen2-30m --output results/profile.json
    python -m adaptive_llava profile --model out/my-model --images 4
    python -m adaptive_llava profile --shape llava-1.5-7b --count-only --output results/flops_7b.json

Without `--model`, presets on backbones of a shape with random weights, which cost the same. FLOPs come from the config
alone (`flop_counts.py`), so that `--count-only` builds no weights; on LLaVA-1.5-7B's shape the JSON also holds the
papers' figures beside ours. Times are medians; in brackets, measured over predicted (`part_timing.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from adaptive_llava import PRESETS, AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.preset_table import preset_options
from adaptive_llava.training.benchmark import provenance
from adaptive_llava.training.benchmark_shapes import SHAPES
from adaptive_llava.training.benchmark_workload import TEXT_TOKENS, Workload
from adaptive_llava.training.flop_counts import kv_cache_bytes
from adaptive_llava.training.part_timing import PARTS, Prompt, time_parts
from adaptive_llava.training.published_figures import cache_beside_published, flops_beside_published


SHAPE = "clip-s-224+qwen2-30m"
_TITLES = {
    "vision_tower": "tower",
    "compressor": "compressor",
    "projector": "projector",
    "modality_prefusion": "pre-fusion",
    "language_model": "LLM",
    "end_to_end": "end to end",
}


def count(config: AdaptiveLlavaConfig, prompt: Prompt, visual_tokens: int, *, bytes_per_value: int) -> dict[str, Any]:
    """One count's FLOPs and cache bytes, as a row of the JSON."""
    counts = prompt.flops(config, visual_tokens)
    flops = {name: sum(counts.parts[part] for part in parts) for name, parts in PARTS.items()}
    return {
        "visual_tokens": visual_tokens,
        "flops": flops | {"end_to_end": counts.end_to_end, "llm_visual_only": counts.visual_only},
        "parts": counts.parts,
        "kv_bytes_per_image": kv_cache_bytes(config.text_config, visual_tokens, bytes_per_value=bytes_per_value),
    }


def profile(
    config: AdaptiveLlavaConfig,
    prompt: Prompt,
    model: AdaptiveLlavaForConditionalGeneration | None = None,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    pairs: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """One row per token count, fewest first; with a model, timed.

    Args:
        config: What to count.
        prompt: Text and images.
        model: The model of this config, to be timed.
        dtype: Of the cache.
        device: Where the model is.
        pairs: Timed runs of each part.
        clock: As in `timed_pairs`.
    """
    rows = []
    for rung, tokens in enumerate(prompt.counts(config)):
        row = count(config, prompt, tokens, bytes_per_value=dtype.itemsize)
        if model is not None:
            row["times"] = time_parts(model, prompt, rung, pairs=pairs, device=device, clock=clock)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Profile as the command line says, print the tables and write the JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    systems: dict[str, list[dict[str, Any]]] = {}
    _print_head(options)
    for name, config, model in _systems(options, dtype):
        size = _image_size(options, config)
        prompt = Prompt(options.text_tokens, options.images, size)
        measuring: Any = {"device": options.device, "pairs": options.pairs, "clock": clock}
        systems[name] = profile(config, prompt, model, dtype=dtype, **measuring)
        for row in systems[name]:
            print(_line(name, row), flush=True)
    command = "python -m adaptive_llava profile " + " ".join(options.command)
    report = provenance(command.strip(), device=options.device, threads=options.threads) | {
        "shape": options.model or options.shape,
        "dtype": options.dtype,
        "seconds": None if options.count_only else "of the CPU" if options.cpu_seconds else "on the clock",
        "images": options.images,
        "text_tokens": options.text_tokens,
        "systems": systems,
    }
    if options.count_only and options.model is None and options.shape == "llava-1.5-7b":
        report["published_flops"] = flops_beside_published(options.text_tokens)
        report["published_memory"] = cache_beside_published()
        _print_published(report)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {options.output}")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="folder or Hub id of an adaptive LLaVA model, in place of shape and presets")
    parser.add_argument("--shape", choices=sorted(SHAPES), default=SHAPE, help="backbones (%(default)s)")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="PRESET", help="default: all")
    parser.add_argument("--images", type=int, default=1, help="images in the prompt (%(default)s)")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of AnyRes, in pixels")
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, help="text ids of the prompt (%(default)s)")
    parser.add_argument("--count-only", action="store_true", help="build no weights and time nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--pairs", type=int, default=10, help="timed runs of each part (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--cpu-seconds", action="store_true", help="time what the CPU computes, on a busy machine")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if min(options.pairs, options.threads, options.images, options.text_tokens) < 1:
        parser.error("--pairs, --threads, --images and --text-tokens must be at least 1")
    if options.device == "cuda" and not options.count_only and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    if options.device == "cuda" and options.cpu_seconds:
        parser.error("--cpu-seconds says nothing of a GPU; leave it out")
    for preset in options.presets:
        preset_options(preset)
    options.command = sys.argv[1:] if arguments is None else arguments
    return options


def _systems(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Name, config and, unless nothing is timed, model of each system; one model at a time."""
    if options.model is not None:
        if options.count_only:
            yield options.model, AdaptiveLlavaConfig.from_pretrained(options.model), None
            return
        model = AdaptiveLlavaForConditionalGeneration.from_pretrained(options.model, dtype=dtype)
        yield options.model, model.config, model.to(options.device).eval()
        return
    work = Workload(options.shape, options.device, options.dtype)
    for preset in options.presets:
        if options.count_only:
            fields: Any = {"vision_config": work.vision, "text_config": work.text}
            yield preset, AdaptiveLlavaConfig.from_preset(preset, **fields), None
        else:
            model = AdaptiveLlavaForConditionalGeneration.from_llava(work.stock, preset)
            model = model.to(options.device, dtype).eval()
            yield preset, model.config, model


def _image_size(options: argparse.Namespace, config: AdaptiveLlavaConfig) -> tuple[int, int] | None:
    if config.tiling["type"] != "anyres":
        return None
    side = 2 * config.tiling["tile_size"]
    height, width = options.image_size or (side, side)
    return height, width


def _print_head(options: argparse.Namespace) -> None:
    where = "counted" if options.count_only else f"{options.device}, {options.threads} threads"
    shape = options.model or options.shape
    print(
        f"{shape}, {options.dtype}, {where}; {options.images} image(s) and {options.text_tokens} text ids in a prompt"
    )
    print(
        "GFLOPs of each part, of all, and of the LLM over visual tokens alone (the STF paper's); MB of cache per image"
    )
    columns = "".join(f"{title:>14}" for title in _TITLES.values())
    print(f"{'':<24}{'tokens':>7}{columns}{'visual only':>13}{'KV MB':>9}")


def _line(name: str, row: dict[str, Any]) -> str:
    flops = row["flops"]
    cells = "".join(f"{flops[part] / 1e9:>14.5g}" for part in _TITLES)
    only, cached = flops["llm_visual_only"] / 1e9, row["kv_bytes_per_image"] / 1e6
    line = f"{name[-24:]:<24}{row['visual_tokens']:>7}{cells}{only:>13.5g}{cached:>9.4g}"
    if "times" in row:
        line += f"\n{'  ms (over predicted)':<31}" + "".join(
            f"{_time(row['times'].get(part)):>14}" for part in _TITLES
        )
    return line


def _time(timed: dict[str, Any] | None) -> str:
    if timed is None:
        return "-"
    ratio = timed.get("measured_over_predicted")
    rounded = "" if ratio is None else f" ({ratio:.2f})" if ratio < 100 else f" ({ratio:.0f})"
    return f"{timed['seconds'] * 1e3:.3g}{rounded}"


def _print_published(report: dict[str, Any]) -> None:
    print(f"\n{'ours':>9} {'paper':>8} {'ratio':>6}  TFLOPs, by the convention of the paper")
    for row in report["published_flops"]:
        fields = ", ".join(f"{name}={value}" for name, value in row["fields"].items())
        what = f"{row['preset']} at {row['visual_tokens']}, {row['counts']}" + (f" ({fields})" if fields else "")
        print(f"{row['tflops']:>9.5g} {row['published_tflops']:>8} {row['ours_over_published']:>6}  {what}")
    print(f"{'ours':>9} {'paper':>8}         MB per image: keys and values in bfloat16, and the paper's memory")
    for row in report["published_memory"]:
        print(f"{row['kv_mb']:>9.4g} {row['published_mb']:>8}         {row['preset']} at {row['visual_tokens']}")


if __name__ == "__main__":
    sys.exit(main())
