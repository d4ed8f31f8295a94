"""What the test classes are called."""

from __future__ import annotations


PEER = "StockLlava"


def suite_name(preset: str) -> str:
    """Name of a preset's test class: `dynamic-resampler` is `DynamicResampler`."""
    return "".join(part.capitalize() for part in preset.split("-"))
