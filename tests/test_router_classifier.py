"""The classifier router against a NumPy reference, and how it is configured, kept and started."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, MobileNetV2Config
from transformers.utils import logging

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaModel
from adaptive_llava.modeling.compressor_average_pool import AveragePoolCompressor
from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.modeling.vision_tower_features import has_class_token
from adaptive_llava.modeling.visual_tokens import VisionFeatures
from adaptive_llava.training.lora_targets import fully_trained_modules
from tests.conftest import IMAGE_TOKEN, tiny_images, tiny_model, tiny_text_config, tiny_vision_config
from tests.fresh_process import run_without_package


pytestmark = pytest.mark.compat

DIM = 8
POOLED = {"compressor": {"type": "average_pool", "factors": [1, 2]}}
PROMPT = torch.tensor([[5, IMAGE_TOKEN, 6]])


def router(counts: int = 2, seed: int = 0, dim: int = DIM, **options) -> ClassifierRouter:
    compressor = AveragePoolCompressor(dim, 12, factors=list(range(1, counts + 1)))
    built = ClassifierRouter(dim, compressor, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return built


def views_of(cls: torch.Tensor, **fields) -> VisionFeatures:
    patches = torch.randn(len(cls), 9, cls.shape[1], generator=torch.Generator().manual_seed(1))
    return VisionFeatures(patches, (3, 3), cls, torch.zeros(len(cls), 3, 6, 6), (1,) * len(cls), **fields)


def some_views(number: int = 50) -> VisionFeatures:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(3, number, DIM, generator=generator)
    blocks = {block: torch.randn(number, 9, DIM, generator=generator) for block in (1, 2)}
    return views_of(states[0], layer_cls=states[1], blocks=blocks)


def document_probability(cls: np.ndarray, weights: dict[str, np.ndarray]) -> float:
    """P(document) of one view as the DynamicResampler report has it, in float64: CLS -> hidden layer -> sigmoid."""
    hidden = []
    for unit, bias in zip(weights["linear_1.weight"], weights["linear_1.bias"], strict=True):
        hidden.append(max(sum(float(w) * float(x) for w, x in zip(unit, cls, strict=True)) + float(bias), 0.0))
    z = sum(float(w) * h for w, h in zip(weights["linear_2.weight"][0], hidden, strict=True))
    return 1 / (1 + np.exp(-(z + float(weights["linear_2.bias"][0]))))


@pytest.mark.parametrize("threshold", [0.5, 0.65])
def test_two_counts_follow_the_report_written_in_numpy(threshold):
    binary, views = router(threshold=threshold), some_views()
    weights = {name: value.numpy() for name, value in binary.state_dict().items()}
    expected = np.array([document_probability(view.numpy(), weights) for view in views.cls])
    routing = binary(views)
    np.testing.assert_allclose(routing.scores.numpy(), expected, rtol=0, atol=1e-6)
    assert routing.rungs.tolist() == (expected > threshold).astype(int).tolist()
    assert 0 < (expected > threshold).sum() < len(expected)
    assert routing.logits.shape == (50, 2) and (routing.logits[:, 0] == 0).all()
    np.testing.assert_allclose(routing.logits.softmax(-1)[:, 1].numpy(), expected, rtol=0, atol=1e-6)


def test_a_case_computed_by_hand():
    # hidden: relu(1*2 - 1) = 1 and relu(-2 + 1) = 0; z = 3*1 + 5*0 - 1 = 2; sigmoid(2) = 0.8807971
    binary = router(dim=1, hidden_dim=2)
    values = {"linear_1.weight": [[1.0], [-1.0]], "linear_1.bias": [-1.0, 1.0]}
    values |= {"linear_2.weight": [[3.0, 5.0]], "linear_2.bias": [-1.0]}
    binary.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    routing = binary(views_of(torch.tensor([[2.0]])))
    assert routing.logits.tolist() == [[0.0, 2.0]] and routing.rungs.tolist() == [1]
    assert routing.scores.item() == pytest.approx(0.8807971, abs=1e-6)


def test_more_counts_take_the_likeliest_and_score_the_expected_rung():
    several = router(counts=4)
    routing = several(some_views())
    probabilities = routing.logits.double().softmax(-1).numpy()
    assert routing.rungs.tolist() == probabilities.argmax(1).tolist() and len(set(routing.rungs.tolist())) > 2
    np.testing.assert_allclose(routing.scores, (probabilities * np.arange(4)).sum(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda views: views.cls),
        ({"features": "feature_layer_cls"}, lambda views: views.layer_cls),
        ({"features": "mean"}, lambda views: views.patches.mean(1)),
        ({"blocks": [2, 1]}, lambda v: torch.cat([v.cls, v.blocks[2].mean(1), v.blocks[1].mean(1)], dim=1)),
    ],
)
def test_it_reads_what_the_options_say(options, expected):
    built, views = router(**options), some_views()
    assert torch.equal(built.inputs(views), expected(views))
    assert built.input_dim == built.hidden_dim == built.linear_1.in_features == expected(views).shape[1]


def test_means_and_logits_are_fp32_in_half_precision():
    views = some_views()
    halves = replace(views, patches=views.patches.half() + 100)
    built = router(features="mean").half()
    assert torch.equal(built.inputs(halves), halves.patches.mean(1, dtype=torch.float32))
    assert built(halves).logits.dtype == torch.float32


@pytest.mark.parametrize("counts", [2, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_view_that_cannot_be_judged_gets_the_most_tokens_and_spoils_no_other(bad, counts):
    views, built = some_views(6), router(counts=counts)
    views.cls[2] = bad
    routing, clean = built(views), built(some_views(6))
    assert routing.rungs[2] == counts - 1 and routing.scores[2] == counts - 1
    others = [0, 1, 3, 4, 5]
    assert torch.equal(routing.rungs[others], clean.rungs[others]) and routing.scores.isfinite().all()


@pytest.mark.parametrize("counts", [2, 5])
def test_untrained_it_gives_every_view_the_most_tokens(counts):
    compressor = AveragePoolCompressor(DIM, 12, factors=list(range(1, counts + 1)))
    routing = ClassifierRouter(DIM, compressor)(some_views())
    assert routing.rungs.tolist() == [counts - 1] * 50


def test_on_a_compressor_with_one_count_it_has_nothing_to_learn_or_read():
    single = router(counts=1, blocks=[1])
    assert list(single.parameters()) == [] and single.needs_blocks == () and not single.needs_class_token
    assert single(views_of(torch.randn(3, DIM))).rungs.tolist() == [0, 0, 0]


@pytest.mark.parametrize("counts", [2, 3])
def test_it_compiles_without_a_graph_break(counts):
    built, views = router(counts=counts), some_views(4)
    compiled = torch.compile(lambda cls: built(replace(views, cls=cls)).rungs, fullgraph=True, backend="eager")
    assert torch.equal(compiled(views.cls), built(views).rungs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "pooled"}, r"`router.features='pooled'` is unknown. Pass one of: cls, feature_layer_cls, mean"),
        ({"blocks": 3}, r"`router.blocks=3` must be a list of distinct indices"),
        ({"blocks": [1, 1]}, r"must be a list of distinct indices"),
        ({"blocks": [1.0]}, r"must be a list of distinct indices"),
        ({"hidden_dim": 0}, r"`router.hidden_dim=0` must be a whole number >= 1"),
        ({"threshold": 1.5}, r"`router.threshold=1.5` must be a probability, from 0 to 1"),
        ({"threshold": float("nan")}, r"must be a probability"),
        ({"threshold": 0.4, "counts": 3}, r"`router.threshold=0.4` has no meaning for 3 token counts"),
    ],
)
def test_options_that_make_no_classifier_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        router(**options)


def test_states_that_the_tower_does_not_give_are_named():
    views = some_views(2)
    with pytest.raises(ValueError, match=r"`router.features='cls'` reads the \[CLS\] state, and this .* gave none"):
        router()(replace(views, cls=None))
    with pytest.raises(ValueError, match=r"Block 1 of `router.blocks=\[1\]` is 5 wide .* built for 8"):
        router(blocks=[1])(replace(views, blocks={1: torch.zeros(2, 9, 5)}))


def convolutional_tower() -> MobileNetV2Config:
    return MobileNetV2Config(image_size=64, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4)


def test_towers_without_a_class_token_are_known_by_their_config():
    assert has_class_token(tiny_vision_config("clip"))
    assert not has_class_token(tiny_vision_config("siglip"))
    assert not has_class_token(convolutional_tower())


@pytest.mark.parametrize("features", ["cls", "feature_layer_cls"])
def test_a_class_token_that_is_not_there_is_refused_when_configured(features):
    fields = POOLED | {"router": {"type": "classifier", "features": features}}
    with pytest.raises(ValueError, match=r"'siglip_vision_model' towers have none. Set its 'features' to 'mean'"):
        tiny_model(vision="siglip", **fields)
    assert tiny_model(vision="clip", **fields).config.router["features"] == features


@pytest.mark.parametrize(("vision", "features"), [("clip", "cls"), ("siglip", "mean")])
def test_from_preset_reads_what_the_tower_has(vision, features):
    model = tiny_model(vision=vision, **POOLED, router={"type": "classifier"})
    assert model.config.router["features"] == features
    assert model.encode_images(tiny_images(2)).rungs in [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_convolutional_tower_is_read_by_its_mean():
    torch.manual_seed(0)
    model = AdaptiveLlavaForConditionalGeneration.from_backbones(
        AutoModel.from_config(convolutional_tower()),
        AutoModelForCausalLM.from_config(tiny_text_config()),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=5,
        **POOLED,
        router={"type": "classifier"},
    )
    assert model.config.router["features"] == "mean"
    assert model.encode_images(tiny_images(2, image_size=64)).rungs == (1, 1)


@pytest.mark.parametrize("block", [4, -5])
def test_a_block_that_the_tower_does_not_have_is_refused_when_configured(block):
    fields = POOLED | {"router": {"type": "classifier", "blocks": [block]}}
    with pytest.raises(ValueError, match=rf"reads hidden states \[{block}\], and this tower of 3 layers has 0 to 3"):
        tiny_model(**fields)


def test_loaded_weights_are_not_started_anew(tmp_path):
    model = tiny_model(**POOLED, fusion_blocks=[0, 1, 2, 3], router={"type": "classifier", "blocks": [1]})
    model.save_pretrained(tmp_path)
    for part in (AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaModel):
        loaded = part.from_pretrained(tmp_path).state_dict()
        for name, value in model.state_dict().items():
            found = loaded.get(name, loaded.get(name.removeprefix("model.")))
            assert name == "lm_head.weight" or torch.equal(found, value), name


@pytest.mark.parametrize("loaded", [False, True])
def test_its_weights_are_frozen_as_built_and_as_loaded(loaded, tmp_path):
    model = tiny_model(**POOLED, router={"type": "classifier", "blocks": [1, -1]})
    if loaded:
        model.model.router.requires_grad_(True)
        model.save_pretrained(tmp_path)
        again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert again.encode_images(tiny_images(6)).rungs == model.encode_images(tiny_images(6)).rungs
        model = again
    assert not any(parameter.requires_grad for parameter in model.train().model.router.parameters())
    assert all(parameter.requires_grad for parameter in model.model.multi_modal_projector.parameters())
    assert "model.router" not in fully_trained_modules(model)
    model.model.router.requires_grad_(True)
    assert "model.router" in fully_trained_modules(model)


@pytest.mark.parametrize("options", [{}, {"features": "feature_layer_cls", "blocks": [2]}, {"features": "mean"}])
@pytest.mark.parametrize("layer", [-2, [1, 2]])
def test_text_alone_in_training_touches_a_trained_router_with_weight_zero(options, layer):
    model = tiny_model(**POOLED, router={"type": "classifier", **options}, vision_feature_layer=layer)
    model.train().model.vision_tower.requires_grad_(False)
    model.model.router.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    gradients = [parameter.grad for parameter in model.model.router.parameters()]
    assert gradients and all(grad is not None and grad.abs().max() == 0 for grad in gradients)


def test_under_peft_a_trained_copy_routes_and_learns():
    model = tiny_model(**POOLED, router={"type": "classifier", "blocks": [1]})
    frozen = {name: value.clone() for name, value in model.model.router.state_dict().items()}
    settings = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["model.router"])
    wrapped = get_peft_model(model, settings)
    inner = wrapped.get_base_model().model
    routing = inner.router(inner.extract_features(tiny_images(3)))
    routing.logits.logsumexp(-1).sum().backward()
    learned = [parameter for parameter in inner.router.parameters() if parameter.requires_grad]
    assert len(learned) == 4 and all(parameter.grad is not None for parameter in learned)
    torch.optim.SGD(learned, lr=0.1).step()
    assert all(torch.equal(value, frozen[name]) for name, value in inner.router.original_module.state_dict().items())
    merged = wrapped.merge_and_unload().model.router
    assert not torch.equal(merged.linear_1.weight, frozen["linear_1.weight"])


def test_generating_with_an_untrained_router_warns_once_unless_a_budget_or_training_decides(caplog):
    logging.warning_once.cache_clear()
    model = tiny_model(**POOLED, router={"type": "classifier"})
    arguments = {"input_ids": PROMPT, "pixel_values": tiny_images(1), "max_new_tokens": 1}
    model.generate(**arguments, visual_token_budget=9)
    model.config.router_training = {"method": "test"}
    model.generate(**arguments)
    assert "router was never trained" not in caplog.text
    model.config.router_training = None
    for _ in range(2):
        model.generate(**arguments)
    assert caplog.text.count("router was never trained and gives every image the most tokens") == 1
    logging.warning_once.cache_clear()


def test_a_model_from_its_config_starts_like_its_parts():
    model = tiny_model(**POOLED, fusion_blocks=[0, 1, 2, 3], router={"type": "classifier"})
    fresh = AdaptiveLlavaForConditionalGeneration(model.config).model
    assert fresh.router.linear_2.bias.tolist() == [1.0] and fresh.router.linear_2.weight.abs().sum() == 0
    assert fresh.multi_block_fusion.linear_2.weight.count_nonzero() == 2 * 32


def test_start_values_are_the_same_as_remote_code(tmp_path):
    tiny_model(**POOLED, router={"type": "classifier"}).save_pretrained(tmp_path / "model")
    code = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
router = AutoModelForImageTextToText.from_config(config, trust_remote_code=True).model.router
print(router.linear_2.weight.abs().sum().item(), router.linear_2.bias.tolist(), router.linear_1.weight.requires_grad)
"""
    said = run_without_package(code, tmp_path / "model", folder=tmp_path)
    assert said.splitlines()[-1] == "0.0 [1.0] False"
