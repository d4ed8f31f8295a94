"""Answers at several budgets: right ones, each image encoded once, and the same whoever shares the batch."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptive_llava.training.evaluation import answer_batch, answered_at_each_count, batches_by_length, prompt_of
from adaptive_llava.training.question_samples import Sample, read_samples
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import load_shipped
from adaptive_llava.training.study.small_model import answers as answers_of_study


pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


@pytest.fixture(scope="module")
def pictures():
    return render(24, seed=3, test=True)


@pytest.fixture(scope="module")
def rendered(pictures, tmp_path_factory):
    """A folder of pictures that the shipped model reads, one question each."""
    return write_pictures(pictures, tmp_path_factory.mktemp("rendered"))


def write_pictures(pictures, folder):
    with (folder / "metadata.jsonl").open("w") as file:
        for number, picture in enumerate(pictures):
            picture.image.save(folder / f"{number}.png")
            question, answer = picture.questions[0]
            row = {"file_name": f"{number}.png", "question": question, "answer": answer, "category": picture.family}
            file.write(json.dumps(row) + "\n")
    return folder


def test_the_shipped_model_answers_as_its_study_says(shipped, pictures, rendered):
    model, processor = shipped
    scored = answered_at_each_count(model, processor, read_samples(rendered), "gqa", max_new_tokens=4)
    assert scored.counts.tolist() == list(model.config.visual_token_counts)
    assert scored.ids == tuple(str(number) for number in range(len(pictures)))
    assert scored.scores.shape == (24, len(scored.counts)) and set(np.unique(scored.scores)) == {0, 1}
    asked = [replace(picture, questions=picture.questions[:1]) for picture in pictures]
    assert np.array_equal(scored.scores == 1, answers_of_study(model, processor, asked, seed=0))


def test_the_tower_runs_once_for_all_budgets(shipped, rendered):
    model, processor = shipped
    seen = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, __, output: seen.append(len(output[0])))
    samples = read_samples(rendered)[:10]
    budgets = {"1": 1, "8": 8, "auto": "auto", "36": 36}
    found = [answer_batch(model, processor, samples[start : start + 4], budgets) for start in range(0, 10, 4)]
    hook.remove()
    assert seen == [4, 4, 2]
    tokens = {name: [row[0] for part in found for row in part.tokens[name]] for name in budgets}
    assert set(tokens["1"]) == {1} and set(tokens["8"]) == {4} and set(tokens["36"]) == {36}
    assert len(set(tokens["auto"])) > 1
    assert all(seconds > 0 for part in found for seconds in part.seconds.values())


def test_several_images_are_shown_in_order(shipped, rendered):
    model, processor = shipped
    first, second = read_samples(rendered)[:2]
    both = Sample("both", "which digit at r1c1", ("1",), [*first.images, *second.images], {})
    found = answer_batch(model, processor, [both, first], {"9": 9, "auto": "auto"})
    apart = answer_batch(model, processor, [first, second], {"auto": "auto"}).tokens["auto"]
    assert found.tokens["9"] == [[9, 9], [9]]
    assert found.tokens["auto"] == [apart[0] + apart[1], apart[0]]
    text = found.text_tokens
    words = len(processor.tokenizer(both.question)["input_ids"]) - len(
        processor.tokenizer(first.question)["input_ids"]
    )
    assert text[0] - text[1] == words


def test_exchanged_questions_are_shown_the_images_of_the_one_before(shipped, rendered):
    model, processor = shipped
    first, second, third = read_samples(rendered)[:3]
    swapped = [replace(first, images=third.images), replace(second, images=first.images)]
    swapped.append(replace(third, images=second.images))
    budgets = {"full": 36, "other": 36}
    found = answer_batch(model, processor, [first, second, third], budgets, exchanged=["other"])
    assert found.texts["other"] == answer_batch(model, processor, swapped, {"full": 36}).texts["full"]
    assert found.texts["other"] != found.texts["full"]
    both = replace(first, images=[*first.images, *second.images])
    with pytest.raises(ValueError, match=r"Questions with \[1, 2\] images are in one batch"):
        answer_batch(model, processor, [first, both], budgets, exchanged=["other"])


def test_batches_hold_prompts_of_similar_length_and_depend_on_nothing_else(shipped, rendered):
    _, processor = shipped
    samples = read_samples(rendered)
    batches = list(batches_by_length(processor, samples, 5))
    assert sorted(index for batch in batches for index in batch) == list(range(24))
    lengths = [len(processor.tokenizer(samples[index].question)["input_ids"]) for batch in batches for index in batch]
    assert lengths == sorted(lengths, reverse=True) and [len(batch) for batch in batches] == [5, 5, 5, 5, 4]


def test_text_around_a_question():
    asked = Sample("1", "What is it?", ("A",), (), {"options": "['cat', 'dog']"})
    assert prompt_of(asked) == "What is it?"
    assert prompt_of(asked, "{question}\n{options}\nLetter:") == "What is it?\nA. cat\nB. dog\nLetter:"
    with pytest.raises(ValueError, match=r"`prompt='Say it.'` lacks {question}. Write it"):
        prompt_of(asked, "Say it.")
    with pytest.raises(ValueError, match="question 1 has no list `options` or `choices`"):
        prompt_of(Sample("1", "?", ("A",), (), {}), "{question} {options}")


def test_wrong_counts_and_metrics_are_refused_before_anything_runs(shipped, rendered):
    model, processor = shipped
    samples = read_samples(rendered)[:2]
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    for counts in ([2], [9, 4], [1, 1]):
        with pytest.raises(ValueError, match="must be ascending and among this model's token counts: .1, 4, 9, 36"):
            answered_at_each_count(model, processor, samples, "gqa", counts=counts)
    with pytest.raises(ValueError, match="`metric='bleu'` is unknown. Known: anls"):
        answered_at_each_count(model, processor, samples, "bleu")
    with pytest.raises(ValueError, match="`batch_size=0` must be at least 1"):
        answered_at_each_count(model, processor, samples, "gqa", batch_size=0)
    hook.remove()


def test_a_broken_image_is_told_with_its_question(shipped, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    row = {"file": "broken.png", "question": "?", "answer": "a"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    model, processor = shipped
    with pytest.raises(ValueError, match="Question 0: "):
        answer_batch(model, processor, read_samples(tmp_path), {"1": 1})


@torch.no_grad()
def test_an_answer_does_not_depend_on_its_batch(shipped, rendered):
    model, processor = shipped
    samples = read_samples(rendered)
    alone = [answer_batch(model, processor, [sample], {"auto": "auto"}) for sample in samples[:6]]
    together = answer_batch(model, processor, samples[:6], {"auto": "auto"})
    assert [part.texts["auto"][0] for part in alone] == together.texts["auto"]
    assert [part.tokens["auto"][0] for part in alone] == together.tokens["auto"]
    assert [part.text_tokens[0] for part in alone] == together.text_tokens
