"""DPO and GRPO with TRL's own trainers: every row keeps its own images, and what is scored is what was sampled."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.collator import ConversationCollator
from adaptive_llava.training.instruction_marks import mark_instruction
from adaptive_llava.training.lora_targets import freeze_vision_tower, fully_trained_modules, language_model_targets
from tests.conftest import BOS, IMAGE_TOKEN, PAD, tiny_text_config, tiny_vision_config
from tests.test_convert import TEMPLATE, character_tokenizer, picture
from tests.test_sft import save, tiny_processor


pytestmark = pytest.mark.compat

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MIXED = [1, 2, 0, 3]
CHOSEN, REJECTED = ["A cat.", "Two red dogs.", "3", "No."], ["Yes", "One.", "I do not know.", "A blue car."]
PARTS = ["lora_", "modality_prefusion", "language_model", "multi_modal_projector", "compressor", "view_arrangement"]
PARTS += ["vision_tower", "lm_head"]
MODELS = {
    "dfmr": ("dfmr", {}),
    "llava": ("llava", {}),
    "llava-mini": ("llava-mini", {}),
    "random-pool": ("random-pool", {}),
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
        result = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, **inputs)
        for row, (ids, mask, logps) in enumerate(zip(input_ids, attention_mask.bool(), result[0], strict=True)):
            attended = mask[-logits_to_keep:]
            prompt, completion = ids[:-logits_to_keep][mask[:-logits_to_keep]], ids[-logits_to_keep:][attended]
            num_images = inputs["num_images"][row] if inputs.get("num_images") else 0
            self.compare(model, prompt, completion, logps[attended], num_images)
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


def load(tmp_path, name) -> tuple[Any, Any]:
    preset, fields = MODELS[name]
    folder = save(tmp_path / "base", preset, **fields)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():  # an image must weigh more on the logits than rounding does
        for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
            for parameter in part.parameters():
                parameter.mul_(2.5)
    model.save_pretrained(folder)
    return AdaptiveLlavaForConditionalGeneration.from_pretrained(folder), AdaptiveLlavaProcessor.from_pretrained(
        folder
    )


def stock_llava() -> tuple[Any, Any]:
    """transformers' own model and processor."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config("llama"),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        image_seq_length=36,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    model.generation_config.pad_token_id = PAD
    return model, LlavaProcessor(
        CLIPImageProcessor(size={"height": 24, "width": 24}, do_center_crop=False),
        character_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


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


def dpo(tmp_path, model, processor, numbers, *, peft_config=None, collator=True):
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**common(tmp_path, max_length=None)),
        train_dataset=dataset(numbers, answers=True),
        processing_class=processor,
        peft_config=peft_config,
    )
    if collator:
        trainer.data_collator = ConversationCollator(trainer.data_collator, processor)
    mark_instruction(trainer)
    return trainer


def moved(trainer):
    """Train, and name the trainable parts whose parameters moved."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 2
    assert all(torch.isfinite(torch.tensor(float(log[key]))) for log in steps for key in ("loss", "grad_norm"))
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    return {next(part for part in PARTS if part in name) for name in changed}


def expected_parts(name, *, adapted):
    own = {"multi_modal_projector"}
    own |= {"compressor", "modality_prefusion"} if name == "llava-mini" else set()
    own |= {"view_arrangement"} if name == "anyres" else set()
    return own | ({"lora_"} if adapted else {"language_model", "lm_head"})


# ---- GRPO


@pytest.mark.parametrize("numbers", [[2, 2, 2, 2], MIXED], ids=str)
@pytest.mark.parametrize("name", ["dfmr", "llava", "llava-mini", "anyres"])
def test_grpo_samples_and_scores_every_row_with_its_own_images(tmp_path, name, numbers):
    model, processor = load(tmp_path, name)
    # `beta` adds a reference model, and `top_k=1` makes of sampling what a row alone can be asked for
    trainer = grpo(tmp_path, model, processor, numbers, beta=0.1, top_k=1)
    mark_instruction(trainer)
    trainer.train()
    assert len(trainer.errors) == 24  # 8 rows before the steps, 8 by the reference, then 4 in each step
    assert max(trainer.errors) <= 1e-4
    assert min(trainer.effects) > 1e-2
    assert len(trainer.greedy) == 16 and all(trainer.greedy)


def test_grpo_takes_the_expanded_layout(tmp_path):
    model, processor = load(tmp_path, "llava")
    processor.layout = "expanded"
    trainer = grpo(tmp_path, model, processor, MIXED, top_k=1)
    trainer.train()
    assert max(trainer.errors) <= 1e-4 and min(trainer.effects) > 1e-2 and all(trainer.greedy)


def test_without_marks_grpo_scores_what_pre_fusion_never_samples(tmp_path, caplog):
    transformers.utils.logging.warning_once.cache_clear()
    model, processor = load(tmp_path, "llava-mini")
    trainer = grpo(tmp_path, model, processor, MIXED)
    trainer.train()
    assert max(trainer.errors) > 1e-2
    assert "`mark_instruction`" in caplog.text


def test_text_alone_goes_through_grpo(tmp_path):
    trainer = grpo(tmp_path, *load(tmp_path, "dfmr"), [0, 0, 0, 0], top_k=1)
    trainer.train()
    assert max(trainer.errors) <= 1e-4 and not trainer.effects and all(trainer.greedy)


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["dfmr", "llava-mini"])
def test_grpo_moves_what_it_should(tmp_path, name, adapted):
    model, processor = load(tmp_path, name)
    freeze_vision_tower(model)
    trainer = grpo(tmp_path, model, processor, MIXED, peft_config=lora(model) if adapted else None, beta=0.1)
    mark_instruction(trainer)
    assert moved(trainer) == expected_parts(name, adapted=adapted)
    assert max(trainer.errors) <= 1e-4


def test_a_random_router_answers_and_scores_at_different_counts(tmp_path):
    """GRPO samples in training mode, where this router draws anew for every forward."""
    drawn = grpo(tmp_path / "drawn", *load(tmp_path / "drawn", "random-pool"), [1, 1, 1, 1])
    drawn.train()
    assert max(drawn.errors) > 1e-2
    load(tmp_path / "fixed", "random-pool")
    folder = tmp_path / "fixed" / "base"
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder, router={"type": "fixed"})
    fixed = grpo(tmp_path / "fixed", model, AdaptiveLlavaProcessor.from_pretrained(folder), [1, 1, 1, 1])
    fixed.train()
    assert max(fixed.errors) <= 1e-4


@pytest.mark.parametrize("numbers", [[2, 2, 2, 2], [1, 2, 3, 1]], ids=str)
def test_stock_llava_keeps_several_images_apart_in_this_trl_too(tmp_path, numbers):
    trainer = grpo(tmp_path, *stock_llava(), numbers, top_k=1)
    trainer.train()
    assert max(trainer.errors) <= 1e-4 and min(trainer.effects) > 1e-2 and all(trainer.greedy)


def test_stock_llava_fails_where_one_row_has_no_image(tmp_path):
    """TRL passes `None` for the row, which transformers' own processor refuses and ours takes."""
    with pytest.raises(TypeError, match="NoneType"):
        grpo(tmp_path, *stock_llava(), MIXED).train()


# ---- DPO


@pytest.mark.parametrize("numbers", [[2, 2, 2, 2], MIXED], ids=str)
@pytest.mark.parametrize("name", ["dfmr", "llava", "llava-mini", "anyres"])
def test_dpo_scores_both_answers_with_the_images_of_their_row(tmp_path, name, numbers):
    model, processor = load(tmp_path, name)
    trainer = dpo(tmp_path, model, processor, numbers)
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    scored = trainer.compute_ref_log_probs(trainer.model, dict(inputs))
    for row, count in enumerate(numbers):
        for answers, log_probs in zip((row, row + len(numbers)), scored, strict=True):
            ids, answer = inputs["input_ids"][answers], inputs["completion_mask"][answers].bool()
            prompt = ids[inputs["attention_mask"][answers].bool() & ~answer]
            for images, same in ((pictures_of(row, count), True), (pictures_of(9, count), not count)):
                alone = logps_alone(model, processor, prompt, ids[answer], images).sum()
                assert ((log_probs[row] - alone).abs() <= 1e-4) == same


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["dfmr", "llava-mini", "anyres", "expanded"])
def test_dpo_moves_what_it_should(tmp_path, name, adapted):
    model, processor = load(tmp_path, "llava" if name == "expanded" else name)
    processor.layout = "expanded" if name == "expanded" else "compact"
    freeze_vision_tower(model)
    trainer = dpo(tmp_path, model, processor, MIXED, peft_config=lora(model) if adapted else None)
    assert moved(trainer) == expected_parts(name, adapted=adapted)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert float(logs[0]["loss"]) == pytest.approx(0.6931, abs=1e-3)  # policy and reference agree before a step
    assert float(logs[1]["loss"]) < 0.6931


def test_preference_rows_begin_and_end_as_in_generation(tmp_path):
    model, _ = load(tmp_path, "dfmr")
    processor = tiny_processor(model, bos=True)
    rows = dataset(MIXED, answers=True)
    trainer = dpo(tmp_path, model, processor, MIXED, collator=False)
    stock, ours = trainer.data_collator, ConversationCollator(trainer.data_collator, processor)
    assert not (stock([dict(row) for row in rows])["input_ids"] == BOS).any()
    batch = ours(list(rows))
    assert (batch["input_ids"][:, 0] == BOS).all() and not batch["completion_mask"][:, 0].any()
    marked = ConversationCollator(stock, processor, marks_instruction=True)(list(rows))["instruction_mask"]
    asked = batch["attention_mask"].bool() & ~batch["completion_mask"].bool() & (batch["input_ids"] != IMAGE_TOKEN)
    assert torch.equal(marked, asked)
    for row, answer in enumerate([*CHOSEN, *REJECTED]):
        ids = batch["input_ids"][row][batch["completion_mask"][row].bool()]
        assert processor.tokenizer.decode(ids) == f" {answer}</s>"
    plain = {"prompt": "<image>Q: ", "chosen": "yes", "rejected": "no</s>", "images": pictures_of(0, 1)}
    batch = ours([plain])
    answers = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert [processor.tokenizer.decode(ids) for ids in answers] == ["yes</s>", "no</s>"]


# ---- README


def test_the_readmes_snippet_runs(tmp_path, monkeypatch):
    code = README.split("### Preferences and rewards")[1].split("```python\n")[1].split("```")[0]
    small = "bf16=False, use_cpu=True, max_steps=1, per_device_train_batch_size=4, report_to='none', "
    for name, more in (("dpo", ""), ("grpo", "max_completion_length=4, ")):
        assert code.count(f'Config("{name}", ') == 1
        code = code.replace(f'Config("{name}", ', f'Config("{name}", {small}{more}')
    save(tmp_path / "my_model", "llava-mini")
    for name, answers in (("my_preferences", True), ("my_questions", False)):
        (tmp_path / name).mkdir()
        dataset(MIXED, answers=answers).to_parquet(str(tmp_path / name / "train-00000.parquet"))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    for trainer in (names["dpo"], names["grpo"]):
        assert trainer.state.global_step == 1
        assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
        inside = trainer.model.get_base_model().model.modality_prefusion
        assert any(parameter.requires_grad for parameter in inside.parameters())
