"""Is a certified bound kept? Routers of the shipped model, certified on rendered pictures and measured on others.

    python -m adaptive_llava.training.certificate_study --pictures 4000 --questions 2 --seed 0

Every question is answered once at every count. From these answers the model's own classifier and DFMR's rule on the
same weights are certified as `calibrate --max-drop` does it, for several figures, and what each then loses is measured
on as many fresh pictures. At last DFMR's rule is certified on `--draws` random draws of `--draw-size` pictures, and
each bound is compared with the drop over all of them. Writes `results/calibration_certificate.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adaptive_llava.training.accuracy_certificate import Certificate
from adaptive_llava.training.calibrate_accuracy import TESTED_SHARE, NotCertified, certify, check_number
from adaptive_llava.training.evaluation import answered_at_each_count
from adaptive_llava.training.markdown_table import table
from adaptive_llava.training.question_samples import Sample
from adaptive_llava.training.router_statistic import processed_batches, router_statistic
from adaptive_llava.training.sample_images import SampleImages, sample_images
from adaptive_llava.training.study.families import FAMILIES, render
from adaptive_llava.training.study.ship import load_shipped
from adaptive_llava.training.threshold_family import ThresholdFamily, threshold_family


NAME = "calibration_certificate"
METRIC = "gqa"  # right or wrong, letter by letter
MAX_DROPS, CONFIDENCE = (0.01, 0.02, 0.05), 0.95
ROUTERS: dict[str, dict[str, Any] | None] = {"classifier": None, "feature_std": {"type": "feature_std"}}

_BATCH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    check_number(options.pictures, min(MAX_DROPS), CONFIDENCE, TESTED_SHARE)
    model, processor = load_shipped()
    sets, scores = [], []
    for seed in (options.seed, options.seed + 1):
        samples = rendered_samples(options.pictures, options.questions, seed=seed)
        images = sample_images(samples)
        scored = answered_at_each_count(model, processor, samples, METRIC, batch_size=_BATCH, max_new_tokens=2)
        sets.append((samples, images))
        scores.append(images.means(scored.scores))
    result: dict[str, Any] = {
        "command": f"python -m adaptive_llava.training.certificate_study --pictures {options.pictures} --questions "
        f"{options.questions} --seed {options.seed} --draws {options.draws} --draw-size {options.draw_size}",
        "counts": list(model.config.visual_token_counts),
        "scores": [round(float(score), 4) for score in scores[1].mean(0)],
        "routers": {},
        "draws": {},
    }
    pool = np.concatenate(scores)
    for name, router in ROUTERS.items():
        family = _family(model, router)
        statistics = [_statistic(model, family, processor, *each) for each in sets]
        about = {"num_questions": len(sets[0][0]), "data_name": "rendered pictures", "data_sha256": sets[0][1].sha256}
        result["routers"][name] = [
            certified_and_measured(family, statistics, scores, max_drop=max_drop, seed=options.seed, **about)
            for max_drop in MAX_DROPS
        ]
        result["draws"][name] = violations(
            family,
            np.concatenate(statistics),
            pool,
            draws=options.draws,
            size=options.draw_size,
            max_drop=MAX_DROPS[1],
        )
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(report(result))
    return 0


def rendered_samples(pictures: int, questions: int, *, seed: int) -> list[Sample]:
    """Questions about pictures of random kinds, with fonts and rulings of test pictures."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(list(FAMILIES), size=pictures).tolist()
    samples = []
    for number, picture in enumerate(render(pictures, seed=1000 + seed, test=True, families=kinds)):
        for position in rng.permutation(len(picture.questions))[:questions].tolist():
            question, answer = picture.questions[position]
            samples.append(Sample(f"{number}.{position}", question, (answer,), [picture.image], {}))
    return samples


def certified_and_measured(
    family: ThresholdFamily, statistics: Sequence[np.ndarray], scores: Sequence[np.ndarray], **options: Any
) -> dict[str, Any]:
    """A certificate from the first set of images, and what its setting does to the second; or why there is none."""
    try:
        found = certify(family, statistics[0], scores[0], metric=METRIC, confidence=CONFIDENCE, **options)
    except NotCertified as refusal:
        return {"max_drop": options["max_drop"], "refused": str(refusal)}
    rungs = family.rungs(statistics[1], found.setting)
    drops = _drops(scores[1], rungs)
    fresh = {
        "num_images": len(drops),
        "drop": round(float(drops.mean()), 5),
        "standard_error": round(float(drops.std(ddof=1) / len(drops) ** 0.5), 5),
        "mean_tokens": round(float(np.asarray(family.counts)[rungs].mean()), 3),
    }
    return {"max_drop": options["max_drop"], "certificate": found.provenance(), "fresh": fresh}


def violations(
    family: ThresholdFamily, statistic: np.ndarray, scores: np.ndarray, *, draws: int, size: int, max_drop: float
) -> dict[str, Any]:
    """How often a draw is certified, and how often the drop over all images is then above its bound."""
    found: list[Certificate] = []
    options: dict[str, Any] = {"metric": METRIC, "max_drop": max_drop, "confidence": CONFIDENCE}
    for seed in tqdm(range(draws), unit="draw", desc="certify"):
        drawn = np.random.default_rng(seed).integers(len(scores), size=size)
        try:
            found.append(certify(family, statistic[drawn], scores[drawn], seed=seed, **options))
        except NotCertified:
            continue
    true = [_drops(scores, family.rungs(statistic, each.setting)).mean() for each in found]
    return {
        "max_drop": max_drop,
        "confidence": CONFIDENCE,
        "draws": draws,
        "images_per_draw": size,
        "images": len(scores),
        "certified": len(found),
        "violated": sum(bool(drop > each.bound) for drop, each in zip(true, found, strict=True)),
        "mean_tokens": round(float(np.mean([each.mean_tokens[1] for each in found])), 2) if found else None,
    }


def report(result: dict[str, Any]) -> str:
    """The result in words and a table."""
    rows, largest = [], result["counts"][-1]
    for name, runs in result["routers"].items():
        for run in runs:
            row = [name, f"{run['max_drop']:g}"]
            if "refused" in run:
                rows.append([*row, "not certified", "", ""])
                continue
            made, fresh = run["certificate"], run["fresh"]
            rows.append(
                [
                    *row,
                    f"{made['mean_tokens']['chosen']:.1f}",
                    f"{made['drop']:+.4f} (n = {made['num_tested']})",
                    f"{fresh['drop']:+.4f} ± {1.96 * fresh['standard_error']:.4f} ({fresh['mean_tokens']:.1f} tokens)",
                ]
            )
    head = ["router", "max drop", f"tokens (full: {largest})", "drop when certified", "drop on fresh pictures"]
    told = []
    for name, draws in result["draws"].items():
        certified = (
            f"Of {draws['draws']} draws of {draws['images_per_draw']} pictures, `{name}` was certified to lose at "
            f"most {draws['max_drop']:g} on {draws['certified']}"
        )
        kept = f", at {draws['mean_tokens']} tokens on average; {draws['violated']} of the bounds were violated"
        told.append(certified + (f"{kept} (5 % allowed)." if draws["certified"] else "."))
    return "\n\n".join([table(head, rows), " ".join(told)])


def _drops(scores: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    return scores[:, -1] - scores[np.arange(len(scores)), rungs]


def _family(model: Any, router: dict[str, Any] | None) -> ThresholdFamily:
    if router is not None:
        model.config.router = dict(router)
        model.config.check_options()
        model.model.router = model.config.build_router(model.model.compressor).eval()
    return threshold_family(model.model.router, model.config.visual_token_counts)


def _statistic(
    model: Any, family: ThresholdFamily, processor: Any, samples: Sequence[Sample], images: SampleImages
) -> np.ndarray:
    shown = (samples[index].images[0] for index in images.first)
    with tqdm(total=len(images.first), unit="image", desc="route") as progress:
        batches = processed_batches(shown, processor, _BATCH, progress)
        return router_statistic(model.model, batches, family.statistic)[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.certificate_study", description=__doc__.split("\n")[0]
    )
    number = partial(parser.add_argument, type=int)
    number("--pictures", default=4000, help="to certify on, and as many fresh ones (%(default)s)")
    number("--questions", default=2, help="about each picture, at most (%(default)s)")
    number("--seed", default=0, help="of pictures, questions and splits (%(default)s)")
    number("--draws", default=500, help="of the last part (%(default)s)")
    number("--draw-size", default=1500, help="pictures per draw (%(default)s)")
    parser.add_argument("--output", default="results", help="folder to write to (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
