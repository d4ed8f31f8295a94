"""One way to read features from any vision tower: CLIP, SigLIP, DINOv2 and convolutional maps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .visual_tokens import VisionFeatures


# How the types of ViTs begin that have patches alone.
_WITHOUT_CLASS_TOKEN = ("aimv2", "idefics", "ijepa", "siglip", "smolvlm")


def unwrap_tower(tower: nn.Module) -> nn.Module:
    """The tower without the wrapper that some transformers releases put around it.

    `CLIPVisionModel` holds its layers under `vision_model` in 4.57 and directly in 5.x; unwrapped, the parameter names
    of a checkpoint are the same under both. A dual encoder (`CLIPModel`, `SiglipModel`) gives its vision side.
    """
    return getattr(tower, "vision_model", tower)


def vision_geometry(config: PretrainedConfig) -> tuple[int, tuple[int, int]] | None:
    """Feature width and patch grid of a tower, or `None` if its config does not tell.

    Those of convolutional towers and of pyramids like Swin differ from stage to stage.

    Raises:
        ValueError: The config tells sizes that are none.
    """
    size, patch, width = (getattr(config, name, None) for name in ("image_size", "patch_size", "hidden_size"))
    if size is None or patch is None or not isinstance(width, int) or hasattr(config, "depths"):
        return None
    for name, value in (("image_size", size), ("patch_size", patch)):
        sides = [value] * 2 if isinstance(value, int) else value
        listed = isinstance(sides, (list, tuple)) and len(sides) == 2
        if not listed or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(
                f"`vision_config.{name}={value!r}` must be a whole number of pixels, or two of them: height and width."
            )
    (height, width_px), (patch_height, patch_width) = _pair(size), _pair(patch)
    return width, (height // patch_height, width_px // patch_width)


def has_class_token(config: PretrainedConfig) -> bool:
    """Whether a tower has a [CLS] token, as far as its config tells: not SigLIP, and no convolutional tower."""
    return vision_geometry(config) is not None and not config.model_type.startswith(_WITHOUT_CLASS_TOKEN)


def image_side_lengths(config: PretrainedConfig) -> tuple[int, int] | None:
    """Height and width of the images a tower was made for, in pixels, or `None` if its config does not tell."""
    size = getattr(config, "image_size", None)
    return None if size is None else _pair(size)


def input_size(tower: Any) -> tuple[int, int]:
    """Height and width of the images a tower was made for, in pixels; 224 where its config does not tell."""
    return image_side_lengths(tower.config) or (224, 224)


def extract_features(
    tower: Any,
    pixel_values: Tensor,
    layer: int | Sequence[int],
    blocks: Sequence[int] = (),
    *,
    keep_outputs: bool = False,
    output_attentions: bool = False,
    join_unused: bool = False,
) -> VisionFeatures:
    """Run a vision tower and read its patches.

    Args:
        tower: An unwrapped tower; its outputs have `hidden_states`, each `(V, tokens, dim)` or `(V, dim, H, W)`.
        pixel_values: `(V, 3, height, width)`, one view per image.
        layer: Index into the hidden states; a list joins several along the channels, in list order.
        blocks: Further hidden states to keep, prefix tokens dropped.
        keep_outputs: Keep all that the tower gives, in `tower_outputs`.
        output_attentions: Keep its attentions too; those of SigLIP stay `None` on transformers 4.57.
        join_unused: Let what lies above the layer join patches and blocks with weight 0, so that each of the tower's
            weights gets a gradient: distributed training waits for all.

    Raises:
        ValueError: The tower's tokens form no patch grid, or a layer or block is not there.
    """
    asked = {"output_attentions": True} if output_attentions else {}
    try:
        outputs = None if _keeps_states_to_itself(tower) else tower(pixel_values, output_hidden_states=True, **asked)
    except ValueError as error:
        raise ValueError(
            f"`pixel_values` of {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels cannot be read by the vision "
            f"tower: {error} Use the checkpoint's own processor."
        ) from error
    states = _layer_by_layer(tower, pixel_values) if outputs is None else outputs.hidden_states
    last_hidden_state = states[-1] if outputs is None else outputs.last_hidden_state
    layers = [layer] if isinstance(layer, int) else list(layer)
    for index in [*layers, *blocks]:
        if not -len(states) <= index < len(states):
            name = f"`vision_feature_layer={layer!r}`" if index in layers else f"Block {index} of {list(blocks)}"
            raise ValueError(f"{name} is not there: this tower has hidden states 0 to {len(states) - 1}. Choose one.")
    last = states[layers[0]]
    if len(last) != len(pixel_values):
        raise ValueError(
            f"The vision tower gave {len(last)} rows of tokens for {len(pixel_values)} images, and only what "
            "belongs to one image can be compressed. Choose a tower that keeps images apart."
        )
    if last.dim() == 4:
        grid, prefix = tuple(last.shape[-2:]), 0
    else:
        patch_height, patch_width = _pair(tower.config.patch_size)
        grid = (pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width)
        prefix = last.shape[1] - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(
                f"The vision tower gave {last.shape[1]} tokens for a {grid[0]}x{grid[1]} patch grid. Choose one "
                "with a token per patch, after any tokens of its own."
            )
    patches = torch.cat([_patches(states[index], prefix) for index in layers], dim=-1)
    patches_of_blocks = {index: _patches(states[index], prefix) for index in blocks}
    if join_unused:
        above = (last_hidden_state, getattr(outputs, "pooler_output", None))
        nothing = sum((state * 0).sum() for state in above if state is not None)
        patches = patches + nothing
        patches_of_blocks = {index: block + nothing for index, block in patches_of_blocks.items()}
    return VisionFeatures(
        patches=patches,
        grid=grid,
        cls=_class_token(tower, outputs, states, prefix),
        pixels=pixel_values,
        views_per_image=(1,) * pixel_values.shape[0],
        blocks=patches_of_blocks,
        layer_cls=torch.cat([states[index][:, 0] for index in layers], dim=-1) if prefix else None,
        tower_outputs={
            "last_hidden_state": last_hidden_state,
            "hidden_states": states,
            "attentions": getattr(outputs, "attentions", None),
        }
        if keep_outputs
        else None,
    )


def _keeps_states_to_itself(tower: nn.Module) -> bool:
    # in 4.57 the wrapper of SigLIP collects the hidden states, and the tower inside it cannot; in 5.0 CLIP's too
    inner = getattr(tower, "original_module", tower)  # PEFT trains a copy of a whole module behind a wrapper
    takes_option = "output_hidden_states" in inspect.signature(inner.forward).parameters
    return not isinstance(inner, PreTrainedModel) and not takes_option


def _layer_by_layer(tower: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    states = [tower.embeddings(pixel_values)]
    if hasattr(tower, "pre_layrnorm"):  # CLIP's, and its spelling
        states = [tower.pre_layrnorm(states[0])]
    for encoder_layer in tower.encoder.layers:
        states.append(encoder_layer(states[-1], None))
    return states


def _patches(state: Tensor, prefix: int) -> Tensor:
    # (V, dim, H, W) -> (V, H * W, dim), or drop [CLS] and register tokens
    return state.flatten(2).transpose(1, 2) if state.dim() == 4 else state[:, prefix:]


def _class_token(tower: nn.Module, outputs: Any, states: Sequence[Tensor], prefix: int) -> Tensor | None:
    if prefix == 0:
        return None
    if outputs is None:
        return tower.post_layernorm(states[-1][:, 0])
    pooled = getattr(outputs, "pooler_output", None)
    return pooled if pooled is not None else outputs.last_hidden_state[:, 0]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
