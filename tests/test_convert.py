"""`python -m adaptive_llava convert`: a LLaVA-1.5 folder becomes an adaptive LLaVA folder with the same answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.__main__ import main
from adaptive_llava.training.convert import convert, describe
from adaptive_llava.training.whole_folder import whole_folder
from tests.conftest import BOS, EOS, IMAGE_TOKEN, PAD, PRESETS_HERE, tiny_text_config, tiny_vision_config
from tests.fresh_process import run_without_package


ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One id per printable character, 100 in all, as many as a tiny language model has rows."""
    characters = [chr(code) for code in range(32, 126)] + ["\n"]
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3, "<image>": IMAGE_TOKEN}
    vocabulary |= {character: 4 + index for index, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"], **names,
    )  # fmt: skip


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA-1.5 checkpoint as transformers writes it, with its own crop and template."""
    folder = tmp_path_factory.mktemp("llava") / "checkpoint"
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config("llama"),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        image_seq_length=36,
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        character_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.mark.compat
def test_the_llava_preset_gives_the_logits_and_text_of_the_source(llava, tmp_path, shared):
    photo = next((shared / "data" / "photos" / "images").glob("*.jpg"))
    convert(llava, tmp_path / "ours", "llava")
    answers = []
    for folder in (llava, tmp_path / "ours"):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
        inputs = processor(images=Image.open(photo), text=prompt, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -5:]
            ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers.append(
            (logits, processor.decode(ids[0, inputs["input_ids"].shape[1] :]), prompt, inputs["pixel_values"])
        )
    (logits, text, prompt, pixels), (our_logits, our_text, our_prompt, our_pixels) = answers
    assert our_prompt == prompt and text
    assert torch.equal(our_pixels, pixels)
    assert (our_logits - logits).abs().max() <= 2e-5
    assert our_text == text


def test_tied_embeddings_of_transformers_layout_stay_tied(llava, tmp_path):
    config = LlavaConfig.from_pretrained(llava)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    stock = LlavaForConditionalGeneration(config)
    for path in llava.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            (tmp_path / "source").mkdir(exist_ok=True)
            (tmp_path / "source" / path.name).symlink_to(path)
    stock.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    found = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert found.config.tie_word_embeddings and found.lm_head.weight is found.get_input_embeddings().weight
    assert torch.equal(found.lm_head.weight, stock.get_input_embeddings().weight)


LOAD = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (30, 20))},
                                     {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=2, visual_token_budget=9).shape[1] - inputs["input_ids"].shape[1])
print(model.config.visual_token_counts)
"""


@pytest.mark.compat
def test_a_converted_folder_loads_without_the_package(llava, tmp_path, capsys):
    target = tmp_path / "ours"
    assert main(["convert", "--from", str(llava), "--to", str(target), "--preset", "dfmr", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "preset 'dfmr'" in printed and "torch.bfloat16" in printed
    assert "4 (rung 0), 9 (rung 1), 36 (rung 2) per image" in printed and "calibrate" in printed
    assert "(4, 9, 36)" in run_without_package(LOAD, target, folder=tmp_path)
    config = json.loads((target / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_token_concat_is_described_with_what_is_next(llava, tmp_path):
    lines = describe(convert(llava, tmp_path / "ours", "token-concat"))
    assert "compressor   token_concat(window=2, strict_tiling=False)" in lines
    assert "tokens       9 (rung 0) per image" in lines


def test_fused_blocks_are_described(llava, tmp_path):
    lines = describe(convert(llava, tmp_path / "ours", "stf-mbtf"))
    assert "fusion       hidden states 2, 3, 1 of the vision tower (released)" in lines
    assert "tokens       9 (rung 0) per image" in lines and not any("fine-tune" in line for line in lines)


@pytest.mark.compat
@pytest.mark.parametrize("preset", PRESETS_HERE)
def test_a_conversion_equals_the_model_made_in_memory(llava, tmp_path, preset):
    stock = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    torch.manual_seed(0)
    convert(llava, tmp_path / "ours", preset, max_shard_bytes=50_000)
    torch.manual_seed(0)
    expected = AdaptiveLlavaForConditionalGeneration.from_llava(stock, preset=preset)
    found = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert found.config.compressor == expected.config.compressor and found.config.router == expected.config.router
    assert found.config.compressor_trained == expected.config.compressor_trained
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llava_next", r"LLaVA-1.5 in transformers' layout, but:\n.*`model_type` llava, here: llava_next"),
        ("vipllava", "of no known kind"),
        ("adaptive_llava", "an adaptive LLaVA model already"),
    ],
)
def test_other_architectures_are_refused_by_name(llava, tmp_path, model_type, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    (source / "model.safetensors").symlink_to(llava / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours", "llava")
    assert not (tmp_path / "ours").exists()


def test_bad_arguments_are_refused_before_anything_is_loaded(llava, tmp_path, capsys):
    with pytest.raises(ValueError, match="`preset='dfrm'` is unknown. Known presets: .*dfmr"):
        convert(llava, tmp_path / "ours", "dfrm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is already there, and nothing is overwritten"):
        convert(llava, tmp_path / "full", "llava")
    with pytest.raises(ValueError, match="there is no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "ours", "llava")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json that can be read"):
        convert(tmp_path / "empty", tmp_path / "ours", "llava")
    with pytest.raises(SystemExit):
        main(["convert", "--from", str(llava), "--to", str(tmp_path / "full")])
    assert "Name a new folder" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(llava, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(
        "adaptive_llava.processing.processing_adaptive_llava.AdaptiveLlavaProcessor.save_pretrained", fail
    )
    with pytest.raises(RuntimeError, match="disk full"):
        convert(llava, tmp_path / "ours", "llava")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_target_is_filled_with_ordinary_permissions(tmp_path):
    (tmp_path / "target").mkdir()
    with whole_folder(tmp_path / "target") as folder:
        (folder / "a").write_text("b")
    assert (tmp_path / "target" / "a").read_text() == "b"
    (tmp_path / "other").mkdir()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "other").stat().st_mode
