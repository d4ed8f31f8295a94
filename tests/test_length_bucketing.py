"""Rows of like length share a batch: lengths are the model's own, counted once, and the order can be resumed."""

import os
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, List

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.collator import ConversationCollator
from adaptive_llava.training.dense_batches import GROUP_BY_LENGTH, SeededLengthSampler
from adaptive_llava.training.joint_routing import build_joint_trainer
from adaptive_llava.training.row_lengths import row_lengths
from adaptive_llava.training.sft import build_trainer
from tests import test_joint_routing
from tests.conftest import TINY_COMPRESSORS, TINY_ROUTERS, tiny_model
from tests.test_convert import picture
from tests.test_packing import losses, mixed_rows, shares
from tests.test_sft import ANSWERS, FULL, command, configuration, message_dataset, save, tiny_processor


pytestmark = pytest.mark.compat

ON_COMMAND_LINE = [text for name, value in GROUP_BY_LENGTH.items() for text in (f"--{name}", str(value))]
SYSTEMS: dict[str, dict[str, Any]] = {
    "llava": {"preset": "llava"},
    "dfmr": {"preset": "dfmr"},
    "pixel_std": {"compressor": TINY_COMPRESSORS["average_pool"], "router": TINY_ROUTERS["pixel_std"]},
    "classifier": {"compressor": TINY_COMPRESSORS["query_resampler"], "router": TINY_ROUTERS["classifier"]},
    "tiles": {"preset": "dfmr", "tiling": {"type": "anyres"}},
    "tiles, fixed": {"preset": "avg-pool", "tiling": {"type": "anyres"}},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An own folder of lengths for each test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adaptive_llava" / "row_lengths"


def caption_rows(count=4):
    rows = {"completion": ANSWERS[:count], "prompt": [""] * count, "images": [[picture(i)] for i in range(count)]}
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def collator(model, folder, rows, **options):
    processor = tiny_processor(model, bos=options.pop("bos", False))
    trainer = build_trainer(model, processor, configuration(folder), rows, **options)
    assert isinstance(trainer.data_collator, ConversationCollator)
    return trainer.data_collator


@torch.no_grad()
def rows_the_model_sees(model, collate, rows):
    """Length of every row in the language model, of batches of one row each."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, arguments, options: seen.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for row in rows:
        inputs = collate([row])
        inputs.pop("labels")
        model.eval()(**inputs)
    hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["prompts", "messages"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_lengths_are_those_of_the_rows_the_model_sees(tmp_path, name, kind):
    model, rows = tiny_model(**SYSTEMS[name]), mixed_rows(8) if kind == "prompts" else message_dataset(8)
    collate = collator(model, tmp_path, rows)
    lengths = row_lengths(rows, collate, model)
    assert lengths == rows_the_model_sees(model, collate, rows)
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("options", [{"bos": True}, {"visual_token_budget": 4}, {"bos": True, "plain": True}], ids=str)
def test_lengths_with_bos_budgets_and_captions(tmp_path, options):
    plain = {"train_only_visual_parts": True, "plain_captions": True} if options.pop("plain", False) else {}
    model, rows = tiny_model("dfmr"), caption_rows() if plain else mixed_rows(4)
    collate = collator(model, tmp_path, rows, **options, **plain)
    assert row_lengths(rows, collate, model) == rows_the_model_sees(model, collate, rows)


def test_counts_are_computed_once_and_anew_when_what_they_depend_on_changes(tmp_path, cache):
    model, rows = tiny_model("dfmr"), mixed_rows(4)
    collate, calls = collator(model, tmp_path, rows), []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))

    def measured(rows=rows, collate=collate):
        before = len(calls)
        return row_lengths(rows, collate, model), len(calls) > before, len(list(cache.glob("*.arrow")))

    lengths, asked, files = measured()
    assert asked and files == 1
    assert measured() == (lengths, False, 1)
    assert measured(rows.select([2, 0, 1]))[:2] == ([lengths[2], lengths[0], lengths[1]], True)
    model.config.router["thresholds"] = list(model.model.router.options["thresholds"])
    model.model.router.thresholds = model.config.router["thresholds"] = [1e9, 1e9]
    fewest, asked, files = measured()
    assert asked and files == 3 and sum(fewest) < sum(lengths)
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).mul_(1.5)
    assert measured()[1:] == (True, 4)
    collate.visual_token_budget = 9
    assert measured()[1:] == (False, 5)  # a budget needs no tower


def test_order_follows_from_seed_and_epoch_and_has_every_row_once():
    lengths = [(7 * i) % 32 + 1 for i in range(64)]

    def order(seed=0, epoch=0):
        return list(SeededLengthSampler(4, lengths, seed=seed, epoch=lambda: epoch))

    torch.manual_seed(0)
    first = order()
    torch.manual_seed(1)
    assert order() == first and sorted(first) == list(range(64))
    assert order(epoch=1) != first and order(seed=5) != first
    batches = [[lengths[i] for i in first[start : start + 4]] for start in range(0, 64, 4)]
    padded = sum(4 * max(batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.2


def grouped(base, folder, rows, **options):
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    defaults = {"per_device_train_batch_size": 2, "max_steps": 16, "logging_steps": 16, "learning_rate": 1e-3}
    trainer = build_trainer(model, tiny_processor(model), configuration(folder, **(defaults | options)), rows)
    trainer.train()
    return trainer


def test_grouped_batches_have_less_padding_and_evaluation_works(tmp_path):
    base, rows = save(tmp_path / "base", "llava"), mixed_rows(32)
    random, bucketed = (grouped(base, tmp_path / "out", rows, **options) for options in ({}, GROUP_BY_LENGTH))
    assert shares(bucketed)[1] < 0.7 * shares(random)[1]
    assert bucketed.evaluate(mixed_rows(4))["eval_loss"] > 0


def test_grouped_batches_can_be_packed(tmp_path):
    base = save(tmp_path / "base", "dfmr")
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    training = configuration(tmp_path / "out", per_device_train_batch_size=2, **GROUP_BY_LENGTH)
    trainer = build_trainer(model, tiny_processor(model), training, mixed_rows(8), pack_batches=True)
    trainer.train()
    assert len(losses(trainer)) == 2 and shares(trainer)[1] == 0


def test_a_column_of_lengths_is_taken_as_it_is(tmp_path, cache):
    base, rows = save(tmp_path / "base", "dfmr"), mixed_rows(8)
    lengths = [5, 1, 8, 2, 7, 3, 6, 4]
    trainer = grouped(base, tmp_path / "out", rows.add_column("length", lengths), max_steps=1, **GROUP_BY_LENGTH)
    assert trainer._get_train_sampler(trainer.train_dataset).lengths == lengths
    assert not cache.exists()


def test_a_run_that_is_broken_off_in_its_second_epoch_goes_on_in_the_same_order(tmp_path):
    base, data = save(tmp_path / "base", "dfmr"), tmp_path / "train.parquet"
    mixed_rows(12).to_parquet(str(data))
    rest = ["--save_strategy", "steps", "--save_steps", 5, "--max_steps", 9, *ON_COMMAND_LINE]
    rest += ["--per_device_train_batch_size", 3]  # four steps an epoch
    unbroken = command(base, str(data), tmp_path / "a", *rest, recipe=FULL)
    (tmp_path / "b").mkdir()
    os.rename(tmp_path / "a" / "checkpoint-5", tmp_path / "b" / "checkpoint-5")
    resumed = command(base, str(data), tmp_path / "b", *rest, "--resume_from_checkpoint", "last", recipe=FULL)
    assert resumed.state.global_step == 9
    assert len(losses(unbroken)) == 9 and losses(unbroken) == pytest.approx(losses(resumed), abs=1e-6)
    shares_of = [[log["padding_share"] for log in t.state.log_history if "loss" in log] for t in (unbroken, resumed)]
    assert shares_of[0] == pytest.approx(shares_of[1])
    assert shares_of[0][:4] != shares_of[0][4:8]  # an order of its own for each epoch
    assert "train_padding_share" in resumed.state.log_history[-1]


def test_rows_whose_length_is_not_known_beforehand_are_refused(tmp_path):
    training = configuration(tmp_path, **GROUP_BY_LENGTH)
    model = tiny_model("llava", compressor=TINY_COMPRESSORS["average_pool"], router=TINY_ROUTERS["random"])
    trainer = build_trainer(model, tiny_processor(model), training, mixed_rows(4))
    with pytest.raises(ValueError, match=r"`router.type='random'` draws new token counts"):
        trainer.get_train_dataloader()
    model = tiny_model("dfmr")
    with pytest.raises(ValueError, match=r"dataset is a IterableDataset|not `IterableDataset"):
        build_trainer(model, tiny_processor(model), training, mixed_rows(4).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"`threshold_schedule` changes the token counts"):
        build_trainer(model, tiny_processor(model), training, mixed_rows(4), threshold_schedule="learning_rate")
    model = tiny_model("llava", **{key: SYSTEMS["classifier"][key] for key in ("compressor", "router")})
    with pytest.raises(ValueError, match=r"joint routing shows every row at every token count"):
        build_joint_trainer(
            model, tiny_processor(model), test_joint_routing.configuration(tmp_path, **GROUP_BY_LENGTH), mixed_rows(4)
        )


def test_several_budgets_are_drawn_anew_and_cannot_be_grouped(tmp_path):
    model = tiny_model("llava", compressor=TINY_COMPRESSORS["average_pool"])
    rows = message_dataset()
    with pytest.raises(ValueError, match=r"`visual_token_budget=\[4, 36\]` draws one"):
        row_lengths(rows, collator(model, tmp_path, rows, visual_token_budget=[4, 36]), model)
