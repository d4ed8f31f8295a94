"""Pretrain what makes visual tokens on captions: stage 1 of LLaVA, before `adaptive_llava.training.sft`.

    python -m adaptive_llava.training.pretrain --config training/recipes/llava_pretrain.yaml \\
        --model_name_or_path my_model --dataset_name captions.parquet --output_dir out/pretrained

Paper: LLaVA-1.5, https://arxiv.org/abs/2310.03744, the "plain" format of its code: `<image>`, the caption, a line
break; no question, no chat template, no EOS. The loss counts caption and line break. Trained are the projector, the
compressor, multi-block fusion, pre-fusion and newline tokens, as far as the model has them; language model, vision
tower and router stay as they are.

Options are those of `adaptive_llava.training.sft`. A dataset has one caption per row, as what the assistant says or as
`completion`; questions are ignored. `prepare_data` writes one from the published lists. The saved folder is a full
model, and the start of stage 2.

Pre-fusion has no instruction to take in here, since a row has none; it sees patches and visual tokens alone.
"""

from __future__ import annotations

from typing import Any

from trl import ModelConfig, SFTConfig, SFTTrainer

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.conversation_data import Rows
from adaptive_llava.training.sft import SftArguments, build_trainer, fine_tune, parse_arguments


def build_pretrainer(
    model: AdaptiveLlavaForConditionalGeneration,
    processor: AdaptiveLlavaProcessor,
    training: SFTConfig,
    train_dataset: Rows,
    eval_dataset: Rows | None = None,
    **options: Any,
) -> SFTTrainer:
    """`sft.build_trainer` for captions in the plain format, with all but the visual parts frozen.

    Raises:
        ValueError: As `build_trainer`, which refuses LoRA and a trained tower here.
    """
    return build_trainer(
        model,
        processor,
        training,
        train_dataset,
        eval_dataset,
        train_only_visual_parts=True,
        plain_captions=True,
        **options,
    )


def check_pretraining(script: SftArguments, training: SFTConfig, model: ModelConfig) -> None:
    """Refuse, before anything is loaded, what would train more than the visual parts or score other text.

    Raises:
        ValueError: LoRA, a vision tower that is trained, or another loss.
    """
    refused = {
        "use_peft": (model.use_peft, "the language model stays frozen"),
        "freeze_vision_tower": (not script.freeze_vision_tower, "the vision tower stays frozen"),
        "assistant_only_loss": (training.assistant_only_loss, "the loss is on captions"),
    }
    for name, (wrong, rule) in refused.items():
        if wrong:
            value = name != "freeze_vision_tower"
            raise ValueError(
                f"`{name}={value}` has no place in pretraining: {rule}. Leave it out, or use "
                "`adaptive_llava.training.sft`."
            )


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Train as the recipe and the command line say."""
    parsed = parse_arguments(arguments, command="pretrain")
    check_pretraining(*parsed)
    return fine_tune(*parsed, build=build_pretrainer)


if __name__ == "__main__":
    main()
