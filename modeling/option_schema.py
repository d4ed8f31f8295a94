"""Options of compressors and routers: the keyword arguments of a constructor are its schema."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn


Part = TypeVar("Part", bound=nn.Module)


def build_part(kind: str, table: Mapping[str, type[Part]], options: Mapping[str, Any], *arguments: Any) -> Part:
    """Build the compressor or router that `options` asks for.

    Args:
        kind: `"compressor"` or `"router"`, for the messages.
        table: Registered classes by type name.
        options: `{"type": name, option: value, ...}`; left-out options take the constructor's default.
        arguments: What the constructor takes before its options.

    Raises:
        ValueError: Unknown type or option (the known ones are listed), or a value the class refuses.
    """
    if not isinstance(options, Mapping) or "type" not in options:
        raise ValueError(f"`{kind}={options!r}` must be a dict with a 'type': one of {', '.join(sorted(table))}.")
    name = options["type"]
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"`{kind}.type={name!r}` is unknown. Known types: {', '.join(sorted(table))}.")
    known = option_names(table[name])
    unknown = sorted(set(options) - set(known) - {"type"})
    if unknown:
        raise ValueError(
            f"`{kind}` of type {name!r} has no option {', '.join(map(repr, unknown))}. "
            f"Known options: {', '.join(known) or 'none'}."
        )
    try:
        return table[name](*arguments, **{key: value for key, value in options.items() if key != "type"})
    except (TypeError, OverflowError, RuntimeError) as error:  # torch's own, of sizes beyond what a tensor can have
        raise ValueError(
            f"`{kind}={dict(options)!r}` cannot be built: {str(error).splitlines()[0]}. Check the types and sizes of "
            "its options, and the widths in `vision_config` and `text_config`."
        ) from error


def option_names(part_class: type[nn.Module]) -> list[str]:
    """Names of a class's options: its keyword-only constructor arguments."""
    parameters = inspect.signature(part_class.__init__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def resolved_options(name: str, part: nn.Module) -> dict[str, Any]:
    """A part's options with every default filled in, ready for JSON."""
    values = {option: getattr(part, option) for option in option_names(type(part))}
    return {"type": name} | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def whole_numbers(name: str, values: Any, *, minimum: int) -> tuple[int, ...]:
    """A list option as a tuple of integers.

    Raises:
        ValueError: Not a non-empty list of whole numbers >= `minimum`.
    """
    listed = isinstance(values, (list, tuple)) and len(values) > 0
    if not listed or any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(f"`{name}={values!r}` must be a non-empty list of whole numbers >= {minimum}.")
    return tuple(values)
