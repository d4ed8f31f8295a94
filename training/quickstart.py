"""Teach the model that comes with the package a new kind of document, and ask it before and after; on a CPU.

    python -m adaptive_llava.training.quickstart
    python -m adaptive_llava.training.quickstart --images my_photos --output my_run

1. Load the shipped model and ask about unseen pictures: how many visual tokens it spends on which kind, and what a
   fixed number would have answered.
2. Show it blueprints, a kind of document it has never seen.
3. Teach its router that blueprints need the most tokens; fine-tune the model at the counts the router chooses, with
   LoRA through TRL's own `SFTTrainer`, among pictures of the kinds it knows; merge, and save it with its code.
4. In a fresh process, load it with `AutoModelForImageTextToText` and ask again. With `--trust-remote-code` that
   process has no `adaptive_llava` to import: the code that was saved beside the weights answers.

Written to `--output`: `model/`, `model_before_lora/`, `quickstart.png`, `quickstart_results.json`, `held_out/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_llava.training import quickstart_answers
from adaptive_llava.training.new_document import NEW_DOCUMENT, render_blueprints
from adaptive_llava.training.process_without_package import run_without_package
from adaptive_llava.training.quickstart_answers import answer, peak_memory_mib
from adaptive_llava.training.quickstart_report import (
    pick_examples,
    print_closing,
    print_examples,
    print_families,
    print_model,
    print_new_kind,
    print_own_images,
    print_scores,
    score,
)
from adaptive_llava.training.study.families import Picture, render


KNOWN = "known kind"
KNOWN_QUESTIONS, NEW_QUESTIONS = 576, 200
TRAINING_PICTURES = 1500  # of the kinds it knows, and as many of the new one
STEPS = 400

_SHOWN = (*[NEW_DOCUMENT] * 4, "scene", "mosaic", "big_digit", "header", "table", "chart", "page_1", "page_8")
_MARK = ".written_by_quickstart"

# Sets that share no random numbers, with each other or with those of the study.
_KNOWN_SEED, _NEW_SEED, _TRAINING_SEED, _NEW_TRAINING_SEED = 71, 72, 73, 74


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
    run(output, own_images, options.steps_scale, trust_remote_code=options.trust_remote_code)
    return 0


def run(
    output: Path, own_images: Sequence[Path] = (), steps_scale: float = 1.0, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The whole story; returns what `quickstart_results.json` holds.

    Args:
        output: Folder to write to.
        own_images: Images to route beside the rendered ones.
        steps_scale: Multiplies training steps and numbers of pictures.
        trust_remote_code: Ask again where the package is absent, with the code saved in `output`.
    """
    import torch

    torch.set_num_threads(1)  # these matrices are too small to share among threads
    seconds: dict[str, float] = {}

    with _phase("1/4  Load the model that comes with the package, and ask it", seconds, "ask_shipped"):
        from adaptive_llava.training.study.ship import load_shipped

        model, processor = load_shipped()
        print_model(model, processor)
        counts = list(model.config.visual_token_counts)
        known_pictures = render(_scaled(KNOWN_QUESTIONS, steps_scale), seed=_KNOWN_SEED, test=True)
        known = write_pictures(known_pictures, output / "held_out", seed=_KNOWN_SEED)
        shipped = score(ask(model, processor, known))
        print_families(shipped, counts)

    with _phase(f"2/4  A kind of document it has never seen: the {NEW_DOCUMENT}", seconds, "ask_new"):
        new_pictures = render_blueprints(_scaled(NEW_QUESTIONS, steps_scale), seed=_NEW_SEED, test=True)
        new = write_pictures(new_pictures, output / "held_out", seed=_NEW_SEED)
        untaught = score(ask(model, processor, new))
        print_new_kind(untaught, counts, NEW_DOCUMENT)

    with _phase("3/4  Teach the router; fine-tune: LoRA, TRL's SFTTrainer, merge, save", seconds, "fine_tune"):
        for part in (model, processor):
            part.save_pretrained(output / "model_before_lora")
        model = teach(model, processor, steps_scale)
        model.save_pretrained(output / "model")
        processor.save_pretrained(output / "model")
        print(f"  saved {output / 'model'}: {', '.join(_kinds_of_files(output / 'model'))}")

    where = "a fresh process without this package" if trust_remote_code else "a fresh process"
    with _phase(f"4/4  Load it in {where}, and ask again", seconds, "answer"):
        answered = answer_in_fresh_process(output, [*new, *known], own_images, trust_remote_code)

    scores = score(answered["answers"], lambda kind: kind if kind == NEW_DOCUMENT else KNOWN)
    shown = pick_examples(answered["answers"]["auto"], _SHOWN)
    print_examples(shown)
    print_scores(scores, counts)
    print_own_images(answered["own_images"], model.config.vision_config.image_size)
    windows = model.config.compressor["type"] == "average_pool"
    picture = _draw(output, shown, answered["own_images"], windows=windows)

    results = {
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_memory_mib": {
            "training": peak_memory_mib(),
            "fresh_process": answered["peak_memory_mib"],
        },
        "steps_scale": steps_scale,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compressor": model.config.compressor["type"],
        "router": model.config.router["type"],
        "token_counts": answered["token_counts"],
        "package_importable_in_fresh_process": answered["package_importable"],
        "model_class_in_fresh_process": answered["model_class"],
        "new_document": NEW_DOCUMENT,
        "shipped": shipped,
        "new_document_before": untaught,
        "scores": scores,
        "own_images": answered["own_images"],
    }
    (output / "quickstart_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_closing(results, output, picture)
    return results


def ask(model: Any, processor: Any, images: list[dict]) -> dict[str, list[dict]]:
    """Answers at the router's choice, and at the fewest and the most tokens."""
    counts = model.config.visual_token_counts
    budgets = {"smallest": counts[0], "auto": "auto", "largest": counts[-1]}
    return {name: answer(model, processor, images, budget) for name, budget in budgets.items()}


def teach(model: Any, processor: Any, steps_scale: float) -> Any:
    """Phase 3: first the router, then the model at the counts that it chooses.

    A model that is fine-tuned at counts too small to read at would only learn to guess. So the router learns first
    that the new kind needs the most tokens; the kinds it knows keep what it has given them so far. Fine-tuning changes
    what the tower sees, and the router reads the tower: it learns the same again afterwards.
    """
    from adaptive_llava.training.quickstart_tuning import fine_tune, read, teach_router

    number = _scaled(TRAINING_PICTURES, steps_scale)
    known = render(number, seed=_TRAINING_SEED)
    new = render_blueprints(number, seed=_NEW_TRAINING_SEED)
    pictures = [*known, *new]
    _, rungs = read(model, processor, pictures)
    counts = np.asarray(model.config.visual_token_counts)
    print(f"  the router gives a {NEW_DOCUMENT} {counts[rungs[number:]].mean():.1f} tokens; it learns: {counts[-1]}")
    rungs[number:] = len(counts) - 1
    teach_router(model, processor, pictures, rungs)
    model = fine_tune(model, processor, pictures, _scaled(STEPS, steps_scale), seed=_TRAINING_SEED)
    teach_router(model, processor, pictures, rungs)
    return model


def write_pictures(pictures: Sequence[Picture], folder: Path, *, seed: int) -> list[dict[str, Any]]:
    """Save pictures as PNG; one question is asked about each, drawn with `seed`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    entries = []
    for index, picture in enumerate(pictures):
        path = folder / f"{picture.family}_{index:03d}.png"
        picture.image.save(path)
        asked = picture.questions[int(rng.integers(len(picture.questions)))]
        entries.append({"path": str(path.resolve()), "kind": picture.family, "questions": [asked]})
    return entries


def answer_in_fresh_process(
    output: Path, images: list[dict], own_images: Sequence[Path], trust_remote_code: bool
) -> dict[str, Any]:
    """Phase 4: hand the saved folders and unseen images to another process; one that trusts lacks this package."""
    with tempfile.TemporaryDirectory() as folder:
        answers_file = Path(folder) / "answers.json"
        job = {
            "models": {
                "before": str((output / "model_before_lora").resolve()),
                "after": str((output / "model").resolve()),
            },
            "images": images,
            "own_images": [str(path.resolve()) for path in own_images],
            "trust_remote_code": trust_remote_code,
            "output": str(answers_file),
        }
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        if trust_remote_code:
            run_without_package(quickstart_answers.__file__, [str(job_file)], folder)
        else:
            subprocess.run([sys.executable, "-m", quickstart_answers.__name__, str(job_file)], check=True)
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
        description="Teach the shipped model a new kind of document, save it, and ask it elsewhere; on the CPU.",
    )
    parser.add_argument("--images", help="folder of your own images, to see how many tokens each would get")
    parser.add_argument("--output", default="quickstart_output", help="folder to write to (%(default)s)")
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        help="multiplies training steps and numbers of pictures (%(default)s)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="ask again where this package is absent, by running the code that this run saves beside the weights",
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


def _quieten_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|peft|trl|transformers)\b")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def _kinds_of_files(folder: Path) -> list[str]:
    """Names of the files that matter, with the code files counted."""
    names = sorted(path.name for path in folder.iterdir())
    code = [name for name in names if name.endswith(".py")]
    return [*(name for name in names if name.endswith((".safetensors", ".json"))), f"{len(code)} code files"]


def _draw(output: Path, shown: list[dict], own_images: list[dict], *, windows: bool) -> Path:
    from adaptive_llava.training.quickstart_picture import draw_picture

    path = output / "quickstart.png"
    title = "Every image at the number of visual tokens chosen for it"
    draw_picture([*shown, *own_images[:8]], path, title=title, windows=windows)
    return path


if __name__ == "__main__":
    sys.exit(main())
