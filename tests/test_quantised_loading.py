"""QLoRA for real: a base in 4 bits on a CPU, trained by the recipe; and a base that stands on several devices."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import BitsAndBytesConfig

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.__main__ import main
from adaptive_llava.training.quantised_loading import NOT_QUANTISED
from adaptive_llava.training.small_document_model import build_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    model, processor = build_model(width=64, layers=2, image_size=32, patch_size=8, factors=(1, 2, 4))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "receipts"
    folder.mkdir()
    rows = []
    for index, (shop, colour) in enumerate([("NORD", "red"), ("OST", "green")] * 6):
        Image.new("RGB", (32 + index, 32), colour).save(folder / f"{index}.png")
        rows.append({"file": f"{index}.png", "fields": {"shop": shop}})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def prompt(base):
    from adaptive_llava import AdaptiveLlavaProcessor

    processor = AdaptiveLlavaProcessor.from_pretrained(base)
    return processor(images=Image.new("RGB", (32, 32), "red"), text="<image> shop?", return_tensors="pt")


def test_the_language_model_is_quantised_and_what_sees_is_not(base, prompt):
    pytest.importorskip("bitsandbytes")
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(
        base, quantization_config=wanted, dtype=torch.bfloat16
    )
    linear = {name: type(part).__name__ for name, part in model.named_modules() if hasattr(part, "in_features")}
    in_language_model = [kind for name, kind in linear.items() if name.startswith("model.language_model.")]
    assert in_language_model and set(in_language_model) == {"Linear4bit"}
    others = {kind for name, kind in linear.items() if not name.startswith("model.language_model.")}
    assert others == {"Linear"}
    whole = AdaptiveLlavaForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    inputs = prompt | {"pixel_values": prompt["pixel_values"].bfloat16()}
    with torch.no_grad():
        found, expected = model(**inputs).logits.float(), whole(**inputs).logits.float()
    assert 0 < (found - expected).norm() < 0.3 * expected.norm()


def test_the_recipe_fine_tunes_a_base_in_4_bits_and_ends_with_a_whole_model_in_16(base, receipts, tmp_path):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "out"
    arguments = [
        "documents", "--config", "documents_qlora.yaml", "--model", str(base), "--data", str(receipts), "--output",
        str(output), "--use_cpu", "true", "--dataloader_pin_memory", "false", "--max_steps", "2",
        "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2", "--logging_steps", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((output / "documents_day.json").read_text())
    assert results["recipe"] == "documents_qlora.yaml" and len(results["curve"]) >= 3
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(output / "model")
    weights = model.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    before = AdaptiveLlavaForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert any("language_model" in name for name in changed) and any("projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


@pytest.mark.compat
def test_a_model_spread_by_a_device_map_answers_as_a_whole_one(base, prompt, tmp_path):
    size = sum(parameter.numel() * 4 for parameter in build_model(
        width=64, layers=2, image_size=32, patch_size=8, factors=(1, 2, 4)
    )[0].parameters())  # fmt: skip
    spread = AdaptiveLlavaForConditionalGeneration.from_pretrained(
        base, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=str(tmp_path / "offload")
    )
    places = set(spread.hf_device_map.values())
    assert places == {"cpu", "disk"}
    whole = AdaptiveLlavaForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        assert torch.allclose(spread(**prompt).logits, whole(**prompt).logits, atol=1e-5)
    told = spread.generate(**prompt, max_new_tokens=4)
    assert torch.equal(told, whole.generate(**prompt, max_new_tokens=4))
