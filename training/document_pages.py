"""Pages with fields to be read: one question per page, one JSON object as its answer.

    pages = read_pages("my_receipts")                        # manifest.jsonl or metadata.jsonl beside the images
    train, held_out = split_pages(pages.pages, holdout=0.25)

A row names an image (`file` or `file_name`, relative to the folder) and holds its fields: `fields`, an object; or
`qa`, a list of `question` and `answer`, where the field is `field`, or stands in the question as `field "Total"`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_llava.processing.image_loading import load_image


LISTINGS = ("manifest.jsonl", "metadata.jsonl")

_NAMED_FIELD = re.compile(r'\bfield "([^"]+)"')


@dataclass(frozen=True)
class DocumentPage:
    """One page.

    Attributes:
        file: Path of the image, relative to the folder.
        path: The same, absolute.
        fields: Values by field, in the order of the row.
        digest: sha256 of the decoded image, in hex: copies of a page share it.
    """

    file: str
    path: str
    fields: dict[str, str]
    digest: str

    @property
    def prompt(self) -> str:
        """What the model is asked; names the fields."""
        names = json.dumps(list(self.fields), ensure_ascii=False)
        return f"Read this page. Answer with one JSON object that has these fields: {names}"

    @property
    def answer(self) -> str:
        """What it should say."""
        return json.dumps(self.fields, ensure_ascii=False)


@dataclass(frozen=True)
class PageFolder:
    """The pages of a folder, and what was left out.

    Attributes:
        name: Name of the folder, without the folders above it.
        pages: Pages with at least one field.
        without_fields: Rows left out because they have none.
        ambiguous_fields: Fields left out because a page has several values for them.
    """

    name: str
    pages: list[DocumentPage]
    without_fields: int
    ambiguous_fields: int


def read_pages(folder: str | os.PathLike) -> PageFolder:
    """Read the rows and decode every image once, so that a damaged one is told before any training.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No listing in it, a row that is none, an image that cannot be read, or no page with fields.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: there is no such folder. Pass one with images and {' or '.join(LISTINGS)}.")
    listing = next((place / name for name in LISTINGS if (place / name).is_file()), None)
    if listing is None:
        raise ValueError(
            f"{place} has no {' or '.join(LISTINGS)}. Write one, a line per page: "
            '{"file": "page_1.png", "fields": {"total": "9.00"}}.'
        )
    pages, empty, ambiguous = [], 0, 0
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {listing}"
        file, fields, several = _read_row(line, where)
        ambiguous += several
        if not fields:
            empty += 1
            continue
        path = (place / file).resolve()
        try:
            digest = hashlib.sha256(load_image(path).tobytes()).hexdigest()
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{where}: {error}") from error
        pages.append(DocumentPage(file, str(path), fields, digest))
    if not pages:
        raise ValueError(
            f"{listing}: none of its {empty} rows has fields. A row needs `fields`, or `qa` with `field` and `answer`."
        )
    return PageFolder(place.resolve().name, pages, empty, ambiguous)


def split_pages(
    pages: Sequence[DocumentPage], *, holdout: float, seed: int = 0
) -> tuple[list[DocumentPage], list[DocumentPage]]:
    """Pages to train on and pages held out, told apart by a hash of seed and image.

    Copies of an image stay together, and a page keeps its side when others are added.

    Args:
        pages: Pages of one folder.
        holdout: Share of the images that is held out, roughly.
        seed: Another seed gives another split.

    Raises:
        ValueError: A share that is none, or fewer than two pages on one side.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"`holdout={holdout}` must lie between 0 and 1: the share of pages that is only measured.")
    train: list[DocumentPage] = []
    held_out: list[DocumentPage] = []
    for page in pages:
        drawn = int(hashlib.sha256(f"{seed}:{page.digest}".encode()).hexdigest()[:12], 16) / 16**12
        (held_out if drawn < holdout else train).append(page)
    if min(len(train), len(held_out)) < 2:
        raise ValueError(
            f"`holdout={holdout}` leaves {len(train)} pages to train on and {len(held_out)} to measure. At least 2 "
            "are needed of each: add pages, or choose another share or seed."
        )
    return train, held_out


def write_conversations(pages: Iterable[DocumentPage], path: Path) -> None:
    """Rows for `load_conversations`, whose loss is on the answer alone."""
    with path.open("w", encoding="utf-8") as file:
        for page in pages:
            row = {
                "images": [page.path],
                "prompt": [{"role": "user", "content": page.prompt}],
                "completion": [{"role": "assistant", "content": page.answer}],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_row(line: str, where: str) -> tuple[str, dict[str, str], int]:
    """File, fields, and the number of fields with several values."""
    try:
        row = json.loads(line)
        file = next(row[key] for key in ("file", "file_name") if key in row)
        named = list((row.get("fields") or {}).items())
        named += [(_name_of(entry), entry.get("answer")) for entry in row.get("qa") or ()]
    except (json.JSONDecodeError, AttributeError, TypeError, StopIteration) as error:
        raise ValueError(
            f'{where} is no JSON object with a "file" (or "file_name") and "fields", or "qa" entries that are objects.'
        ) from error
    values: dict[str, set[str]] = {}
    for name, value in named:
        text = " ".join(str(value).split()) if value is not None else ""
        if name and text:
            values.setdefault(name, set()).add(text)
    fields = {name: found.pop() for name, found in values.items() if len(found) == 1}
    return str(file), fields, len(values) - len(fields)


def _name_of(entry: dict[str, Any]) -> str | None:
    found = _NAMED_FIELD.search(entry.get("question") or "")
    return entry.get("field") or (found[1] if found else None)
