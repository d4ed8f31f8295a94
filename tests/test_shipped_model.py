"""The checkpoint that comes with the package: complete, small, harmless, and as good as its card says."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor
from adaptive_llava.modeling.code_files import MANIFEST_NAME, code_files
from adaptive_llava.training.quickstart_tuning import read
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import SHIPPED, load_shipped
from adaptive_llava.training.study.small_model import answers
from tests.fresh_process import run_without_package


pytestmark = pytest.mark.compat

MOST_BYTES = 12 * 2**20
RESULTS = json.loads((SHIPPED / "results.json").read_text(encoding="utf-8"))

ANSWER = """
import json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
print(json.dumps([written.sequences.tolist(), written.num_visual_tokens.tolist()]))
"""


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


def question_and_inputs(processor, picture):
    question, _ = picture.questions[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return question, processor(images=picture.image, text=prompt, return_tensors="pt")


def test_a_padded_batch_gets_the_answers_of_its_rows(shipped):
    """A tokenizer that padded on the right would let `generate` go on from padding."""
    model, processor = shipped
    pictures = render(8, seed=5, test=True)
    asked = [question_and_inputs(processor, picture) for picture in pictures]
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question, _ in asked
    ]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    batch = processor(images=[picture.image for picture in pictures], text=prompts, return_tensors="pt", padding=True)
    assert not batch["attention_mask"].all()
    together = model.generate(**batch, max_new_tokens=2)[:, batch["input_ids"].shape[1] :]
    for row, (_, inputs) in zip(together, asked, strict=True):
        alone = model.generate(**inputs, max_new_tokens=2)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(row[: len(alone)], alone)


def test_the_auto_classes_load_it_without_remote_code(shipped):
    names = ["AutoModelForImageTextToText", "AutoModelForVision2Seq"]  # the second one is gone in transformers 5
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    assert AutoModelForImageTextToText in found
    weights = shipped[0].state_dict()
    for auto in found:
        model = auto.from_pretrained(SHIPPED)
        assert type(model) is AdaptiveLlavaForConditionalGeneration
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert type(AutoProcessor.from_pretrained(SHIPPED)) is AdaptiveLlavaProcessor


def test_the_snippet_of_its_card_answers():
    block = re.search(r"```python\n(.*?)```", (SHIPPED / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(block.group(1), scope)
    prompt = scope["inputs"]["input_ids"].shape[1]
    said = scope["processor"].batch_decode(scope["written"][:, prompt:], skip_special_tokens=True)[0].split()
    assert said and said[0] in "0123456789"


def test_the_folder_is_small_and_holds_neither_code_nor_pickles():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".md", ".yaml", ".json", ".jinja", ".safetensors"}
    assert "auto_map" not in json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))


def test_config_router_and_processor_agree(shipped):
    model, processor = shipped
    config, counts = model.config, list(model.config.visual_token_counts)
    assert counts == RESULTS["counts"] and config.compressor_trained
    assert config.router["type"] == "classifier" and config.router_training["method"] == "study"
    assert model.model.router.num_rungs == len(counts)
    assert processor.router == config.router and processor.compressor == config.compressor
    assert processor.image_token_id == config.image_token_id
    assert len(processor.tokenizer) == config.text_config.vocab_size
    size = processor.image_processor.size
    assert size["height"] == size["width"] == config.vision_config.image_size == RESULTS["image_size"]
    assert processor.count_tokens([render(1, seed=1)[0].image], visual_token_budget=counts[0]) == [counts[0]]


def test_it_answers_unseen_pictures_as_well_as_its_card_says(shipped):
    model, processor = shipped
    pictures = render(140, seed=20_261_121, test=True)
    right = answers(model, processor, pictures, seed=5)
    _, rungs = read(model, processor, pictures)
    assert right[np.arange(140), rungs].mean() >= RESULTS["all"]["auto"]["accuracy"] - 0.1
    assert right[:, -1].mean() >= RESULTS["all"][str(RESULTS["counts"][-1])]["accuracy"] - 0.1
    tokens = np.asarray(RESULTS["counts"])[rungs].mean()
    assert tokens == pytest.approx(RESULTS["all"]["auto"]["tokens"], abs=3)


def test_saved_again_it_brings_its_code_and_answers_without_the_package(shipped, tmp_path):
    model, processor = shipped
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} >= {path.name for path in code_files()}
    assert (folder / MANIFEST_NAME).is_file()
    picture = render(1, seed=1, test=True, families=["table"])[0]
    picture.image.save(tmp_path / "table.png")
    question, inputs = question_and_inputs(processor, picture)
    written = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    said = run_without_package(ANSWER, folder, tmp_path / "table.png", question, folder=tmp_path)
    assert json.loads(said) == [written.sequences.tolist(), written.num_visual_tokens.tolist()]
