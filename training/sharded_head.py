"""The gradient of a language-model head that FSDP2 shards as a unit of its own.

TRL's fused head multiplies with `lm_head.weight` and does not call the module, so that FSDP2 does not gather it. Of a
text model, accelerate puts head and last norm into one unit, and the norm's call gathers both; of a vision-language
model it does not find the norm. TRL then gathers the weight with `full_tensor()`, whose backward pass keeps of the
gradient what this process has seen alone (trl 1.16, accelerate 1.15).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def gather_head_with_backbone(model: PreTrainedModel) -> None:
    """Let each pass of the backbone gather the head, if it is sharded; the backward pass reduces its gradient.

    Args:
        model: An `AdaptiveLlavaForConditionalGeneration`, sharded or about to be.
    """

    def gather(*_: Any) -> None:
        head: Any = model.get_output_embeddings()  # PEFT may have replaced it
        if hasattr(head, "unshard"):
            head.unshard()

    model.model.register_forward_hook(gather)
