"""Questions about images with their answers, from a folder, a file, a stored dataset or a dataset on the Hub.

    samples = read_samples("my_receipts")                    # a folder with manifest.jsonl or metadata.jsonl
    samples = read_samples("user/dataset", split="test")     # also *.jsonl, *.json, *.parquet and saved datasets

A row has an image or several, a question and an answer or several accepted ones, under names that are recognised or
given; or it has `qa`, a list of questions with answers about the same images. Files are named relative to the listing.
Images are read when they are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


LISTINGS = ("manifest.jsonl", "metadata.jsonl")
IMAGE_FIELDS = ("images", "image", "file", "file_name", "file_names", "image_path", "images_file_names")
QUESTION_FIELDS = ("question", "query", "prompt")
ANSWER_FIELDS = ("answers", "answer", "label")
NESTED = "qa"
SPLITS = ("test", "validation", "val", "dev")

_FOLDED = ".parquet", ".arrow"


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes:
        id: Place in the data: number of the row, and behind a point that of the question, if a row has several.
        question: The question alone.
        answers: Accepted answers, at least one.
        images: What `load_image` reads; those of a stored dataset are fetched when the sequence is read.
        fields: All other fields of the row and the question, such as `category` or `choices`.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    images: Sequence[Any]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class FieldNames:
    """Names of fields; `None` is found among the known ones.

    Attributes:
        image: One name, or several separated by commas, of which a row may leave some empty.
        question: Of a row, or of an entry of `qa`.
        answer: The same.
    """

    image: str | None = None
    question: str | None = None
    answer: str | None = None


def read_samples(
    data: str | os.PathLike,
    *,
    split: str | None = None,
    subset: str | None = None,
    image_field: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """All questions of a dataset, in its order.

    Args:
        data: A folder with `manifest.jsonl` or `metadata.jsonl`; a `*.jsonl` file; a `*.json` list (or an object with
            a list called `data`); `*.parquet` or a folder of them; a folder written by `save_to_disk`; or a dataset id
            on the Hub.
        split: Split of a stored dataset; by default its only one, or else the first of test, validation, val, dev.
        subset: Configuration of a dataset on the Hub.
        image_field: See `FieldNames`.
        question_field: See `FieldNames`.
        answer_field: See `FieldNames`.
        limit: Keep only so many questions, drawn with `seed`.
        seed: Of that draw.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: No rows, a field that is missing, a row without an answer, or an image file that is not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit={limit}` must be at least 1 question; leave it out to read all.")
    names = FieldNames(image_field, question_field, answer_field)
    path = Path(data)
    if path.is_dir():
        listing = next((path / name for name in LISTINGS if (path / name).is_file()), None)
        samples = _of_dataset(_folder(path, split), names, path) if listing is None else _of_listing(listing, names)
    elif path.is_file():
        if path.suffix in (".jsonl", ".json"):
            samples = _of_listing(path, names)
        elif path.suffix in _FOLDED:
            samples = _of_dataset(_tables([path]), names, path)
        else:
            raise ValueError(f"{path} is a file of an unknown kind. Known: .jsonl, .json, {', '.join(_FOLDED)}.")
    elif path.suffix or str(data).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path}: there is no such file or folder. Check the path.")
    else:
        samples = _of_dataset(_from_hub(str(data), subset, split), names, data)
    if not samples:
        raise ValueError(f"{data} holds no questions.")
    if limit is not None and limit < len(samples):
        kept = np.random.default_rng(seed).choice(len(samples), size=limit, replace=False)
        samples = [samples[index] for index in sorted(kept.tolist())]
    return samples


def _of_listing(listing: Path, names: FieldNames) -> list[Sample]:
    def images(row: Mapping[str, Any], fields: Sequence[str], where: str) -> Sequence[Any]:
        found = [str(listing.parent / file) for name in fields for file in _as_list(row.get(name))]
        absent = next((file for file in found if not os.path.isfile(file)), None)
        if absent is not None:
            raise ValueError(
                f"{where} names the image {absent}, but there is none. Write paths relative to {listing}."
            )
        return found

    return [
        sample
        for number, (where, row) in enumerate(_rows(listing))
        for sample in _samples(
            row, number, where, names, lambda fields, row=row, where=where: images(row, fields, where)
        )
    ]


def _rows(listing: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row."""
    text = listing.read_text(encoding="utf-8")
    rows: Iterable[tuple[str, Any]]
    if listing.suffix == ".json":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{listing} is no JSON: {error}") from error
        entries = entries.get("data") if isinstance(entries, dict) else entries
        if not isinstance(entries, list):
            raise ValueError(f"{listing} holds no list of objects, and no object with such a list as `data`.")
        rows = ((f"Entry {number} of {listing}", entry) for number, entry in enumerate(entries))
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = ((f"Line {number} of {listing}", _parsed(line)) for number, line in lines if line.strip())
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object.")
        yield where, row


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _samples(row: Mapping[str, Any], number: int, where: str, names: FieldNames, images: Any) -> Iterator[Sample]:
    nested = row.get(NESTED)
    entries = nested if isinstance(nested, list) else [row]
    # a row without questions needs no image
    shown = images(_image_fields(row, names.image, where)) if entries else ()
    for position, entry in enumerate(entries):
        question = _field(entry, names.question, QUESTION_FIELDS, "question", where)
        answer = _field(entry, names.answer, ANSWER_FIELDS, "answer", where)
        answers = tuple(_text_of(value) for value in _as_list(entry[answer]))
        if not answers or entry[question] is None:
            raise ValueError(f"{where}: `{question}` or `{answer}` is empty. Leave rows without them out.")
        yield Sample(
            id=f"{number}.{position}" if entries is nested else str(number),
            question=str(entry[question]),
            answers=answers,
            images=shown,
            fields={name: value for name, value in {**row, **entry}.items() if name not in (NESTED, question)},
        )


def _image_fields(row: Mapping[str, Any], named: str | None, where: str) -> list[str]:
    given = named.split(",") if named else [None]
    return [_field(row, name and name.strip(), IMAGE_FIELDS, "image", where) for name in given]


def _field(row: Mapping[str, Any], named: str | None, known: Sequence[str], what: str, where: str) -> str:
    found = next((name for name in ([named] if named else known) if name in row), None)
    if found is None:
        sought = f"no field {named!r}" if named else f"none of the known fields of {what}s ({', '.join(known)})"
        raise ValueError(f"{where} has {sought}, but: {', '.join(row)}. Name it with `--{what}-field`.")
    return found


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _text_of(answer: Any) -> str:
    """An answer as text; annotators' answers may be objects with more about them."""
    return str(answer["answer"] if isinstance(answer, Mapping) and "answer" in answer else answer)


class _StoredImages(Sequence):
    """Images of one row, fetched from the dataset at each reading: bytes and all, they may not fit into memory."""

    def __init__(self, dataset: Any, row: int, columns: Sequence[str], folder: Path | None):
        self.dataset, self.row, self.columns, self.folder = dataset, row, columns, folder

    def _fetch(self) -> list[Any]:
        row = self.dataset[self.row]
        found = [image for column in self.columns for image in _as_list(row[column])]
        return [str(self.folder / image) if isinstance(image, str) and self.folder else image for image in found]

    def __len__(self) -> int:
        return len(self._fetch())

    def __getitem__(self, index: Any) -> Any:
        return self._fetch()[index]


def _of_dataset(dataset: Any, names: FieldNames, source: str | os.PathLike) -> list[Sample]:
    columns = dict.fromkeys(dataset.column_names)
    shown = _image_fields(columns, names.image, f"The dataset {source}")
    for column in shown:
        dataset = _undecoded(dataset, column)
    path = Path(source)
    folder = (path if path.is_dir() else path.parent) if path.exists() else None
    pixels = dataset.select_columns(shown)
    samples: list[Sample] = []
    # the rows keep the names of their image columns, without the images
    for number, row in enumerate(dataset.remove_columns(shown)):
        stored = _StoredImages(pixels, number, shown, folder)
        samples += _samples(
            row | dict.fromkeys(shown),
            number,
            f"Row {number} of {source}",
            names,
            lambda fields, stored=stored: stored,
        )
    return samples


def _undecoded(dataset: Any, column: str) -> Any:
    from datasets import Image

    feature = dataset.features[column]
    if isinstance(feature, Image):
        return dataset.cast_column(column, Image(decode=False))
    if isinstance(getattr(feature, "feature", None), Image):
        return dataset.cast_column(column, type(feature)(Image(decode=False)))
    return dataset


def _folder(folder: Path, split: str | None) -> Any:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        from datasets import load_from_disk

        return _one_split(load_from_disk(str(folder)), split, folder)
    tables = sorted(path for path in folder.rglob("*") if path.suffix in _FOLDED)
    if not tables:
        raise ValueError(
            f"{folder} holds no questions: no {' or '.join(LISTINGS)}, no saved dataset and no *.parquet."
        )
    # shards of several splits may share a folder: as on the Hub, their names begin with the split's
    splits: dict[str, list[Path]] = {}
    for table in tables:
        splits.setdefault(table.stem.split("-")[0], []).append(table)
    return _tables(_one_split(splits, split, folder))


def _tables(paths: Sequence[Path]) -> Any:
    from datasets import load_dataset

    kind = paths[0].suffix.removeprefix(".")
    return load_dataset(kind, data_files=[str(path) for path in paths], split="train")


def _from_hub(name: str, subset: str | None, split: str | None) -> Any:
    from datasets import load_dataset

    try:
        found = load_dataset(name, name=subset)
    except Exception as error:  # of many kinds: offline, no such id, no such subset, gated
        raise ValueError(
            f"{name!r} is no file or folder here, and could not be loaded as a dataset of the Hub: {error}"
        ) from error
    return _one_split(found, split, name)


def _one_split(splits: Any, split: str | None, source: str | os.PathLike) -> Any:
    if not isinstance(splits, dict):
        return splits
    preferred = [split] if split else [*(splits if len(splits) == 1 else ()), *SPLITS]
    found = next((name for name in preferred if name in splits), None)
    if found is None:
        asked = f"no split {split!r}" if split else f"none of the splits {', '.join(SPLITS)}"
        raise ValueError(f"{source} has {asked}, but: {', '.join(splits)}. Name one with `--split`.")
    return splits[found]
