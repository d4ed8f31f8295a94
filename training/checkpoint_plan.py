"""What a converted checkpoint is made of: the model without storage, and where each of its tensors comes from.

The backbones of a model on the meta device take no memory; parts that are new to the source (a preset's compressor, a
projector that reads more than one patch) are built for real, with the start values that `from_llava` gives them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from adaptive_llava.modeling.backbone_assembly import LLAVA_CLASSES
from adaptive_llava.training.checkpoint_layouts import TRANSFORMERS, Origin, Rows, new_places, shorten
from adaptive_llava.training.checkpoint_shards import CheckpointFiles, PlannedTensor


_EMBEDDINGS, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_BACKBONES = ("model.vision_tower.", "model.language_model.", _HEAD)


class SourceTensors:
    """The tensors of a checkpoint under the names they have in an adaptive LLaVA model.

    Args:
        files: The checkpoint.
        rows: Its layout.
        dtype: New type of its floating-point tensors; `None` keeps each as it is stored.

    Attributes:
        shapes: Shape of each tensor of the checkpoint, by its name there.
        origins: Where each tensor comes from, by its new name.
    """

    def __init__(self, files: CheckpointFiles, rows: Rows, dtype: torch.dtype | None = None):
        self.files, self.dtype = files, dtype
        self.shapes = {name: tensor.shape for name, tensor in files.stored.items()}
        self.origins: dict[str, tuple[CheckpointFiles, Origin]] = {}
        self.add(files, rows)

    def add(self, files: CheckpointFiles, rows: Rows) -> None:
        """Take what another checkpoint has and this one has not."""
        for name, origin in new_places(rows, {name: tensor.shape for name, tensor in files.stored.items()}).items():
            self.origins.setdefault(name, (files, origin))

    def close(self) -> None:
        """Let go of the files."""
        for files in {id(files): files for files, _ in self.origins.values()}.values():
            files.close()

    def has_part(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.origins)

    @property
    def vocabulary(self) -> int:
        """Embeddings of the language model, in tokens; 0 if it has none."""
        return self.shape(_EMBEDDINGS)[0] if _EMBEDDINGS in self.origins else 0

    @property
    def language_dtype(self) -> torch.dtype:
        """Type of the language model in the new checkpoint."""
        return self.new_dtype(_EMBEDDINGS) if _EMBEDDINGS in self.origins else torch.get_default_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        files, origin = self.origins[name]
        first, *rest = files.stored[origin.name].shape or (1,)
        return (first // origin.pieces, *rest)

    def new_dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the new checkpoint."""
        files, origin = self.origins[name]
        stored = files.stored[origin.name].dtype
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def read(self, name: str, length: int | None = None) -> Tensor:
        """A tensor's values; rows are added up to `length`, each the mean of those that are there."""
        files, origin = self.origins[name]
        value = files.read(origin.name)
        if origin.pieces > 1:
            value = value.chunk(origin.pieces)[origin.piece]
        if length is not None and length > len(value):
            mean = value.mean(dim=0, keepdim=True, dtype=torch.float32).to(value.dtype)
            value = torch.cat([value, mean.expand(length - len(value), *value.shape[1:])])
        return value.to(self.new_dtype(name))

    def settle_tie(self, text: PretrainedConfig, tied: bool) -> None:
        """Write into the text config whether the head is the embeddings; where both are stored, they decide."""
        if tied and _HEAD in self.origins:
            tied = self.shape(_HEAD) == self.shape(_EMBEDDINGS) and torch.equal(
                self.read(_HEAD), self.read(_EMBEDDINGS)
            )
            if tied:
                del self.origins[_HEAD]
        text.tie_word_embeddings = tied

    def check(self, model: nn.Module, *, may_grow: bool) -> None:
        """Compare with what a model on the meta device needs.

        Args:
            model: One of transformers' or ours.
            may_grow: Whether it may have a larger vocabulary.

        Raises:
            ValueError: Tensors that are missing, have no use or another shape; all are named.
        """
        wanted: dict[str, tuple[int, ...]] = {}
        for name, value in model.state_dict().items():
            places = new_places(TRANSFORMERS, {name: value.shape})
            wanted |= {place: tuple(value.shape) for place in places or [name]}
        if model.config.get_text_config().tie_word_embeddings:
            del wanted[_HEAD]
        both = wanted.keys() & self.origins.keys()
        grown = {_EMBEDDINGS, _HEAD} if may_grow else set()
        wrong = [
            f"{name} {list(self.shape(name))} instead of {list(wanted[name])}"
            for name in sorted(both)
            if self.shape(name) != wanted[name]
            and not (name in grown and self.shape(name)[1:] == wanted[name][1:] and self.shape(name) < wanted[name])
        ]
        unused = sorted({origin.name for name, (_, origin) in self.origins.items() if name not in wanted})
        lists = {
            "missing": sorted(wanted.keys() - both),
            "without a place in the model that its config describes": unused,
            "of another shape": wrong,
        }
        if any(lists.values()):
            found = "\n".join(f"  {what}: {shorten(names)}" for what, names in lists.items() if names)
            raise ValueError(f"its tensors do not fit its config.json:\n{found}")


def stock_model(config: PretrainedConfig, source: SourceTensors, *, may_grow: bool) -> Any:
    """transformers' own LLaVA without storage, but for the few tensors from which new parts start.

    Args:
        config: Of LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision.
        source: Its tensors.
        may_grow: Whether `config` may have a larger vocabulary than they have.

    Raises:
        ValueError: They do not fit the config.
    """
    with torch.device("meta"):
        model = getattr(transformers, LLAVA_CLASSES[config.model_type])(config).to(source.language_dtype)
    source.check(model, may_grow=may_grow)
    small = [name for name in source.origins if not name.startswith(_BACKBONES)]
    values = {name: source.read(name).to(source.language_dtype) for name in small}
    model.load_state_dict(values, strict=False, assign=True)
    return model


def plan(model: nn.Module, source: SourceTensors) -> dict[str, PlannedTensor]:
    """All tensors of a new checkpoint.

    Args:
        model: Ours; what has no storage comes from the source, everything else is taken as it is.
        source: Tensors that fit it.
    """
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state[_HEAD]
    planned = {}
    for name in source.origins:  # in their order: file by file
        if name not in state or not state[name].is_meta:
            continue
        shape = tuple(state[name].shape)
        length = shape[0] if name in (_EMBEDDINGS, _HEAD) else None
        planned[name] = PlannedTensor(shape, source.new_dtype(name), partial(source.read, name, length))
    for name, value in state.items():
        if not value.is_meta:
            planned[name] = PlannedTensor(tuple(value.shape), value.dtype, value.clone)
    assert planned.keys() == state.keys(), state.keys() - planned.keys()
    return planned
