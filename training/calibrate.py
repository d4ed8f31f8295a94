"""Choose a router's thresholds on your own images, for a mean token count or for shares of images per count.

    python -m adaptive_llava calibrate --model my_model --data my_images --target-mean 200
    python -m adaptive_llava calibrate --model my_model --data user/dataset --shares 0.5,0.3,0.2 --output calibrated

Thresholds are chosen on one part of the images; what is printed was measured on the rest. They are written with
their provenance into `config.json` (`router["thresholds"]`, `calibration`), beside a picture of the statistic.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_llava.training.calibration_record import Calibration, routed_model
from adaptive_llava.training.image_source import ImageSource, open_images
from adaptive_llava.training.threshold_search import (
    check_mean,
    check_shares,
    rungs_at,
    thresholds_for_mean,
    thresholds_for_shares,
)


MIN_IMAGES = 8
HISTOGRAM = "calibration_histogram.png"


@torch.no_grad()  # not inference mode: what a module caches now must serve training later
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
    spread, counts = _statistics(inner, pixel_batches, check)
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


def _statistics(
    inner: nn.Module, pixel_batches: Iterable[Tensor | tuple[Tensor, Tensor]], check: Callable[[Sequence[int]], None]
) -> tuple[np.ndarray, tuple[int, ...]]:
    spreads, counts = [], None
    modes = [(part, part.training) for part in inner.modules()]
    inner.eval()  # batch norms of a convolutional tower must not learn from these images
    try:
        for batch in pixel_batches:
            features = inner.extract_features(*(batch if isinstance(batch, tuple) else (batch,)))
            spreads.append(inner.router.window_spread(features).cpu().numpy())
            ladder = inner.compressor.ladder(features.grid)
            if counts is None:
                check(ladder)  # before the other images are read
            elif counts != ladder:
                raise ValueError(f"Images of different sizes give different token counts: {counts} and {ladder}.")
            counts = ladder
    finally:
        for part, training in modes:
            part.training = training
    if counts is None:
        raise ValueError("There are no images to calibrate on. Pass at least one batch.")
    spread = np.concatenate(spreads)
    if not np.isfinite(spread).all():
        raise ValueError("The router's statistic is not finite for some images. Load the model in float32.")
    return spread, counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    if not options.output and not Path(options.model).is_dir():
        raise ValueError(
            f"`--model {options.model}` is no folder here. Say with `--output` where to write the result."
        )
    if options.batch_size < 1:
        raise ValueError(f"`--batch-size {options.batch_size}` must be at least 1 image.")
    from tqdm import tqdm
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = open_images(options.data, split=options.split, limit=options.limit)
    remote = {"trust_remote_code": options.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", **remote)
    routed_model(model)  # before any image is read
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(options.model, **remote)
    with tqdm(total=source.count, unit="image", desc="calibrate") as progress:
        calibration = calibrate_thresholds(
            model,
            _pixel_batches(source, processor, options.batch_size, progress),
            target_mean=options.target_mean,
            shares=options.shares,
            holdout=options.holdout,
            seed=options.seed,
            data_name=source.name,
        )
    calibration.apply(model, processor)
    print(calibration.summary())
    output = Path(options.output or options.model)
    if output.resolve() == Path(options.model).resolve():
        _write_into(output, model.config)
    else:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    calibration.save_histogram(output / HISTOGRAM)
    print(f"written: {output / 'config.json'}, {output / HISTOGRAM}")
    return 0


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
    parser.add_argument("--holdout", type=float, default=0.3, help="share of images only measured (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (%(default)s)")
    parser.add_argument("--output", help="folder to write; default: the model's own folder")
    parser.add_argument("--limit", type=int, help="read only the first images, at most this many")
    parser.add_argument("--split", default="train", help="split of a dataset (%(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model's repository")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _pixel_batches(source: ImageSource, processor: Any, size: int, progress: Any) -> Iterator[tuple[Tensor, Tensor]]:
    images: list[Any] = []

    def processed() -> tuple[Tensor, Tensor]:
        inputs = processor(images=images, return_tensors="pt")
        progress.update(len(images))
        return inputs["pixel_values"], inputs["image_sizes"]

    for _, image in source:
        images.append(image)
        if len(images) == size:
            yield processed()
            images = []
    if images:
        yield processed()


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
