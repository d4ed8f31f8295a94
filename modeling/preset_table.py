"""The published systems, each a compressor and a router."""

from __future__ import annotations

from copy import deepcopy
from typing import Any


PRESETS: dict[str, dict[str, Any]] = {
    "llava": {"compressor": {"type": "identity"}, "router": {"type": "fixed"}},
    "avg-pool": {"compressor": {"type": "average_pool", "factors": [2]}, "router": {"type": "fixed"}},
    "random-pool": {"compressor": {"type": "average_pool", "factors": [1, 2, 3]}, "router": {"type": "random"}},
    "dfmr": {"compressor": {"type": "average_pool", "factors": [1, 2, 3]}, "router": {"type": "feature_std"}},
    "token-concat": {"compressor": {"type": "token_concat", "window": 2}, "router": {"type": "fixed"}},
    "stf": {"compressor": {"type": "spatial_fusion", "window": 2}, "router": {"type": "fixed"}},
    "mbtf": {"compressor": {"type": "identity"}, "router": {"type": "fixed"}, "fusion_blocks": "default"},
    "stf-mbtf": {
        "compressor": {"type": "spatial_fusion", "window": 2},
        "router": {"type": "fixed"},
        "fusion_blocks": "default",
    },
    "llava-mini": {
        "compressor": {"type": "query_resampler", "counts": [1], "key_positions": "enlarged"},
        "router": {"type": "fixed"},
        "prefusion_layers": 4,
    },
    "dynamic-resampler": {
        "compressor": {"type": "query_resampler", "counts": [1, 256]},
        "router": {"type": "classifier"},
    },
    "dynamic-resampler-multi": {
        "compressor": {"type": "query_resampler", "counts": [1, 4, 16, 64, 256]},
        "router": {"type": "classifier"},
    },
}

PRESET_ALIASES = {"llava-zip": "dfmr", "llava-stf": "stf-mbtf"}


def preset_options(name: str) -> dict[str, Any]:
    """Config fields of a preset or alias.

    Raises:
        ValueError: Unknown name; the known ones are listed.
    """
    known = PRESET_ALIASES.get(name, name)
    if known not in PRESETS:
        aliases = ", ".join(f"{alias} (= {target})" for alias, target in PRESET_ALIASES.items())
        raise ValueError(f"`preset={name!r}` is unknown. Known presets: {', '.join(PRESETS)}; aliases: {aliases}.")
    return deepcopy(PRESETS[known])
