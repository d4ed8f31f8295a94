"""Merge a LoRA adapter into its model and save a full folder: weights, config, code and processor.

python -m adaptive_llava.training.merge --adapter out/my-adapter --to out/my-model
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.lora_targets import visual_parts
from adaptive_llava.training.whole_folder import whole_folder


def merge_adapter(
    adapter: str | os.PathLike, target: str | os.PathLike, *, base: str | os.PathLike | None = None, **loading: Any
) -> Path:
    """Merge an adapter into a fresh copy of its base model, which may have been quantised in training.

    Args:
        adapter: Folder or Hub id of the adapter, with the processor beside it.
        target: Folder to write; must not exist, or be empty.
        base: Base model, where it is no longer where the adapter says.
        loading: Arguments of `from_pretrained` for the base (`dtype`, `revision`).

    Raises:
        ValueError: `target` is not empty, or the base model cannot be told.
    """
    with whole_folder(target) as folder:
        config = PeftConfig.from_pretrained(str(adapter))
        base = base or config.base_model_name_or_path
        if not base:
            raise ValueError(f"The adapter {str(adapter)!r} does not name its base model. Pass `base`.")
        loading.setdefault("revision", config.revision)
        model = AdaptiveLlavaForConditionalGeneration.from_pretrained(str(base), **loading)
        trained = set(visual_parts(model)) <= set(config.modules_to_save or ())
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        if trained:
            merged.config.compressor_trained = True
        if "model.router" in (config.modules_to_save or ()):
            merged.config.router_training = {"method": "joint_routing"}  # nothing else trains one beside an adapter
        merged.save_pretrained(folder)
        AdaptiveLlavaProcessor.from_pretrained(str(adapter)).save_pretrained(folder)
    return Path(target)


def main(arguments: list[str] | None = None) -> None:
    """Merge as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.merge", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument("--base", help="base model, where it is no longer where the adapter says")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    options = parser.parse_args(arguments)
    try:
        merge_adapter(options.adapter, options.to, base=options.base, dtype=options.dtype)
    except ValueError as error:
        parser.error(str(error))
    print(f"Merged model: {options.to}")


if __name__ == "__main__":
    main()
