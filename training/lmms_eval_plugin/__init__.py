"""`--model adaptive_llava` of lmms-eval, which finds it through the entry point `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """What lmms-eval registers; it is imported only here, so that this package does without it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    models = f"{__name__}.models"
    return ModelManifest(
        model_id="adaptive_llava",
        chat_class_path=f"{models}.AdaptiveLlavaChat",
        simple_class_path=f"{models}.AdaptiveLlavaSimple",
    )
