"""What share of the language model's slots is padding, measured where the model sees them.

A slot is one position of one row that the language model computes: text, a visual token, or padding. The share is
logged as `padding_share` since the last log, and as `train_padding_share` over the whole run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class PaddingShare(TrainerCallback):
    """Counts slots and padding in training, on the device; a trainer's log reads them.

    Args:
        device: Where the counts are kept.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self._handle: Any = None
        self._recent, self._whole = self._nothing(), self._nothing()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._recent, self._whole = self._nothing(), self._nothing()
        if self._handle is not None:  # left by a training that broke off
            self._handle.remove()
        self._handle = language_model_of(model).register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._handle.remove()

    def recent(self) -> Tensor:
        """Padding and slots since the last call, `(2,)`."""
        taken, self._recent = self._recent, self._nothing()
        return taken

    def whole(self) -> Tensor:
        """Padding and slots since training began, `(2,)`."""
        return self._whole

    def _nothing(self) -> Tensor:
        return torch.zeros(2, dtype=torch.long, device=self.device)

    def _count(self, module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        if not module.training:
            return
        rows, length = options["inputs_embeds"].shape[:2]
        mask = options.get("attention_mask")
        for counts in (self._recent, self._whole):
            counts[1] += rows * length
            if mask is not None:
                counts[0] += (mask == 0).sum().to(self.device, non_blocking=True)


def language_model_of(model: nn.Module) -> Any:
    """The language model, under any head, adapter or wrapper."""
    return inner_model(model).language_model


def inner_model(model: nn.Module) -> Any:
    """The `AdaptiveLlavaModel`, under any head, adapter or wrapper."""
    return next(part for part in model.modules() if hasattr(part, "extract_features") and hasattr(part, "router"))
