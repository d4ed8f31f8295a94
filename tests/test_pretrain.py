"""Pretraining: what is trained, what a row looks like, what the loss counts, and what is refused."""

import pytest
import torch
from torch.nn import functional as F
from trl import ModelConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.conversation_data import read_caption
from adaptive_llava.training.pretrain import build_pretrainer, main
from tests.conftest import BOS, IMAGE_TOKEN, tiny_model
from tests.test_sft import (
    ANSWERS,
    LORA,
    configuration,
    logits_of,
    message_dataset,
    prompt_dataset,
    save,
    tiny_processor,
)


def captions(count=8):
    """Rows with one image and one answer, as messages."""
    rows = message_dataset(2 * count)
    return rows.select([index for index in range(2 * count) if len(rows[index]["images"]) == 1])


def pretrain(preset, folder, *, rows=None, bos=False, **options):
    model = tiny_model(preset)
    with torch.no_grad():  # small weights: a few steps must not overflow
        for parameter in model.parameters():
            parameter.mul_(0.8)
    training = configuration(folder, **options.pop("training", {}))
    return build_pretrainer(model, tiny_processor(model, bos=bos), training, rows or captions(), **options)


@pytest.mark.compat
@pytest.mark.parametrize("preset", ["dfmr", "stf-mbtf", "pre-fusion", "dynamic-resampler"])
def test_what_makes_visual_tokens_moves_and_nothing_else(tmp_path, preset):
    trainer = pretrain(preset, tmp_path, training={"gradient_checkpointing": True, "max_steps": 3})
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    visual = ("multi_modal_projector", "compressor", "multi_block_fusion", "modality_prefusion")
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    for name in before:
        expected = name.split(".")[1] in visual
        # softmax does not see key biases, and a count to which the router sends no image gets no gradient
        if name.endswith("k_proj.bias") or name.startswith("model.compressor.query_"):
            continue
        assert (name in moved) == expected, name
    assert moved and trainer.model.config.compressor_trained is True


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_a_row_is_the_image_its_caption_and_a_line_break_and_these_two_are_scored(tmp_path, kind):
    rows = captions(2) if kind == "messages" else prompt_dataset(2)
    trainer = pretrain("dfmr", tmp_path, rows=rows, bos=True)
    tokenizer = trainer.processing_class.tokenizer
    batch = trainer.data_collator([dict(row) for row in rows])
    said = [ANSWERS[0], ANSWERS[3]] if kind == "messages" else ANSWERS[:2]
    for ids, mask, labels, answer in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], said, strict=True
    ):
        caption = tokenizer(f"{answer}\n", add_special_tokens=False)["input_ids"]
        assert ids[mask].tolist() == [BOS, IMAGE_TOKEN, *caption]
        assert labels[mask].tolist() == [-100, -100, *caption] and (labels[~mask] == -100).all()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
        logits = trainer.model(**batch).logits[:, :-1].flatten(0, 1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch["labels"][:, 1:].flatten()).item(), abs=1e-5)


def test_a_row_needs_images_and_exactly_one_caption():
    said = [{"role": "assistant", "content": "A cat."}]
    assert read_caption({"messages": said, "image": "a"}) == {
        "images": ["a"], "prompt": "<image>", "completion": "A cat.\n",
    }  # fmt: skip
    with pytest.raises(ValueError, match="A row has 0 images and 1 answers. Pretraining takes images and one caption"):
        read_caption({"messages": said, "images": []})
    with pytest.raises(ValueError, match="A row has 1 images and 2 answers"):
        read_caption({"messages": said * 2, "images": ["a"]})


@pytest.mark.compat
def test_the_command_writes_the_start_of_stage_two(tmp_path):
    base = save(tmp_path / "base", "stf-mbtf", compressor_trained=False)
    captions(4).to_parquet(str(tmp_path / "captions.parquet"))
    options = {
        "model_name_or_path": base, "dataset_name": tmp_path / "captions.parquet", "output_dir": tmp_path / "out",
        "max_steps": 2, "use_cpu": "true", "report_to": "none", "learning_rate": "1e-2",
    }  # fmt: skip
    trainer = main([str(part) for name, value in options.items() for part in (f"--{name}", value)])
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert again.config.compressor_trained is True
    processor = trainer.processing_class
    assert (logits_of(again, processor) - logits_of(trainer.model, processor)).abs().max() <= 1e-6


def test_what_would_train_more_is_refused(tmp_path):
    start = ["--output_dir", str(tmp_path), "--model_name_or_path", "m", "--dataset_name", "d"]
    with pytest.raises(ValueError, match="`use_peft=True` has no place in pretraining: the language model stays"):
        main(["--config", LORA, *start])
    with pytest.raises(ValueError, match="`freeze_vision_tower=False` has no place.*Leave it out, or use"):
        main([*start, "--freeze_vision_tower", "false"])
    with pytest.raises(ValueError, match="`train_only_visual_parts=True` freezes.*`use_peft=True`.*Leave both out"):
        pretrain("dfmr", tmp_path, model_arguments=ModelConfig(use_peft=True))
