"""Questions from folders, listings, tables and stored datasets, and errors that name what was found."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture

from adaptive_llava.processing.image_loading import load_image
from adaptive_llava.training.question_samples import read_samples


COLOURS = ("red", "green", "blue")
ROWS = [{"question": f"Is it {colour}?", "answer": "yes", "tag": number} for number, colour in enumerate(COLOURS)]


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        Picture.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def told(samples):
    """What can be told of samples without their images' storage."""
    return [(sample.id, sample.question, sample.answers) for sample in samples]


def colours(sample):
    return [load_image(image).getpixel((0, 0)) for image in sample.images]


EXPECTED = [(str(number), row["question"], ("yes",)) for number, row in enumerate(ROWS)]
PIXELS = [[(255, 0, 0)], [(0, 128, 0)], [(0, 0, 255)]]


@pytest.mark.parametrize("field", ["file", "file_name", "image", "images"])
@pytest.mark.parametrize("name", ["manifest.jsonl", "metadata.jsonl", "list.json", "data.json", "other.jsonl"])
def test_listings_name_images_beside_them(folder, name, field):
    rows = [row | {field: f"{colour}.png"} for row, colour in zip(ROWS, COLOURS, strict=True)]
    path = write(folder / name, rows)
    if name.endswith(".json"):
        path.write_text(json.dumps({"data": rows} if name == "data.json" else rows))
    samples = read_samples(folder if name in ("manifest.jsonl", "metadata.jsonl") else path)
    assert told(samples) == EXPECTED and [colours(sample) for sample in samples] == PIXELS
    assert [sample.fields["tag"] for sample in samples] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved", "saved splits"])
def test_stored_images_are_read_when_asked_for(folder, kind):
    rows = [row | {"image": str(folder / f"{colour}.png")} for row, colour in zip(ROWS, COLOURS, strict=True)]
    dataset = Dataset.from_list(rows).cast_column("image", Image())
    path = folder / "stored"
    if kind.startswith("saved"):
        train = dataset.select([0])
        (DatasetDict(train=train, test=dataset) if kind == "saved splits" else dataset).save_to_disk(path)
    else:
        path.mkdir()
        dataset.to_parquet(path / "test-00000-of-00001.parquet")
        dataset.select([0]).to_parquet(path / "train-00000-of-00001.parquet")
    samples = read_samples(path / "test-00000-of-00001.parquet" if kind == "parquet" else path)
    assert told(samples) == EXPECTED and [colours(sample) for sample in samples] == PIXELS
    if kind in ("saved splits", "folder of parquet"):
        assert len(read_samples(path, split="train")) == 1
        with pytest.raises(ValueError, match="no split 'dev', but: .*test.*Name one with `--split`"):
            read_samples(path, split="dev")


def test_a_question_may_have_several_images(folder):
    shown = [["red.png", "green.png"], ["blue.png"], ["red.png", "blue.png", "green.png"]]
    rows = [row | {"images": files} for row, files in zip(ROWS, shown, strict=True)]
    samples = read_samples(write(folder / "list.jsonl", rows))
    assert [len(sample.images) for sample in samples] == [2, 1, 3]
    features = {"images": List(Image()), "question": Value("string"), "answer": Value("string"), "tag": Value("int64")}
    paths = [[str(folder / file) for file in files] for files in shown]
    stored = [row | {"images": files} for row, files in zip(ROWS, paths, strict=True)]
    Dataset.from_list(stored, features=Features(features)).to_parquet(folder / "list.parquet")
    again = read_samples(folder / "list.parquet")
    assert [colours(sample) for sample in again] == [colours(sample) for sample in samples]
    apart = [{"first": "red.png", "second": "blue.png"} | row for row in ROWS[:1]]
    (both,) = read_samples(write(folder / "apart.jsonl", apart), image_field="first,second")
    assert colours(both) == [(255, 0, 0), (0, 0, 255)]


def test_a_row_may_hold_several_questions_and_accepted_answers(folder):
    nested = [{"question": "a", "answer": ["x", "y"], "tag": 1}, {"question": "b", "answer": 5}]
    rows = [{"file": "red.png", "qa": nested, "tag": 0}, {"file": "gone.png", "qa": []}]
    rows.append({"file": "blue.png", "question": "c", "answers": [{"answer": "two", "answer_id": 1}, {"answer": "2"}]})
    samples = read_samples(write(folder / "manifest.jsonl", rows).parent)
    assert told(samples) == [("0.0", "a", ("x", "y")), ("0.1", "b", ("5",)), ("2", "c", ("two", "2"))]
    assert [sample.fields.get("tag") for sample in samples] == [1, 0, None]


def test_real_manifests_are_read(shared):
    counts = {name: len(read_samples(shared / "data" / name)) for name in ("easyvqa", "nlvr", "charts", "documents")}
    assert counts == {"easyvqa": 1886, "nlvr": 300, "charts": 287, "documents": 274}
    drawn = [told(read_samples(shared / "data" / "nlvr", limit=20, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 20


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"file": "red.png", "text": "?", "answer": "a"}],
            {},
            "none of the known fields of questions .* but: file, t",
        ),
        ([{"file": "red.png", "question": "?"}], {}, "known fields of answers .*Name it with `--answer-field`"),
        ([{"picture": "red.png", "question": "?", "answer": "a"}], {}, "Line 1 of .*images .*but: picture, question"),
        ([{"file": "red.png", "question": "?", "answer": "a"}], {"question_field": "q"}, "no field 'q', but: file, q"),
        ([{"file": "red.png", "question": "?", "answer": None}], {}, "`question` or `answer` is empty. Leave rows"),
        ([{"file": "gone.png", "question": "?", "answer": "a"}], {}, "names the image .*gone.png, but there is none"),
        ([["no object"]], {}, "Line 1 of .*manifest.jsonl is no JSON object"),
        ([{"file": "red.png", "qa": []}], {}, "holds no questions"),
        ([{"file": "red.png", "question": "?", "answer": "a"}], {"limit": 0}, "`limit=0` must be at least 1 question"),
    ],
)
def test_rows_that_are_none_are_refused(folder, rows, options, message):
    write(folder / "manifest.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read_samples(folder, **options)


def test_places_that_are_none_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder. Check the path"):
        read_samples(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no questions: no manifest.jsonl or metadata.jsonl"):
        read_samples(folder)
    with pytest.raises(ValueError, match="a file of an unknown kind. Known: .jsonl"):
        read_samples(folder / "red.png")
    (folder / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is no JSON"):
        read_samples(folder / "broken.json")
    with pytest.raises(ValueError, match="no file or folder here, and could not be loaded as a dataset of the Hub"):
        read_samples("nobody/nothing")
