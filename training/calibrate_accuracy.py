"""Choose the cheapest thresholds of a router whose loss of score against all tokens is bounded.

A router's thresholds are one dial (`threshold_family`) with `STEPS` settings, evenly spaced in mean tokens between all
and the fewest. They are placed on part of the images; on the rest they are tested, from the most tokens on
(`learn_then_test`). Scores are compared image by image: the mean over an image's questions, at the count the setting
gives it and at all tokens. Questions about one image are no independent evidence, so images are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from adaptive_llava.training.accuracy_certificate import Certificate
from adaptive_llava.training.calibration_record import inner_model
from adaptive_llava.training.learn_then_test import check_goal, images_needed, learn_then_test, size_of_tested
from adaptive_llava.training.router_statistic import processed_batches, router_statistic
from adaptive_llava.training.sample_images import sample_images
from adaptive_llava.training.threshold_family import ThresholdFamily, threshold_family


if TYPE_CHECKING:
    from adaptive_llava.training.question_samples import Sample

STEPS = 20
TESTED_SHARE = 0.8
FEWEST = 10  # images; with fewer, settings cannot be placed


class NotCertified(ValueError):
    """No setting that saves tokens keeps the drop."""


def certify_thresholds(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    metric: str,
    *,
    max_drop: float,
    confidence: float = 0.95,
    tested_share: float = TESTED_SHARE,
    seed: int = 0,
    batch_size: int = 8,
    data_name: str | None = None,
    **asking: Any,
) -> Certificate:
    """Ask all questions at every count, and certify a setting; `.apply(model)` of the result puts it to use.

    Args:
        model: A model whose router has thresholds, or is a classifier.
        processor: Its processor.
        samples: Questions about one image each, drawn like those the model will be used for.
        metric: Name in `METRICS`; its headline is a mean of scores from 0 to 1.
        max_drop: Largest mean loss of score, such as 0.01 for one point of a hundred.
        confidence: Probability with which the loss keeps it.
        tested_share: Share of the images on which settings are tested; the others place them.
        seed: Seed of the split.
        batch_size: Questions per step.
        data_name: What to call the data in the certificate.
        asking: Passed on to `answered_at_each_count`, such as `max_new_tokens`.

    Raises:
        ValueError: A router without thresholds, a model that cuts images into tiles, another kind of metric, or too
            few images; the number that is needed is named.
        NotCertified: No setting passes.
    """
    from tqdm import tqdm

    from adaptive_llava.training.evaluation import answered_at_each_count
    from adaptive_llava.training.metric_table import known_metric

    inner = inner_model(model)
    counts = inner.config.visual_token_counts
    family = threshold_family(inner.router, counts)
    if inner.config.tiling["type"] == "anyres":
        raise ValueError(
            "This model routes every tile of an image by itself, and its answers at one count for all tiles do not "
            "tell what such a mixture answers. Certify a model without AnyRes, or calibrate this one with "
            "`--target-mean`."
        )
    if known_metric(metric).parts is not None:
        raise ValueError(
            f"`metric={metric!r}` is no mean of scores of single answers, and only such a mean can be bounded here. "
            "Use another metric, such as anls, relaxed_accuracy, vqa_accuracy or gqa."
        )
    images = sample_images(samples)
    check_number(len(images.first), max_drop, confidence, tested_share)
    with tqdm(total=len(images.first), unit="image", desc="route") as progress:
        shown = (samples[index].images[0] for index in images.first)
        statistic, _ = router_statistic(
            inner, processed_batches(shown, processor, batch_size, progress), family.statistic
        )
    scored = answered_at_each_count(model, processor, samples, metric, batch_size=batch_size, **asking)
    return certify(
        family,
        statistic,
        images.means(scored.scores),
        metric=metric,
        max_drop=max_drop,
        confidence=confidence,
        tested_share=tested_share,
        seed=seed,
        num_questions=len(samples),
        data_name=data_name,
        data_sha256=images.sha256,
    )


def certify(
    family: ThresholdFamily,
    statistic: np.ndarray,
    scores: np.ndarray,
    *,
    metric: str,
    max_drop: float,
    confidence: float = 0.95,
    tested_share: float = TESTED_SHARE,
    seed: int = 0,
    num_questions: int | None = None,
    data_name: str | None = None,
    data_sha256: str | None = None,
) -> Certificate:
    """Certify a setting from what is known of each image.

    Args:
        family: The router's thresholds.
        statistic: What the router decides by, `(n, k)`.
        scores: Score of each image at each count, 0 to 1, `(n, R)`.
        metric: Name of the score.
        max_drop: See `certify_thresholds`, as for the rest.
        num_questions: One per image by default.
    """
    number, counts = len(scores), np.asarray(family.counts)
    check_number(number, max_drop, confidence, tested_share)
    order, size = np.random.default_rng(seed).permutation(number), size_of_tested(number, tested_share)
    tested, pilot = order[:size], order[size:]
    targets = np.linspace(counts[-1], counts[0], STEPS + 1)[1:].tolist()
    placed = dict.fromkeys(family.setting(statistic[pilot], target) for target in targets)
    chosen_by = {setting: family.rungs(statistic, setting) for setting in placed}
    settings = [setting for setting, chosen in chosen_by.items() if counts[chosen[pilot]].mean() < counts[-1]]
    rungs = np.stack([chosen_by[setting] for setting in settings], axis=1)
    drops = scores[:, -1:] - np.take_along_axis(scores, rungs, axis=1)
    verdict = learn_then_test(drops[pilot], drops[tested], max_drop=max_drop, confidence=confidence)
    if verdict.setting is None:
        saved = 1 - counts[rungs[tested, 0]].mean() / counts[-1]
        raise NotCertified(
            f"`max_drop={max_drop:g}` is not certified, and the thresholds were left as they were. The first setting, "
            f"which spares {saved:.0%} of the tokens, already changed the mean {metric} of {size} images by "
            f"{-verdict.drop:+.4f}; with {100 * confidence:g} % confidence it loses at most {verdict.bound:.4f}, and "
            "no less can be said. Pass at least that as `--max-drop`, if you can accept it, more images, or train the "
            "router."
        )
    chosen = rungs[tested, verdict.setting]
    return Certificate(
        setting=settings[verdict.setting],
        family=family.name,
        counts=family.counts,
        metric=metric,
        max_drop=max_drop,
        confidence=confidence,
        bound=verdict.bound,
        drop=verdict.drop,
        scores=(float(scores[tested, -1].mean()), float(scores[tested, chosen].mean())),
        mean_tokens=(float(counts[-1]), float(counts[chosen].mean())),
        num_tested=size,
        num_images=number,
        num_questions=number if num_questions is None else num_questions,
        num_settings=len(settings),
        seed=seed,
        data_name=data_name,
        data_sha256=data_sha256,
    )


def check_number(number: int, max_drop: float, confidence: float, tested_share: float) -> None:
    """Refuse a number of images with which nothing could be certified, before any question is asked.

    Raises:
        ValueError: The number that is needed is named.
    """
    check_goal(max_drop, confidence)
    if not 0 < tested_share < 1:
        raise ValueError(f"`tested_share={tested_share:g}` must lie between 0 and 1.")
    needed = images_needed(max_drop, confidence, tested_share=tested_share, at_least=FEWEST)
    if number < needed:
        raise ValueError(
            f"{number} images are too few for `max_drop={max_drop:g}` at `confidence={confidence:g}`: at least "
            f"{needed} are needed, even if no answer gets worse, and more if some do. Pass more images, or ask for "
            "less."
        )
