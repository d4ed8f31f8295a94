"""Images from folders, manifests, stored datasets and the Hub."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adaptive_llava.training.image_source import open_images


pytestmark = pytest.mark.compat


def picture(seed: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(images) -> list[list]:
    return [np.asarray(image).tolist() for image in images]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "my_images"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".cache").mkdir()
    picture(0).save(root / "z.png")
    picture(1).save(root / "b" / "deep" / "a.PNG")
    picture(2).convert("CMYK").save(root / "b" / "c.jpg")
    picture(3).save(root / ".cache" / "hidden.png")
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_is_walked_recursively_and_sorted_as_often_as_asked(folder):
    source = open_images(folder)
    assert (source.name, source.count) == ("my_images", 3)
    first, second = list(source), list(source)
    assert [name for name, _ in first] == [name for name, _ in second] == ["b/c.jpg", "b/deep/a.PNG", "z.png"]
    assert {image.mode for _, image in first} == {"RGB"}
    assert pixels([first[2][1]]) == pixels([picture(0)])


def test_images_are_read_only_when_they_are_asked_for(folder):
    (folder / "zz_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert len(list(open_images(folder, limit=3))) == 3
    with pytest.raises(ValueError, match="zz_broken.png"):
        list(open_images(folder))


def test_a_limit_keeps_the_first_images(folder):
    source = open_images(folder, limit=2)
    assert source.count == 2 and [name for name, _ in source] == ["b/c.jpg", "b/deep/a.PNG"]
    with pytest.raises(ValueError, match="`limit=0` must be at least 1"):
        open_images(folder, limit=0)


def test_a_manifest_gives_its_files_in_its_order(folder):
    lines = [{"file": "z.png", "kind": "photo"}, {"file": "b/c.jpg"}]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = open_images(folder)
    assert source.count == 2 and [name for name, _ in source] == ["z.png", "b/c.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no images"),
        ('{"file": "z.png"}\n{"image": 1}', "Line 2 of .*manifest.jsonl"),
        ("nonsense", "Line 1"),
    ],
)
def test_a_manifest_without_files_is_refused_with_its_line(folder, content, message):
    (folder / "manifest.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_images(folder)


def test_a_file_that_a_manifest_names_in_vain_is_named(folder):
    (folder / "manifest.jsonl").write_text('{"file": "gone.png"}')
    with pytest.raises(FileNotFoundError, match="gone.png"):
        list(open_images(folder))


def test_an_empty_folder_a_wrong_file_and_a_missing_path_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no images"):
        open_images(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="notes.txt is a single file"):
        open_images(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="not/here/at/all"):
        open_images("not/here/at/all")


@pytest.fixture
def dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"id": datasets.Value("int64"), "picture": datasets.Image()})
    return datasets.Dataset.from_dict({"id": [0, 1, 2], "picture": [picture(i) for i in range(3)]}, features=features)


def test_a_saved_dataset_is_read_by_the_type_of_its_columns(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved")
    assert (source.name, source.count) == ("saved", 3)
    names, images = zip(*source, strict=True)
    assert names == ("saved[0]", "saved[1]", "saved[2]")
    assert pixels(images) == pixels(picture(i) for i in range(3))


def test_a_split_of_a_saved_dataset_is_chosen_by_name(dataset, tmp_path):
    import datasets

    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(tmp_path / "saved")
    assert pixels(image for _, image in open_images(tmp_path / "saved", split="test")) == pixels([picture(2)])
    with pytest.raises(ValueError, match="no split 'dev'. Its splits: train, test"):
        open_images(tmp_path / "saved", split="dev")


def test_parquet_is_read_as_a_file_and_as_a_folder_with_splits(dataset, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    dataset.select([0, 1]).to_parquet(shards / "train-00000-of-00001.parquet")
    dataset.select([2]).to_parquet(shards / "test-00000-of-00001.parquet")
    assert pixels(image for _, image in open_images(shards)) == pixels([picture(0), picture(1)])
    assert pixels(image for _, image in open_images(shards, split="test")) == pixels([picture(2)])
    single = open_images(shards / "test-00000-of-00001.parquet", limit=1)
    assert pixels(image for _, image in single) == pixels([picture(2)])


def test_rows_with_several_images_give_all_of_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"images": datasets.Sequence(datasets.Image())})
    rows = {"images": [[picture(0), picture(1)], [], [picture(2)]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    names, images = zip(*open_images(tmp_path / "saved"), strict=True)
    assert names == ("saved[0.0]", "saved[0.1]", "saved[2]")
    assert pixels(images) == pixels(picture(i) for i in range(3))


def test_a_dataset_without_images_lists_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no column of images: its columns are text, label"):
        open_images(tmp_path / "saved")
    with pytest.raises(ValueError, match="no column 'photo': its columns are text, label"):
        open_images(tmp_path / "saved", column="photo")


def test_a_broken_row_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": b"no image", "path": None}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="Row 0 of .*saved"):
        list(open_images(tmp_path / "saved"))


def test_a_name_that_is_neither_a_folder_nor_a_dataset_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*arguments, **options):
        raise ConnectionError("the Hub is not reachable")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="'some/dataset' is no folder here, and .*not reachable"):
        open_images("some/dataset")


def test_a_dataset_of_the_hub_is_streamed(dataset, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return dataset.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_images("some/dataset", split="validation", limit=2)
    assert asked == {"name": "some/dataset", "split": "validation", "streaming": True}
    assert (source.name, [name for name, _ in source]) == ("some/dataset", ["some/dataset[0]", "some/dataset[1]"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("some.jsonl", '{"image": "z.png"}\n{"images": ["b/c.jpg", "z.png"]}'),
        ("some.json", '[{"file": "z.png"}, {"images": ["b/c.jpg", "z.png"], "label": 1}]'),
    ],
)
def test_a_listing_is_read_by_its_own_name(folder, name, content):
    (folder / name).write_text(content)
    source = open_images(folder / name)
    assert source.name == "some" and [name for name, _ in source] == ["z.png", "b/c.jpg", "z.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no JSON"), ("{}", "holds no list of objects, but a dict"), ('[{"text": 1}]', "Entry 0 of .*some.json")],
)
def test_a_listing_of_something_else_is_refused(folder, content, message):
    (folder / "some.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_images(folder / "some.json")
