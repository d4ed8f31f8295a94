"""Give a LLaVA-1.5 checkpoint a compressor and a router, and save it as an adaptive LLaVA model.

    python -m adaptive_llava convert --from llava-hf/llava-1.5-7b-hf --to out/llava-dfmr --preset dfmr

Weights, tokenizer, image processor and chat template are the source's own; the folder holds the code too, so that it
loads with `trust_remote_code=True` where this package is not installed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor, PretrainedConfig

from adaptive_llava.modeling.modeling_adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.preset_table import PRESETS, preset_options
from adaptive_llava.processing.processing_adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.training.whole_folder import check_free, whole_folder


# Formats of the LLaVA authors' own code base, which transformers does not read.
_ORIGINAL_FORMATS = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    preset: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
) -> AdaptiveLlavaForConditionalGeneration:
    """Convert a checkpoint; the target appears only when it is complete.

    Args:
        source: Folder or Hub id of a LLaVA-1.5 model in transformers' format.
        target: Folder to write; must not exist, or be empty.
        preset: One of the published systems.
        revision: Branch, tag or commit of a Hub id.
        dtype: Type of the saved weights; `"auto"` keeps the source's.

    Raises:
        ValueError: Unknown preset, another architecture, a source that is not there, or a target that is.
    """
    preset_options(preset)
    check_free(target)
    _check_source(source, revision)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(
        str(source), preset=preset, revision=revision or "main", dtype=dtype
    )
    original: Any = LlavaProcessor.from_pretrained(str(source), revision=revision or "main")
    processor = AdaptiveLlavaProcessor.from_config(
        model.config,
        original.tokenizer,
        original.image_processor,
        chat_template=original.chat_template or original.tokenizer.chat_template or "vicuna",
        image_token=original.image_token,
    )
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model


def describe(model: AdaptiveLlavaForConditionalGeneration) -> list[str]:
    """What a converted model is, in lines to print."""
    config = model.config
    counts = config.visual_token_counts
    lines = [
        f"compressor   {_options(config.compressor)}",
        f"router       {_options(config.router)}",
        f"patch grid   {config.vision_grid[0]}x{config.vision_grid[1]}",
        "tokens       " + ", ".join(f"{count} (rung {rung})" for rung, count in enumerate(counts)) + " per image",
    ]
    if config.fusion_blocks is not None:
        blocks = ", ".join(map(str, config.fusion_blocks))
        lines.insert(0, f"fusion       hidden states {blocks} of the vision tower ({config.fusion_variant})")
    if config.router.get("thresholds"):
        lines.append("next         choose thresholds for your images: python -m adaptive_llava calibrate --help")
    if not config.compressor_trained:
        lines.append("next         fine-tune: fusion, compressor or projector have new weights")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava convert", description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", required=True, help="folder or Hub id of a LLaVA-1.5 model")
    parser.add_argument("--to", dest="target", required=True, help="folder to write")
    parser.add_argument("--preset", default="llava", help=f"one of: {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    options = parser.parse_args(arguments)
    try:
        model = convert(options.source, options.target, options.preset, revision=options.revision, dtype=options.dtype)
    except ValueError as error:
        parser.error(str(error))
    print(f"Converted {options.source} to {options.target} (preset {options.preset!r}, {model.dtype})")
    print("\n".join(describe(model)))
    return 0


def _check_source(source: str | os.PathLike, revision: str | None) -> None:
    if not Path(source).is_dir() and str(source).startswith((".", "/", "~")):
        raise ValueError(f"`--from={str(source)!r}`: there is no such folder. Check the path.")
    try:
        found, _ = PretrainedConfig.get_config_dict(str(source), revision=revision or "main")
        reason = "the file is missing"
    except OSError as error:
        found, reason = {}, str(error)
    if not found:
        raise ValueError(f"`--from={str(source)!r}` has no config.json that can be read: {reason}.")
    kind = found.get("model_type")
    if kind == "llava":
        return
    names = ", ".join(found.get("architectures") or ["no named architecture"])
    advice = "Pass a LLaVA-1.5 checkpoint, such as llava-hf/llava-1.5-7b-hf."
    if kind in _ORIGINAL_FORMATS:
        advice = (
            "This is the LLaVA authors' own format: convert it with transformers' "
            "convert_llava_weights_to_hf.py first, or take the same model from the llava-hf organisation."
        )
    elif kind == "adaptive_llava":
        advice = "It is an adaptive LLaVA model already: load it with `AutoModelForImageTextToText`."
    raise ValueError(
        f"`--from={str(source)!r}` is a {kind!r} model ({names}), and only 'llava' is known here. {advice}"
    )


def _options(options: dict[str, Any]) -> str:
    rest = ", ".join(f"{name}={value}" for name, value in options.items() if name != "type")
    return f"{options['type']}({rest})"
