"""Answers of a model to questions about images, at several token budgets; images are encoded once for all of them.

    samples = read_samples("my_receipts")
    scored = answered_at_each_count(model, processor, samples, "anls")
    scored.scores.mean(0)                                # by scored.counts

Questions go through the model in batches of similar length. Which ones share a batch follows from the samples and the
batch size alone, so that padding, and with it the last bit of a logit, is the same whoever asks and in which order.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adaptive_llava.processing.image_loading import load_image
from adaptive_llava.training.metric_table import known_metric, listed
from adaptive_llava.training.question_samples import Sample


QUESTION, OPTIONS = "{question}", "{options}"
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, eq=False)
class ScoredSamples:
    """How well each question is answered at each token count.

    Attributes:
        ids: `Sample.id` of each row.
        counts: Visual tokens per image, ascending, `(R,)`.
        scores: 0 to 1, `(N, R)`.
    """

    ids: tuple[str, ...]
    counts: np.ndarray
    scores: np.ndarray


@dataclass
class BatchAnswers:
    """What was said about one batch of questions.

    Attributes:
        text_tokens: Length of each prompt, without its images.
        texts: Answers by budget.
        tokens: Visual tokens of each question's images, by budget.
        image_sizes: Height and width of each question's images, in pixels.
        seconds: Of the vision tower, under `TOWER`, and of routing, compression and generation by budget.
    """

    text_tokens: list[int]
    image_sizes: list[list[tuple[int, int]]]
    texts: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


TOWER = "vision tower"


def answered_at_each_count(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    metric: str,
    *,
    counts: Sequence[int] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prompt: str = QUESTION,
) -> ScoredSamples:
    """Greedy answers to all questions at all token counts, scored one by one.

    Args:
        model: The model; is put into evaluation mode.
        processor: Its processor.
        samples: Of `read_samples`.
        metric: Name in `METRICS`.
        counts: Token counts, ascending; those of the model by default.
        batch_size: Questions per step.
        max_new_tokens: Length at which an answer is cut.
        prompt: See `prompt_of`.

    Raises:
        ValueError: An unknown metric, samples that it cannot judge, or a count that the model cannot produce.
    """
    judge = known_metric(metric)
    references = [judge.reference(sample) for sample in samples]
    ladder = list(model.config.visual_token_counts)
    counts = ladder if counts is None else list(counts)
    unknown = sorted(set(counts) - set(ladder))
    if unknown or sorted(set(counts)) != counts:
        raise ValueError(f"`counts={counts}` must be ascending and among this model's token counts: {ladder}.")
    scores = np.zeros((len(samples), len(counts)))
    with tqdm(total=len(samples), unit="question", desc="ask") as bar:
        for batch in batches_by_length(processor, samples, batch_size, prompt):
            chosen = [samples[index] for index in batch]
            budgets = {str(count): count for count in counts}
            answers = answer_batch(model, processor, chosen, budgets, max_new_tokens=max_new_tokens, prompt=prompt)
            for column, texts in enumerate(answers.texts.values()):
                for index, text in zip(batch, texts, strict=True):
                    scores[index, column] = judge.score(text, references[index])
            bar.update(len(batch))
    return ScoredSamples(tuple(sample.id for sample in samples), np.asarray(counts), scores)


@torch.no_grad()
def answer_batch(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    budgets: Mapping[str, int | str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prompt: str = QUESTION,
    exchanged: Collection[str] = (),
) -> BatchAnswers:
    """Greedy answers to a few questions at every budget; the vision tower runs once.

    Args:
        model: The model; is put into evaluation mode.
        processor: Its processor.
        samples: Questions of one batch.
        budgets: `visual_token_budget` by name.
        max_new_tokens: Length at which an answer is cut.
        prompt: See `prompt_of`.
        exchanged: Budgets, by name, at which each question is shown the images of the one before it.

    Raises:
        ValueError: A budget that no count fits, an image that cannot be read, or questions with unlike numbers of
            images that are to be exchanged.
    """
    model.eval()
    images = [_read(sample) for sample in samples]
    texts = [written(processor, sample, len(own), prompt) for sample, own in zip(samples, images, strict=True)]
    inputs = processor(
        images=images if any(images) else None,
        text=texts,
        padding=True,
        padding_side="left",
        layout="compact",
        return_tensors="pt",
    ).to(model.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    placeholders = (ids == model.config.image_token_id).sum(1)
    sizes = [[(image.height, image.width) for image in own] for own in images]
    found = BatchAnswers((mask.sum(1) - placeholders).tolist(), sizes)
    pixels = inputs.get("pixel_values"), inputs.get("image_sizes")
    start = _now(model)
    features = model.model.extract_features(*pixels) if any(images) else None
    found.seconds[TOWER] = _now(model) - start
    for name, budget in budgets.items():
        start = _now(model)
        encoded = None
        if features is not None:
            encoded = model.encode_images(*pixels, visual_token_budget=budget, features=features)
            if name in exchanged:
                encoded = encoded.select(_of_the_question_before(images))
        said = model.generate(
            ids,
            attention_mask=mask,
            encoded_images=encoded,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[:, ids.shape[1] :]
        found.texts[name] = [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]
        found.seconds[name] = _now(model) - start
        lengths = iter(() if encoded is None else encoded.lengths)
        found.tokens[name] = [[next(lengths) for _ in own] for own in images]
    return found


def batches_by_length(
    processor: Any, samples: Sequence[Sample], batch_size: int, prompt: str = QUESTION
) -> Iterator[list[int]]:
    """Indices of the samples, in batches of prompts of similar length; the longest come first.

    Raises:
        ValueError: A batch size below 1, or a prompt without the question.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size={batch_size}` must be at least 1 question.")
    texts = [prompt_of(sample, prompt) for sample in samples]
    # an image takes far more room than a word
    lengths = [
        (len(sample.images), len(processor.tokenizer(text)["input_ids"]))
        for sample, text in zip(samples, texts, strict=True)
    ]
    order = sorted(range(len(samples)), key=lambda index: (lengths[index], index), reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def prompt_of(sample: Sample, prompt: str = QUESTION) -> str:
    """What a model is asked.

    Args:
        sample: The question.
        prompt: Text around it. `{question}` stands for the question, `{options}` for the choices of its `options` or
            `choices`, each on a line of its own behind its letter.

    Raises:
        ValueError: `{question}` is missing, or `{options}` stands for nothing.
    """
    if QUESTION not in prompt:
        raise ValueError(f"`prompt={prompt!r}` lacks {QUESTION}. Write it where the question belongs.")
    if OPTIONS in prompt:
        options = listed(sample.fields.get("options") or sample.fields.get("choices"))
        if not isinstance(options, list):
            raise ValueError(
                f"`prompt={prompt!r}` shows {OPTIONS}, but question {sample.id} has no list `options` or `choices`."
            )
        lines = (f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options))
        prompt = prompt.replace(OPTIONS, "\n".join(lines))
    return prompt.replace(QUESTION, sample.question)


def written(processor: Any, sample: Sample, num_images: int, prompt: str) -> str:
    """The question as the chat template writes it, behind its images."""
    content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": prompt_of(sample, prompt)}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def _of_the_question_before(images: Sequence[Sequence[Any]]) -> list[int]:
    if len({len(own) for own in images}) != 1:
        raise ValueError(
            f"Questions with {sorted({len(own) for own in images})} images are in one batch, so that none can be "
            "shown the other's. Leave `exchanged` out."
        )
    return np.roll(np.arange(len(images) * len(images[0])), len(images[0])).tolist()


def _read(sample: Sample) -> list[Any]:
    try:
        return [load_image(image, index=index) for index, image in enumerate(sample.images)]
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"Question {sample.id}: {error}") from error


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
