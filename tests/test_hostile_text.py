"""Text, chats and requests from strangers: whatever they write stays text, stands in its own row, or is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.chat_requests import FIELDS, check_request, images_of, read_messages
from adaptive_llava.hub_cards.space.chat_turn import prepare, user_message
from adaptive_llava.processing.prompt_encoding import TEXT_MARK
from tests.conftest import tiny_model
from tests.hostile_cases import cases, junk, refused_well
from tests.test_chat_requests import data_url
from tests.test_convert import character_tokenizer
from tests.test_image_bytes import encoded
from tests.test_processing_adaptive_llava import build, byte_level_tokenizer, sentence_piece_tokenizer


PICTURES = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
# Pieces that a tokenizer, a chat template or our own marks give a meaning.
PIECES = [
    "<image>", "<im", "age>", "<video>", "</s>", "<s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<",
    ">", "|", "USER:", "ASSISTANT:", "\nASSISTANT: ", "{{ 7 * 7 }}", "{% raw %}", "{%- generation -%}", "{#", "a",
    TEXT_MARK, "\ufdd1", "\x00", "\u202e", "\u200b", "\ufeff", "\ud800", "\U0001f600", "e\u0301", " ", "\n", "\r\n",
    "What is this?", "<image" * 20, "\u0000" * 3, "<<image>>", "<image></s><image>", "&lt;image&gt;", "%s %d",
    "file:///etc/passwd",
]  # fmt: skip
writing = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(max_size=20),
    st.text("<image>|s/", max_size=12),
)
TOKENIZERS = {"bytes": byte_level_tokenizer, "letters": sentence_piece_tokenizer, "characters": character_tokenizer}


@pytest.fixture(scope="module")
def processors():
    return {
        (name, template): build(make(), chat_template=template)
        for name, make in TOKENIZERS.items()
        for template in ("vicuna", "chatml")
    }


@cases(
    250,
    st.sampled_from([(name, template) for name in TOKENIZERS for template in ("vicuna", "chatml")]),
    st.lists(
        st.tuples(st.lists(st.one_of(writing, st.none()), min_size=1, max_size=3), writing), min_size=1, max_size=2
    ),
)
def test_what_users_and_models_wrote_adds_no_placeholder_and_no_control_token(processors, key, turns):
    processor = processors[key]

    def chat(clean: bool) -> list[dict]:
        def text(written: str) -> str:
            return "a" if clean else written

        return [
            message
            for parts, answer in turns
            for message in (
                {"role": "user", "content": [
                    {"type": "image", "image": PICTURES[0]} if part is None else {"type": "text", "text": text(part)}
                    for part in parts
                ]},
                {"role": "assistant", "content": text(answer)},
            )
        ]  # fmt: skip

    ids = {}
    with refused_well(said="(`text`|Unicode|message)"):
        for clean in (True, False):
            inputs = processor.apply_chat_template(
                chat(clean), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids[clean] = inputs["input_ids"][0]
            assert len(inputs["assistant_masks"][0]) == len(ids[clean])
        control = set(processor.tokenizer.all_special_ids) | {processor.image_token_id}
        control -= {processor.tokenizer.unk_token_id}
        counts = {
            clean: [[token for token in row if token in control].count(token) for token in sorted(control)]
            for clean, row in ids.items()
        }
        assert counts[True] == counts[False]
        images = sum(part is None for parts, _ in turns for part in parts)
        assert list(ids[False]).count(processor.image_token_id) == images
        mark = processor.tokenizer.convert_tokens_to_ids(TEXT_MARK)
        assert mark in (None, processor.tokenizer.unk_token_id) or mark not in ids[False]


@cases(250, st.lists(writing, min_size=1, max_size=3), st.data())
def test_a_prompt_gets_its_own_images_in_its_own_row_or_is_refused(processors, texts, data):
    processor = processors[data.draw(st.sampled_from([("bytes", "vicuna"), ("letters", "chatml")]))]
    picture = st.sampled_from(PICTURES)
    nested = st.lists(st.one_of(st.lists(picture, max_size=3), st.none(), picture), max_size=4)
    matching = st.just([[PICTURES[0]] * text.count("<image>") for text in texts])
    images = data.draw(st.one_of(matching, st.lists(picture, max_size=4), nested, st.none()))
    options = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "visual_rungs": st.lists(st.integers(-1, 3), max_size=4),
                "visual_token_budget": st.one_of(st.integers(0, 20), junk),
                "layout": st.sampled_from(["compact", "expanded", "wide", None]),
                "padding": st.sampled_from([True, False, "longest"]),
                "max_length": st.integers(1, 40),
                "truncation": st.booleans(),
            },
        )
    )
    with refused_well():
        inputs = processor(images=images, text=texts, **options)
        counts = [1] * 99
        if options.get("layout") == "expanded":
            counts = processor.count_tokens(
                images,
                **{name: options[name] for name in ("visual_rungs", "visual_token_budget") if name in options},
            ) if images else []  # fmt: skip
        remaining = iter(counts)
        for row, text in zip(inputs["input_ids"], texts, strict=True):
            expected = sum(next(remaining) for _ in range(text.count("<image>")))
            assert list(row).count(processor.image_token_id) == expected
        number = sum(text.count("<image>") for text in texts)
        assert len(inputs.get("pixel_values", ())) == number
        assert all(np.isfinite(pixels).all() for pixels in inputs.get("pixel_values", ()))


NAMES = ["type", "text", "image_url", "url", "role", "content", "image", "path", "video", "tool_calls", "name"]
WORDS = [
    "text",
    "image_url",
    "image",
    "video",
    "user",
    "system",
    "assistant",
    "tool",
    "developer",
    "http://127.0.0.1/a",
]
WORDS += [
    __file__,
    "file:///etc/passwd",
    "data:image/png;base64,",
    data_url(encoded(PICTURES[0])),
    "data:,",
    "data:;x",
]
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), writing, st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)),
    max_leaves=8,
)
text_part = st.fixed_dictionaries({"type": st.just("text"), "text": st.one_of(writing, json_values)})
image_part = st.fixed_dictionaries(
    {
        "type": st.just("image_url"),
        "image_url": st.fixed_dictionaries({"url": st.one_of(st.sampled_from(WORDS), json_values)}),
    }
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.one_of(writing, json_values)
     | st.lists(st.one_of(text_part, image_part, json_values), max_size=3)}
)  # fmt: skip


@cases(1200, st.one_of(st.lists(st.one_of(message, message, json_values), max_size=4), json_values))
def test_messages_of_any_form_are_read_or_refused(messages):
    with refused_well(said="(message|Image|request)"):
        chat = read_messages(messages)
        assert len(chat) == len(messages)
        for entry in chat:
            assert entry["role"] in ("system", "user", "assistant")
            for part in entry["content"]:
                assert part.keys() == {"type", part["type"]} and part["type"] in ("text", "image")
        assert all(isinstance(image, Image.Image) for image in images_of(chat))


@cases(500, st.dictionaries(st.one_of(st.sampled_from(FIELDS), writing), json_values, max_size=4) | json_values)
def test_a_request_of_any_form_is_checked_or_refused(body):
    with refused_well():
        fields = check_request(body, max_new_tokens=64)
        assert set(fields) <= set(FIELDS)
        assert 1 <= fields.get("max_tokens", 1) <= 64 and 0 <= fields.get("temperature", 0) <= 2
        json.dumps(fields)


own_part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video", "image_url"])},
    optional=dict.fromkeys(["text", "image", "path", "url", "base64", "image_url", "video"], json_values),
)
own_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | json_values,
     "content": st.lists(st.one_of(own_part, own_part, json_values), max_size=3) | json_values}
)  # fmt: skip


# Other errors of transformers' own: of a template that refuses a role, and of an image of a type that is none.
@cases(250, st.sampled_from(["vicuna", "chatml"]), st.lists(own_message, max_size=3) | json_values, st.booleans())
def test_a_chat_of_any_form_is_written_or_refused(processors, template, chat, tokenized):
    with refused_well(TemplateError, TypeError, FileNotFoundError, said="(`|message|Image|Video|Role)"):
        processor = processors["bytes", template]
        found = processor.apply_chat_template(chat, tokenize=tokenized)
        assert len(found) and (tokenized or isinstance(found, str))


@pytest.fixture(scope="module")
def model_and_processor():
    model = tiny_model("dfmr")
    return model, AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer())


@cases(20, st.lists(writing, min_size=1, max_size=2), st.integers(0, 2), st.sampled_from([None, 4, 9, {"ceiling": 9}]))
@torch.no_grad()
def test_a_model_answers_any_text_with_finite_numbers_whatever_its_company(model_and_processor, texts, images, budget):
    model, processor = model_and_processor
    with refused_well(said="(`text`|Unicode|`visual_token_budget)"):
        alone = prepare(processor, [user_message(texts[0], PICTURES[:images])])
        chats = [[user_message(text, PICTURES[:images])] for text in texts]
        together = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )  # fmt: skip
        one, all_rows = (model(**inputs, visual_token_budget=budget) for inputs in (alone, together))
        assert all_rows.logits.isfinite().all()
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(all_rows.logits[0, :length], one.logits[0], rtol=1e-3, atol=1e-3)
