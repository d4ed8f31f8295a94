"""Turn a LLaVA checkpoint into an adaptive LLaVA model, shard by shard.

    python -m adaptive_llava convert --from llava-hf/llava-1.5-7b-hf --to out/llava-dfmr --preset dfmr

The source is recognised by its tensors: LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision in transformers' layout, LLaVA-1.5
and LLaVA-NeXT in their authors' layout, and LLaVA-STF and LLaVA-Mini, which bring a compressor. Weights, tokenizer,
image processor and chat template are the source's own; the folder holds the code too, so that it loads with
`trust_remote_code=True` where this package is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, LlavaProcessor
from transformers.tokenization_utils_base import AddedToken

from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.modeling.modeling_adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.preset_table import PRESET_ALIASES, PRESETS, preset_options
from adaptive_llava.processing.processing_adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.training import original_llava
from adaptive_llava.training.checkpoint_layouts import VISION_TOWER, Layout, recognise
from adaptive_llava.training.checkpoint_plan import SourceTensors, plan, stock_model
from adaptive_llava.training.checkpoint_shards import CheckpointFiles, checkpoint_folder, write_shards
from adaptive_llava.training.whole_folder import check_free, whole_folder


MAX_SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        kind: What the source was recognised as.
        preset: Published system that it became.
        config: The new model's.
        notes: What was added or had to be assumed, in lines to print.
    """

    kind: str
    preset: str
    config: AdaptiveLlavaConfig
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    preset: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    vision_tower: str | os.PathLike | None = None,
    window: int | None = None,
    fusion_blocks: Sequence[int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:
    """Convert a checkpoint; the target appears only when it is complete.

    Args:
        source: Folder or Hub id.
        target: Folder to write; must not exist, or be empty.
        preset: One of the published systems; by default `"llava"`, or the one that the source was trained as.
        revision: Branch, tag or commit of a Hub id.
        dtype: Type of the saved weights; `"auto"` keeps each tensor's own.
        vision_tower: Folder or Hub id of the vision tower of a source in the authors' layout, which may hold its
            weights or not; by default the one that its config names.
        window: Side of the windows that a LLaVA-STF checkpoint fuses, in patches, where shapes leave it open.
        fusion_blocks: The hidden states that a LLaVA-STF checkpoint fuses, likewise.
        max_shard_bytes: Size of a file of weights, and about the memory that is needed.

    Raises:
        ValueError: Unknown preset, a source that is not there or not known, or a target that is there.
    """
    if preset is not None:
        preset_options(preset)
    check_free(target)
    folder = checkpoint_folder(source, revision)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_config(found)
        files = CheckpointFiles(folder)
        layout = recognise({name: tensor.shape for name, tensor in files.stored.items()}, found)
        preset = _choose_preset(layout, preset)
        weights = SourceTensors(files, layout.rows, None if dtype == "auto" else getattr(torch, dtype))
        if layout.original:
            options = {"window": window, "fusion_blocks": fusion_blocks}
            model, processor, notes = _from_authors(folder, found, layout, weights, preset, vision_tower, options)
        else:
            if vision_tower is not None:
                raise ValueError(f"{layout.title} brings its vision tower. Leave out `--vision-tower`.")
            model, processor, notes = _from_transformers(folder, weights, preset)
    except ValueError as error:
        raise ValueError(f"`--from={str(source)!r}`: {error}") from error
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], weights.language_dtype
    with whole_folder(target) as new:
        write_shards(new, plan(model, weights), max_bytes=max_shard_bytes, after_shard=weights.close)
        config.save_pretrained(new)
        model.generation_config.save_pretrained(new)
        processor.save_pretrained(new)
    return Conversion(layout.title, preset, config, tuple(notes))


def describe(conversion: Conversion) -> list[str]:
    """What was converted, in lines to print."""
    config = conversion.config
    counts, part = config.visual_token_counts, "view" if config.tiling["type"] == "anyres" else "image"
    lines = [
        f"source       {conversion.kind}",
        f"compressor   {_options(config.compressor)}",
        f"router       {_options(config.router)}",
        f"patch grid   {config.vision_grid[0]}x{config.vision_grid[1]}",
        "tokens       " + ", ".join(f"{count} (rung {rung})" for rung, count in enumerate(counts)) + f" per {part}",
        *conversion.notes,
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
    parser.add_argument("--from", dest="source", required=True, help="folder or Hub id of a LLaVA checkpoint")
    parser.add_argument("--to", dest="target", required=True, help="folder to write")
    parser.add_argument("--preset", help=f"one of: {', '.join(PRESETS)} (default: llava, or what the source is)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--vision-tower", help="CLIP folder or Hub id, for checkpoints in the authors' layout")
    parser.add_argument("--window", type=int, help="LLaVA-STF: side of the fused windows, in patches")
    parser.add_argument("--fusion-blocks", type=int, nargs="+", help="LLaVA-STF: the hidden states that are fused")
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, help="default: %(default)s")
    options = vars(parser.parse_args(arguments))
    try:
        conversion = convert(**options)
    except ValueError as error:
        parser.error(str(error))
    kept = f"preset {conversion.preset!r}, {conversion.config.dtype}"
    print(f"Converted {options['source']} to {options['target']} ({kept})")
    print("\n".join(describe(conversion)))
    return 0


def _check_config(found: dict[str, Any]) -> None:
    if found.get("model_type") == "adaptive_llava":
        raise ValueError("this is an adaptive LLaVA model already: load it with `AutoModelForImageTextToText`.")
    if found.get("quantization_config"):
        raise ValueError("its weights are quantised. Convert the original ones, and quantise when loading.")
    if found.get("mm_use_im_start_end"):
        raise ValueError("its prompts frame images (`mm_use_im_start_end`), which no chat template here does.")


def _choose_preset(layout: Layout, asked: str | None) -> str:
    if layout.preset is None:
        return asked or "llava"
    if asked is not None and PRESET_ALIASES.get(asked, asked) != layout.preset:
        raise ValueError(
            f"this is {layout.title}, whose projector has learned with its own compressor, preset {layout.preset!r}. "
            f"Leave out `--preset={asked}`, or give that preset to a plain LLaVA checkpoint."
        )
    preset_options(layout.preset)
    return layout.preset


def _from_transformers(folder: Path, weights: SourceTensors, preset: str) -> tuple[Any, Any, list[str]]:
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    weights.settle_tie(text, bool(text.tie_word_embeddings or config.tie_word_embeddings))
    stock = stock_model(config, weights, may_grow=False)
    stock.generation_config = _generation_config(folder, text)
    model = AdaptiveLlavaForConditionalGeneration.from_llava(stock, preset=preset)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options, _ = LlavaProcessor.get_processor_dict(folder)
    processor = AdaptiveLlavaProcessor.from_config(
        model.config,
        tokenizer,
        AutoImageProcessor.from_pretrained(folder),
        chat_template=options.get("chat_template") or tokenizer.chat_template or "vicuna",
        image_token=options.get("image_token", "<image>"),
    )
    return model, processor, []


def _from_authors(
    folder: Path,
    found: dict[str, Any],
    layout: Layout,
    weights: SourceTensors,
    preset: str,
    vision_tower: str | os.PathLike | None,
    options: dict[str, Any],
) -> tuple[Any, Any, list[str]]:
    tower = _tower_folder(found, vision_tower, with_weights=not weights.has_part("model.vision_tower."))
    vision = original_llava.read_vision_config(tower)
    if not weights.has_part("model.vision_tower."):
        weights.add(CheckpointFiles(tower), VISION_TOWER)
    rows = weights.vocabulary
    text = original_llava.read_text_config(found, rows)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=text)
    notes = []
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
        notes.append(f"added        token <image> as id {tokenizer.convert_tokens_to_ids('<image>')}")
    text.vocab_size = max(rows, len(tokenizer))
    weights.settle_tie(text, text.tie_word_embeddings)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    generation = _generation_config(folder, text)
    if layout.preset is None:
        stock = stock_model(original_llava.stock_config(found, vision, text, image_token_id), weights, may_grow=True)
        stock.generation_config = generation
        model = AdaptiveLlavaForConditionalGeneration.from_llava(stock, preset=preset)
    else:
        fields, assumed = original_llava.system_options(found, weights.shapes, vision, preset, **options)
        notes += assumed
        if "model.compressor.pos_embed" in weights.shapes:
            original_llava.check_stored_positions(weights.files.read("model.compressor.pos_embed"))
        config = AdaptiveLlavaConfig.from_preset(
            preset, vision_config=vision, text_config=text, image_token_id=image_token_id, **fields
        )
        with torch.device("meta"):
            model = AdaptiveLlavaForConditionalGeneration(config)
        weights.check(model, may_grow=True)
        model.generation_config = generation
    template = original_llava.original_chat_template(found, tokenizer)
    if template is None:
        notes.append("missing      a chat template: none is known for this language model")
    images = original_llava.original_image_processor(found, tower, vision)
    return model, AdaptiveLlavaProcessor.from_config(model.config, tokenizer, images, chat_template=template), notes


def _tower_folder(found: dict[str, Any], given: str | os.PathLike | None, *, with_weights: bool) -> Path:
    named = given or found.get("mm_vision_tower")
    if named is None:
        raise ValueError("its config.json names no vision tower (`mm_vision_tower`). Pass `--vision-tower`.")
    return checkpoint_folder(named, argument="--vision-tower", with_weights=with_weights)


def _generation_config(folder: Path, text: Any) -> GenerationConfig:
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(text)
    generation = GenerationConfig.from_pretrained(folder)
    if not generation.do_sample:
        # the authors left sampling values in files that do not sample; newer releases refuse to write that
        for name in ("temperature", "top_p", "top_k"):
            setattr(generation, name, None)
    return generation


def _options(options: dict[str, Any]) -> str:
    rest = ", ".join(f"{name}={value}" for name, value in options.items() if name != "type")
    return f"{options['type']}({rest})"
