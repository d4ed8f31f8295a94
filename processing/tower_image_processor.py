"""The image processor that fits a vision tower."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils import is_torchvision_available


# Mean and standard deviation that other towers than CLIP and SigLIP were trained with; ImageNet's if not named here.
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_NORMALISATION = {"vit": _HALF, "mobilenet": _HALF}


def square_image_processor(vision_config: Any) -> Any:
    """A plain resize to the tower's square input, with the tower's normalisation.

    Args:
        vision_config: Config of a vision tower that names its `image_size`, in pixels.

    Raises:
        ValueError: The config has no `image_size` (convolutional towers).
    """
    size = getattr(vision_config, "image_size", None)
    if size is None:
        raise ValueError(
            f"`vision_config` of type {vision_config.model_type!r} does not tell the input size of the tower. Pass "
            "`image_processor`."
        )
    height, width = (size, size) if isinstance(size, int) else size
    options: dict[str, Any] = {"size": {"height": height, "width": width}}
    kind = vision_config.model_type
    name = "SiglipImageProcessor" if kind.startswith("siglip") else "CLIPImageProcessor"
    if name == "CLIPImageProcessor":
        options["do_center_crop"] = False
        if not kind.startswith("clip"):
            family = next((family for family in _NORMALISATION if kind.startswith(family)), None)
            options["image_mean"], options["image_std"] = _NORMALISATION.get(family or "", _IMAGENET)
    # as transformers does when it loads this processor again: torchvision where it is installed, else PIL, which
    # transformers 5 keeps under its own name
    without_torchvision = None if is_torchvision_available() else getattr(transformers, name + "Pil", None)
    return (without_torchvision or getattr(transformers, name))(**options)
