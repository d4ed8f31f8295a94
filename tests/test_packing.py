"""Packed batches: the same loss and gradients as padded ones, without the padding."""

import json

import pytest
import torch
from datasets import Dataset, Image, List
from transformers import MambaConfig, MambaModel

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.joint_routing import build_joint_trainer
from adaptive_llava.training.packing import PackingCollator, check_packing
from adaptive_llava.training.sft import build_trainer
from tests import test_joint_routing
from tests.conftest import TINY_COMPRESSORS, TINY_ROUTERS, tiny_model
from tests.test_convert import picture
from tests.test_sft import ANSWERS, FULL, NEW_ENOUGH, command, configuration, message_dataset, save, tiny_processor


QUESTIONS = ["What is this?", "And </s> <image>?", "How many of them are there, and where?"]


def mixed_rows(count=8):
    """Prompts of several lengths with one, two and no images."""
    numbers = [(1, 2, 0, 1)[i % 4] for i in range(count)]
    rows = {
        "prompt": [[{"role": "user", "content": QUESTIONS[i % 3]}] for i in range(count)],
        "completion": [[{"role": "assistant", "content": ANSWERS[i % 4]}] for i in range(count)],
        "images": [[picture(10 * i + k) for k in range(n)] for i, n in enumerate(numbers)],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def steepest(folder, **options):
    """One step down the gradient itself, so that weights after it tell the gradient."""
    defaults = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 1e9, "logging_steps": 1}
    return configuration(folder, **(defaults | options))


def trained(base, folder, rows, *, pack, attention="sdpa", eval_rows=None, **options):
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base, attn_implementation=attention)
    trainer = build_trainer(
        model, tiny_processor(model), steepest(folder, **options), rows, eval_rows, pack_batches=pack
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_training(padded, packed, steps=1):
    assert len(losses(padded)) == steps
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-4)
    expected = dict(padded.model.named_parameters())
    for name, value in packed.model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4, msg=name)


def shares(trainer):
    """Padding share of each step, and of the whole run."""
    log = trainer.state.log_history
    return [entry["padding_share"] for entry in log if "loss" in entry], log[-1]["train_padding_share"]


class Counted:
    """Stands in front of the collator: two padded rows with an image each."""

    def __call__(self, examples):
        return {
            "input_ids": torch.tensor([[1, 99, 5, 0], [1, 6, 99, 7]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
            "labels": torch.tensor([[1, -100, 5, -100], [1, 6, -100, 7]]),
            "instruction_mask": torch.tensor([[True, False, False, False], [True, True, False, False]]),
            "pixel_values": torch.zeros(2, 3, 4, 4),
            "image_sizes": torch.tensor([[4, 4], [4, 4]]),
            "visual_token_budget": 4,
        }


def test_rows_stand_behind_each_other_and_no_row_predicts_the_next():
    batch = PackingCollator(Counted())([])
    assert batch["input_ids"].tolist() == [[1, 99, 5, 1, 6, 99, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 5, -100, 6, -100, 7]]
    assert batch["instruction_mask"].tolist() == [[True, False, False, True, True, False, False]]
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["image_sizes"].shape == (2, 2)
    assert batch["visual_token_budget"] == 4 and "attention_mask" not in batch


@pytest.mark.compat
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", ["llava", "dfmr", "llava-mini", "dynamic-resampler-multi"])
def test_packed_batches_train_as_padded_ones_do(tmp_path, preset, attention):
    base = save(tmp_path / "base", preset)
    padded, packed = (
        trained(base, tmp_path / f"{pack}", mixed_rows(), pack=pack, attention=attention) for pack in (False, True)
    )
    assert_same_training(padded, packed)
    before = AdaptiveLlavaForConditionalGeneration.from_pretrained(base).state_dict()
    moved = [(value - before[name]).abs().max() for name, value in packed.model.named_parameters()]
    assert max(moved) > 1e-2  # gradients that a tolerance of 1e-4 can tell apart
    assert shares(padded)[1] > 0.02 and shares(packed) == ([0.0], 0.0)


@pytest.mark.skipif(not NEW_ENOUGH, reason="transformers 4 counts each row's first id as scored when it is padded")
@pytest.mark.parametrize("preset", ["dfmr", "llava"])
def test_loss_on_all_text_is_divided_by_the_same_number_over_accumulated_batches(tmp_path, preset):
    base = save(tmp_path / "base", preset)
    options = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.1,
    }  # fmt: skip
    padded, packed = (
        trained(base, tmp_path / f"{pack}", message_dataset(), pack=pack, **options) for pack in (False, True)
    )
    assert_same_training(padded, packed, steps=2)


@pytest.mark.compat
def test_tiles_are_packed_too(tmp_path):
    base = save(tmp_path / "base", "dfmr", tiling={"type": "anyres"})
    padded, packed = (trained(base, tmp_path / f"{pack}", mixed_rows(4), pack=pack) for pack in (False, True))
    assert_same_training(padded, packed)


@pytest.mark.compat
def test_rows_of_text_alone_are_packed(tmp_path):
    base, rows = save(tmp_path / "base", "dfmr"), mixed_rows(12).select([2, 6, 10])
    padded, packed = (trained(base, tmp_path / f"{pack}", rows, pack=pack) for pack in (False, True))
    assert_same_training(padded, packed)
    assert shares(packed)[1] == 0.0


@pytest.mark.compat
def test_one_placeholder_per_visual_token_is_packed(tmp_path):
    base, results = save(tmp_path / "base", "avg-pool"), []
    for pack in (False, True):
        model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
        processor = tiny_processor(model)
        processor.layout = "expanded"
        trainer = build_trainer(model, processor, steepest(tmp_path / f"{pack}"), mixed_rows(), pack_batches=pack)
        trainer.train()
        results.append(trainer)
    assert_same_training(*results)


@pytest.mark.compat
def test_evaluation_stays_padded_and_scores_the_same(tmp_path):
    base = save(tmp_path / "base", "dfmr")
    results = []
    for pack in (False, True):
        trainer = trained(base, tmp_path / f"{pack}", mixed_rows(), pack=pack, eval_rows=mixed_rows(6))
        found = trainer.evaluate()
        results.append(found["eval_loss"])
        assert "eval_padding_share" not in found
    assert results[0] == pytest.approx(results[1], abs=1e-4)


@pytest.mark.compat
def test_padding_share_is_that_of_the_rows_the_model_saw(tmp_path):
    base = save(tmp_path / "base", "llava")  # 36 visual tokens per image
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    rows = mixed_rows(4)
    trainer = build_trainer(model, tiny_processor(model), steepest(tmp_path / "out"), rows)
    attended = trainer.data_collator(list(rows))["attention_mask"].sum(1)
    lengths = attended + 35 * torch.tensor([1, 2, 0, 1])
    trainer.train()
    expected = 1 - lengths.sum().item() / (4 * lengths.max().item())
    assert shares(trainer) == ([pytest.approx(expected)], pytest.approx(expected))


@pytest.mark.compat
def test_the_command_packs_and_says_what_padding_was_left(tmp_path, capsys):
    base, data = save(tmp_path / "base", "dfmr"), tmp_path / "train.parquet"
    mixed_rows().to_parquet(str(data))
    command(base, str(data), tmp_path / "packed", "--pack_batches", "true", recipe=FULL)
    assert "Padding was 0.0% of what the language model computed." in capsys.readouterr().out
    assert json.loads((tmp_path / "packed" / "train_results.json").read_text())["train_padding_share"] == 0
    command(base, str(data), tmp_path / "padded", recipe=FULL)
    share = json.loads((tmp_path / "padded" / "train_results.json").read_text())["train_padding_share"]
    assert share > 0.02 and f"Padding was {share:.1%} of" in capsys.readouterr().out


def test_recurrent_language_models_are_not_packed():
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 2, "vocab_size": 10}
    with pytest.raises(ValueError, match=r"`pack_batches=True`, but the language model \(mamba\) has layers other"):
        check_packing(MambaModel(MambaConfig(**shape)))
    check_packing(tiny_model("llava").model.language_model)


def test_joint_routing_refuses_packed_batches(tmp_path):
    model = tiny_model("llava", compressor=TINY_COMPRESSORS["query_resampler"], router=TINY_ROUTERS["classifier"])
    with pytest.raises(ValueError, match=r"`pack_batches=True` puts many rows into one"):
        build_joint_trainer(
            model, tiny_processor(model), test_joint_routing.configuration(tmp_path), mixed_rows(4), pack_batches=True
        )
