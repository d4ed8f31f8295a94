"""Which LLaVA checkpoint this is, told by its tensors, and where each of them belongs in an adaptive LLaVA model.

A layout is a literal table: a pattern of the source's names, and the names of this package. Where a row has several
targets, the tensor is cut along its first dimension into as many equal parts (an attention's joint input projection);
where it has none, the tensor is a fixed table that the model computes by itself. `{length}` stands for the number of
its rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


Rows = Mapping[str, Sequence[str]]

_COMPUTED: Rows = {r".*\.rotary_emb\.inv_freq": (), r".*\.position_ids": ()}

_NEWLINE: Rows = {r"(?:model\.)?image_newline": ("model.image_newline",)}

# transformers: 4.57 and 5.x put the prefixes differently, in files as in modules.
_STOCK: Rows = _COMPUTED | {
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)": (r"model.vision_tower.\1",),
    r"(?:model\.)?multi_modal_projector\.(.+)": (r"model.multi_modal_projector.\1",),
    r"(?:language_model\.model|model\.language_model)\.(.+)": (r"model.language_model.\1",),
    r"(?:language_model\.)?lm_head\.weight": ("lm_head.weight",),
}
TRANSFORMERS: Rows = _STOCK | _NEWLINE

# A vision tower's own checkpoint, with or without the text side of a dual encoder.
VISION_TOWER: Rows = _COMPUTED | {
    r"text_model\..+|(?:text|visual)_projection\..+|logit_(?:scale|bias)": (),
    r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..+)": (r"model.vision_tower.\1",),
}

# The LLaVA authors' code base and its descendants.
_ORIGINAL: Rows = _COMPUTED | {
    r"model\.(embed_tokens|layers|norm)\.(.+)": (r"model.language_model.\1.\2",),
    r"lm_head\.weight": ("lm_head.weight",),
    r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)": (r"model.vision_tower.\1",),
}
_ORIGINAL_PROJECTOR: Rows = {
    r"model\.mm_projector\.0\.(.+)": (r"model.multi_modal_projector.linear_1.\1",),
    r"model\.mm_projector\.2\.(.+)": (r"model.multi_modal_projector.linear_2.\1",),
}
_WINDOW_PROJECTOR: Rows = {
    r"model\.mm_projector\.0\.(.+)": (r"model.compressor.linear_1.\1",),
    r"model\.mm_projector\.2\.(.+)": (r"model.compressor.linear_2.\1",),
}
_BLOCK_FUSION: Rows = {
    r"model\.mm_projector_crosslayer\.0\.(.+)": (r"model.multi_block_fusion.linear_1.\1",),
    r"model\.mm_projector_crosslayer\.2\.(.+)": (r"model.multi_block_fusion.linear_2.\1",),
}
_RESAMPLER: Rows = {
    r"model\.compressor\.pos_embed": (),
    r"model\.compressor\.query": ("model.compressor.query_{length}",),
    r"model\.compressor\.(ln_q|ln_kv)\.(.+)": (r"model.compressor.\1.\2",),
    r"model\.compressor\.attn\.in_proj_(weight|bias)": (
        r"model.compressor.q_proj.\1",
        r"model.compressor.k_proj.\1",
        r"model.compressor.v_proj.\1",
    ),
    r"model\.compressor\.attn\.out_proj\.(.+)": (r"model.compressor.o_proj.\1",),
}
_PREFUSION: Rows = {r"model\.prefusion_layers\.(\d+)\.(.+)": (r"model.modality_prefusion.decoder.layers.\1.\2",)}

_FIRST_LAYER = r"model\.mm_projector\.0\.weight"
_CROSSLAYER = r"model\.mm_projector_crosslayer\.0\.weight"


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint.

    Attributes:
        title: Its name, for people.
        model_types: What its config.json may call it.
        marks: Patterns of tensors without which it is not this kind.
        rows: Every tensor it may have, and where that belongs.
        preset: The published system it was trained as; `None`: plain LLaVA, to which any preset can be given.
        windows: Whether the projector reads windows of patches rather than single ones; `None`: not looked at.
    """

    title: str
    model_types: tuple[str, ...]
    marks: tuple[str, ...]
    rows: Rows = field(repr=False)
    preset: str | None = None
    windows: bool | None = None

    @property
    def original(self) -> bool:
        """Whether it is of the LLaVA authors' code base, whose config.json transformers does not read."""
        return _FIRST_LAYER in self.marks


_AUTHORS_TYPES = ("llava_llama", "llava_mistral", "llava_qwen", "llava")
_PROJECTOR = r"(?:model\.)?multi_modal_projector\.linear_1\.weight"
_IMAGE_NEWLINE = r"(?:model\.)?image_newline"

LAYOUTS = (
    Layout("LLaVA-1.5 in transformers' layout", ("llava",), (_PROJECTOR,), _STOCK),
    Layout(
        "LLaVA-NeXT in transformers' layout",
        ("llava_next",),
        (_PROJECTOR, _IMAGE_NEWLINE),
        TRANSFORMERS,
    ),
    Layout(
        "LLaVA-OneVision in transformers' layout",
        ("llava_onevision",),
        (_PROJECTOR, _IMAGE_NEWLINE),
        TRANSFORMERS,
    ),
    Layout(
        "LLaVA-1.5 in its authors' layout",
        _AUTHORS_TYPES,
        (_FIRST_LAYER,),
        _ORIGINAL | _ORIGINAL_PROJECTOR,
        windows=False,
    ),
    Layout(
        "LLaVA-NeXT in its authors' layout",
        _AUTHORS_TYPES,
        (_FIRST_LAYER, _IMAGE_NEWLINE),
        _ORIGINAL | _ORIGINAL_PROJECTOR | _NEWLINE,
        windows=False,
    ),
    Layout(
        "LLaVA-STF (spatial token fusion alone)",
        _AUTHORS_TYPES,
        (_FIRST_LAYER,),
        _ORIGINAL | _WINDOW_PROJECTOR,
        preset="stf",
        windows=True,
    ),
    Layout(
        "LLaVA-STF (multi-block fusion alone)",
        _AUTHORS_TYPES,
        (_FIRST_LAYER, _CROSSLAYER),
        _ORIGINAL | _ORIGINAL_PROJECTOR | _BLOCK_FUSION,
        preset="mbtf",
        windows=False,
    ),
    Layout(
        "LLaVA-STF (multi-block and spatial token fusion)",
        _AUTHORS_TYPES,
        (_FIRST_LAYER, _CROSSLAYER),
        _ORIGINAL | _WINDOW_PROJECTOR | _BLOCK_FUSION,
        preset="stf-mbtf",
        windows=True,
    ),
    Layout(
        "LLaVA-Mini",
        ("llava_mini_llama",),
        (_FIRST_LAYER, r"model\.compressor\.query", r"model\.prefusion_layers\.0\..+"),
        _ORIGINAL | _ORIGINAL_PROJECTOR | _RESAMPLER | _PREFUSION,
        preset="llava-mini",
        windows=False,
    ),
)


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the new model comes from: part `piece` of `pieces` of a source tensor."""

    name: str
    piece: int = 0
    pieces: int = 1


def recognise(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> Layout:
    """The kind of a checkpoint.

    Args:
        shapes: Shape of every tensor, by name.
        config: Its config.json.

    Raises:
        ValueError: It is of no known kind; what does not fit the nearest one is listed.
    """
    misfits = {layout.title: _misfits(layout, shapes, config) for layout in LAYOUTS}
    for layout in LAYOUTS:
        if not misfits[layout.title]:
            return layout
    nearest, listed = min(misfits.items(), key=lambda item: sum(len(names) for _, names in item[1]))
    raise ValueError(
        f"its {len(shapes)} tensors are of no known kind. Nearest is {nearest}, but:\n"
        + "\n".join(f"  {what}: {shorten(names)}" for what, names in listed)
        + "\nKnown kinds: "
        + "; ".join(layout.title for layout in LAYOUTS)
        + "."
    )


def new_places(rows: Rows, shapes: Mapping[str, Sequence[int]]) -> dict[str, Origin]:
    """Where every tensor of the new model comes from, for those that the rows know."""
    places: dict[str, Origin] = {}
    for name, shape in shapes.items():
        targets = _targets(rows, name, shape) or ()
        places |= {target: Origin(name, piece, len(targets)) for piece, target in enumerate(targets)}
    return places


def vision_width(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> int | None:
    """Width of the vision features of a checkpoint in the authors' layout, if it tells."""
    for name, shape in shapes.items():
        if name.endswith("vision_model.embeddings.patch_embedding.weight"):
            return shape[0]
        if name == "model.mm_projector_crosslayer.2.weight":
            return shape[0]
    return config.get("mm_hidden_size")


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """A list of names for a message, of bounded length."""
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _misfits(
    layout: Layout, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
) -> list[tuple[str, list[str]]]:
    targets = {name: _targets(layout.rows, name, shape) for name, shape in shapes.items()}
    missing = [mark for mark in layout.marks if not any(re.fullmatch(mark, name) for name in shapes)]
    unknown = [name for name, places in targets.items() if places is None]
    claimed = [place for places in targets.values() for place in places or ()]
    twice = (
        sorted({place for place in claimed if claimed.count(place) > 1}) if len(set(claimed)) < len(claimed) else []
    )
    found = [
        ("tensors it must have are missing", [mark.replace("\\", "").replace("(?:model.)?", "") for mark in missing]),
        ("tensors it does not have", unknown),
        ("more than one tensor for the same place", twice),
    ]
    if config.get("model_type") not in layout.model_types:
        found.append(
            (
                f"its config.json has `model_type` {' or '.join(layout.model_types)}, here",
                [str(config.get("model_type"))],
            )
        )
    if layout.windows is not None and "model.mm_projector.0.weight" in shapes:
        reads, width = shapes["model.mm_projector.0.weight"][1], vision_width(shapes, config)
        takes = "several patches" if layout.windows else "one patch"
        fits = width and (reads > width and reads % width == 0 if layout.windows else reads == width)
        if not fits:
            found.append(
                (f"its projector reads {takes} of width {width or '(told nowhere)'}, here", [f"{reads} numbers"])
            )
    return [(what, names) for what, names in found if names]


def _targets(rows: Rows, name: str, shape: Sequence[int]) -> list[str] | None:
    for pattern, targets in rows.items():
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(target).format(length=shape[0] if shape else 1) for target in targets]
    return None
