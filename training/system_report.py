"""What every published system adds to LLaVA-1.5, and how far it is from its authors' code.

    python -m adaptive_llava.training.system_report --golden ../shared/golden --output results/

Parameters and matrix-multiplication FLOPs are counted on LLaVA-1.5-7B's shapes (CLIP-L/336 tower, 576 patches, 4096
wide language model) without storage. Parity runs recorded inputs and weights of the authors' code through our parts in
fp32. Writes `systems.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from adaptive_llava import PRESETS, AdaptiveLlavaConfig
from adaptive_llava.modeling.projector import AdaptiveLlavaProjector
from adaptive_llava.training.flop_counts import count_flops, vision_tower_flops
from adaptive_llava.training.golden_parity import parity_errors
from adaptive_llava.training.published_figures import llama_7b


NAME = "systems"
INSTRUCTION = 40  # ids of text beside an image, for pre-fusion


def describe_preset(preset: str) -> dict[str, Any]:
    """Token counts, parameters and FLOPs per image of a preset.

    Returns:
        `token_counts`, fewest first, and under `parts` for each part its `parameters` and its `gflops`: one number per
        token count, without norms, activations and pooling, which multiply no matrices.
    """
    config = AdaptiveLlavaConfig.from_preset(preset, text_config=llama_7b())
    counts = config.visual_token_counts
    with torch.device("meta"):
        compressor = config.build_compressor()
        parts = {
            "multi_block_fusion": config.build_fusion(),
            "compressor": compressor,
            "router": config.build_router(compressor),
            "projector": AdaptiveLlavaProjector.from_config(config, compressor),
            "modality_prefusion": config.build_prefusion(),
        }
    flops = [count_flops(config, count, INSTRUCTION).parts for count in counts]
    return {
        "compressor": config.compressor,
        "router": config.router,
        "token_counts": list(counts),
        "parts": {
            name: {
                "parameters": sum(parameter.numel() for parameter in part.parameters()),
                "gflops": [round(row[name] / 1e9, 4) for row in flops],
            }
            for name, part in parts.items()
            if part is not None
        },
    }


def report(golden: Path) -> dict[str, Any]:
    """All presets, each with its parity errors; see `describe_preset` and `parity_errors`."""
    config = AdaptiveLlavaConfig(text_config=llama_7b())
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


if __name__ == "__main__":
    raise SystemExit(main())
