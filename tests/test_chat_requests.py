"""Requests of OpenAI's chat protocol: taken whole, or refused by a rule that is named."""

from __future__ import annotations

import base64

import pytest

from adaptive_llava.chat_requests import check_request, images_of, read_data_url, read_messages
from adaptive_llava.image_bytes import MAX_BYTES
from tests.test_image_bytes import still


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def test_text_and_images_keep_their_order():
    text = {"type": "text", "text": "and"}
    chat = read_messages(
        [
            {"role": "developer", "content": "Be short."},
            *user(picture(data_url(still())), text, picture(data_url(still("JPEG")))),
            {"role": "assistant", "content": "Two."},
        ]
    )
    assert [message["role"] for message in chat] == ["system", "user", "assistant"]
    assert [part["type"] for part in chat[1]["content"]] == ["image", "text", "image"]
    assert chat[0]["content"] == [{"type": "text", "text": "Be short."}]
    assert [image.size for image in images_of(chat)] == [(40, 30)] * 2


REFUSED = {
    "no list": ("hello", "`messages` must be a non-empty list"),
    "empty": ([], "`messages` must be a non-empty list"),
    "no message": (["hello"], "A message has the role 'hello'. Use one of: system"),
    "another role": ([{"role": "tool", "content": "4"}], "A message has the role 'tool'"),
    "a tool call": ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "or calls tools"),
    "no content": ([{"role": "user"}], "has no content"),
    "a video": (user({"type": "video_url", "video_url": {"url": "x"}}), "a part of type 'video_url'"),
    "a part of transformers": (user({"type": "image", "path": __file__}), "a part of type 'image'"),
    "text of another type": (user({"type": "text", "text": {}}), "a part of type 'text'"),
    "a part that is none": (user(3), "a part of type '3'"),
    "an address": (user(picture("http://127.0.0.1/a.png")), "Image 1 is no data URL .'http://127.0.0.1/a.png'.*bytes"),
    "a file's address": (user(picture(f"file://{__file__}")), "Image 1 is no data URL"),
    "a path": (user({"type": "image_url", "image_url": __file__}), "Image 1 is no data URL"),
    "an address that is none": (user(picture(None)), "Image 1 is no data URL"),
    "the second": (user(picture(data_url(still())), picture("x.png")), "Image 2 is no data URL .'x.png'"),
    "many": (user(*[picture("x.png")] * 9), "The request has 9 images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_messages_are_refused(name):
    messages, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_messages(messages)


def test_base64_is_checked_before_it_is_decoded():
    with pytest.raises(ValueError, match="Image 1 is no valid base64"):
        read_data_url("data:image/png;base64,!!!!")
    with pytest.raises(ValueError, match="Image 1 has 15,.* bytes, and at most 10,485,760"):
        read_data_url("data:image/png;base64," + "!" * (2 * MAX_BYTES))


FIELDS_REFUSED = {
    "generation_config": ('{"max_new_tokens": 9}', "`generation_config` is not supported here"),
    "chat_template_kwargs": ({"images": [__file__]}, "`chat_template_kwargs` is not supported here"),
    "tools": ([{}], "`tools` is not supported here"),
    "n": (2, "`n=2` must be a whole number from 1 to 1"),
    "max_tokens": (65, "`max_tokens=65` must be a whole number from 1 to 64"),
    "max_completion_tokens": ("8", "`max_completion_tokens='8'` must be a whole number"),
    "seed": (-1, "`seed=-1` must be"),
    "temperature": (3, "`temperature=3` must be a number from 0 to 2"),
    "top_p": (True, "`top_p=True` must be a number from 0 to 1"),
    "stop": ([3], r"`stop=\[3\]` must be a string or a list"),
    "stream": ("yes", "`stream='yes'` must be true or false"),
}


@pytest.mark.parametrize("name", FIELDS_REFUSED)
def test_what_cannot_be_done_is_not_left_out_in_silence(name):
    value, message = FIELDS_REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_request({"model": "m", "messages": [], name: value}, max_new_tokens=64)


def test_fields_without_a_value_are_left_out():
    fields = {"model": "m", "messages": [], "max_tokens": 64, "stream": True, "temperature": 0.5}
    assert check_request({**fields, "tools": None, "seed": None}, max_new_tokens=64) == fields
    with pytest.raises(ValueError, match="The request is a list"):
        check_request([], max_new_tokens=64)
