"""Pre-fusion under TRL's own trainers: what is scored is no instruction.

TRL's trainers keep the labels from the model's backbone, and GRPO also every key that it does not know, so that
pre-fusion would take answers for instruction: the probabilities that are trained would not be those that `generate`
samples from. `ConversationCollator` marks the instruction for SFT; this does so for DPO, GRPO and the others.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from transformers import Trainer


def mark_instruction(trainer: Trainer) -> None:
    """Make text without label the instruction in every forward of the trainer's model and its reference model.

    Call it once, after the trainer is built and before `train()`. Without pre-fusion it changes nothing.

    Args:
        trainer: One of TRL's trainers that call the model with `labels`, such as `DPOTrainer` and `GRPOTrainer`.
    """
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        model = trainer.accelerator.unwrap_model(model)
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if base.config.prefusion_layers > 0:
            base.forward = _with_instruction(base.forward)


def _with_instruction(forward: Any) -> Any:
    @functools.wraps(forward)  # `generate` reads the signature
    def marked(*args: Any, labels: Any = None, instruction_mask: Any = None, **kwargs: Any) -> Any:
        if instruction_mask is None and labels is not None:
            instruction_mask = labels == -100
        return forward(*args, labels=labels, instruction_mask=instruction_mask, **kwargs)

    return marked
