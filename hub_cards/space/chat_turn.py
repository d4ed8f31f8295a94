"""One turn of the demo's chat: the same question at the chosen count and at the full one, timed and counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adaptive_llava.modeling.view_geometry import ImageViews, cut_image, image_costs
from adaptive_llava.training.flop_counts import count_flops


Message = dict[str, Any]

_QUICK_MS = 500  # both runs together: below, a machine's other work would show in the comparison
_REPEATS = 4


@dataclass(frozen=True)
class Run:
    """One answer and what it took.

    Attributes:
        answer: What the model wrote.
        tokens: Visual tokens of each image of the prompt.
        rungs: Rung of each view.
        flops: Up to the first answer token; `None` for a model that `count_flops` does not know.
        first_token_ms: Milliseconds up to the first answer token, the vision tower included.
        total_ms: Milliseconds up to the last one.
    """

    answer: str
    tokens: tuple[int, ...]
    rungs: tuple[int, ...]
    flops: int | None
    first_token_ms: float
    total_ms: float


def user_message(text: str, images: Sequence[Image.Image] = ()) -> Message:
    """A message of the visitor: its images, then its text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """A message of the model."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def images_of(messages: Sequence[Message]) -> list[Image.Image]:
    """All images of a chat, in prompt order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def next_prompt(history: Sequence[Message], question: Message, *, remember: bool) -> list[Message]:
    """What the model reads of a chat.

    Args:
        history: The turns before.
        question: The new message.
        remember: Whether earlier turns are part of the prompt. If not, a question without images is about the latest
            ones of the chat.

    Raises:
        ValueError: There is no image to ask about.
    """
    if remember:
        messages = [*history, question]
    elif images_of([question]):
        messages = [question]
    else:
        shown = [images for message in history if (images := images_of([message]))]
        messages = [user_message(question["content"][-1]["text"], shown[-1] if shown else ())]
    if not images_of(messages):
        raise ValueError("There is no image yet. Upload one, and ask about it.")
    return messages


def prepare(processor: Any, messages: Sequence[Message]) -> Any:
    """Inputs of the model for a chat; placeholders and other control tokens that somebody typed are plain text.

    Args:
        processor: The model's processor.
        messages: Made of `user_message` and `assistant_message`: their images are PIL images, never addresses.
    """
    return processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def run(
    model: Any,
    processor: Any,
    inputs: Any,
    *,
    budget: int | str | None = None,
    rungs: Sequence[int] | None = None,
    max_new_tokens: int = 128,
) -> Run:
    """Answer a prepared prompt.

    Args:
        model: An adaptive LLaVA model.
        processor: Its processor.
        inputs: Result of `prepare`.
        budget: Tokens per image, or `"auto"` for the router.
        rungs: One rung per view, replayed exactly.
        max_new_tokens: Length of the answer at most.

    Raises:
        ValueError: A budget below the smallest count.
    """
    watch = _Stopwatch()
    found = model.generate(
        **inputs.to(model.device),
        visual_token_budget=budget,
        visual_rungs=rungs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=watch,
        return_dict_in_generate=True,
    )
    total = watch.milliseconds()
    ids = inputs["input_ids"]
    answer = processor.decode(found.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip()
    tokens = tuple(found.num_visual_tokens.tolist())
    text_tokens = int((ids != model.config.image_token_id).sum())
    sizes = [tuple(size) for size in torch.as_tensor(inputs["image_sizes"]).tolist()]
    chosen = tuple(found.visual_rungs.tolist())
    flops = _flops(model.config, tokens, text_tokens, sizes, chosen)
    return Run(answer, tokens, chosen, flops, watch.first, total)


def run_both(model: Any, processor: Any, messages: Sequence[Message], budget: int | str) -> tuple[Run, Run]:
    """The answer at a budget, and at the most tokens that the model can spend on these images.

    Runs of a few milliseconds are repeated in turn, and the fastest of each side counts.

    Args:
        model: An adaptive LLaVA model.
        processor: Its processor.
        messages: Result of `next_prompt`.
        budget: Tokens per image, or `"auto"`.
    """
    inputs = prepare(processor, messages)
    chosen = run(model, processor, inputs, budget=budget)
    top = [model.model.compressor.num_rungs - 1] * len(chosen.rungs)
    full = run(model, processor, inputs, rungs=top)
    if chosen.total_ms + full.total_ms < _QUICK_MS:
        for _ in range(_REPEATS):
            chosen = _faster(chosen, run(model, processor, inputs, rungs=chosen.rungs))
            full = _faster(full, run(model, processor, inputs, rungs=top))
    return chosen, full


def warm_up(model: Any, processor: Any) -> None:
    """Answer once, so that the first visitor's milliseconds are no slower than the others'."""
    run_both(model, processor, [user_message("which", [Image.new("RGB", (48, 48))])], "auto")


def budget_range(config: Any) -> tuple[int, int]:
    """The fewest and the most visual tokens that an image can cost, for the slider."""
    cuts = [ImageViews()]
    if config.tiling["type"] == "anyres":
        cuts = [cut_image(config.tiling, size) for size in config.tiling["pinpoints"]]
    costs = image_costs(config.tiling, config.compressor, config.view_grid, cuts)
    return min(cost.counts[0] for cost in costs), max(cost.counts[-1] for cost in costs)


def comparison_table(chosen: Run, full: Run) -> str:
    """Both runs side by side, as an HTML table whose every cell is escaped."""
    rows = [
        ("visual tokens", _added(chosen.tokens), _added(full.tokens), sum(chosen.tokens) / sum(full.tokens)),
        ("FLOPs to the first token", _short(chosen.flops), _short(full.flops), _share(chosen.flops, full.flops)),
        ("ms to the first token", *_ms(chosen.first_token_ms, full.first_token_ms)),
        ("ms in all", *_ms(chosen.total_ms, full.total_ms)),
        ("answer", chosen.answer, full.answer, None),
    ]
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(ours)}</td><td>{escape(theirs)}</td>"
        f"<td>{'' if ratio is None else f'{ratio:.2f}'}</td></tr>"
        for name, ours, theirs, ratio in rows
    )
    head = "<tr><th></th><th>chosen</th><th>all tokens</th><th>ratio</th></tr>"
    return f'<table class="comparison"><thead>{head}</thead><tbody>{body}</tbody></table>'


class _Stopwatch:
    """A streamer that notes when the first token comes; the prompt is put before it."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.puts = 0
        self.first = 0.0

    def milliseconds(self) -> float:
        return 1000 * (time.perf_counter() - self.start)

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.first = self.milliseconds()

    def end(self) -> None:
        """Nothing to do: a streamer must have it."""


def _faster(one: Run, other: Run) -> Run:
    first, total = min(one.first_token_ms, other.first_token_ms), min(one.total_ms, other.total_ms)
    return replace(one, first_token_ms=first, total_ms=total)


def _flops(
    config: Any, tokens: Sequence[int], text_tokens: int, sizes: Sequence[Any], rungs: Sequence[int]
) -> int | None:
    tiled = list(sizes) if config.tiling["type"] == "anyres" else None
    try:
        return count_flops(config, list(tokens), text_tokens, image_size=tiled, rungs=rungs).end_to_end
    except ValueError:
        return None


def _added(tokens: Sequence[int]) -> str:
    return str(tokens[0]) if len(tokens) == 1 else f"{' + '.join(map(str, tokens))} = {sum(tokens)}"


def _short(flops: int | None) -> str:
    if flops is None:
        return "not known"
    unit, name = next((unit, name) for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if flops >= unit)
    return f"{flops / unit:.3g} {name}"


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or whole is None else part / whole


def _ms(chosen: float, full: float) -> tuple[str, str, float]:
    return f"{chosen:.1f}", f"{full:.1f}", chosen / full
