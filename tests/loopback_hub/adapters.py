"""A LoRA adapter as PEFT saves it, with its own empty card, and the processor beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor


def save_adapter(base: Path, folder: Path) -> Path:
    """Write an adapter of random weights.

    Args:
        base: Folder of the model that it belongs to, and that its config names.
        folder: Is made.
    """
    torch.manual_seed(0)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    AdaptiveLlavaProcessor.from_pretrained(base).save_pretrained(folder)
    return folder
