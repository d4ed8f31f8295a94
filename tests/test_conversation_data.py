"""Datasets of every kind give the same rows; what cannot be trained on is refused."""

import json
from typing import Any

import pytest
import torch
from datasets import Dataset

from adaptive_llava.training.conversation_data import load_conversations, read_example
from tests.test_collator import collators
from tests.test_convert import picture
from tests.test_sft import message_dataset


LLAVA_TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture
def picture_files(tmp_path):
    (tmp_path / "shots").mkdir()
    for index in range(2):
        picture(index).save(tmp_path / "shots" / f"{index}.png")
    return tmp_path


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.compat
def test_every_kind_of_source_gives_the_same_batch(picture_files, tmp_path, monkeypatch):
    folder = picture_files
    plain = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": a}] for a in ("A cat.", "3")]
    rows: list[dict[str, Any]] = [{"messages": m, "images": [f"shots/{i}.png"]} for i, m in enumerate(plain)]
    write_lines(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows))
    llava = [{"image": f"shots/{i}.png", "conversations": [LLAVA_TURNS[0], {"from": "gpt", "value": m[1]["content"]}]}
             for i, m in enumerate(plain)]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(llava))
    stored = Dataset.from_list([{"messages": m, "images": [picture(i)]} for i, m in enumerate(plain)])
    stored.to_parquet(str(folder / "rows.parquet"))
    stored.save_to_disk(str(folder / "saved"))
    write_lines(
        folder / "shots" / "metadata.jsonl", [{"file_name": f"{i}.png", "messages": m} for i, m in enumerate(plain)]
    )
    (folder / "json_folder").mkdir()
    write_lines(folder / "json_folder" / "train.jsonl", [{**r, "images": [f"../{r['images'][0]}"]} for r in rows])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    _, ours, _ = collators(message_dataset(4), folder / "out")
    expected = None
    for name in ("rows.jsonl", "rows.json", "llava.json", "rows.parquet", "saved", "shots", "json_folder"):
        for streaming in (False, True):
            loaded: Any = load_conversations(folder / name, streaming=streaming)
            batch = ours([dict(row) for row in loaded.take(2)])
            expected = expected or batch
            assert torch.equal(batch["input_ids"], expected["input_ids"]), name
            assert torch.equal(batch["labels"], expected["labels"]), name
            assert torch.equal(batch["pixel_values"], expected["pixel_values"]), name


def test_what_cannot_be_trained_on_is_refused(tmp_path, picture_files):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_conversations(tmp_path / "nothing.json")
    rows = write_lines(tmp_path / "a.jsonl", [{"question": "What?", "images": ["shots/0.png"]}])
    with pytest.raises(
        ValueError, match="has the columns question, images. It needs `images`.*`messages`, or `prompt`"
    ):
        load_conversations(rows)
    rows = write_lines(tmp_path / "b.jsonl", [{"prompt": "<image>Q", "completion": "A", "images": ["missing.png"]}])
    with pytest.raises(ValueError, match="names the image 'missing.png', but there is no .*Write paths relative to"):
        load_conversations(rows)
    message_dataset(4).to_parquet(tmp_path / "both" / "train-0.parquet")
    message_dataset(4).to_parquet(tmp_path / "both" / "test-0.parquet")
    with pytest.raises(ValueError, match="`split='validation'` is not in .*which has: train, test"):
        load_conversations(tmp_path / "both", split="validation")
    (tmp_path / "c.csv").write_text("a")
    with pytest.raises(ValueError, match="is a file of an unknown kind. Known: .json, .jsonl, .parquet, .arrow"):
        load_conversations(tmp_path / "c.csv")


def test_a_written_placeholder_stands_for_an_image_only_where_the_counts_agree():
    pair = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "<image> is a word."}]
    split = read_example({"messages": pair, "images": ["a"]})["messages"]
    assert split[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}] and split[1] == pair[1]
    assert read_example({"messages": pair, "images": ["a", "b"]})["messages"] == pair
    assert read_example({"messages": pair, "images": None}) == {"messages": pair, "images": []}
