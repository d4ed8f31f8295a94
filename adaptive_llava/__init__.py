"""LLaVA-style models that spend 1 token on a cat and 576 on an invoice."""

from pathlib import Path


__version__ = "0.1.0"

# The sub-packages live at the repository root; a wheel moves them in here, a checkout does not.
_root = Path(__file__).resolve().parents[1]
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))

from adaptive_llava.auto_classes import AutoModelForVision2Seq  # noqa: E402, needs the path above
from adaptive_llava.modeling.compressor_base import Compressor  # noqa: E402
from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig  # noqa: E402
from adaptive_llava.modeling.encoded_images import EncodedImages  # noqa: E402
from adaptive_llava.modeling.modeling_adaptive_llava import (  # noqa: E402
    AdaptiveLlavaForConditionalGeneration,
    AdaptiveLlavaModel,
)
from adaptive_llava.modeling.preset_table import PRESETS  # noqa: E402
from adaptive_llava.modeling.router_base import Router  # noqa: E402
from adaptive_llava.modeling.visual_tokens import Routing, VisionFeatures, VisualTokens  # noqa: E402
from adaptive_llava.processing.processing_adaptive_llava import AdaptiveLlavaProcessor  # noqa: E402


__all__ = [
    "PRESETS",
    "AdaptiveLlavaConfig",
    "AdaptiveLlavaForConditionalGeneration",
    "AdaptiveLlavaModel",
    "AdaptiveLlavaProcessor",
    "AutoModelForVision2Seq",
    "Compressor",
    "EncodedImages",
    "Router",
    "Routing",
    "VisionFeatures",
    "VisualTokens",
]
