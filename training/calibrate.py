"""Choose a router's thresholds on your own images: for a mean token count, for shares of images per count, or as cheap
as a bound on the loss of score allows.

    python -m adaptive_llava calibrate --model my_model --data my_images --target-mean 200
    python -m adaptive_llava calibrate --model my_model --data user/dataset --shares 0.5,0.3,0.2 --output calibrated
    python -m adaptive_llava calibrate --model my_model --data my_val --metric anls --max-drop 0.01 --confidence 0.95

Thresholds are chosen on one part of the images; what is printed was measured on the rest. They are written with
their provenance into `config.json` (`router["thresholds"]`, `calibration`), beside a picture of the statistic.

The last command needs questions with answers (`question_samples.read_samples`), asks all of them at every count, and
bounds the loss against all tokens; see `calibrate_accuracy`. It takes a classifier too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_llava.training.accuracy_certificate import Certificate
from adaptive_llava.training.calibrate_accuracy import TESTED_SHARE, certify_thresholds
from adaptive_llava.training.calibration_record import Calibration, inner_model, routed_model
from adaptive_llava.training.image_source import open_images
from adaptive_llava.training.router_statistic import processed_batches, router_statistic
from adaptive_llava.training.threshold_family import threshold_family
from adaptive_llava.training.threshold_search import (
    check_mean,
    check_shares,
    rungs_at,
    thresholds_for_mean,
    thresholds_for_shares,
)


MIN_IMAGES = 8
HOLDOUT, CONFIDENCE = 0.3, 0.95
HISTOGRAM = "calibration_histogram.png"

_FIELDS = ("image_field", "question_field", "answer_field")
_ASKING = ("prompt", "max_new_tokens")


def calibrate_thresholds(
    model: nn.Module,
    pixel_batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    target_mean: float | None = None,
    shares: Sequence[float] | None = None,
    holdout: float = 0.3,
    seed: int = 0,
    data_name: str | None = None,
) -> Calibration:
    """Choose thresholds; `.apply(model)` of the result puts them to use.

    Args:
        model: A model whose router cuts a statistic at thresholds.
        pixel_batches: Batches of processed images, read one after the other: `(batch, 3, height, width)`, or
            `(batch, max_views, 3, height, width)` and their `image_sizes (batch, 2)`, where every view is counted like
            an image.
        target_mean: Wanted mean, in tokens: all thresholds are the same quantile of their own statistic.
        shares: In place of a mean, the wanted share of images per token count, fewest tokens first.
        holdout: Share of the images that is left out of the choice and measured.
        seed: Seed of the split.
        data_name: What to call the images in the provenance.

    Raises:
        ValueError: A router without thresholds, fewer than 8 images, or a target that cannot be reached.
    """
    inner = routed_model(model)
    if (target_mean is None) == (shares is None):
        raise ValueError(f"Pass one of `target_mean` and `shares`; got {target_mean!r} and {shares!r}.")
    if not 0 < holdout < 1:
        raise ValueError(f"`holdout={holdout}` must lie between 0 and 1: the share of images that is only measured.")
    check = partial(check_mean, target=target_mean) if shares is None else partial(check_shares, shares=shares)
    spread, counts = router_statistic(inner, pixel_batches, inner.router.window_spread, check)
    number = len(spread)
    if number < MIN_IMAGES:
        raise ValueError(f"{number} images are too few to calibrate on. Pass at least {MIN_IMAGES}, better hundreds.")
    held_out = min(max(round(holdout * number), 2), number - 2)
    order = np.random.default_rng(seed).permutation(number)
    quantile = None
    if shares is None:
        thresholds, quantile = thresholds_for_mean(spread[order[held_out:]], counts, float(target_mean))
    else:
        thresholds = thresholds_for_shares(spread[order[held_out:]], shares)
        target_mean = float(np.dot(shares, counts))
    rungs = rungs_at(spread[order[:held_out]], thresholds)
    tokens = np.asarray(counts)[rungs]
    return Calibration(
        thresholds=tuple(thresholds),
        counts=tuple(counts),
        target_mean=float(target_mean),
        target_shares=None if shares is None else tuple(map(float, shares)),
        quantile=quantile,
        mean=float(tokens.mean()),
        standard_error=float(tokens.std(ddof=1) / held_out**0.5),
        shares=tuple(float((rungs == rung).mean()) for rung in range(len(counts))),
        num_images=number,
        num_held_out=held_out,
        seed=seed,
        spread=spread,
        data_name=data_name,
        counted="views" if inner.config.tiling["type"] == "anyres" else "images",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    _check(options)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    remote = {"trust_remote_code": options.trust_remote_code}
    by_accuracy = options.max_drop is not None
    source: Any = _questions(options) if by_accuracy else open_images(options.data, **_part_of(options, "train"))
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", **remote)
    output, own = Path(options.output or options.model), Path(options.model)
    in_place = output.resolve() == own.resolve()
    if by_accuracy:
        _check_place(model, in_place)
    else:
        routed_model(model)  # before any image is read
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(options.model, **remote)
    found = (_by_accuracy if by_accuracy else _by_tokens)(model, processor, source, options)
    found.apply(model, processor)
    print(found.summary())
    if in_place:
        _write_into(output, model.config)
    else:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    (output / HISTOGRAM).unlink(missing_ok=True)  # of an earlier calibration
    if isinstance(found, Calibration):
        found.save_histogram(output / HISTOGRAM)
    print(f"written: {output / 'config.json'}" + (f", {output / HISTOGRAM}" if not by_accuracy else ""))
    return 0


def _by_tokens(model: Any, processor: Any, source: Any, options: argparse.Namespace) -> Calibration:
    from tqdm import tqdm

    with tqdm(total=source.count, unit="image", desc="calibrate") as progress:
        images = (image for _, image in source)
        return calibrate_thresholds(
            model,
            processed_batches(images, processor, options.batch_size, progress),
            target_mean=options.target_mean,
            shares=options.shares,
            holdout=HOLDOUT if options.holdout is None else options.holdout,
            seed=options.seed,
            data_name=source.name,
        )


def _questions(options: argparse.Namespace) -> list[Any]:
    from adaptive_llava.training.question_samples import read_samples

    fields = {name: getattr(options, name) for name in _FIELDS}
    return read_samples(options.data, seed=options.seed, **_part_of(options, None), **fields)


def _by_accuracy(model: Any, processor: Any, samples: list[Any], options: argparse.Namespace) -> Certificate:
    return certify_thresholds(
        model,
        processor,
        samples,
        options.metric,
        max_drop=options.max_drop,
        confidence=CONFIDENCE if options.confidence is None else options.confidence,
        tested_share=TESTED_SHARE if options.holdout is None else options.holdout,
        seed=options.seed,
        batch_size=options.batch_size,
        data_name=Path(options.data).resolve().name if Path(options.data).exists() else options.data,
        **{name: getattr(options, name) for name in _ASKING if getattr(options, name) is not None},
    )


def _part_of(options: argparse.Namespace, split: str | None) -> dict[str, Any]:
    return {"split": options.split or split, "limit": options.limit}


def _check(options: argparse.Namespace) -> None:
    if options.max_drop is None:
        misplaced = [
            name for name in ("metric", "confidence", *_FIELDS, *_ASKING) if getattr(options, name) is not None
        ]
        if misplaced:
            raise ValueError(
                f"`--{misplaced[0].replace('_', '-')} {getattr(options, misplaced[0])}` belongs to a bound on a loss "
                "of score. Pass `--metric` and `--max-drop` in place of `--target-mean` or `--shares`, or leave it "
                "out."
            )
    elif options.metric is None:
        raise ValueError(
            f"`--max-drop {options.max_drop:g}` says how much, and `--metric` is missing, which says of what. Pass "
            "one, such as `--metric anls`."
        )
    if not options.output and not Path(options.model).is_dir():
        raise ValueError(
            f"`--model {options.model}` is no folder here. Say with `--output` where to write the result."
        )
    if options.batch_size < 1:
        raise ValueError(f"`--batch-size {options.batch_size}` must be at least 1 image.")


def _check_place(model: Any, in_place: bool) -> None:
    inner = inner_model(model)
    if threshold_family(inner.router, inner.config.visual_token_counts).in_weights and in_place:
        raise ValueError(
            f"What is set in a {inner.router.type_name!r} router with {inner.router.num_rungs} token counts are its "
            "weights, and those in the model's own folder are left alone. Say with `--output` where to write."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava calibrate", description="Choose a router's thresholds on your own images."
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of an adaptive LLaVA model")
    parser.add_argument("--data", required=True, help="folder of images, saved dataset, *.parquet, or Hub dataset id")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--target-mean", type=float, help="wanted mean, in tokens per image (AnyRes: per view)")
    goal.add_argument(
        "--shares", type=_numbers, help="wanted share of images (views) per count, fewest first: 0.5,0.3,0.2"
    )
    goal.add_argument("--max-drop", type=float, help="largest mean loss of the score against all tokens, such as 0.01")
    parser.add_argument(
        "--holdout",
        type=float,
        help=f"share of images only measured ({HOLDOUT}; with --max-drop {TESTED_SHARE})",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (%(default)s)")
    parser.add_argument("--output", help="folder to write; default: the model's own folder")
    parser.add_argument("--limit", type=int, help="read only so many images (with --max-drop: questions)")
    parser.add_argument("--split", help="split of a dataset (train; with --max-drop test or validation)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model's repository")
    loss = parser.add_argument_group("with --max-drop: questions with answers, asked at every count")
    loss.add_argument("--metric", help="score of an answer, such as anls, relaxed_accuracy, vqa_accuracy or gqa")
    loss.add_argument("--confidence", type=float, help=f"probability with which the loss is kept ({CONFIDENCE})")
    loss.add_argument("--prompt", help="text around the question, with {question} in it")
    loss.add_argument("--max-new-tokens", type=int, help="length at which an answer is cut")
    for name in _FIELDS:
        loss.add_argument(f"--{name.replace('_', '-')}", help=f"name of the data's {name.replace('_', ' ')}")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _write_into(folder: Path, config: Any) -> None:
    # the weights and the code in the folder stay as they are; the processor repeats the router's options
    new = {"config.json": {"router": config.router, "calibration": config.calibration}}
    new["processor_config.json"] = {"router": config.router}
    for name, entries in new.items():
        path = folder / name
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "router" not in stored:
            continue
        unfinished = path.with_suffix(".json.partial")
        unfinished.write_text(json.dumps(stored | entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


if __name__ == "__main__":
    raise SystemExit(main())
