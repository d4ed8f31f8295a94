"""Published LLaVA data as one parquet file of `messages` and `images`, for `pretrain` and `sft`.

    python -m adaptive_llava.training.prepare_data --data blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain/images \\
        --output captions.parquet
    python -m adaptive_llava.training.prepare_data --data llava_v1_5_mix665k.json --images LLaVA-Tuning \\
        --output instructions.parquet

Reads JSON lists of `{"image": path, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}` as they were
published: llava-pretrain-558k, ReCap-558K, CC-595K, llava-instruct-158k and 665k, whose images lie in `coco/`, `gqa/`,
`ocr_vqa/`, `textvqa/` and `vg/`. Rows without `image` are text only. Paths in the parquet file are relative to it.
(A copy of such a list on the Hub that holds its images as parquet needs none of this: train on it by its id.)

Rows read as in the LLaVA authors' code: `<image>` goes to the front of its turn, and what the assistant says before
anyone asks is left out. Where `<image>` is text, in answers and in rows without images, a space goes into it.

All images must be there. Missing ones are counted by folder and listed in `<output>.missing.txt`; `--skip-missing`
leaves their rows out. The parquet file appears when it is complete. Memory does not grow with the data.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adaptive_llava.training.json_list_stream import read_objects
from adaptive_llava.training.whole_folder import check_free


SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.string()),
    }
)
ROWS_PER_GROUP = 1000

_ROLES = {"human": "user", "gpt": "assistant"}
_IMAGE_TEXT = "<image>"
_NO_IMAGE = "< image>"


@dataclass
class Prepared:
    """What was found in a list.

    Attributes:
        rows: Rows written.
        text_only: How many of them have no image.
        missing: Rows whose image is not there, by the first folder of its path.
        escaped: Rows with an `<image>` that is text.
    """

    rows: int = 0
    text_only: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    escaped: int = 0


def prepare_data(
    source: str | os.PathLike,
    images: str | os.PathLike,
    output: str | os.PathLike,
    *,
    skip_missing: bool = False,
    rows_per_group: int = ROWS_PER_GROUP,
) -> Prepared:
    """Write a published list as parquet.

    Args:
        source: The JSON list, or a file with one object per line.
        images: Folder that the list's paths start from.
        output: Parquet file to write; must not exist.
        skip_missing: Leave rows with missing images out; by default they are an error.
        rows_per_group: Rows held in memory at a time.

    Raises:
        ValueError: `output` is there already, images are missing, or a row that is no conversation.
    """
    target, folder = check_free(output), Path(images).absolute()
    if not folder.is_dir():
        raise ValueError(f"`images={str(images)!r}` is no folder. Pass the folder that the list's paths start from.")
    if target.is_dir():
        raise ValueError(f"`output={str(output)!r}` is a folder. Pass a file to write, such as data.parquet.")
    target.parent.mkdir(parents=True, exist_ok=True)
    listed = target.with_name(f"{target.name}.missing.txt")
    found = Prepared()
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as partial:
        rows, names = Path(partial) / "rows.parquet", Path(partial) / "missing.txt"
        with pq.ParquetWriter(rows, SCHEMA) as writer, open(names, "w", encoding="utf-8") as missing:
            group: list[dict[str, Any]] = []
            for row in _rows(source, folder, found, missing):
                group.append(
                    {**row, "images": [os.path.relpath(folder / name, target.parent) for name in row["images"]]}
                )
                if len(group) == rows_per_group:
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
        if found.missing:
            os.replace(names, listed)
            if not skip_missing:
                raise ValueError(
                    f"{found.missing.total()} of {found.rows + found.missing.total()} rows name an image that is not "
                    f"in {folder} ({_by_folder(found.missing)}); all are listed in {listed}. Fetch them, correct "
                    "`--images`, or pass --skip-missing to leave the rows out."
                )
        if not found.rows:
            raise ValueError(f"{source} has no rows to write. Check the file and `--images`.")
        os.replace(rows, target)
    return found


def _rows(source: str | os.PathLike, folder: Path, found: Prepared, missing: Any) -> Iterator[dict[str, Any]]:
    for index, entry in enumerate(read_objects(source)):
        row, escaped = convert_row(entry, f"{source}: row {index} (id {entry.get('id')!r})")
        absent = [name for name in row["images"] if not (folder / name).is_file()]
        if absent:
            found.missing[Path(absent[0]).parts[0] if len(Path(absent[0]).parts) > 1 else "."] += 1
            missing.writelines(f"{name}\n" for name in absent)
            continue
        found.rows += 1
        found.text_only += not row["images"]
        found.escaped += escaped
        yield row


def convert_row(entry: dict[str, Any], place: str = "row") -> tuple[dict[str, Any], bool]:
    """One published row as `messages` and `images`, and whether a text `<image>` in it got a space.

    Args:
        entry: With `conversations`, and `image` (a path, or a list of them) unless it is text only.
        place: Where it stands, for errors.

    Raises:
        ValueError: Turns that do not alternate between human and gpt, or other than one `<image>` per image.
    """
    image = entry.get("image")
    images = [] if not image else [image] if isinstance(image, str) else list(image)
    turns = list(entry.get("conversations") or [])
    while turns and turns[0].get("from") == "gpt":
        turns.pop(0)
    speakers = [turn.get("from") for turn in turns]
    if len(turns) < 2 or any(speaker != ("human", "gpt")[index % 2] for index, speaker in enumerate(speakers)):
        raise ValueError(
            f"{place}: `conversations` has turns from {speakers}. It needs a human's and gpt's in turn, at least one "
            "of each. Correct the row, or take it out of the list."
        )
    messages, shown, escaped = [], 0, False
    for turn in turns:
        text = turn.get("value")
        if not isinstance(text, str):
            raise ValueError(f"{place}: a turn has the `value` {text!r}. It must be text; correct the row.")
        if turn["from"] == "human" and images and _IMAGE_TEXT in text:
            shown += text.count(_IMAGE_TEXT) if len(images) > 1 else 1
            text = _images_first(text) if len(images) == 1 else text
        elif _IMAGE_TEXT in text:
            text, escaped = text.replace(_IMAGE_TEXT, _NO_IMAGE), True
        messages.append({"role": _ROLES[turn["from"]], "content": text})
    if shown != len(images):
        raise ValueError(
            f"{place}: {shown} turns of the human show {_IMAGE_TEXT} for {len(images)} images. Write it once per "
            "image, or take the row out of the list."
        )
    return {"messages": messages, "images": images}, escaped


def _images_first(text: str) -> str:
    return f"{_IMAGE_TEXT}\n{text.replace(_IMAGE_TEXT, '').strip()}".strip()


def _by_folder(missing: Counter[str]) -> str:
    return ", ".join(f"{folder}: {count}" for folder, count in missing.most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the parquet file as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava.training.prepare_data", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="published list: *.json, or *.jsonl with one row per line")
    parser.add_argument("--images", required=True, help="folder that the list's image paths start from")
    parser.add_argument("--output", required=True, help="parquet file to write")
    parser.add_argument("--skip-missing", action="store_true", help="leave rows out whose image is not there")
    options = parser.parse_args(arguments)
    try:
        found = prepare_data(options.data, options.images, options.output, skip_missing=options.skip_missing)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Saved {options.output}: {found.rows} rows, {found.text_only} of them text only")
    if found.escaped:
        print(f"{found.escaped} rows have the text {_IMAGE_TEXT!r} where no image is; it is now {_NO_IMAGE!r}")
    if found.missing:
        total, where = found.missing.total(), _by_folder(found.missing)
        print(f"{total} rows left out, image missing ({where}); listed in {options.output}.missing.txt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
