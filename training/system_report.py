"""What every published system adds to LLaVA-1.5, and how far it is from its authors' code.

    python -m adaptive_llava.training.system_report --golden ../shared/golden --output results/

Parameters and matrix-multiplication FLOPs are counted on LLaVA-1.5-7B's shapes (CLIP-L/336 tower, 576 patches, 4096
wide language model) without storage. Parity runs recorded inputs and weights of the authors' code through our parts in
fp32. Writes `systems.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adaptive_llava import PRESETS, AdaptiveLlavaConfig
from adaptive_llava.modeling.projector import AdaptiveLlavaProjector
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.flop_counts import prefusion_flops, vision_tower_flops
from adaptive_llava.training.golden_parity import parity_errors


NAME = "systems"
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
INSTRUCTION = 40  # ids of text beside an image, for pre-fusion


def describe_preset(preset: str) -> dict[str, Any]:
    """Token counts, parameters and FLOPs per image of a preset.

    Returns:
        `token_counts`, fewest first, and under `parts` for each part its `parameters` and its `gflops`: one number per
        token count, without norms, activations and pooling, which multiply no matrices.
    """
    config = AdaptiveLlavaConfig.from_preset(preset, text_config=LLAMA_7B)
    counts = config.visual_token_counts
    with torch.device("meta"):
        fusion, compressor, prefusion = config.build_fusion(), config.build_compressor(), config.build_prefusion()
    router = config.build_router(compressor)  # small; and autocast, which it turns off, knows no meta device
    routing = _flops(router, _features(config, compressor.input_dim, router.needs_blocks))
    with torch.device("meta"):
        projector = AdaptiveLlavaProjector.from_config(config, compressor)
        features = _features(config, compressor.input_dim, router.needs_blocks)
        states = dict.fromkeys(config.fusion_blocks or (), features.patches)
        rungs = range(len(counts))
        # pre-fusion reads all patches through the projector
        patches = features.patches.shape[1] if prefusion is not None else 0
        projected = [torch.empty(count + patches, compressor.output_dim) for count in counts]
        parts = {
            "multi_block_fusion": _part(fusion, [_flops(fusion, states) for _ in rungs]) if fusion else None,
            "compressor": _part(compressor, [_flops(compressor.compress, features, rung) for rung in rungs]),
            "router": _part(router, [routing for _ in rungs]),
            "projector": _part(projector, [_flops(projector, tokens) for tokens in projected]) if projector else None,
        }
    if prefusion is not None:
        cost = [
            prefusion_flops(config.text_config, config.prefusion_layers, patches, count + INSTRUCTION)
            for count in counts
        ]
        parts["modality_prefusion"] = _part(prefusion, cost)
    return {
        "compressor": config.compressor,
        "router": config.router,
        "token_counts": list(counts),
        "parts": {name: part for name, part in parts.items() if part is not None},
    }


def report(golden: Path) -> dict[str, Any]:
    """All presets, each with its parity errors; see `describe_preset` and `parity_errors`."""
    config = AdaptiveLlavaConfig(text_config=LLAMA_7B)
    return {
        "shape": "CLIP-L/336 tower, 24x24 patches, language model 4096 wide",
        "tower_gflops": vision_tower_flops(config.vision_config) / 1e9,
        "instruction_ids": INSTRUCTION,
        "systems": {preset: describe_preset(preset) | {"parity": parity_errors(golden, preset)} for preset in PRESETS},
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the report, and print it in short."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of the authors' recorded tensors")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the result file")
    options = parser.parse_args(arguments)
    if not options.golden.is_dir():
        parser.error(f"`--golden={options.golden}`: there is no such folder.")
    result = report(options.golden)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{NAME}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for preset, row in result["systems"].items():
        worst = max(row["parity"].values(), default=None)
        print(f"{preset:<24} {row['token_counts']}  parity {'-' if worst is None else format(worst, '.1e')}")
    print(f"Results: {path}")
    return 0


def _features(config: AdaptiveLlavaConfig, patch_dim: int, blocks: tuple[int, ...]) -> VisionFeatures:
    height, width = config.view_grid
    side, dim = config.vision_config.image_size, config.vision_feature_dim
    return VisionFeatures(
        patches=torch.empty(1, height * width, patch_dim),
        grid=(height, width),
        cls=torch.empty(1, dim),
        pixels=torch.empty(1, 3, side, side),
        views_per_image=(1,),
        blocks=dict.fromkeys(blocks, torch.empty(1, height * width, dim)),
        layer_cls=torch.empty(1, patch_dim),
    )


def _flops(call: Callable[..., Any], *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return int(counter.get_total_flops())


def _part(module: nn.Module, flops: list[int]) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {"parameters": parameters, "gflops": [round(value / 1e9, 4) for value in flops]}


if __name__ == "__main__":
    raise SystemExit(main())
