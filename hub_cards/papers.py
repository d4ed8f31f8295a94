"""Where the parts of a model come from: the papers that their files name, as BibTeX."""

from __future__ import annotations

import re
import sys
from typing import Any

from adaptive_llava.modeling import modality_prefusion, multi_block_fusion
from adaptive_llava.modeling.compressor_registry import COMPRESSORS
from adaptive_llava.modeling.router_registry import ROUTERS


_NUMBER = re.compile(r"arxiv\.org/abs/(\d{4}\.\d{5})")

# By arXiv number: key, authors, title, year.
PAPERS = {
    "2310.03744": (
        "liu2023improved",
        "Liu, Haotian and Li, Chunyuan and Li, Yuheng and Lee, Yong Jae",
        "Improved Baselines with Visual Instruction Tuning",
        2023,
    ),
    "2412.08771": (
        "wang2024llavazip",
        "Wang, Ke and Xuan, Hong",
        "{LLaVA-Zip}: Adaptive Visual Token Compression with Intrinsic Image Information",
        2024,
    ),
    "2501.03895": (
        "zhang2025llavamini",
        "Zhang, Shaolei and Fang, Qingkai and Yang, Zhe and Feng, Yang",
        "{LLaVA-Mini}: Efficient Image and Video Large Multimodal Models with One Vision Token",
        2025,
    ),
    "2506.07138": (
        "tang2025compact",
        "Tang, Hao and Shen, Chengchao",
        "Learning Compact Vision Tokens for Efficient Large Multimodal Models",
        2025,
    ),
}


def part_modules(config: Any) -> list[Any]:
    """The modules of the parts that a config asks for, compressor and router first."""
    classes = (COMPRESSORS[config.compressor["type"]], ROUTERS[config.router["type"]])
    modules = [sys.modules[part.__module__] for part in classes]
    if config.fusion_blocks is not None:
        modules.append(multi_block_fusion)
    if config.prefusion_layers:
        modules.append(modality_prefusion)
    return modules


def first_sentence(module: Any) -> str:
    """What a part does, in the words of its file."""
    return module.__doc__.split("\n\n")[0].replace("\n", " ").strip()


def bibtex(config: Any) -> list[str]:
    """LLaVA's paper, and those of the config's parts."""
    named = [number for module in part_modules(config) for number in _NUMBER.findall(module.__doc__)]
    return [_entry(number) for number in dict.fromkeys(["2310.03744", *named])]


def _entry(number: str) -> str:
    key, authors, title, year = PAPERS[number]
    return (
        f"@article{{{key},\n  author = {{{authors}}},\n  title = {{{title}}},\n"
        f"  journal = {{arXiv preprint arXiv:{number}}},\n  year = {{{year}}}\n}}"
    )
