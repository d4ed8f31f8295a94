"""The study's models, and the loop that trains them on its pictures.

What lets a model this small read is the recipe of `tiny_model`; and as the tower is born with positions, so are the
words that name them: to look up one of 36 cells is then learned in a minute. Families that are not learned yet come
more often, if asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_llava.training.joint_routing import joint_routing_loss
from adaptive_llava.training.study.drawing import CONTENTS, Layout
from adaptive_llava.training.study.families import Picture
from adaptive_llava.training.tiny_model import (
    LastPatches,
    Shape,
    Words,
    assemble,
    build_tokenizer,
    pixels_of,
    rate_at,
    two_dimensional_positions,
)


# Picks rungs for a batch: the model, its pixels and the generator -> one rung per image, or None for joint training.
Rungs = Callable[[Any, Tensor, np.random.Generator], Sequence[int]]

_QUESTIONS_PER_IMAGE = 4
_RARE = 0.1  # how often a family still comes that is learned, against 1 for one that is not
_MEMORY = 0.05  # weight of the latest picture in a family's running loss
_SAVE_SECONDS = 60


class OutOfTime(Exception):
    """Time is up; what was done is kept in a file, and the next run goes on from there."""


def build_model(seed: int, layout: Layout, shape: Shape, **fields: Any) -> tuple[Any, Any]:
    """An untrained model whose words for places begin as the codes of these places; and its processor.

    Args:
        seed: Of the weights.
        layout: Of the pictures.
        shape: Sizes of the model; image and patch are the layout's.
        fields: Config fields, such as `compressor`.
    """
    tokenizer = build_tokenizer(layout.vocabulary())
    model, processor = assemble(seed, tokenizer, shape, **fields)
    codes = two_dimensional_positions(layout.grid, shape.width)
    board = codes.view(layout.board, 2, layout.board, 2, -1).mean((1, 3)).flatten(0, 1)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[tokenizer.convert_tokens_to_ids(list(layout.cells))] = codes
        words[tokenizer.convert_tokens_to_ids(list(layout.squares))] = board
    return model, processor


def take_weights(model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Load every trained tensor that the model has too, with equal shape; its other parts stay new."""
    own = model.state_dict()
    model.load_state_dict({**own, **{k: v for k, v in trained.items() if k in own and own[k].shape == v.shape}})


def random_rungs(model: Any, pixels: Tensor, rng: np.random.Generator) -> list[int]:
    """Each image gets any rung, with equal chance."""
    return rng.integers(model.model.compressor.num_rungs, size=len(pixels)).tolist()


def fixed_rung(rung: int) -> Rungs:
    """Each image gets this rung."""
    return lambda model, pixels, rng: [rung] * len(pixels)


def train(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    *,
    steps: int,
    seed: int,
    rungs: Rungs | None,
    learning_rate: float,
    batch_size: int = 32,
    unlearned_first: bool = False,
    token_price: float = 0.3,
    temperature: float = 0.1,
    watch: Callable[[int], None] = lambda step: None,
    checkpoint: Path | None = None,
    deadline: float = float("inf"),
) -> None:
    """Train everything, in place.

    Args:
        model: Of `build_model`.
        processor: Its processor.
        pictures: To be drawn from.
        steps: Optimiser steps.
        seed: Of pictures, questions and rungs.
        rungs: Picks the rung of each image; `None` trains jointly with the router, at every rung in every step.
        learning_rate: Peak; warmed up over the first 5 %, then a half cosine down to 5 %.
        batch_size: Pictures per step.
        unlearned_first: Draw families by their running loss, instead of all alike.
        token_price: Of joint training.
        temperature: Of joint training.
        watch: Called after every step with the number of steps done.
        checkpoint: File to go on from, if it is there, and to leave behind when time is up.
        deadline: `time.monotonic()` at which to stop.

    Raises:
        OutOfTime: The deadline has passed; the state is in `checkpoint`.
    """
    words = Words(processor.tokenizer)
    patches = LastPatches(model.model.vision_tower)
    torch.manual_seed(seed)
    device = model.device
    content_head = nn.Linear(model.config.vision_config.hidden_size, len(CONTENTS)).to(device)
    model.model.router.requires_grad_(rungs is None)
    parameters = [p for p in (*model.parameters(), *content_head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / steps))
    state = _State(
        model, content_head, optimizer, schedule, np.random.default_rng(seed), len({p.family for p in pictures})
    )
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
    names = sorted({picture.family for picture in pictures})
    members = [[index for index, picture in enumerate(pictures) if picture.family == name] for name in names]
    saved = time.monotonic()
    model.train()
    while state.step < steps:
        share = np.minimum(state.losses, 1) + _RARE if unlearned_first else np.ones(len(names))
        drawn = state.rng.choice(len(names), batch_size, p=share / share.sum())
        batch = [pictures[members[family][state.rng.integers(len(members[family]))]] for family in drawn]
        pixels = pixels_of(processor, [picture.pixels for picture in batch]).to(device)
        input_ids, labels = words.batch([conversation(p, state.rng, _QUESTIONS_PER_IMAGE) for p in batch])
        input_ids, labels = input_ids.to(device), labels.to(device)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (input_ids != words.pad).long(),
            "instruction_mask": labels == -100,
        }
        if rungs is None:
            loss, by_row = _joint_loss(model, inputs, pixels, labels, token_price, temperature)
        else:
            logits = model(**inputs, pixel_values=pixels, visual_rungs=rungs(model, pixels, state.rng)).logits
            by_label = _label_losses(logits, labels)
            loss = by_label.sum() / (labels[:, 1:] != -100).sum()
            by_row = by_label.sum(1) / (labels[:, 1:] != -100).sum(1)
        contents = torch.from_numpy(np.stack([picture.contents for picture in batch])).long().to(device)
        content_loss = F.cross_entropy(content_head(patches.features).flatten(0, 1), contents.flatten())
        optimizer.zero_grad()
        (loss + content_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        state.note(drawn, by_row.detach().float().cpu().numpy())
        watch(state.step)
        if checkpoint is not None and (time.monotonic() > deadline or time.monotonic() - saved > _SAVE_SECONDS):
            state.save(checkpoint)
            saved = time.monotonic()
            if saved > deadline:
                raise OutOfTime(f"{checkpoint}: {state.step} of {steps} steps")
    patches.remove()
    model.config.compressor_trained = True
    model.eval()


def conversation(picture: Picture, rng: np.random.Generator, questions: int) -> list[dict[str, str]]:
    """Messages that ask up to so many of a picture's questions, in random order."""
    chosen = rng.permutation(len(picture.questions))[:questions]
    return [
        message
        for index in chosen
        for message in (
            {"role": "user", "content": picture.questions[index][0]},
            {"role": "assistant", "content": picture.questions[index][1]},
        )
    ]


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    *,
    seed: int,
    rungs: Sequence[int] | None = None,
    batch_size: int = 100,
) -> np.ndarray:
    """Whether one question about each picture is answered right at each of these rungs, `(N, R)` bool; all by default.

    The question is drawn with `seed` and asked by itself; the answer is one word, and right if it is the likeliest
    next word, which is what greedy generation writes.
    """
    words = Words(processor.tokenizer)
    rng = np.random.default_rng(seed)
    rungs = range(model.model.compressor.num_rungs) if rungs is None else rungs
    right = np.zeros((len(pictures), len(rungs)), dtype=bool)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        input_ids, labels = words.batch([conversation(picture, rng, 1) for picture in batch])
        pixels = pixels_of(processor, [picture.pixels for picture in batch]).to(model.device)
        features = model.model.extract_features(pixels)
        place = (labels != -100).int().argmax(1)
        rows = torch.arange(len(batch))
        for column, rung in enumerate(rungs):
            encoded = model.model.encode_images(pixels, features=features, visual_rungs=[rung] * len(batch))
            logits = model(
                input_ids=input_ids.to(model.device),
                attention_mask=(input_ids != words.pad).long().to(model.device),
                instruction_mask=(labels == -100).to(model.device),
                encoded_images=encoded,
            ).logits.cpu()
            predicted = logits[rows, place - 1].argmax(-1)
            right[start : start + len(batch), column] = (predicted == labels[rows, place]).numpy()
    return right


def _joint_loss(
    model: Any, inputs: dict[str, Tensor], pixels: Tensor, labels: Tensor, price: float, temperature: float
) -> tuple[Tensor, Tensor]:
    features = model.model.extract_features(pixels)
    router_logits = model.model.router(features).logits
    labelled = (labels[:, 1:] != -100).sum(1)
    losses = []
    for rung in range(model.model.compressor.num_rungs):
        encoded = model.model.encode_images(pixels, features=features, visual_rungs=[rung] * len(pixels))
        logits = model(**inputs, encoded_images=encoded).logits
        losses.append(_label_losses(logits, labels).sum(1) / labelled)
    counts = torch.tensor(model.config.visual_token_counts, dtype=torch.float32, device=pixels.device)
    by_rung = torch.stack(losses)
    rows = torch.arange(len(pixels), device=pixels.device)
    prices = price * counts / counts[-1]
    loss = joint_routing_loss(by_rung, router_logits, rows, labelled > 0, prices, temperature)
    return loss, by_rung[-1]


def _label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each next label, `(B, L - 1)`; 0 where there is none."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    return flat.view(len(labels), -1)


class _State:
    """Everything that a run needs to go on as if it had not stopped."""

    def __init__(self, model: Any, head: Any, optimizer: Any, schedule: Any, rng: np.random.Generator, families: int):
        self.parts = {"model": model, "head": head, "optimizer": optimizer, "schedule": schedule}
        self.rng, self.step, self.losses = rng, 0, np.ones(families)

    def note(self, drawn: np.ndarray, losses: np.ndarray) -> None:
        self.step += 1
        for family, loss in zip(drawn, losses, strict=True):
            self.losses[family] += _MEMORY * (loss - self.losses[family])

    def save(self, path: Path) -> None:
        kept = {name: part.state_dict() for name, part in self.parts.items()}
        extra = {"step": self.step, "losses": self.losses.tolist(), "rng": self.rng.bit_generator.state}
        partial = path.with_suffix(".partial")
        torch.save(kept | extra, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        kept = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(kept[name])
        self.step, self.losses = kept["step"], np.asarray(kept["losses"])
        self.rng.bit_generator.state = kept["rng"]
