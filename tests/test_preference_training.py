"""DPO and GRPO with TRL's own trainers: every row keeps its own images, and what is scored is what was sampled."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.instruction_marks import mark_instruction
from adaptive_llava.training.lora_targets import fully_trained_modules, language_model_targets
from tests.conftest import IMAGE_TOKEN, PAD, tiny_text_config, tiny_vision_config
from tests.test_convert import TEMPLATE, character_tokenizer, picture
from tests.test_sft import save


pytestmark = pytest.mark.compat

MIXED = [1, 2, 0, 3]
CHOSEN, REJECTED = ["A cat.", "Two red dogs.", "3", "No."], ["Yes", "One.", "I do not know.", "A blue car."]
MODELS = {
    "dfmr": ("dfmr", {}),
    "llava": ("llava", {}),
    "llava-mini": ("llava-mini", {}),
    "anyres": ("dfmr", {"tiling": {"type": "anyres"}}),
}


def pictures_of(row, count):
    """Few large squares of colour, so that pooled features differ; of shapes that AnyRes cuts into 1 to 4 tiles."""
    shapes = [(40, 30), (30, 60), (70, 30)]
    return [picture(10 * row + k, size=(2, 2)).resize(shapes[(row + k) % 3], 0) for k in range(count)]


def dataset(numbers, *, answers=False):
    """Rows with as many images each as `numbers` says, told apart by the number in the question."""
    message = {"role": Value("string"), "content": Value("string")}
    rows = {
        "prompt": [[{"role": "user", "content": f"What is in {row}?"}] for row in range(len(numbers))],
        "images": [pictures_of(row, count) for row, count in enumerate(numbers)],
    }
    features = {"prompt": List(message), "images": List(Image())}
    if answers:
        for name, texts in (("chosen", CHOSEN), ("rejected", REJECTED)):
            rows[name] = [[{"role": "assistant", "content": texts[row]}] for row in range(len(numbers))]
            features[name] = List(message)
    return Dataset.from_dict(rows, features=Features(features))


def distinct_characters(completions, **_):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


class WatchedGRPOTrainer(trl.GRPOTrainer):
    """Compares every log-probability the trainer computes with that of its row alone, and notes the images it got."""

    alone = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **inputs):
        result = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, **inputs
        )
        for row, (ids, mask, logps) in enumerate(zip(input_ids, attention_mask.bool(), result[0], strict=True)):
            attended = mask[-logits_to_keep:]
            prompt, completion = ids[:-logits_to_keep][mask[:-logits_to_keep]], ids[-logits_to_keep:][attended]
            self.compare(model, prompt, completion, logps[attended], inputs["num_images"][row])
        return result

    def compare(self, model, prompt, completion, logps, num_images):
        question = int(re.search(r"What is in (\d)", self.processing_class.decode(prompt)).group(1))
        own = self.train_dataset[question]["images"]
        assert num_images == len(own)
        expected = logps_alone(model, self.processing_class, prompt, completion, own)
        self.errors.append((logps - expected).abs().max().item())
        if own:
            others = pictures_of(9, len(own))
            other = logps_alone(model, self.processing_class, prompt, completion, others)
            self.effects.append((other - expected).abs().max().item())
        if torch.is_grad_enabled():
            return  # the weights have moved since the answers were sampled
        scores = logits_alone(model, self.processing_class, prompt, completion, own)
        scores[:, IMAGE_TOKEN] = float("-inf")  # TRL suppresses it
        self.greedy.append(torch.equal(scores.argmax(-1), completion))


@torch.no_grad()
def logits_alone(model, processor, prompt, completion, images):
    """Logits of the completion's tokens in a row of its own, `(tokens, vocabulary)`."""
    inputs = processor.image_processor(images, return_tensors="pt") if images else {}
    if images and isinstance(processor, AdaptiveLlavaProcessor):
        text = processor.image_token * len(images)
        inputs = processor(images=images, text=text, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    if getattr(model.config, "prefusion_layers", 0) > 0:
        instruction = torch.cat([torch.ones_like(prompt), torch.zeros_like(completion)])
        inputs = {**inputs, "instruction_mask": instruction[None].bool()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = base(input_ids=torch.cat([prompt, completion])[None], **inputs).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def logps_alone(model, processor, prompt, completion, images):
    logits = logits_alone(model, processor, prompt, completion, images)
    return logits.log_softmax(-1).gather(1, completion[:, None]).squeeze(1)


def load(tmp_path, name):
    preset, fields = MODELS[name]
    folder = save(tmp_path / "base", preset, **fields)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():  # an image must weigh more on the logits than rounding does
        for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
            for parameter in part.parameters():
                parameter.mul_(2.5)
    model.save_pretrained(folder)
    return AdaptiveLlavaForConditionalGeneration.from_pretrained(folder), AdaptiveLlavaProcessor.from_pretrained(folder)


def lora(model):
    return LoraConfig(
        r=4, target_modules=language_model_targets(model), modules_to_save=fully_trained_modules(model) or None
    )


def common(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return defaults | options


def grpo(tmp_path, model, processor, numbers, *, peft_config=None, **options):
    defaults = {"num_generations": 2, "max_completion_length": 5, "steps_per_generation": 2}
    trainer = WatchedGRPOTrainer(
        model=model,
        args=trl.GRPOConfig(**common(tmp_path, **(defaults | options))),
        train_dataset=dataset(numbers),
        reward_funcs=distinct_characters,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.errors, trainer.effects, trainer.greedy = [], [], []
    return trainer


def dpo(tmp_path, model, processor, numbers, *, peft_config=None):
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**common(tmp_path, max_length=None)),
        train_dataset=dataset(numbers, answers=True),
        processing_class=processor,
        peft_config=peft_config,
    )


def moved(trainer):
    """Train, and name the trainable parts whose parameters moved."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 2
    assert all(torch.isfinite(torch.tensor(float(log[key]))) for log in steps for key in ("loss", "grad_norm"))
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    parts = ("lora_", "language_model", "multi_modal_projector", "compressor", "modality_prefusion", "vision_tower")
    return {next((part for part in parts if part in name), "lm_head") for name in changed}


# ---- GRPO


@pytest.mark.parametrize("numbers", [[1, 1, 1, 1], [2, 2, 2, 2], MIXED], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_grpo_scores_every_row_with_its_own_images(tmp_path, name, numbers):
    model, processor = load(tmp_path, name)
    # every other option of TRL that calls the model: a reference model, and chunks of the generation batch
    trainer = grpo(tmp_path, model, processor, numbers, beta=0.1, top_k=1)
    mark_instruction(trainer)
    trainer.train()
    print(name, numbers, len(trainer.errors), max(trainer.errors), min(trainer.effects), sum(trainer.greedy), len(trainer.greedy))
    assert len(trainer.errors) >= 16
    assert max(trainer.errors) <= 1e-4
    assert min(trainer.effects) > 1e-2
