"""Registers the package's classes with transformers' Auto classes, and keeps `AutoModelForVision2Seq` alive on 5.x."""

from __future__ import annotations

import sys

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.modeling.modeling_adaptive_llava import (
    AdaptiveLlavaForConditionalGeneration,
    AdaptiveLlavaModel,
)
from adaptive_llava.processing.processing_adaptive_llava import AdaptiveLlavaProcessor


def _vision2seq_class() -> type:
    existing = getattr(transformers, "AutoModelForVision2Seq", None)  # 4.57 has it, 5.x removed it
    if existing is not None:
        return existing

    class AutoModelForVision2Seq(AutoModelForImageTextToText):
        """The former name of `AutoModelForImageTextToText`, for code written for transformers 4."""

        _model_mapping = AutoModelForImageTextToText._model_mapping

    # the module that a later `import transformers` finds is not always the one bound here
    for module in ("transformers", "transformers.models.auto", "transformers.models.auto.modeling_auto"):
        if module in sys.modules:
            setattr(sys.modules[module], AutoModelForVision2Seq.__name__, AutoModelForVision2Seq)
    return AutoModelForVision2Seq


AutoModelForVision2Seq = _vision2seq_class()

AutoConfig.register("adaptive_llava", AdaptiveLlavaConfig, exist_ok=True)
AutoModel.register(AdaptiveLlavaConfig, AdaptiveLlavaModel, exist_ok=True)
AutoProcessor.register(AdaptiveLlavaConfig, AdaptiveLlavaProcessor, exist_ok=True)
for _name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq"):
    _auto_class = getattr(transformers, _name, None)
    if _auto_class is not None:
        _auto_class.register(AdaptiveLlavaConfig, AdaptiveLlavaForConditionalGeneration, exist_ok=True)
