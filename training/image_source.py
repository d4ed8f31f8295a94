"""Images of a folder, a manifest, a stored dataset or a dataset on the Hub, one after the other.

    for name, image in open_images("my_photos"):        # every image below the folder, sorted by path
    for name, image in open_images("user/dataset"):     # streamed from the Hub; also *.parquet and saved datasets

Images are read when they are asked for, upright and in 8-bit RGB; names are relative, so that they can be published.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adaptive_llava.processing.image_loading import FORMATS, load_image


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ImageSource:
    """Images that can be walked through any number of times: yields `(name, image)`.

    Attributes:
        name: Name of the folder or dataset, without the folders above it.
        count: Number of images, `None` if only a walk can tell.
    """

    name: str
    count: int | None
    _walk: Callable[[], Iterator[tuple[str, Image.Image]]]

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        return self._walk()


def open_images(
    data: str | os.PathLike, *, split: str = "train", limit: int | None = None, column: str | None = None
) -> ImageSource:
    """Find out what `data` is, without reading an image yet.

    Args:
        data: A folder of images (searched with its sub-folders, sorted); a folder with `manifest.jsonl`, whose lines
            name a `"file"` (or `"image"`, or a list of `"images"`) relative to it; any such `*.jsonl`, or a `*.json`
            list, by its own name; a dataset folder written by `save_to_disk`; `*.parquet` or a folder of them; or a
            dataset id on the Hub, which is streamed.
        split: Split of a dataset.
        limit: Stop after this many images.
        column: Column of a dataset that holds an image, or a list of images, per row; found by its type if left out.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: Nothing in it is an image, or the dataset lacks the split or column.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit={limit}` must be at least 1 image; leave it out to read all.")
    path = Path(data)
    if path.is_dir():
        source = _from_folder(path, split, column)
    elif path.is_file():
        if path.suffix in (".jsonl", ".json"):
            source = _from_files(path.stem, path.parent, _listed_files(path))
        elif path.suffix == ".parquet":
            source = _from_parquet(path, [path], split, column)
        else:
            raise ValueError(
                f"{path} is a single file. Pass a folder of images, a *.jsonl, *.json or *.parquet file, or a dataset "
                "id."
            )
    else:
        source = _from_hub(str(data), split, column)
    if limit is None:
        return source
    count = limit if source.count is None else min(limit, source.count)
    return ImageSource(source.name, count, lambda: itertools.islice(iter(source), limit))


def _from_folder(folder: Path, split: str, column: str | None) -> ImageSource:
    name = folder.resolve().name
    if (folder / "manifest.jsonl").is_file():
        return _from_files(name, folder, _listed_files(folder / "manifest.jsonl"))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _from_saved_dataset(name, folder, split, column)
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    files = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    if files:
        return _from_files(name, folder, files)
    tables = sorted(folder.rglob("*.parquet"))
    if tables:
        return _from_parquet(folder, tables, split, column)
    raise ValueError(
        f"{folder} holds no images: no file with a known ending ({', '.join(sorted(suffixes)[:12])}, ...), no "
        "manifest.jsonl, no saved dataset and no *.parquet."
    )


def _listed_files(listing: Path) -> list[Path]:
    text = listing.read_text(encoding="utf-8")
    try:
        entries = json.loads(text) if listing.suffix == ".json" else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{listing} is no JSON: {error}") from error
    if entries is None:
        rows = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        files = [file for number, line in rows for file in _files_of(line, f"Line {number} of {listing}")]
    else:
        if not isinstance(entries, list):
            raise ValueError(f"{listing} holds no list of objects, but a {type(entries).__name__}.")
        files = [
            file for number, entry in enumerate(entries) for file in _files_of(entry, f"Entry {number} of {listing}")
        ]
    if not files:
        raise ValueError(f"{listing} lists no images.")
    return files


def _files_of(entry: Any, where: str) -> list[Path]:
    try:
        entry = json.loads(entry) if isinstance(entry, str) else entry
        named = next(entry[key] for key in ("file", "image", "images") if key in entry)
        return [Path(file) for file in (named if isinstance(named, list) else [named])]
    except (json.JSONDecodeError, TypeError, StopIteration) as error:
        raise ValueError(
            f'{where} is no JSON object with a "file" entry (or "image", "images"), the image\'s path relative to the '
            "listing."
        ) from error


def _from_files(name: str, folder: Path, files: list[Path]) -> ImageSource:
    def walk() -> Iterator[tuple[str, Image.Image]]:
        for index, file in enumerate(files):
            yield file.as_posix(), load_image(folder / file, index=index)

    return ImageSource(name, len(files), walk)


def _from_saved_dataset(name: str, folder: Path, split: str, column: str | None) -> ImageSource:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{folder} has no split {split!r}. Its splits: {', '.join(dataset)}.")
        dataset = dataset[split]
    return _from_rows(name, dataset, column, str(folder))


def _from_parquet(path: Path, tables: list[Path], split: str, column: str | None) -> ImageSource:
    from datasets import load_dataset

    # shards of several splits may share a folder: as on the Hub, their names begin with the split's
    named = [table for table in tables if table.name.startswith(f"{split}-") or table.stem == split]
    files = [str(table) for table in named or tables]
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return _from_rows(path.resolve().name, dataset, column, str(path))


def _from_hub(data: str, split: str, column: str | None) -> ImageSource:
    if not _HUB_ID.fullmatch(data):
        raise FileNotFoundError(f"{data}: there is no such file or folder, and it is no dataset id of the Hub.")
    from datasets import load_dataset

    try:
        dataset = load_dataset(data, split=split, streaming=True)
    except Exception as error:  # of many kinds: offline, no such id, no such split, gated
        raise ValueError(
            f"{data!r} is no folder here, and could not be loaded as a dataset of the Hub (split {split!r}): {error}"
        ) from error
    return _from_rows(data, dataset, column, data)


def _from_rows(name: str, dataset: Any, column: str | None, where: str) -> ImageSource:
    features: Any = dataset.features or next(iter(dataset.take(1)), {})
    if column is None:
        column = next((key for key, feature in features.items() if _is_image(feature)), None)
        column = column or next((key for key in ("image", "images") if key in features), None)
    if column is None or column not in features:
        raise ValueError(
            f"The dataset {where} has no column {column!r}: its columns are {', '.join(features) or 'none'}. Name the "
            "column of its images."
            if column
            else f"The dataset {where} has no column of images: its columns are {', '.join(features) or 'none'}."
        )

    def walk() -> Iterator[tuple[str, Image.Image]]:
        rows = iter(dataset.select_columns([column]))
        for index in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # datasets decodes while it walks, with any of Pillow's errors
                raise ValueError(f"Row {index} of {where} could not be read: {error}") from error
            if row is None:
                return
            images = row[column] if isinstance(row[column], list) else [row[column]]
            for position, image in enumerate(images):
                suffix = f"{index}" if len(images) == 1 else f"{index}.{position}"
                try:
                    yield f"{name}[{suffix}]", load_image(image, index=index)
                except (ValueError, TypeError, FileNotFoundError) as error:
                    raise ValueError(f"Row {index} of {where}, column {column!r}: {error}") from error

    single = not isinstance(features.get(column), list) and type(features.get(column)).__name__ == "Image"
    return ImageSource(name, len(dataset) if single and hasattr(dataset, "__len__") else None, walk)


def _is_image(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    return type(inner).__name__ == "Image" and hasattr(inner, "decode_example")
