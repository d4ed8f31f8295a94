"""Datasets of conversations about images, from the Hub, a folder or a file, in the form that TRL's trainers read.

A row has `images` (a list; empty for text only; or `image`, a single one) and either `messages`, or `prompt` and
`completion`. The LLaVA authors' format (`conversations` with `from` and `value`, `image`) is converted. Images may be
stored in the dataset, or be paths relative to the file that names them.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk


Rows: TypeAlias = Dataset | IterableDataset

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_ROLES = {"human": "user", "gpt": "assistant"}
_IMAGE_TEXT = "<image>"


def load_conversations(
    source: str | os.PathLike, *, config: str | None = None, split: str = "train", streaming: bool = False
) -> Rows:
    """Load one split of a dataset.

    Args:
        source: A Hub id; a `.json`, `.jsonl`, `.parquet` or `.arrow` file; a folder saved by `datasets`; an image
            folder with `metadata.jsonl`; or a folder of such files.
        config: Name of a configuration of a Hub dataset.
        split: Which split; a single file is one split whatever its name.
        streaming: Read rows as they are needed.

    Raises:
        ValueError: No such file or split, columns that cannot be trained on, or a named image that is not there.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(
                f"`dataset_name={str(source)!r}` is a file of an unknown kind. Known: {', '.join(_BUILDERS)}."
            )
        splits = load_dataset(_BUILDERS[path.suffix], data_files={split: str(path)}, streaming=streaming)
    elif path.is_dir():
        splits = _load_folder(path, config, streaming)
    elif path.suffix in _BUILDERS or str(source).startswith((".", "/", "~")):
        raise ValueError(f"`dataset_name={str(source)!r}`: there is no such file or folder. Check the path.")
    else:
        splits = load_dataset(str(source), name=config, streaming=streaming)
    rows = splits
    if isinstance(splits, dict):
        if split not in splits:
            raise ValueError(
                f"`split={split!r}` is not in `dataset_name={str(source)!r}`, which has: {', '.join(splits)}. "
                "Set `dataset_train_split` or `dataset_test_split` to one of these."
            )
        rows = splits[split]
    return _check_images(_check_columns(_from_llava_format(rows), source), path)


def read_example(example: dict[str, Any]) -> dict[str, Any]:
    """A row as TRL's collator wants it: a list of images, and messages whose images are parts.

    A literal `<image>` in a user's string stands for an image if there are as many of them as images.
    """
    example = dict(example)
    images = [example.pop("image")] if example.get("image") is not None else example.get("images") or []
    example.pop("image", None)
    for key in ("messages", "prompt", "completion", "chosen", "rejected"):
        if isinstance(example.get(key), list):
            example[key] = _image_parts(example[key], len(images))
    return example | {"images": list(images)}


def read_caption(example: dict[str, Any]) -> dict[str, Any]:
    """A row in the LLaVA authors' plain format: the images, then the caption and a line break, which are scored.

    What the user says is left out, as are BOS and EOS.

    Raises:
        ValueError: A row without an image, or with more than one answer.
    """
    row = read_example(example)
    said = row.get("messages") or row.get("completion")
    if isinstance(said, list):
        answers = [_text(message["content"]) for message in said if message["role"] == "assistant"]
    else:
        answers = [said] if said else []
    if not row["images"] or len(answers) != 1:
        raise ValueError(
            f"A row has {len(row['images'])} images and {len(answers)} answers. Pretraining takes images and one "
            "caption per row. Leave the row out, or train on conversations with `adaptive_llava.training.sft`."
        )
    return {"images": row["images"], "prompt": _IMAGE_TEXT * len(row["images"]), "completion": f"{answers[0]}\n"}


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _load_folder(folder: Path, config: str | None, streaming: bool) -> Any:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        splits = load_from_disk(str(folder))
        if not streaming:
            return splits
        if isinstance(splits, Dataset):
            return splits.to_iterable_dataset()
        return IterableDatasetDict({name: rows.to_iterable_dataset() for name, rows in splits.items()})
    return load_dataset(str(folder), name=config, streaming=streaming)


def _columns(rows: Rows) -> list[str]:
    return list(rows.column_names if rows.column_names is not None else next(iter(rows)))


def _check_columns(rows: Rows, source: str | os.PathLike) -> Rows:
    columns = _columns(rows)
    conversation = "messages" in columns or {"prompt", "completion"} <= set(columns)
    if not conversation or not {"images", "image"} & set(columns):
        raise ValueError(
            f"`dataset_name={str(source)!r}` has the columns {', '.join(columns)}. It needs `images` (lists, empty "
            "for text-only rows) and either `messages`, or `prompt` and `completion`. Rename its columns, for example "
            "with `dataset.rename_column`, and pass the saved folder."
        )
    return rows


def _from_llava_format(rows: Rows) -> Rows:
    columns = _columns(rows)
    if "conversations" not in columns or "messages" in columns:
        return rows

    def convert(example: dict[str, Any]) -> dict[str, Any]:
        turns = example["conversations"]
        return {"messages": [{"role": _ROLES.get(t["from"], t["from"]), "content": t["value"]} for t in turns]}

    return rows.map(convert, remove_columns=["conversations"])


def _check_images(rows: Rows, source: Path) -> Rows:
    """Make image paths absolute: they are relative to the file that names them."""
    column = "images" if "images" in _columns(rows) else "image"
    first = next((value for example in islice(rows.select_columns([column]), 50) if (value := example[column])), None)
    first = first[0] if isinstance(first, list) else first
    feature = (rows.features or {}).get(column)
    # text alone at the start, as in the published lists, does not tell
    paths = isinstance(first, str) if first else getattr(getattr(feature, "feature", feature), "dtype", "") == "string"
    if not paths:
        return rows
    folder = (source if source.is_dir() else source.parent).resolve()

    def locate(name: str | None) -> str | None:
        return name if not name or name.startswith(("http://", "https://", "data:")) else str(folder / name)

    def absolute(value: Any) -> dict[str, Any]:
        return {column: [locate(name) for name in value] if isinstance(value, list) else locate(value)}

    located = locate(first)
    if located is not None and located.startswith("/") and not os.path.isfile(located):
        raise ValueError(
            f"The dataset names the image {first!r}, but there is no {located}. Write paths relative to {folder}, or "
            "absolute ones."
        )
    return rows.map(absolute, input_columns=[column])


def _image_parts(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    messages = [_without_empty_keys(message) for message in messages]
    written = [
        message["content"].count(_IMAGE_TEXT)
        for message in messages
        if message["role"] == "user" and isinstance(message.get("content"), str)
    ]
    if not num_images or sum(written) != num_images:
        return messages  # TRL puts the images before the first user's text
    return [
        {**message, "content": _split_text(message["content"])} if message["role"] == "user" else message
        for message in messages
    ]


def _split_text(content: Any) -> Any:
    if not isinstance(content, str):
        return content
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split(_IMAGE_TEXT)):
        parts += [{"type": "image"}] if index else []
        text = text.strip("\n")  # the chat template puts an image on its own line
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _without_empty_keys(message: dict[str, Any]) -> dict[str, Any]:
    # Arrow gives every part the keys of all parts
    content = message.get("content")
    if isinstance(content, list):
        content = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {key: value for key, value in message.items() if value is not None} | {"content": content}
