"""The batches of fine-tuning: which ids are scored, and that rows begin and end as in generation."""

import pytest
import torch
from datasets import Dataset, Image, List
from trl import SFTTrainer

from adaptive_llava.training.collator import ConversationCollator
from adaptive_llava.training.conversation_data import read_example
from tests.conftest import BOS, IMAGE_TOKEN, tiny_model
from tests.test_convert import picture
from tests.test_sft import ANSWERS, NEW_ENOUGH, configuration, message_dataset, prompt_dataset, tiny_processor


def collators(dataset, tmp_path, *, bos=False, **options):
    """TRL's collator and ours around it, and the processor."""
    model = tiny_model("dfmr")
    processor = tiny_processor(model, bos=bos)
    stock = SFTTrainer(
        model=model, args=configuration(tmp_path, **options), train_dataset=dataset, processing_class=processor
    ).data_collator
    return stock, ConversationCollator(stock, processor), processor


def copies(rows):
    return [dict(row) for row in rows]


@pytest.mark.compat
def test_stock_trl_leaves_one_label_per_image_and_our_collator_none(tmp_path):
    rows = list(message_dataset(4))
    stock, ours, _ = collators(message_dataset(4), tmp_path)
    left, right = stock(copies(rows)), ours(copies(rows))
    placeholders = left["input_ids"] == IMAGE_TOKEN
    assert placeholders.sum(1).tolist() == [1, 2, 0, 1]
    assert (left["labels"] == IMAGE_TOKEN).sum(1).tolist() == [1, 2, 0, 1]
    assert not (right["labels"] == IMAGE_TOKEN).any()
    assert torch.equal(left["input_ids"], right["input_ids"])
    assert torch.equal(left["labels"][~placeholders], right["labels"][~placeholders])


def scored_text(batch, processor, row):
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.compat
def test_completion_only_loss_counts_the_answer_and_its_end(tmp_path):
    _, ours, processor = collators(prompt_dataset(), tmp_path)
    batch = ours(copies(prompt_dataset()))
    assert [scored_text(batch, processor, row) for row in range(4)] == [f" {answer}</s>" for answer in ANSWERS]


@pytest.mark.compat
def test_a_plain_completion_gets_its_end(tmp_path):
    rows = Dataset.from_dict(
        {"prompt": ["<image>Q: "] * 2, "completion": ["yes", "no</s>"], "images": [[picture(0)], [picture(1)]]}
    ).cast_column("images", List(Image()))
    stock, ours, processor = collators(rows, tmp_path)
    assert scored_text(stock(copies(rows)), processor, 0) == "yes"
    batch = ours(copies(rows))
    assert [scored_text(batch, processor, row) for row in range(2)] == ["yes</s>", "no</s>"]


@pytest.mark.skipif(not NEW_ENOUGH, reason="TRL needs transformers >= 5.18 for it")
def test_assistant_only_loss_counts_what_the_assistant_says(tmp_path):
    _, ours, processor = collators(message_dataset(4), tmp_path, assistant_only_loss=True)
    batch = ours(copies(message_dataset(4)))
    assert [scored_text(batch, processor, row) for row in range(4)] == [f" {answer}</s>" for answer in ANSWERS]


@pytest.mark.compat
def test_rows_begin_as_they_do_in_generation(tmp_path):
    stock, ours, processor = collators(message_dataset(4), tmp_path, bos=True)
    rows = [read_example(row) for row in message_dataset(4)]
    batch = ours(copies(message_dataset(4)))
    assert not (stock(copies(rows))["input_ids"] == BOS).any()
    for row, example in enumerate(rows):
        prompt = processor.apply_chat_template(example["messages"])
        expected = processor(images=example["images"] or None, text=prompt)["input_ids"][0]
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == expected
    assert (batch["labels"][:, 0] == -100).all()
    shapes = {batch[name].shape for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids")}
    assert len(shapes) == 1
