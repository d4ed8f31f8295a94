"""Teaching the shipped model a kind of document: its router first, then the model itself at the counts it chooses."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from adaptive_llava.training.router_fit import fit_router, split_images
from adaptive_llava.training.study.families import Picture
from adaptive_llava.training.study.small_model import conversation
from adaptive_llava.training.tiny_model import pixels_of


BATCH_SIZE, LEARNING_RATE, QUESTIONS_PER_IMAGE = 32, 2e-3, 4
_TARGET = r"model\.vision_tower\..*\.(?:q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@torch.no_grad()
def read(model: Any, processor: Any, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """What the model's router reads of each picture, `(N, input_dim)`, and the rung it chooses, `(N,)`."""
    inputs, rungs = [], []
    for start in range(0, len(pictures), 100):
        pixels = pixels_of(processor, [picture.pixels for picture in pictures[start : start + 100]])
        features = model.model.extract_features(pixels)
        inputs.append(model.model.router.inputs(features))
        rungs.append(model.model.router(features).rungs)
    return torch.cat(inputs).numpy(), torch.cat(rungs).numpy()


def teach_router(model: Any, processor: Any, pictures: Sequence[Picture], rungs: np.ndarray, *, seed: int = 0) -> None:
    """Train the model's router anew, in place, with what `train-router` is made of.

    Args:
        model: With a classifier as its router.
        processor: Its processor.
        pictures: To learn from; a fifth of them decides when to stop.
        rungs: Wanted rung of each, `(N,)`.
        seed: Of the split and of the start.
    """
    inputs, _ = read(model, processor, pictures)
    parts = split_images(rungs, validation=0.2, holdout=0.0, seed=seed)
    train, stop = parts["train"], parts["validation"]
    fit_router(model.model.router, inputs[train], rungs[train], inputs[stop], rungs[stop], balanced=False, seed=seed)
    model.config.router_training = {
        "method": "quickstart",
        "images": len(pictures),
        "date": datetime.now(UTC).date().isoformat(),
    }


def fine_tune(model: Any, processor: Any, pictures: Sequence[Picture], steps: int, *, seed: int = 0) -> Any:
    """LoRA on language model and tower, the projector in full, at the counts the router chooses; merged.

    Args:
        model: To be adapted.
        processor: Its processor.
        pictures: Up to four questions are asked about each.
        steps: Optimiser steps.
        seed: Of the questions.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    from adaptive_llava.training.lora_targets import fully_trained_modules, language_model_targets

    rng = np.random.default_rng(seed)
    rows = [
        {"images": [picture.image], "messages": conversation(picture, rng, QUESTIONS_PER_IMAGE)}
        for picture in pictures
    ]
    model.model.router.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                assistant_only_loss=True,
                max_length=None,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=min(20, steps),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=f"{language_model_targets(model)}|{_TARGET}",
                modules_to_save=fully_trained_modules(model),
            ),
        )
        with progress_bar("LoRA", steps) as bar:
            for prints_dictionaries in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(prints_dictionaries)
            trainer.add_callback(_show_progress_on(bar))
            trainer.train()
    return trainer.model.merge_and_unload().eval()


def progress_bar(what: str, steps: int) -> Any:
    """A bar of training steps."""
    from tqdm import tqdm

    return tqdm(total=steps, desc=f"  {what}", unit="step", mininterval=1, ncols=100)


def _show_progress_on(bar: Any) -> Any:
    """A callback that moves our bar."""
    from transformers import TrainerCallback

    class ShowProgress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                bar.set_postfix(loss=f"{float(logs['loss']):.2f}", refresh=False)

    return ShowProgress()
