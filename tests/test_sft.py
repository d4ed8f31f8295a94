"""Fine-tuning with stock TRL: what is trained, what the loss counts, and that a trained model survives the disk."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset, Features, Image, List, Value
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from trl import ModelConfig, SFTConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.training.lora_targets import fully_trained_modules, language_model_targets
from adaptive_llava.training.merge import merge_adapter
from adaptive_llava.training.sft import build_trainer, main, parse_arguments
from tests.conftest import BOS, tiny_model
from tests.fresh_process import run_without_package
from tests.test_convert import character_tokenizer, picture


ROOT = Path(__file__).resolve().parents[1]
LORA = str(ROOT / "training" / "recipes" / "lora.yaml")
FULL = str(ROOT / "training" / "recipes" / "full.yaml")
NEW_ENOUGH = Version(transformers.__version__) >= Version("5.18")
ANSWERS = ["A cat.", "Two red dogs on a mat.", "3", "No, a blue car."]


def tiny_processor(model, *, bos=False):
    tokenizer = character_tokenizer()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return AdaptiveLlavaProcessor.from_config(model.config, tokenizer)


def save(folder, preset="dfmr", **fields):
    model = tiny_model(preset, **fields)
    with torch.no_grad():  # small weights: a few steps must not overflow
        for parameter in model.parameters():
            parameter.mul_(0.8)
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return str(folder)


def turns(answer, question="What is this?", images=1):
    user = [{"type": "image", "text": None}] * images + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def message_rows(count=8):
    """Rows with one, two and no images."""
    numbers = [(1, 2, 0, 1)[i % 4] for i in range(count)]
    return {
        "messages": [turns(ANSWERS[i % 4], images=n) for i, n in enumerate(numbers)],
        "images": [[picture(10 * i + k) for k in range(n)] for i, n in enumerate(numbers)],
    }


def message_dataset(count=8):
    part = {"type": Value("string"), "text": Value("string")}
    features = {"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())}
    return Dataset.from_dict(message_rows(count), features=Features(features))


def prompt_dataset(count=4):
    rows = {
        "prompt": [[{"role": "user", "content": "What is this?"}]] * count,
        "completion": [[{"role": "assistant", "content": ANSWERS[i % 4]}] for i in range(count)],
        "images": [[picture(i)] for i in range(count)],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("base") / "model", compressor_trained=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    message_dataset().to_parquet(str(folder / "train-00000.parquet"))
    message_dataset(4).to_parquet(str(folder / "test-00000.parquet"))
    return str(folder)


def configuration(folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "bf16": False, "use_cpu": True, "max_length": None, "report_to": "none", "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "weight_decay": 0.0,
    }  # fmt: skip
    return SFTConfig(**(defaults | options))


def command(base, data, output, *options, recipe=LORA):
    arguments = ["--config", recipe, "--model_name_or_path", base, "--dataset_name", data]
    arguments += ["--output_dir", str(output), "--use_cpu", "true", "--max_steps", "2", "--lr_scheduler_type"]
    arguments += [
        "constant",
        "--warmup_steps",
        "0",
        "--learning_rate",
        "1e-2",
        "--gradient_accumulation_steps",
        "1",
        "--logging_steps",
        "1",
    ]
    return main([*arguments, *map(str, options)])


def inputs_of(processor, budget=None):
    chats = [turns("", images=1)[:1], turns("", images=2)[:1]]
    for index, chat in enumerate(chats):
        shown = iter(picture(90 + 3 * index + k) for k in range(2))
        for part in chat[0]["content"]:
            part.pop("text", None) if part["type"] == "image" else None
        chat[0]["content"] = [{**p, "image": next(shown)} if p["type"] == "image" else p for p in chat[0]["content"]]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    images = [[part["image"] for part in chat[0]["content"] if part["type"] == "image"] for chat in chats]
    return processor(images=images, text=prompts, padding=True, padding_side="right", return_tensors="pt")


@torch.no_grad()
def logits_of(model, processor):
    inputs = inputs_of(processor)
    return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


# ---- what is trained


class LearnedScale(nn.Module):
    """Stands in for a compressor with weights: wraps another one."""

    def __init__(self, inner, dim):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(dim))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, features, rungs):
        tokens = self.inner(features, rungs)
        return type(tokens)(tokens.values * self.scale, tokens.lengths)


def train(model, tmp_path, *, lora, rows=None, **options):
    arguments = ModelConfig(use_peft=lora, lora_dropout=0.0, lora_r=4, lora_target_modules=["all-linear"])
    trainer = build_trainer(
        model,
        tiny_processor(model),
        configuration(tmp_path, **options.pop("training", {})),
        rows or message_dataset(),
        model_arguments=arguments,
        **options,
    )
    return trainer


@pytest.mark.compat
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("tower", [True, False])
def test_every_parameter_that_should_move_moved_and_none_else(tmp_path, lora, tower):
    model = tiny_model("dfmr")
    model.model.compressor = LearnedScale(model.model.compressor, 32)
    trainer = train(model, tmp_path, lora=lora, train_vision_tower=tower, training={"max_steps": 3})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    # the last tower block and the post-norm come after the selected layer (-2): no gradient can reach them
    unused = ("layers.2.", "post_layernorm", "vision_tower.encoder.layers.2")
    parts = ("multi_modal_projector", "compressor", *(["vision_tower"] if tower else []))
    for name in before:
        visual = any(part in name for part in parts)
        if "vision_tower" in name and any(word in name for word in unused):
            assert name not in moved
            continue
        if lora:
            expected = "lora_" in name or (visual and "modules_to_save" in name)
            assert "lora_" not in name or "language_model" in name
        else:
            expected = visual or "vision_tower" not in name
        # k_proj biases move only by rounding: softmax does not see them
        if expected and name.endswith("k_proj.bias"):
            continue
        assert (name in moved) == expected, name
    assert model.config.compressor_trained is True


@pytest.mark.compat
@pytest.mark.parametrize("lora", [True, False])
def test_fused_blocks_and_windows_are_trained_in_full_and_saved(tmp_path, lora):
    base = save(tmp_path / "base", "stf-mbtf", compressor_trained=False)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    trainer = train(model, tmp_path / "out", lora=lora)
    own = ("model.multi_block_fusion.", "model.compressor.")
    visual = {
        n: p.detach().clone()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad and any(o in n for o in own)
    }
    assert len(visual) == 8
    trainer.train()
    trained = dict(trainer.model.named_parameters())
    assert not [name for name, before in visual.items() if torch.equal(trained[name], before)]
    processor = tiny_processor(model)
    expected = logits_of(trainer.model, processor)
    trainer.save_model()
    folder = merge_adapter(tmp_path / "out", tmp_path / "merged") if lora else tmp_path / "out"
    again = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder)
    assert again.config.compressor_trained is True
    assert (logits_of(again, processor) - expected).abs().max() <= 1e-5


@pytest.mark.compat
def test_an_adapter_that_left_a_visual_part_alone_does_not_count_as_its_training(tmp_path):
    base = save(tmp_path / "base", "stf-mbtf", compressor_trained=False)
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    model.model.multi_block_fusion.requires_grad_(False)
    trainer = train(model, tmp_path / "out", lora=True)
    assert trainer.model.peft_config["default"].modules_to_save == ["model.compressor"]
    trainer.save_model()
    folder = merge_adapter(tmp_path / "out", tmp_path / "merged")
    assert AdaptiveLlavaForConditionalGeneration.from_pretrained(folder).config.compressor_trained is False


@pytest.mark.compat
def test_counts_that_an_untrained_router_never_chooses_are_not_left_out_silently(tmp_path, caplog):
    warning = "so that nothing is learned for the other counts"
    model = tiny_model("dynamic-resampler")
    train(model, tmp_path, lora=False, visual_token_budget=9)
    model.config.router_training = {"method": "test"}
    train(model, tmp_path, lora=False)
    assert warning not in caplog.text
    model.config.router_training = None
    train(model, tmp_path, lora=False)
    assert caplog.text.count(warning) == 1


@pytest.mark.compat
def test_layers_of_fusion_may_carry_lora_themselves(tmp_path):
    model = tiny_model("stf-mbtf")
    processor = tiny_processor(model)
    before = logits_of(model, processor)
    layers = "linear_1", "linear_2"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=list(layers)))
    assert sum("lora_B" in name for name, _ in adapted.named_parameters()) == 4
    assert (logits_of(adapted, processor) - before).abs().max() <= 1e-5


@pytest.mark.compat
def test_all_linear_means_exactly_the_language_model(tmp_path):
    model = tiny_model("dfmr", text="llama")
    linear = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.language_model.")
    }
    trainer = train(model, tmp_path, lora=True)
    adapted = {n.removeprefix("base_model.model.") for n, m in trainer.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == linear and len(linear) == 14
    assert trainer.model.peft_config["default"].modules_to_save == ["model.multi_modal_projector"]


def test_short_names_mean_the_language_model_and_full_names_are_kept():
    model = tiny_model()
    assert language_model_targets(model, ["q_proj"]) == r"model\.language_model\.(?:.*\.)?(?:q_proj)"
    assert language_model_targets(model, ["model.vision_tower.x"]) == ["model.vision_tower.x"]
    with pytest.raises(ValueError, match=r"qkv is no linear layer of this language model. Pass 'all-linear', some of"):
        language_model_targets(model, ["q_proj", "qkv"])


def test_a_name_shared_with_another_kind_of_layer_is_listed_in_full():
    model = tiny_model()
    model.model.language_model.layers[0].mlp.gate_proj = nn.Identity()
    targets = language_model_targets(model)
    assert "model.language_model.layers.1.mlp.gate_proj" in targets
    assert "model.language_model.layers.0.mlp.gate_proj" not in targets


def test_a_router_that_is_not_meant_to_be_trained_stays_out():
    model = tiny_model("dfmr")
    model.model.router.head = nn.Linear(2, 2).requires_grad_(False)
    assert fully_trained_modules(model) == ["model.multi_modal_projector"]
    model.model.router.requires_grad_(True)
    assert fully_trained_modules(model) == ["model.multi_modal_projector", "model.router"]


@pytest.mark.compat
def test_the_trainers_loss_equals_the_models_own_without_placeholders(tmp_path):
    model = tiny_model("dfmr")
    trainer = train(model, tmp_path, lora=False)
    batch = trainer.data_collator(list(message_dataset(4)))
    with torch.no_grad():
        fused = trainer.compute_loss(trainer.model.eval(), dict(batch))
        own = trainer.model(**batch).loss
    assert fused == pytest.approx(own.item(), abs=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize("lora", [True, False])
def test_pre_fusion_is_trained_in_full_on_what_the_collator_marks(tmp_path, lora):
    model = tiny_model("pre-fusion")
    trainer = train(model, tmp_path, lora=lora, rows=prompt_dataset(), training={"gradient_checkpointing": True})
    batch = trainer.data_collator(list(prompt_dataset()))
    scored = batch["labels"] != -100
    others = (batch["attention_mask"] == 0) | (batch["input_ids"] == trainer.processing_class.image_token_id)
    assert torch.equal(batch["instruction_mask"], ~(scored | others)) and batch["instruction_mask"].any(1).all()
    with torch.no_grad():  # TRL keeps the labels to itself, the mask gets through
        fused = trainer.compute_loss(trainer.model.eval(), dict(batch))
        del batch["instruction_mask"]
        own = trainer.model(**batch).loss
    assert fused == pytest.approx(own.item(), abs=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    # under PEFT the copy is trained, and no adapter stands inside it
    names = [n for n in before if "modality_prefusion" in n and ("modules_to_save" in n or not lora)]
    assert len(names) == 24  # two layers of Qwen2
    assert not any("modality_prefusion" in n and "lora_" in n for n in before)
    still = [n for n, p in trainer.model.named_parameters() if n in names and torch.equal(p, before[n])]
    assert all(name.endswith("k_proj.bias") for name in still)


def test_text_that_is_all_scored_leaves_pre_fusion_without_instruction(tmp_path, caplog):
    transformers.utils.logging.warning_once.cache_clear()
    trainer = train(tiny_model("pre-fusion"), tmp_path, lora=False)
    batch = trainer.data_collator([message_dataset(1)[0]])
    assert batch["instruction_mask"].sum() == 0
    assert "so pre-fusion has no instruction to fuse. Train on answers alone" in caplog.text
    assert "instruction_mask" not in train(tiny_model("dfmr"), tmp_path, lora=False).data_collator(
        [message_dataset(1)[0]]
    )


@pytest.mark.compat
def test_stock_trl_trains_pre_fusion_with_a_warning(tmp_path, caplog):
    transformers.utils.logging.warning_once.cache_clear()
    model = tiny_model("pre-fusion")
    trainer = trl.SFTTrainer(
        model=model,
        args=configuration(tmp_path),
        train_dataset=prompt_dataset(),
        processing_class=tiny_processor(model),
    )
    trainer.train()
    assert "Pre-fusion takes all text for instruction, answers too" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_budget_in_training_replaces_the_router(tmp_path):
    model = tiny_model("dfmr")
    trainer = train(model, tmp_path, lora=False, visual_token_budget=5)
    batch = trainer.data_collator(list(message_dataset(4)))
    counts = trainer.model(**batch).num_visual_tokens
    assert counts.tolist() == [4] * 4
    assert "visual_token_budget" not in trainer.data_collator(list(message_dataset(4).select([2])))
    trainer.train()
    with pytest.raises(ValueError, match="`visual_token_budget=2` is below the smallest count.*Pass at least 4"):
        train(tiny_model("dfmr"), tmp_path, lora=False, visual_token_budget=2)


@pytest.mark.compat
@pytest.mark.parametrize(("layout", "least", "largest"), [("sequence", 4, 22), ("spatial_unpad", 5, 24)])
def test_a_budget_for_tiled_images_is_held_against_whole_images_with_their_tiles(
    layout, least, largest, tmp_path, caplog
):
    # 4 tokens a view: shown whole 4 (joined: and a newline); as 2x2 tiles 5 views and 2 newlines (4 lines of 4 and 1)
    def tiled():
        return tiny_model("dfmr", tiling={"type": "anyres", "view_layout": layout})

    with pytest.raises(ValueError, match=rf"is below the smallest count .*\({least} tokens\). Pass at least {least}"):
        train(tiled(), tmp_path, lora=False, visual_token_budget=least - 1)
    train(tiled(), tmp_path, lora=False, visual_token_budget=largest)
    assert "does not suffice for every image" not in caplog.text
    trainer = train(tiled(), tmp_path, lora=False, visual_token_budget=largest - 1)
    assert f"costs up to {largest} tokens at the fewest, and training would stop at it" in caplog.text
    with pytest.raises(
        ValueError, match=rf"{largest - 1}` is below the smallest count .*\({largest} tokens for an im"
    ):
        trainer.train()  # the pictures are square


# ---- the command, end to end


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert model.config.compressor_trained
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits[inputs["attention_mask"].bool()], sys.argv[3])
"""


@pytest.mark.compat
def test_lora_trained_saved_reloaded_and_merged_gives_the_same_logits(tmp_path, base, data):
    output = tmp_path / "out"
    trainer = command(base, data, output, "--merge", "true", "--eval_strategy", "steps", "--eval_steps", 1)
    assert {"loss", "eval_loss", "eval_mean_token_accuracy"} <= {
        key for log in trainer.state.log_history for key in log
    }
    assert json.loads((output / "train_results.json").read_text())["train_loss"] > 0
    assert "eval_loss" in json.loads((output / "eval_results.json").read_text())
    processor = AdaptiveLlavaProcessor.from_pretrained(output)
    trained = logits_of(trainer.model, processor)

    fresh = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    before = logits_of(fresh, processor)
    reloaded = PeftModel.from_pretrained(fresh, output)
    merged = AdaptiveLlavaForConditionalGeneration.from_pretrained(output / "merged")
    assert (trained - before).abs().max() > 1e-2
    assert (logits_of(reloaded, processor) - trained).abs().max() <= 1e-5
    assert (logits_of(merged, processor) - trained).abs().max() <= 1e-5
    assert merged.config.compressor_trained and not fresh.config.compressor_trained
    names = set(load_file(output / "merged" / "model.safetensors"))
    assert names == set(load_file(Path(base) / "model.safetensors"))

    torch.save(dict(inputs_of(processor)), tmp_path / "inputs.pt")
    run_without_package(LOAD, output / "merged", tmp_path / "inputs.pt", tmp_path / "logits.pt", folder=tmp_path)
    assert (torch.load(tmp_path / "logits.pt") - trained).abs().max() <= 1e-5


@pytest.mark.compat
def test_full_tuning_saves_a_folder_that_loads(tmp_path, base, data):
    trainer = command(base, data, tmp_path / "out", recipe=FULL)
    processor = AdaptiveLlavaProcessor.from_pretrained(tmp_path / "out")
    loaded = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (logits_of(loaded, processor) - logits_of(trainer.model, processor)).abs().max() <= 1e-6
    assert loaded.config.compressor_trained
    assert (tmp_path / "out" / "modeling_adaptive_llava.py").is_file()


@pytest.mark.compat
@pytest.mark.parametrize("recipe", [LORA, FULL])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, base, data, recipe):
    rest = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4, "--save_total_limit", 5]
    unbroken = command(base, data, tmp_path / "a", *rest, recipe=recipe)
    (tmp_path / "b").mkdir()
    os.rename(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = command(base, data, tmp_path / "b", *rest, "--resume_from_checkpoint", "last", recipe=recipe)
    assert resumed.state.global_step == 4
    # the first two losses come from the checkpoint's log, the rest was computed again
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (unbroken, resumed)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-6)
    expected = dict(unbroken.model.named_parameters())
    assert all(torch.allclose(v, expected[n], atol=1e-6) for n, v in resumed.model.named_parameters())


def test_gradient_checkpointing_is_on_and_changes_no_gradient(tmp_path):
    assert parse_arguments(["--config", LORA, "--output_dir", str(tmp_path)])[1].gradient_checkpointing
    weights = []
    for checkpointing in (True, False):
        trainer = train(tiny_model("dfmr"), tmp_path, lora=False, training={"gradient_checkpointing": checkpointing})
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert all(torch.allclose(v, weights[1][n], atol=1e-5) for n, v in weights[0].items())


@pytest.mark.compat
def test_trls_own_command_trains_a_saved_checkpoint(tmp_path, base, data):
    script = "import sys; from trl.scripts.sft import *; main(*make_parser().parse_args_and_config(sys.argv[1:]))"
    options = {
        "model_name_or_path": base, "trust_remote_code": "true", "dataset_name": data, "output_dir": tmp_path / "out",
        "max_steps": 2, "per_device_train_batch_size": 2, "max_length": 4096, "bf16": "false", "use_cpu": "true",
        "report_to": "none", "use_peft": "true", "lora_target_modules": "all-linear", "gradient_checkpointing": "true",
    }  # fmt: skip
    run_without_package(script, *[x for k, v in options.items() for x in (f"--{k}", v)], folder=tmp_path)
    adapter = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    # what it does differently: the tower is adapted too, and the projector is not trained in full
    assert any("vision_tower" in name for name in adapter)
    assert any("multi_modal_projector.linear_1.lora_A" in name for name in adapter)


@pytest.mark.compat
@pytest.mark.parametrize("preset", ["dfmr", "pre-fusion"])
def test_dpo_takes_two_steps(tmp_path, preset):
    base = save(tmp_path / "base", preset)
    rows = Dataset.from_dict(
        {
            "prompt": [turns("")[:1]] * 4,
            "chosen": [turns("A cat.")[1:]] * 4,
            "rejected": [turns("No.")[1:]] * 4,
            "images": [[picture(i)] for i in range(4)],
        }
    ).cast_column("images", List(Image()))
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True, "report_to": "none"}
    trainer = trl.DPOTrainer(
        model=AdaptiveLlavaForConditionalGeneration.from_pretrained(base),
        args=trl.DPOConfig(str(tmp_path), max_length=None, save_strategy="no", logging_steps=1, **options),
        train_dataset=rows,
        processing_class=AdaptiveLlavaProcessor.from_pretrained(base),
    )
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.compat
@pytest.mark.skipif(NEW_ENOUGH, reason="older transformers only")
def test_assistant_only_loss_is_refused_before_transformers_5_18(tmp_path, base, data):
    with pytest.raises(ValueError, match="`assistant_only_loss=True` needs transformers >= 5.18.*this is 4"):
        command(base, data, tmp_path, "--assistant_only_loss", "true")


def test_arguments_that_do_not_go_together_are_refused(tmp_path, base, data):
    with pytest.raises(ValueError, match="`model_name_or_path` is missing"):
        main(["--config", LORA, "--output_dir", str(tmp_path), "--dataset_name", data])
    with pytest.raises(
        ValueError,
        match="there is no such file. Pass a path, or one of .*: .*full.yaml, joint_routing.yaml.* lora.yaml",
    ):
        main(["--config", "lroa.yaml"])
    with pytest.raises(ValueError, match="`merge=True` merges a LoRA adapter"):
        command(base, data, tmp_path, "--merge", "true", recipe=FULL)
