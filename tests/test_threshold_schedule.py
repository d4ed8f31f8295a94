"""Thresholds that follow the learning rate: exactly, in training only, and never into a checkpoint."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTTrainer

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.sft import build_trainer, main
from adaptive_llava.training.threshold_schedule import ThresholdSchedule
from tests.conftest import tiny_model
from tests.test_sft import LORA, configuration, message_dataset, save, tiny_processor


THRESHOLDS = (0.05, 0.15)


class Watch(TrainerCallback):
    """Notes learning rate, thresholds and token counts of every step, and the thresholds in evaluation and on disk."""

    def __init__(self, model):
        self.rates, self.thresholds, self.counts, self.evaluated = [], [], [], []
        self.router = model.model.router
        model.model.compressor.register_forward_hook(self._forward)

    def _forward(self, compressor, arguments, tokens):
        (self.counts if compressor.training else self.evaluated).append((self.router.thresholds, tokens.lengths))

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.thresholds.append(self.router.thresholds)


def train(model, folder, steps=6, **options):
    training = {"max_steps": steps, "lr_scheduler_type": "cosine", "warmup_steps": 2, "learning_rate": 1e-3}
    trainer = build_trainer(
        model,
        tiny_processor(model),
        configuration(folder, **(training | options)),
        message_dataset(),
        message_dataset(4),
        threshold_schedule="learning_rate",
    )
    watch = Watch(model)
    trainer.add_callback(watch)
    return trainer, watch


@pytest.mark.compat
@pytest.mark.parametrize("accumulation", [1, 2])
def test_thresholds_follow_the_learning_rate_and_counts_follow_them(tmp_path, accumulation):
    model = tiny_model("dfmr")
    spread = torch.tensor([0.5, 0.5])  # keeps thresholds where the noisy pictures here fall between the counts
    model.model.router.thresholds = tuple(spread.tolist())
    trainer, watch = train(
        model, tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    assert len(watch.rates) == 6 and watch.rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    for rate, thresholds in zip(watch.rates, watch.thresholds, strict=True):
        assert thresholds == pytest.approx([0.5 * rate / 1e-3] * 2)
    assert model.model.router.thresholds == (0.5, 0.5)


@pytest.mark.compat
def test_images_get_every_token_without_a_rate_and_their_own_count_at_the_peak(tmp_path):
    model = tiny_model("dfmr")
    model.model.router.thresholds = (1e9, 1e9)
    trainer, watch = train(model, tmp_path, steps=4)
    trainer.train()
    by_step = {step: {n for _, lengths in watch.counts[step : step + 1] for n in lengths} for step in range(4)}
    assert by_step[0] == {36} and by_step[1] == by_step[2] == {4}


@pytest.mark.compat
def test_evaluation_and_checkpoints_have_the_calibrated_thresholds_and_a_resumed_run_goes_on(tmp_path):
    def run(folder, **options):
        model = tiny_model("dfmr")
        trainer, watch = train(
            model, folder, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, **options
        )
        return model, trainer, watch

    model, trainer, watch = run(tmp_path)
    trainer.train()
    assert watch.evaluated and {thresholds for thresholds, _ in watch.evaluated} == {THRESHOLDS}
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        assert json.loads((folder / "config.json").read_text())["router"]["thresholds"] == list(THRESHOLDS)
        loaded = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder)
        assert loaded.model.router.thresholds == THRESHOLDS

    resumed_model, resumed, seen = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen.thresholds == watch.thresholds[4:] and len(seen.thresholds) == 2
    assert resumed_model.model.router.thresholds == model.model.router.thresholds == THRESHOLDS


@pytest.mark.compat
def test_a_run_that_breaks_off_does_not_lose_the_calibrated_thresholds(tmp_path):
    model = tiny_model("dfmr")
    trainer, watch = train(model, tmp_path)

    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    trainer.add_callback(Break)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert loaded.model.router.thresholds == THRESHOLDS
    trainer.remove_callback(Break)
    trainer.train()
    assert watch.thresholds[-1] == pytest.approx([t * watch.rates[-1] / 1e-3 for t in THRESHOLDS])
    assert model.model.router.thresholds == THRESHOLDS


@pytest.mark.compat
def test_the_command_follows_the_rate_and_merges_the_calibrated_thresholds(tmp_path):
    base = save(tmp_path / "base")
    message_dataset().to_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    arguments = ["--config", LORA, "--model_name_or_path", base, "--dataset_name", str(tmp_path / "data")]
    arguments += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--max_steps", "2", "--merge", "true"]
    trainer = main([*arguments, "--threshold_schedule", "learning_rate"])
    assert isinstance(trainer.model, PeftModel)
    assert any(isinstance(callback, ThresholdSchedule) for callback in trainer.callback_handler.callbacks)
    merged = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "merged")
    assert merged.model.router.thresholds == trainer.model.get_base_model().model.router.thresholds == THRESHOLDS


def test_what_has_no_thresholds_is_refused_before_anything_is_trained(tmp_path):
    model = tiny_model("llava")
    with pytest.raises(ValueError, match="`threshold_schedule` needs a router with thresholds.*FixedRouter.*feature_"):
        train(model, tmp_path)
    stock = SFTTrainer(
        model=model,
        args=configuration(tmp_path),
        train_dataset=message_dataset(),
        processing_class=tiny_processor(model),
        callbacks=[ThresholdSchedule()],
    )
    with pytest.raises(ValueError, match="needs a router with thresholds"):
        stock.train()
    model = tiny_model("dfmr")
    processor = tiny_processor(model)
    processor.layout = "expanded"
    with pytest.raises(
        ValueError, match="layout 'expanded' fixes them beforehand. Set `processor.layout = 'compact'`"
    ):
        build_trainer(model, processor, configuration(tmp_path), message_dataset(), threshold_schedule="learning_rate")
    with pytest.raises(ValueError, match="`threshold_schedule='loss'` is unknown. Pass 'learning_rate'"):
        ThresholdSchedule("loss")
