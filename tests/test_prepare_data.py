"""Published lists of captions and instructions become a parquet file that trains, or are refused with the reason."""

import json
import tracemalloc

import pyarrow.parquet as pq
import pytest
import torch

from adaptive_llava.training.conversation_data import load_conversations
from adaptive_llava.training.json_list_stream import read_objects
from adaptive_llava.training.prepare_data import convert_row, main, prepare_data
from adaptive_llava.training.pretrain import build_pretrainer
from adaptive_llava.training.sft import build_trainer
from tests.conftest import IMAGE_TOKEN, tiny_model
from tests.test_convert import picture
from tests.test_sft import configuration, tiny_processor


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


CAPTIONS = [
    {"id": "0", "image": "00000/0.jpg", "conversations": [human("What is it?\n<image>"), gpt("a red dog")]},
    {"id": "1", "image": "00001/1.jpg", "conversations": [human("<image>\nRender a summary."), gpt("two cats")]},
]
# the folders of llava-v1.5-mix665k, text alone between them, several turns, the image last, and its odd rows
SECOND_TURN = [human("C?"), gpt("d")]
INSTRUCTIONS = [
    {"id": "a", "image": "coco/train2017/0.jpg", "conversations": [human("<image>\nA?"), gpt("b"), *SECOND_TURN]},
    {"id": "b", "conversations": [human("Hi."), gpt("Hello.")], "model": ""},
    {"id": "c", "image": "gqa/images/1.jpg", "conversations": [human("Is it?\n<image>"), gpt("yes")]},
    {"id": "d", "image": "ocr_vqa/images/2.jpg", "conversations": [human("<image>\nWho?"), gpt("me")]},
    {"id": "e", "conversations": [gpt("first word"), human("Say <image>."), gpt("<image>")]},
    {"id": "f", "image": "textvqa/train_images/3.jpg", "conversations": [human("<image>\nRead."), gpt("go")]},
    {"id": "g", "image": "vg/VG_100K/4.jpg", "conversations": [human("<image>\nWhere?"), gpt("[0.1, 0.2]")]},
]  # fmt: skip


def publish(folder, rows, name="list.json", without=()):
    """A list as published beside its images."""
    for index, row in enumerate(rows):
        if "image" in row and row["image"] not in without:
            path = folder / "images" / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(index).save(path)
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def rows_of(path):
    return pq.read_table(path).to_pylist()


@pytest.mark.compat
def test_captions_are_ready_for_pretraining(tmp_path):
    data = publish(tmp_path, CAPTIONS)
    (tmp_path / "out").mkdir()
    found = prepare_data(data, tmp_path / "images", tmp_path / "out" / "captions.parquet")
    assert (found.rows, found.text_only, found.missing, found.escaped) == (2, 0, {}, 0)
    assert rows_of(tmp_path / "out" / "captions.parquet") == [
        {
            "messages": [
                {"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a red dog"},
            ],
            "images": ["../images/00000/0.jpg"],
        },
        {
            "messages": [
                {"role": "user", "content": "<image>\nRender a summary."},
                {"role": "assistant", "content": "two cats"},
            ],
            "images": ["../images/00001/1.jpg"],
        },
    ]  # fmt: skip
    rows = load_conversations(tmp_path / "out" / "captions.parquet")
    model = tiny_model("dfmr")
    trainer = build_pretrainer(model, tiny_processor(model), configuration(tmp_path / "run", max_steps=1), rows)
    trainer.train()
    batch = trainer.data_collator([dict(row) for row in rows])
    assert batch["pixel_values"].shape[0] == 2 and (batch["input_ids"][:, 0] == IMAGE_TOKEN).all()


@pytest.mark.compat
@pytest.mark.parametrize("streaming", [False, True])
def test_instructions_are_ready_for_tuning(tmp_path, streaming):
    data = publish(tmp_path, INSTRUCTIONS)
    found = prepare_data(data, tmp_path / "images", tmp_path / "all.parquet", rows_per_group=3)
    assert (found.rows, found.text_only, found.escaped) == (7, 2, 1)
    assert pq.ParquetFile(tmp_path / "all.parquet").num_row_groups == 3
    written = rows_of(tmp_path / "all.parquet")
    assert [len(row["messages"]) for row in written] == [4, 2, 2, 2, 2, 2, 2]
    assert [turn["content"] for turn in written[2]["messages"]] == ["<image>\nIs it?", "yes"]
    assert [turn["content"] for turn in written[4]["messages"]] == ["Say < image>.", "< image>"]
    assert written[6]["images"] == ["images/vg/VG_100K/4.jpg"]
    model = tiny_model("dfmr")
    rows = load_conversations(tmp_path / "all.parquet", streaming=streaming)
    trainer = build_trainer(model, tiny_processor(model), configuration(tmp_path / "run"), rows)
    trainer.train()
    batch = trainer.data_collator([dict(row) for row in rows])
    assert (batch["input_ids"] == IMAGE_TOKEN).sum(1).tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert torch.isfinite(trainer.model.lm_head.weight).all()


@pytest.mark.compat
@pytest.mark.parametrize("streaming", [False, True])
def test_paths_are_found_behind_many_rows_of_text_alone(tmp_path, streaming):
    data = publish(tmp_path, [INSTRUCTIONS[1]] * 60 + [CAPTIONS[0]])
    prepare_data(data, tmp_path / "images", tmp_path / "rows.parquet")
    last = list(load_conversations(tmp_path / "rows.parquet", streaming=streaming))[-1]
    assert last["images"] == [str(tmp_path / "images" / "00000/0.jpg")]


def test_missing_images_are_counted_listed_and_refused(tmp_path, capsys):
    gone = ("ocr_vqa/images/2.jpg", "vg/VG_100K/4.jpg")
    data = publish(tmp_path, INSTRUCTIONS, without=gone)
    output = tmp_path / "all.parquet"
    with pytest.raises(ValueError, match=r"2 of 7 rows name an image.*\(ocr_vqa: 1, vg: 1\).*pass --skip-missing"):
        prepare_data(data, tmp_path / "images", output)
    listed = tmp_path / "all.parquet.missing.txt"
    assert listed.read_text().splitlines() == list(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.parquet.missing.txt", "images", "list.json"]
    options = ["--data", data, "--images", tmp_path / "images", "--output", output, "--skip-missing"]
    assert main(list(map(str, options))) == 0
    assert [row["images"] for row in rows_of(output)].count([]) == 2 and len(rows_of(output)) == 5
    printed = capsys.readouterr().out
    assert "5 rows, 2 of them text only" in printed and "2 rows left out, image missing (ocr_vqa: 1, vg: 1)" in printed


def test_a_file_that_is_there_is_not_overwritten_and_half_a_file_never_appears(tmp_path):
    data = publish(tmp_path, CAPTIONS)
    output = tmp_path / "rows.parquet"
    data.write_text(data.read_text()[:-20])
    with pytest.raises(ValueError, match="object 1 cannot be read.*may be incomplete: download it again"):
        prepare_data(data, tmp_path / "images", output)
    assert not output.exists() and not list(tmp_path.glob(".*partial*"))
    output.write_text("mine")
    with pytest.raises(ValueError, match="is already there, and nothing is overwritten"):
        prepare_data(data, tmp_path / "images", output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"conversations": [human("A?")]}, r"turns from \['human'\]. It needs a human's and gpt's in turn"),
        ({"conversations": [human("A?"), human("B?")]}, "at least one of each. Correct the row"),
        ({"image": "a.jpg", "conversations": [human("A?"), gpt("b")]}, "0 turns of the human show <image> for 1"),
        ({"image": "a.jpg", "conversations": [human("<image>"), gpt("b")] * 2}, "2 turns of the human show <image>"),
        ({"conversations": [human(None), gpt("b")]}, "a turn has the `value` None. It must be text"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_refused(entry, error):
    with pytest.raises(ValueError, match=f"row 3: .*{error}"):
        convert_row(entry, "row 3")


def test_several_images_keep_their_places():
    row, escaped = convert_row(
        {"image": ["a", "b"], "conversations": [human("First <image>, then <image>."), gpt("both")]}
    )
    assert row["images"] == ["a", "b"] and not escaped
    assert row["messages"][0]["content"] == "First <image>, then <image>."


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_alike_in_pieces_of_any_size(tmp_path, chunk, indent):
    rows = [*INSTRUCTIONS, {"id": 'quote " brace } bracket ] \\', "conversations": [], "n": [1, {"é": "日本"}]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(read_objects(path, chunk=chunk)) == rows
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert list(read_objects(path, chunk=chunk)) == rows
    path.write_text("[]")
    assert list(read_objects(path, chunk=chunk)) == []


def test_what_is_no_list_of_objects_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    for text, error in (("[1]", "object 0 is a int"), ('[{"a": 1}', "object 1 cannot"), ("[{}, {a}]", "object 1 ca")):
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            list(read_objects(path))


def test_memory_does_not_grow_with_the_list(tmp_path):
    peaks = []
    for size in (4000, 12000):
        rows = [{"id": str(i), "conversations": [human("Hi. " * 50), gpt("Hello.")]} for i in range(size)]
        data = publish(tmp_path, rows)
        del rows
        tracemalloc.start()
        prepare_data(data, tmp_path / "images", tmp_path / f"{size}.parquet", rows_per_group=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert data.stat().st_size > 3_000_000 and peaks[1] < 1.2 * peaks[0]
