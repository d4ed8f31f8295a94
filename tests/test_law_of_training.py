"""The law of fine-tuning: of every compressor, part and router, stock TRL moves what should move and nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from trl import ModelConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.backbone_assembly import OWN_PARTS
from adaptive_llava.modeling.compressor_base import Compressor
from adaptive_llava.training.joint_routing import build_joint_trainer
from adaptive_llava.training.merge import merge_adapter
from adaptive_llava.training.sft import build_trainer
from tests import test_joint_routing
from tests.conftest import TINY_COMPRESSORS, TINY_ROUTERS
from tests.test_sft import configuration, inputs_of, message_dataset, prompt_dataset, save, tiny_processor


pytestmark = pytest.mark.compat

RANDOM = {"type": "random"}  # visits every rung
POOLING = {"compressor": TINY_COMPRESSORS["average_pool"], "router": RANDOM}
# Every compressor, and every other part that learns, by the fields of its model.
PARTS = {
    **{name: {"compressor": options, "router": RANDOM} for name, options in TINY_COMPRESSORS.items()},
    "fusion": POOLING | {"fusion_blocks": "default"},
    "pre-fusion": POOLING | {"prefusion_layers": 1},
    "newline of a sequence": POOLING | {"tiling": {"type": "anyres"}},
    # the views of a map share the largest of their rungs, so that smaller ones would hardly be seen
    "newline of a map": {"compressor": {"type": "average_pool", "factors": [2]}, "tiling": {"type": "anyres"}},
    "all": {
        "compressor": TINY_COMPRESSORS["query_resampler"],
        "router": RANDOM,
        "fusion_blocks": "default",
        "prefusion_layers": 1,
        "tiling": {"type": "anyres"},
    },
}
MERGED = ("query_resampler", "spatial_fusion", "all")
# Own parts with parameters, beside the projector; spatial fusion stands in its place.
LEARNED = {
    "query_resampler": {"compressor"},
    "query_resampler_nested": {"compressor"},
    "spatial_fusion": {"compressor"},
    "fusion": {"multi_block_fusion"},
    "pre-fusion": {"modality_prefusion"},
    "newline of a sequence": {"view_arrangement"},
    "newline of a map": {"view_arrangement"},
    "all": {"compressor", "multi_block_fusion", "modality_prefusion", "view_arrangement"},
}


def lora_arguments(lora: bool) -> ModelConfig:
    return ModelConfig(use_peft=lora, lora_dropout=0.0, lora_r=4, lora_target_modules=["all-linear"])


def run(trainer) -> tuple[set[str], set[str], set[int]]:
    """Train; the names of all parameters, of those that moved, and the rungs that were compressed."""
    visited: set[int] = set()
    base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    for module in base.model.compressor.modules():  # under PEFT a trained copy stands beside the original
        if isinstance(module, Compressor):
            module.register_forward_pre_hook(lambda _, arguments: visited.update(arguments[1]))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    return set(before), {name for name, value in before.items() if not torch.equal(value, after[name])}, visited


def should_move(name: str, lora: bool) -> bool:
    """Whether SFT moves this parameter of a model whose tower and router stay as they are."""
    if not lora:
        return "vision_tower." not in name and "model.router." not in name
    # adapters of the language model, and whole copies of the parts that make visual tokens
    return "lora_" in name or ("modules_to_save" in name and "model.router." not in name)


def own_parts(names: set[str]) -> set[str]:
    return {part for part in OWN_PARTS if any(f"model.{part}." in name for name in names)}


@torch.no_grad()
def logits_at_every_rung(model, inputs) -> Tensor:
    """Logits of all attended ids, with all views at one rung after the other."""
    model.eval()
    attended, logits = inputs["attention_mask"].bool(), []
    views = len(model(**inputs).visual_rungs)
    for rung in range(len(model.config.visual_token_counts)):
        logits.append(model(**inputs, visual_rungs=[rung] * views).logits[attended])
    return torch.stack(logits)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_part_is_trained_in_full_and_survives_the_disk(tmp_path, name, lora):
    base = save(tmp_path / "base", "llava", **PARTS[name])
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    processor, options = tiny_processor(model), {"max_steps": 4, "learning_rate": 3e-3}
    rows = prompt_dataset() if model.config.prefusion_layers else message_dataset()
    trainer = build_trainer(
        model, processor, configuration(tmp_path / "out", **options), rows, model_arguments=lora_arguments(lora)
    )
    names, moved, visited = run(trainer)
    # keys of the same query all get the same from this bias, and softmax does not see it
    seen = {each for each in names if not each.endswith("k_proj.bias")}
    expected = {each for each in seen if should_move(each, lora)}
    assert moved & seen == expected
    projector = set() if name == "spatial_fusion" else {"multi_modal_projector"}
    assert own_parts(moved) == LEARNED.get(name, set()) | projector
    assert visited == set(range(len(model.config.visual_token_counts)))

    inputs = inputs_of(processor)
    trained = logits_at_every_rung(trainer.model, inputs)
    trainer.save_model()
    fresh = AdaptiveLlavaForConditionalGeneration.from_pretrained(base if lora else tmp_path / "out")
    if lora:
        assert (logits_at_every_rung(fresh, inputs) - trained).abs().max() > 1e-3
        fresh = PeftModel.from_pretrained(fresh, tmp_path / "out")
    assert (logits_at_every_rung(fresh, inputs) - trained).abs().max() <= 1e-5
    if lora and name in MERGED:
        merged = AdaptiveLlavaForConditionalGeneration.from_pretrained(
            merge_adapter(tmp_path / "out", tmp_path / "merged")
        )
        assert (logits_at_every_rung(merged, inputs) - trained).abs().max() <= 1e-5


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", TINY_ROUTERS)
def test_fine_tuning_leaves_every_router_as_it_is(tmp_path, name, lora):
    base = save(tmp_path / "base", "llava", compressor=TINY_COMPRESSORS["average_pool"], router=TINY_ROUTERS[name])
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    trainer = build_trainer(
        model, tiny_processor(model), configuration(tmp_path), message_dataset(), model_arguments=lora_arguments(lora)
    )
    chosen = dict(model.config.router)
    names, moved, _ = run(trainer)
    assert own_parts(moved) == {"multi_modal_projector"}
    assert ("router" in own_parts(names)) == (name == "classifier")
    assert model.model.router.options == chosen and model.config.router_training is None


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_joint_routing_moves_the_router_and_every_query_set(tmp_path, lora):
    base = save(
        tmp_path / "base", "llava", compressor=TINY_COMPRESSORS["query_resampler"], router=TINY_ROUTERS["classifier"]
    )
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    trainer = build_joint_trainer(
        model, tiny_processor(model), test_joint_routing.configuration(tmp_path / "out", max_steps=2),
        message_dataset(), model_arguments=lora_arguments(lora),
    )  # fmt: skip
    names, moved, visited = run(trainer)
    seen = {each for each in names if not each.endswith("k_proj.bias")}
    routed = {each for each in seen if "model.router." in each and ("modules_to_save" in each or not lora)}
    assert len(routed) == 4  # two linear layers
    assert moved & seen == routed | {each for each in seen if should_move(each, lora)}
    assert visited == {0, 1}
