"""What the generation suite compares with: a loop over `forward`, and parts of a caller that keep what they see."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria, set_seed
from transformers.generation.streamers import BaseStreamer

from tests.conftest import PAD


NEW = 5  # ids


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self):
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


class SeenByProcessor(LogitsProcessor):
    """Keeps the ids it is called with."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores


class SeenByCriterion(StoppingCriteria):
    """Keeps the ids it is called with, and never stops."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def build_generator(model_class: type, config: Any, seed: int = 0) -> Any:
    """A model whose weights are large enough that every part matters, and that never writes a placeholder or ends."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # norms stay as they are
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model


def first_row(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first prompt of a batch with one image per prompt."""
    return {name: value[:1] for name, value in inputs.items()}


def sampled(model: Any, inputs: dict[str, torch.Tensor], *, seed: int, **options: Any) -> torch.Tensor:
    """Sampled ids of a seed."""
    set_seed(seed)
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=True, **options)


def greedy_by_forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Prompt and greedy ids by a loop over `forward`, without a cache."""
    sequences = inputs["input_ids"]
    for _ in range(NEW):
        logits = logits_of(model, inputs, sequences)[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], dim=1)
    return sequences


def mean_log_probability(model: Any, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of the new ids of each row, which is what beam search maximises."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    logits = logits_of(model, inputs, sequences)[:, -new - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, sequences[:, -new:].unsqueeze(-1))
    return chosen.squeeze(-1).mean(1)


def logits_of(model: Any, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> torch.Tensor:
    """Logits of `forward` on prompts and what was answered."""
    mask, new = inputs["attention_mask"], sequences.shape[1] - inputs["input_ids"].shape[1]
    rows = {"input_ids": sequences, "attention_mask": torch.nn.functional.pad(mask, (0, new), value=1)}
    if getattr(model.config, "prefusion_layers", 0):  # it takes in the prompt, not the answer
        rows["instruction_mask"] = torch.nn.functional.pad(mask, (0, new)).bool()
    with torch.no_grad():
        return model(**(inputs | rows)).logits
