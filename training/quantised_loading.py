"""Loading a base model in 4 or 8 bits for QLoRA: which parts stay in 16, and on which devices it stands."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, get_quantization_config

from adaptive_llava.modeling.backbone_assembly import OWN_PARTS


# Full names: transformers 5 compares the beginnings and ends of names, where 4 looked anywhere in them.
NOT_QUANTISED = ("model.vision_tower", *(f"model.{part}" for part in OWN_PARTS), "lm_head")


def check_quantisation(model: ModelConfig) -> None:
    """Refuse a quantised base that cannot be loaded, or cannot learn.

    Raises:
        ValueError: bitsandbytes is not installed, or there is no LoRA.
    """
    asked = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)), None)
    if asked and not model.use_peft:
        raise ValueError(f"`{asked}=True` with `use_peft=False`: quantised weights do not learn. Use LoRA.")
    if asked and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`{asked}=True` needs bitsandbytes, which is not installed: `pip install bitsandbytes`. Or train "
            f"unquantised: `--{asked} false`, on a CPU with `--dtype float32`."
        )


def placement(model: ModelConfig, training: TrainingArguments, device_map: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the language model quantised if asked for, and a device map.

    Args:
        model: TRL's options.
        training: Says which device and how many processes there are.
        device_map: What is wanted of one process with GPUs; each of several processes has its own GPU, and on a CPU
            there is none.
    """
    quantisation = get_quantization_config(model)
    if quantisation is not None:
        quantisation.llm_int8_skip_modules = list(NOT_QUANTISED)
    place: Any = None if training.device.type == "cpu" else device_map
    if place is not None and training.world_size > 1:
        place = {"": training.local_process_index}
    return {"quantization_config": quantisation, "device_map": place}
