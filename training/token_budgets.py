"""Token budgets as a command line names them: `16,64,auto`."""

from __future__ import annotations

from typing import Any

from adaptive_llava import AdaptiveLlavaConfig


AUTO = "auto"


def adaptive_config(model: str) -> AdaptiveLlavaConfig:
    """The config of a folder or Hub id.

    Raises:
        ValueError: It is a model of another kind.
    """
    kind = AdaptiveLlavaConfig.get_config_dict(model)[0].get("model_type")
    if kind != AdaptiveLlavaConfig.model_type:
        raise ValueError(
            f"`--model {model}` is of type {kind!r}. Give it a compressor and a router first: `python -m "
            "adaptive_llava convert --from MODEL --to FOLDER --preset dfmr`."
        )
    return AdaptiveLlavaConfig.from_pretrained(model)


def read_budgets(text: str | None, config: Any) -> tuple[list[int], bool]:
    """Numbers of tokens, ascending, and whether the router's own choice is asked for.

    Args:
        text: Numbers and `auto`, separated by commas; all counts of the model and `auto` by default.
        config: That of the model.

    Raises:
        ValueError: No numbers, numbers below the smallest count, or none for a model that cuts images into tiles.
    """
    counts = list(config.visual_token_counts)
    if text is None:
        if config.tiling["type"] == "anyres":
            raise ValueError(
                "`--budgets` is missing: this model cuts images into tiles, and budgets are for whole images. Pass "
                "some, such as `--budgets 300,600,auto`."
            )
        return sorted(set(counts)), True
    parts = [part.strip() for part in text.split(",")]
    if not all(part == AUTO or part.isdecimal() for part in parts):
        raise ValueError(f"`--budgets {text}` must be whole numbers of tokens and 'auto', separated by commas.")
    numbers = sorted({int(part) for part in parts if part != AUTO})
    if numbers and numbers[0] < counts[0]:
        raise ValueError(f"`--budgets {text}`: this model spends at least {counts[0]} tokens (counts: {counts}).")
    return numbers, AUTO in parts


def named_budgets(numbers: list[int], routed: bool) -> dict[str, int | str]:
    """`visual_token_budget` by name, cheapest first, the router's own choice last."""
    return {**{str(number): number for number in numbers}, **({AUTO: AUTO} if routed else {})}
