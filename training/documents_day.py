"""From pages with fields to the number of visual tokens they need: fine-tune, sweep, decide, calibrate, save.

    python -m adaptive_llava documents --model my_model --data my_receipts --output out/receipts
    python -m adaptive_llava documents --model my_model --data my_receipts --output out/receipts \\
        --budgets 16,64,144,auto --push user/receipts --num_train_epochs 5

1. Read `manifest.jsonl` or `metadata.jsonl` (see `document_pages.py`); hold out a part of the pages.
2. Fine-tune as the recipe says (`--config`; QLoRA by default), each image at one of the budgets at random. Options of
   the recipe may follow on the command line. Without bitsandbytes: `--load_in_4bit false`, on a CPU `--dtype float32`.
3. Ask about the held-out pages at every budget, at the router's own counts (`auto`) and with all tokens.
4. Name the cheapest budget whose score is within `--margin` of all tokens', or say that the model does not read.
5. Calibrate a router with thresholds to that number, and ask again.

Written to `--output`: `model/`, `documents_day.json` and `.png` with figures alone, and `answers.jsonl`, which holds
the held-out pages' fields and all answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptive_llava.hub_cards.hub_errors import check_reachable
from adaptive_llava.hub_cards.push import push
from adaptive_llava.training.budget_curve import curve_of, draw_curve, table_of
from adaptive_llava.training.budget_sweep import MOST_TOKENS, answer_at_budgets, chosen_budgets, write_answers
from adaptive_llava.training.calibrate import HISTOGRAM, MIN_IMAGES, calibrate_thresholds
from adaptive_llava.training.calibration_record import Calibration, routed_model
from adaptive_llava.training.document_pages import DocumentPage, read_pages, split_pages, write_conversations
from adaptive_llava.training.quickstart_answers import peak_memory_mib
from adaptive_llava.training.token_budgets import AUTO
from adaptive_llava.training.token_need import SCORES, TokenNeed, draw_pages, token_need
from adaptive_llava.training.whole_folder import check_free


RECIPE = "documents_qlora.yaml"
RESULTS, CURVE, ANSWERS = "documents_day.json", "documents_day.png", "answers.jsonl"
EXCHANGED, CALIBRATED = "other page", "auto, calibrated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options, of_recipe = _parser().parse_known_args(arguments)
    output = check_free(options.output)
    check_options(options, of_recipe)
    if options.push:
        check_reachable("--push", options.push)
    budgets = chosen_budgets(options.budgets, options.model)
    folder = read_pages(options.data)
    train, held_out = split_pages(folder.pages, holdout=options.holdout, seed=options.seed)
    print(
        f"{folder.name}: {len(folder.pages)} pages with {sum(len(page.fields) for page in folder.pages)} fields, "
        f"{len(train)} to train on, {len(held_out)} held out; left out: {folder.without_fields} pages without fields, "
        f"{folder.ambiguous_fields} fields with several values",
        flush=True,
    )
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    trained = options.model if options.skip_training else fine_tune_on_pages(options, of_recipe, train, budgets)
    seconds["fine_tune"] = round(time.perf_counter() - start, 1)

    start = time.perf_counter()
    model, processor = _load(trained)
    longest = max(len(processor.tokenizer(page.answer)["input_ids"]) for page in train)
    asking = {"max_new_tokens": longest + longest // 4, "batch_size": options.batch_size}
    answers = answer_at_budgets(model, processor, held_out, budgets, exchanged=EXCHANGED, **asking)
    draws = draw_pages(len(held_out), options.seed)
    curve, other = curve_of(answers, held_out, draws, EXCHANGED)
    need = token_need(curve, other, score=options.score, margin=options.margin, useful=options.useful)
    seconds["sweep"] = round(time.perf_counter() - start, 1)

    start = time.perf_counter()
    calibration, why = _calibrated(model, processor, train, need, options, folder.name)
    if calibration is not None:
        calibration.apply(model, processor)
        answers |= answer_at_budgets(model, processor, held_out, {CALIBRATED: AUTO}, **asking)
        curve, other = curve_of(answers, held_out, draws, EXCHANGED)
    seconds["calibrate"] = round(time.perf_counter() - start, 1)

    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    if not options.skip_training:
        shutil.rmtree(trained)  # it is `model` now; an adapter stays beside it
    if calibration is not None:
        calibration.save_histogram(output / HISTOGRAM)
    results = {
        "data": folder.name,
        "pages": {
            "train": len(train),
            "held_out": len(held_out),
            "without_fields": folder.without_fields,
            "held_out_fields": sum(len(page.fields) for page in held_out),
            "ambiguous_fields": folder.ambiguous_fields,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": None if options.skip_training else Path(options.config).name,
        "options": of_recipe,
        "score": options.score,
        "margin": options.margin,
        "useful": options.useful,
        "seed": options.seed,
        "curve": curve,
        "other_page": other,
        "need": vars(need),
        "calibration": None if calibration is None else calibration.provenance(),
        "seconds": seconds,
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_mib": peak_memory_mib(),
    }
    (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_answers(answers, held_out, output / ANSWERS)
    draw_curve(results, output / CURVE)
    print(f"\n{table_of(results)}\n\n{need.sentence}\n{why if calibration is None else calibration.summary()}")
    print(f"written: {', '.join(str(output / name) for name in ('model', RESULTS, CURVE, ANSWERS))}")
    if options.push:
        untrained = not model.config.compressor_trained
        done = push(output / "model", options.push, untrained=untrained, results=[output / RESULTS])
        print(f"pushed: {done.url}")
    return 0


def check_options(options: argparse.Namespace, of_recipe: Sequence[str]) -> None:
    """Refuse numbers that cannot be meant.

    Raises:
        ValueError: A number out of range, options of a recipe where nothing is trained, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "`documents` runs in one process. To train with several, use `adaptive_llava.training.sft`, and measure "
            "the model with `documents --skip-training`."
        )
    for name in ("margin", "useful"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"`--{name} {getattr(options, name)}` must be a score from 0 up to 1.")
    if options.batch_size < 2:
        raise ValueError(f"`--batch-size {options.batch_size}` must be at least 2: pages of a step are exchanged.")
    if options.skip_training and of_recipe:
        raise ValueError(f"`--skip-training` leaves no use for {' '.join(of_recipe)}. Leave one of the two out.")


def fine_tune_on_pages(
    options: argparse.Namespace,
    of_recipe: Sequence[str],
    pages: Sequence[DocumentPage],
    budgets: Mapping[str, int | str],
) -> Path:
    """Train on the pages, each at one of the budgets at random.

    Returns:
        Folder of the full model.

    Raises:
        ValueError: The recipe's options do not go together, with each other or with this command.
    """
    from adaptive_llava.training.sft import build_trainer, fine_tune, parse_arguments

    numbers = [budget for budget in budgets.values() if isinstance(budget, int)]

    def build(*parts: Any, **named: Any) -> Any:
        return build_trainer(*parts, **(named | {"visual_token_budget": [*numbers, MOST_TOKENS]}))

    work = Path(options.output) / "training"
    with tempfile.TemporaryDirectory() as rows:
        listing = Path(rows) / "train.jsonl"
        write_conversations(pages, listing)
        given = {
            "config": options.config,
            "model_name_or_path": options.model,
            "dataset_name": listing,
            "output_dir": work,
            "seed": options.seed,
        }
        script, training, model = parse_arguments(
            [*(str(part) for name, value in given.items() for part in (f"--{name}", value)), *of_recipe]
        )
        _check_recipe(script, training)
        script.merge = model.use_peft
        fine_tune(script, training, model, build=build)
    gc.collect()  # the trained model stands on disk; the device is needed for asking
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return work / "merged" if model.use_peft else work


def _check_recipe(script: Any, training: Any) -> None:
    taken = {
        "visual_token_budget": (script.visual_token_budget is not None, "name token counts with `--budgets`"),
        "threshold_schedule": (script.threshold_schedule is not None, "each page is shown at all budgets"),
        "push_to_hub": (training.push_to_hub, "pass `--push user/name`"),
    }
    for name, (given, instead) in taken.items():
        if given:
            raise ValueError(f"`{name}` would be overruled here: leave it out; {instead}.")


def _load(name: str | Path) -> tuple[Any, Any]:
    from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor

    place: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(name, dtype="auto", **place)
    processor = AdaptiveLlavaProcessor.from_pretrained(name)
    processor.layout = "compact"  # counts vary
    return model, processor


def _calibrated(
    model: Any,
    processor: Any,
    pages: Sequence[DocumentPage],
    need: TokenNeed,
    options: argparse.Namespace,
    name: str,
) -> tuple[Calibration | None, str]:
    """A calibration to the mean that is needed, or why there is none."""
    if not need.reads:
        return None, "The router's thresholds were left as they were."
    if model.config.tiling["type"] == "anyres":
        return None, "Not calibrated: thresholds count views, the budgets here whole images. See `calibrate`."
    if len(pages) < MIN_IMAGES:
        return None, f"Not calibrated: {len(pages)} pages to train on, {MIN_IMAGES} are needed."
    try:
        routed_model(model)
    except ValueError as error:
        return None, f"Not calibrated: {error}"
    batches = (pages[start : start + options.batch_size] for start in range(0, len(pages), options.batch_size))
    pixels = (
        processor(images=[page.path for page in batch], return_tensors="pt")["pixel_values"] for batch in batches
    )
    found = calibrate_thresholds(model, pixels, target_mean=need.tokens, seed=options.seed, data_name=name)
    return found, ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava documents",
        description="Fine-tune on pages with fields, and find out how many visual tokens they need.",
        epilog="Other options are those of the recipe: --num_train_epochs 5 --learning_rate 1e-4 ...",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of an adaptive LLaVA model")
    parser.add_argument("--data", required=True, help="folder with manifest.jsonl or metadata.jsonl")
    parser.add_argument("--output", required=True, help="folder to write; must be new or empty")
    parser.add_argument("--config", default=RECIPE, help="recipe to train with (%(default)s)")
    parser.add_argument("--budgets", help="tokens per page to try, and auto: 1,16,64,auto; default: all counts, auto")
    parser.add_argument("--holdout", type=float, default=0.25, help="share of pages only measured (%(default)s)")
    parser.add_argument("--score", choices=SCORES, default=SCORES[0], help="what decides (%(default)s)")
    parser.add_argument("--margin", type=float, default=0.02, help="score that may be lost (%(default)s)")
    parser.add_argument(
        "--useful", type=float, default=0.1, help="score at full tokens that counts as reading (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pages per step when asking (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, training and intervals (%(default)s)")
    parser.add_argument("--skip-training", action="store_true", help="the model is fine-tuned already; only measure")
    parser.add_argument("--push", metavar="USER/NAME", help="push model and processor to this repository of the Hub")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
