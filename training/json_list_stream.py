"""Objects of a JSON list one after another, in the memory of one object: published lists are up to a gigabyte."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any


CHUNK = 1 << 18  # characters
LONGEST = 1 << 26  # of one object; what follows a broken one is not read to the end

_BETWEEN = re.compile(r"[\s,]*")


def read_objects(source: str | os.PathLike, *, chunk: int = CHUNK) -> Iterator[dict[str, Any]]:
    """Objects of a `.json` list, or of a `.jsonl` file with one per line.

    Args:
        source: The file, in UTF-8.
        chunk: Characters read at a time.

    Raises:
        ValueError: The file is no such list, or ends early; the place is named.
    """
    decoder = json.JSONDecoder()
    with open(source, encoding="utf-8-sig") as file:
        buffer = file.read(chunk).lstrip()
        listed = buffer.startswith("[")
        place, count = int(listed), 0
        while True:
            place = _BETWEEN.match(buffer, place).end()
            if listed and buffer.startswith("]", place):
                return
            try:
                value, end = decoder.raw_decode(buffer, place)
            except json.JSONDecodeError as error:
                held = buffer[place:]
                # grows, so that a long object is not parsed over and over
                more = file.read(max(chunk, len(held))) if len(held) < LONGEST else ""
                if more:
                    buffer, place = held + more, 0
                    continue
                if not listed and not held:
                    return
                raise ValueError(
                    f"{source}: object {count} cannot be read ({error.msg}). The file must be a JSON list of objects, "
                    "or have one per line; it may be incomplete: download it again."
                ) from error
            if not isinstance(value, dict):
                raise ValueError(
                    f"{source}: object {count} is a {type(value).__name__}. The file must be a list of objects."
                )
            yield value
            place, count = end, count + 1
