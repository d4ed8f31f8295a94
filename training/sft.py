"""Fine-tune an adaptive LLaVA model with TRL's `SFTTrainer`, with LoRA or in full.

    python -m adaptive_llava.training.sft --config training/recipes/lora.yaml \\
        --model_name_or_path org/model --dataset_name org/data --output_dir out/my-model

Every option of TRL's `SFTConfig` and `ModelConfig` may stand in the recipe or on the command line, which wins. LoRA
adapts the linear layers of the language model (`--lora_target_modules all-linear`); the projector, pre-fusion and what
a compressor or router learns are trained in full beside it; the vision tower stays frozen unless
`--freeze_vision_tower false`.
`--merge` also writes `<output_dir>/merged`, a full model that loads as remote code. `--threshold_schedule
learning_rate` shows each image at varying counts (DFMR as data augmentation, see `threshold_schedule.py`).
`--projector_learning_rate` and its like give a part a rate of its own (see `part_learning_rates.py`). Against padding:
`--train_sampling_strategy group_by_length`, or `--pack_batches true` (see `dense_batches.py`). bf16 and tf32 are on
where the machine has them.

`--resume_from_checkpoint last` goes on from the newest whole checkpoint in `output_dir`, and starts where there is
none. With it in the command from the start, the same command starts a run and, after a kill, ends it with the weights
of an unbroken one: data order, random numbers, schedule and optimizer come from the checkpoint. Without it, a folder
that holds checkpoints is refused. A full disk or a loss that is not finite ends the run with status 1 and a message
(see `whole_checkpoints.py`).

On several GPUs: `accelerate launch --config_file training/recipes/accelerate/ddp.yaml -m adaptive_llava.training.sft
...`; that folder also has FSDP2 and DeepSpeed ZeRO, and each file says what of it was run.

A dataset is a Hub id, a folder, or a parquet or json file with `images` and either `messages`, or `prompt` and
`completion`. Loss: all text, the completion alone (the default for `prompt` and `completion`), or what the assistant
says (`--assistant_only_loss`, transformers >= 5.18); never the image placeholders.

TRL's own command also works on a saved checkpoint: `trl sft --model_name_or_path DIR --trust_remote_code true
--max_length 4096 ...`. It differs: one label per image stands at the `<image>` placeholder unless the loss is on
completions or assistants only; rows never begin with the BOS token and a plain-text completion has no EOS token;
`all-linear` also adapts the vision tower and leaves the projector with an adapter; nothing is frozen in full training;
image paths in json files are relative to the working directory; `compressor_trained` is not set.

An adapter changes no config: over a base with `compressor_trained: false`, `generate` still warns until it is merged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.utils import is_torch_tf32_available, logging
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
)

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.modeling.view_geometry import ImageViews, cut_image, image_costs
from adaptive_llava.training.collator import ConversationCollator
from adaptive_llava.training.conversation_data import Rows, load_conversations
from adaptive_llava.training.lora_targets import (
    freeze_all_but_visual_parts,
    freeze_vision_tower,
    fully_trained_modules,
    language_model_targets,
    trains_visual_parts,
)
from adaptive_llava.training.merge import merge_adapter
from adaptive_llava.training.part_learning_rates import PARTS, PartRatesTrainer
from adaptive_llava.training.quantised_loading import check_quantisation, placement
from adaptive_llava.training.resume_point import resume_point
from adaptive_llava.training.sharded_head import gather_head_with_backbone
from adaptive_llava.training.threshold_schedule import ThresholdSchedule, routed_by_thresholds
from adaptive_llava.training.whole_checkpoints import TrainingStopped


logger = logging.get_logger(__name__)

RECIPES = Path(__file__).resolve().parent / "recipes"


@dataclass
class SftArguments(ScriptArguments):
    """Dataset and what is particular to these models.

    Args:
        eval_dataset_name: Dataset to evaluate on; by default the `dataset_test_split` of `dataset_name`.
        freeze_vision_tower: Leave the vision tower as it is.
        visual_token_budget: Visual tokens per image in training and evaluation, in place of the router's choice.
        threshold_schedule: `learning_rate`: in training the router's thresholds follow the learning rate.
        device_map: `auto`: spread the model over the GPUs; with several processes each has its own GPU, and without a
            GPU it is left out.
        merge: Merge the LoRA adapter after training and save the full model as `<output_dir>/merged`.
        warmup_share: Share of the steps in which the learning rate rises, on every version of transformers.
        vision_tower_learning_rate: Peak learning rate of the vision tower, if it is trained; `learning_rate` by
            default, as for the other parts.
        fusion_learning_rate: Of the multi-block fusion.
        compressor_learning_rate: Of the compressor.
        projector_learning_rate: Of the projector.
        prefusion_learning_rate: Of the modality pre-fusion.
        router_learning_rate: Of the router, if it is trained.
        pack_batches: Train on the rows of a batch one behind another, without padding.
    """

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to evaluate on; by default a split of `dataset_name`."}
    )
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Leave the vision tower as it is."})
    visual_token_budget: int | None = field(
        default=None, metadata={"help": "Visual tokens per image in place of the router's choice."}
    )
    threshold_schedule: str | None = field(
        default=None, metadata={"help": "'learning_rate': the router's thresholds follow the learning rate."}
    )
    device_map: str | None = field(default=None, metadata={"help": "'auto': spread the model over the GPUs."})
    merge: bool = field(default=False, metadata={"help": "Also save the merged model as `<output_dir>/merged`."})
    warmup_share: float | None = field(
        default=None, metadata={"help": "Share of the steps in which the learning rate rises."}
    )
    vision_tower_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the tower."})
    fusion_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of multi-block fusion."})
    compressor_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the compressor."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the projector."})
    prefusion_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of pre-fusion."})
    router_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the router."})
    pack_batches: bool = field(default=False, metadata={"help": "Put the rows of a batch into one, unpadded."})

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rates that were set, by part."""
        rates = {part: getattr(self, f"{part}_learning_rate") for part in PARTS}
        return {part: rate for part, rate in rates.items() if rate is not None}


def parse_arguments(
    arguments: list[str] | None = None, *, config_class: type[SFTConfig] = SFTConfig, command: str = "sft"
) -> tuple[SftArguments, Any, ModelConfig]:
    """Read recipe and command line; our defaults differ from TRL's where a vision model needs it."""
    kinds: Any = (SftArguments, config_class, ModelConfig)
    parser = TrlParser(kinds, prog=f"python -m adaptive_llava.training.{command}")
    parser.set_defaults(max_length=None)  # a limit would cut placeholders off
    parser.set_defaults(logging_nan_inf_filter=False)  # it hides what ends a run, and waits for the device to do so
    if not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        parser.set_defaults(bf16=False)
    if is_torch_tf32_available():
        parser.set_defaults(tf32=True)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--config" in arguments[:-1]:
        place = arguments.index("--config") + 1
        arguments[place] = str(find_recipe(arguments[place]))
    parsed: Any = parser.parse_args_and_config(arguments)
    _set_warm_up(parsed[0].warmup_share, parsed[1])
    return parsed


def find_recipe(name: str) -> Path:
    """A recipe by path, or one of this package's by file name.

    Raises:
        ValueError: There is no such file.
    """
    candidates = [Path(name), RECIPES / Path(name).name]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml")))
    raise ValueError(
        f"`--config {name}`: there is no such file. Pass a path, or one of this package's recipes: {known}."
    )


def _set_warm_up(share: float | None, training: SFTConfig) -> None:
    if share is None:
        return
    if not 0 <= share < 1 or training.warmup_steps:
        raise ValueError(
            f"`warmup_share={share}` with `warmup_steps={training.warmup_steps}`: pass a share of all steps below 1, "
            "or a number of steps, not both."
        )
    # transformers 4 has two fields, 5 takes a share in the one for steps
    name = "warmup_ratio" if Version(transformers.__version__) < Version("5.0.0.dev0") else "warmup_steps"
    setattr(training, name, share)


def check_arguments(script: SftArguments, training: SFTConfig, model: ModelConfig) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ValueError: An argument is missing, or two do not go together.
    """
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", script.dataset_name)):
        if not value:
            raise ValueError(f"`{name}` is missing. Pass --{name} on the command line, or write it into the recipe.")
    check_quantisation(model)
    if training.assistant_only_loss and Version(transformers.__version__) < Version("5.18.0.dev0"):
        raise ValueError(
            f"`assistant_only_loss=True` needs transformers >= 5.18 for images; this is {transformers.__version__}. "
            "Upgrade, or use a dataset with `prompt` and `completion`, whose loss is on the completion alone."
        )
    if script.merge and not model.use_peft:
        raise ValueError(
            "`merge=True` merges a LoRA adapter, but `use_peft` is false: the saved model is already full."
        )
    if training.push_to_hub and model.use_peft and os.path.isdir(str(model.model_name_or_path)):
        raise ValueError(
            f"`push_to_hub=True` would push an adapter of {model.model_name_or_path}, a base that nobody else has. "
            "Push the base first (`python -m adaptive_llava push`), and pass its name as `model_name_or_path`; or "
            "leave `push_to_hub` out, pass `merge=True`, and push the merged model."
        )
    if script.merge and os.path.exists(os.path.join(str(training.output_dir), "merged")):
        raise ValueError(
            f"`merge=True` would write {training.output_dir}/merged, which is already there. Remove it, or choose "
            "another `output_dir`."
        )


def build_trainer(
    model: AdaptiveLlavaForConditionalGeneration,
    processor: AdaptiveLlavaProcessor,
    training: SFTConfig,
    train_dataset: Rows,
    eval_dataset: Rows | None = None,
    *,
    model_arguments: ModelConfig | None = None,
    train_vision_tower: bool = False,
    visual_token_budget: int | Sequence[int] | None = None,
    threshold_schedule: str | None = None,
    learning_rates: Mapping[str, float] | None = None,
    train_only_visual_parts: bool = False,
    plain_captions: bool = False,
    pack_batches: bool = False,
    trainer_class: type[SFTTrainer] = PartRatesTrainer,
) -> SFTTrainer:
    """TRL's `SFTTrainer` with this package's LoRA targets, frozen parts and collator.

    Args:
        model: The model to train.
        processor: Its processor.
        training: TRL's configuration.
        train_dataset: Rows as `load_conversations` gives them.
        eval_dataset: Rows to evaluate on.
        model_arguments: Use LoRA if its `use_peft` is set.
        train_vision_tower: Train the vision tower too.
        visual_token_budget: Visual tokens per image, all its tiles and newlines included, in place of the router's
            choice; of several, each image gets one at random.
        threshold_schedule: `"learning_rate"` moves the router's thresholds with the learning rate; see
            `threshold_schedule.py`.
        learning_rates: Peak rate of parts that differ from `training.learning_rate`, by name; see
            `part_learning_rates.py`.
        train_only_visual_parts: Freeze the language model too: projector, compressor, multi-block fusion and
            pre-fusion are trained alone.
        plain_captions: Rows are one caption each, in the plain format of pretraining.
        pack_batches: Train on packed batches; see `dense_batches.py`.
        trainer_class: `PartRatesTrainer`, or one derived from it.

    Raises:
        ValueError: A budget below the smallest count, unknown LoRA targets, a threshold schedule where the router
            has no thresholds, a learning rate of a part that is not trained, or what TRL refuses.
    """
    if visual_token_budget is not None:
        least = visual_token_budget if isinstance(visual_token_budget, int) else min(visual_token_budget)
        _check_budget(least, model.config)
    schedule = None if threshold_schedule is None else ThresholdSchedule(threshold_schedule)
    if schedule is not None:
        routed_by_thresholds(model)
        if processor.layout != "compact":
            raise ValueError(
                f"`threshold_schedule={threshold_schedule!r}` varies token counts inside the model, and the "
                f"processor's layout {processor.layout!r} fixes them beforehand. Set `processor.layout = 'compact'`."
            )
    learns = any(parameter.requires_grad for parameter in model.model.router.parameters())
    if model.model.has_untrained_router and visual_token_budget is None and not learns:
        logger.warning(
            "This model's router was never trained and gives every image the most tokens, so that nothing is learned "
            "for the other counts. Train it first: `python -m adaptive_llava train-router`; or router and model "
            "together: `adaptive_llava.training.joint_routing`."
        )
    peft_config: Any = None
    lora = model_arguments is not None and model_arguments.use_peft
    if train_only_visual_parts:
        if lora or train_vision_tower:
            raise ValueError(
                f"`train_only_visual_parts=True` freezes language model and vision tower, but `use_peft={lora}` and "
                f"`train_vision_tower={train_vision_tower}` would train them. Leave both out."
            )
        freeze_all_but_visual_parts(model)
    elif model_arguments is not None and lora:
        peft_config = get_peft_config(model_arguments)
        peft_config.target_modules = language_model_targets(model, model_arguments.lora_target_modules)
        own = fully_trained_modules(model, vision_tower=train_vision_tower)
        peft_config.modules_to_save = [*own, *(peft_config.modules_to_save or [])] or None
    elif not train_vision_tower:
        freeze_vision_tower(model)
    own_options: dict[str, Any] = {"learning_rates": learning_rates, "pack_batches": pack_batches}
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=None if schedule is None else [schedule],
        **own_options,
    )
    trainer.data_collator = ConversationCollator(
        trainer.data_collator,
        processor,
        visual_token_budget=visual_token_budget,
        marks_instruction=model.config.prefusion_layers > 0,
        plain_captions=plain_captions,
    )
    gather_head_with_backbone(model)
    trained: Any = trainer.model
    if trains_visual_parts(trained):
        model.config.compressor_trained = True  # of what is saved from now on
    return trainer


def _check_budget(budget: int, config: Any) -> None:
    # of tiled images by size: what the model will say of one, before the training has come to it
    cuts = [ImageViews()]
    if config.tiling["type"] == "anyres":
        cuts += [cut_image(config.tiling, resolution) for resolution in config.tiling["pinpoints"]]
    costs = image_costs(config.tiling, config.compressor, config.view_grid, cuts)
    least = [cost.counts[0] for cost in costs]
    if budget < min(least):
        raise ValueError(
            f"`visual_token_budget={budget}` is below the smallest count this model can produce ({min(least)} "
            f"tokens). Pass at least {min(least)}, or leave it out for the router's choice."
        )
    if budget < max(least):
        logger.warning(
            f"`visual_token_budget={budget}` does not suffice for every image: one that is cut into "
            f"{max(cut.views for cut in cuts) - 1} tiles costs up to {max(least)} tokens at the fewest, and training "
            f"would stop at it. Pass at least {max(least)} unless your images are smaller."
        )


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Train as the recipe and the command line say."""
    return fine_tune(*parse_arguments(arguments))


def fine_tune(
    script: SftArguments,
    training: SFTConfig,
    model_arguments: ModelConfig,
    *,
    build: Callable[..., SFTTrainer] = build_trainer,
) -> SFTTrainer:
    """Load model and data, train, and save.

    Args:
        script: Dataset and what is particular to these models.
        training: TRL's configuration.
        model_arguments: Model, and LoRA.
        build: Makes the trainer; takes the arguments of `build_trainer`.

    Raises:
        ValueError: Arguments that are missing or do not go together.
        SystemExit: Training stopped, with the reason as its message.
    """
    check_arguments(script, training, model_arguments)
    resume = resume_point(str(training.output_dir), training.resume_from_checkpoint)
    name, revision = str(model_arguments.model_name_or_path), model_arguments.model_revision
    dataset_name = str(script.dataset_name)
    data: dict[str, Any] = {"config": script.dataset_config, "streaming": script.dataset_streaming}
    train_dataset = load_conversations(dataset_name, split=script.dataset_train_split, **data)
    eval_dataset = None
    if training.eval_strategy != "no":
        source = script.eval_dataset_name or dataset_name
        eval_dataset = load_conversations(source, split=script.dataset_test_split, **data)

    loading: dict[str, Any] = {"revision": revision, "dtype": model_arguments.dtype}
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(
        name,
        attn_implementation=model_arguments.attn_implementation,
        **placement(model_arguments, training, script.device_map),
        **loading,
    )
    trainer = build(
        model,
        AdaptiveLlavaProcessor.from_pretrained(name, revision=revision),
        training,
        train_dataset,
        eval_dataset,
        model_arguments=model_arguments,
        train_vision_tower=not script.freeze_vision_tower,
        visual_token_budget=script.visual_token_budget,
        threshold_schedule=script.threshold_schedule,
        learning_rates=script.learning_rates,
        pack_batches=script.pack_batches,
    )
    if resume is not None:
        trainer.accelerator.print(f"Goes on from {resume}")
    try:
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", result.metrics)
        if eval_dataset is not None:
            trainer.save_metrics("eval", trainer.evaluate())
    except TrainingStopped as stopped:
        raise SystemExit(str(stopped)) from stopped
    trainer.accelerator.wait_for_everyone()
    padding = result.metrics["train_padding_share"]
    trainer.accelerator.print(f"Padding was {padding:.1%} of what the language model computed.")
    trainer.accelerator.print(f"Saved {training.output_dir}")
    if training.push_to_hub:  # before the merged model stands in the folder
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if script.merge and trainer.is_world_process_zero():
        output = str(training.output_dir)
        folder = merge_adapter(output, os.path.join(output, "merged"), base=name, **loading)
        print(f"Saved {folder}")
    return trainer


if __name__ == "__main__":
    main()
