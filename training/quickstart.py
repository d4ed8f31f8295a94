"""Build, calibrate, fine-tune, save and reload a small adaptive vision-language model, all in a few minutes on a CPU.

    python -m adaptive_llava.training.quickstart
    python -m adaptive_llava.training.quickstart --images my_photos --output my_run

1. Train a tiny model from nothing on images rendered here: scenes, collages, and pages of digits to be read.
2. Calibrate its router: which images get 1, 4 or 16 visual tokens.
3. Fine-tune it at those counts with LoRA through TRL's own `SFTTrainer`, merge, and save it with its code.
4. In a fresh process without this package: load it with `AutoModelForImageTextToText` and ask about unseen images.

Written to `--output`: `model/`, `model_before_lora/`, `quickstart.png`, `quickstart_results.json`, held-out images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptive_llava.training.process_without_package import run_without_package
from adaptive_llava.training.quickstart_answers import peak_memory_mib
from adaptive_llava.training.quickstart_report import (
    pick_examples,
    print_closing,
    print_examples,
    print_own_images,
    print_scores,
    score,
)
from adaptive_llava.training.rendered_images import KINDS, RenderedImage, render_images


SCRATCH_STEPS = 1500
LORA_STEPS, LORA_IMAGES = 700, 6000
CALIBRATION_IMAGES = 900
HELD_OUT_IMAGES = 300

_MARK = ".written_by_quickstart"

# Sets that share no random numbers.
SCRATCH_SEED, CALIBRATION_SEED, LORA_SEED, HELD_OUT_SEED = 1, 2, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if not options.steps_scale > 0:
            raise ValueError(f"`--steps-scale {options.steps_scale}` must be above 0; 1 is the full training.")
        own_images = find_images(options.images) if options.images else []
        output = prepare_output(options.output)
    except (OSError, ValueError) as error:
        parser.exit(2, f"quickstart: {error}\n")
    print("Loading torch, transformers and TRL ...", flush=True)
    _quieten_libraries()
    run(output, own_images, options.steps_scale)
    return 0


def run(output: Path, own_images: Sequence[Path] = (), steps_scale: float = 1.0) -> dict[str, Any]:
    """The whole story; returns what `quickstart_results.json` holds.

    Args:
        output: Folder to write to.
        own_images: Images to route beside the rendered ones.
        steps_scale: Multiplies training steps and image counts.
    """
    import torch

    torch.set_num_threads(1)  # these matrices are too small to share among threads
    seconds: dict[str, float] = {}

    with _phase("1/4  Train a tiny vision-language model from nothing", seconds, "train_from_scratch"):
        model, processor = train_model(steps_scale)

    with _phase("2/4  Calibrate the router: who gets 1, 4 or 16 visual tokens", seconds, "calibrate"):
        calibrate(model, processor)

    with _phase("3/4  Fine-tune at those counts: LoRA, TRL's SFTTrainer, merge, save", seconds, "fine_tune"):
        for part in (model, processor):
            part.save_pretrained(output / "model_before_lora")
        model = fine_tune(model, processor, steps_scale)
        model.save_pretrained(output / "model")
        processor.save_pretrained(output / "model")
        print(f"  saved {output / 'model'}: {', '.join(_kinds_of_files(output / 'model'))}")

    with _phase("4/4  Load it in a fresh process without this package, ask about unseen images", seconds, "answer"):
        answered = answer_in_fresh_process(output, own_images)

    scores = score(answered["answers"])
    shown = pick_examples(answered["answers"]["auto"])
    print_examples(shown)
    print_scores(scores, answered["token_counts"])
    print_own_images(answered["own_images"])
    picture = _draw(output, shown, answered["own_images"])

    results = {
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_memory_mib": {
            "training": peak_memory_mib(),
            "fresh_process": answered["peak_memory_mib"],
        },
        "steps_scale": steps_scale,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "thresholds": list(model.config.router["thresholds"]),
        "calibration": model.config.calibration,
        "token_counts": answered["token_counts"],
        "package_importable_in_fresh_process": answered["package_importable"],
        "model_class_in_fresh_process": answered["model_class"],
        "scores": scores,
        "own_images": answered["own_images"],
    }
    (output / "quickstart_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_closing(results, output, picture)
    return results


def train_model(steps_scale: float) -> tuple[Any, Any]:
    """Phase 1: an untrained model learns to see and to read, always looking at all 16 tokens."""

    from adaptive_llava.training.tiny_model import build_model, train_from_scratch

    model, processor = build_model()
    steps = _scaled(SCRATCH_STEPS, steps_scale)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"  {size:,} parameters; images rendered on the way: {', '.join(f'{kind}s' for kind in KINDS)}")
    with _progress_bar("from scratch", steps) as bar:

        def report(step: int, loss: float) -> None:
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
            bar.update()

        train_from_scratch(model, processor, steps=steps, seed=SCRATCH_SEED, report=report)
    return model, processor


def calibrate(model: Any, processor: Any) -> None:
    """Phase 2: thresholds at which each third of unseen images gets one of the three counts."""
    from adaptive_llava.training.calibrate import calibrate_thresholds

    images = render_images(CALIBRATION_IMAGES, seed=CALIBRATION_SEED)
    batches = (images[start : start + 100] for start in range(0, len(images), 100))
    calibration = calibrate_thresholds(
        model,
        (processor(images=[image.image for image in batch], return_tensors="pt")["pixel_values"] for batch in batches),
        shares=[1 / 3, 1 / 3, 1 / 3],
        data_name="rendered images",
    )
    calibration.apply(model, processor)
    print("\n".join(f"  {line}" for line in calibration.summary().splitlines()))


def fine_tune(model: Any, processor: Any, steps_scale: float) -> Any:
    """Phase 3: LoRA on the language model, the projector in full, at the counts the router chooses."""
    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    from adaptive_llava.training.lora_targets import fully_trained_modules, language_model_targets
    from adaptive_llava.training.tiny_model import conversation

    rng = np.random.default_rng(LORA_SEED)
    images = render_images(_scaled(LORA_IMAGES, steps_scale), seed=LORA_SEED)
    rows = [{"images": [image.image], "messages": conversation(image, rng)} for image in images]
    steps = _scaled(LORA_STEPS, steps_scale)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                learning_rate=2e-3,
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
                target_modules=language_model_targets(model),
                modules_to_save=fully_trained_modules(model),
            ),
        )
        with _progress_bar("LoRA", steps) as bar:
            for prints_dictionaries in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(prints_dictionaries)
            trainer.add_callback(_show_progress_on(bar))
            trainer.train()
    return trainer.model.merge_and_unload()


def answer_in_fresh_process(output: Path, own_images: Sequence[Path]) -> dict[str, Any]:
    """Phase 4: hand the saved folder and unseen images to a process that has only the usual libraries."""
    held_out = render_images(HELD_OUT_IMAGES, seed=HELD_OUT_SEED)
    with tempfile.TemporaryDirectory() as folder:
        answers_file = Path(folder) / "answers.json"
        job = {
            "models": {
                "before": str((output / "model_before_lora").resolve()),
                "after": str((output / "model").resolve()),
            },
            "images": write_images(held_out, output / "held_out"),
            "own_images": [str(path.resolve()) for path in own_images],
            "output": str(answers_file),
        }
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_without_package(Path(__file__).with_name("quickstart_answers.py"), [str(job_file)], folder)
        return json.loads(answers_file.read_text(encoding="utf-8"))


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Image files of a folder, each opened once, so that a bad one is reported before any training.

    Raises:
        ValueError: No such folder, no images in it, or one that cannot be read; the path and the fix are named.
    """
    from adaptive_llava.training.image_source import open_images

    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"`--images {folder}`: there is no such folder. Pass a folder with image files in it.")
    try:
        files = [path / name for name, _ in open_images(path)]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--images {folder}`: {error} Put readable image files into the folder, or take this one out."
        ) from error
    if not all(file.is_file() for file in files):
        raise ValueError(
            f"`--images {folder}`: the folder holds a dataset. Pass one with image files (PNG, JPEG, ...)."
        )
    return files


def prepare_output(folder: str | os.PathLike) -> Path:
    """The output folder, made if missing and without the model of an earlier run.

    Raises:
        ValueError: The path is a file, or a folder that something else than the quickstart has filled.
    """
    output = Path(folder)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output {folder}` is a file. Pass a folder; it is made if it does not exist.")
    ours = (output / _MARK).is_file()
    if output.is_dir() and any(output.iterdir()) and not ours:
        raise ValueError(
            f"`--output {folder}`: the folder is not empty, and not of an earlier quickstart. Pass a new or empty one."
        )
    for part in ("model", "model_before_lora", "held_out") if ours else ():
        shutil.rmtree(output / part, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARK).write_text("Written by `python -m adaptive_llava.training.quickstart`; may be deleted.\n")
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.quickstart",
        description="Build, fine-tune, save and reload a small adaptive vision-language model on the CPU.",
    )
    parser.add_argument("--images", help="folder of your own images, to see how many tokens each would get")
    parser.add_argument("--output", default="quickstart_output", help="folder to write to (%(default)s)")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies training steps and image counts (%(default)s)"
    )
    return parser


def _scaled(number: int, scale: float) -> int:
    return max(4, round(number * scale))


@contextmanager
def _phase(title: str, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Prints a heading and writes down how long the block took."""
    print(f"\n{title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
    print(f"  {seconds[name]:.0f} s", flush=True)


def _progress_bar(what: str, steps: int) -> Any:
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


def _quieten_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|peft|trl|transformers)\b")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def write_images(images: Sequence[RenderedImage], folder: Path) -> list[dict[str, Any]]:
    """Saves images as PNG; two questions are asked about each, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, image in enumerate(images):
        path = folder / f"{image.kind}_{index:03d}.png"
        image.image.save(path)
        first = index // len(KINDS)  # not always the same two cells
        asked = [image.questions[(first + offset) % len(image.questions)] for offset in (0, 1)]
        entries.append({"path": str(path.resolve()), "kind": image.kind, "questions": asked})
    return entries


def _kinds_of_files(folder: Path) -> list[str]:
    """Names of the files that matter, with the code files counted."""
    names = sorted(path.name for path in folder.iterdir())
    code = [name for name in names if name.endswith(".py")]
    return [*(name for name in names if name.endswith((".safetensors", ".json"))), f"{len(code)} code files"]


def _draw(output: Path, shown: list[dict], own_images: list[dict]) -> Path:
    from adaptive_llava.training.quickstart_picture import draw_picture

    path = output / "quickstart.png"
    draw_picture([*shown, *own_images[:8]], path, title="Every image at the number of visual tokens chosen for it")
    return path


if __name__ == "__main__":
    sys.exit(main())
