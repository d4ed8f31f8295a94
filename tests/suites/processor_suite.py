"""`ProcessorTesterMixin`, for the processors of stock LLaVA and each preset.

python -m pytest tests/suites/processor_suite.py::Dfmr
"""

from __future__ import annotations

import shutil
import tempfile
import unittest
from typing import Any
from unittest import mock

from transformers import CLIPImageProcessor, LlavaProcessor, ProcessorMixin

from adaptive_llava import PRESETS, AdaptiveLlavaProcessor
from adaptive_llava.processing.chat_templates import CHAT_TEMPLATES
from adaptive_llava.processing.prompt_media import VIDEO_TOKEN
from adaptive_llava.processing.tower_image_processor import square_image_processor
from tests.conftest import tiny_vision_config
from tests.suites.model_testers import AdaptiveTester
from tests.suites.preset_names import suite_name
from tests.suites.source_tests import load_tests, without_unknown_tests
from tests.test_processing_adaptive_llava import byte_level_tokenizer


ProcessorTesterMixin: Any = load_tests("test_processing_common").ProcessorTesterMixin


class ProcessorSuite(ProcessorTesterMixin):
    """What stock LLaVA's processor and ours have in common: parts, and a chat template."""

    image_token = "<image>"

    if not hasattr(ProcessorTesterMixin, "setUpClass"):  # transformers 4 leaves this to each model's tests

        @classmethod
        def setUpClass(cls) -> None:
            cls.tmpdirname = tempfile.mkdtemp()
            parts = {"image_processor": cls._setup_image_processor(), "tokenizer": cls._setup_tokenizer()}
            cls.processor_class(**parts, **cls.prepare_processor_dict()).save_pretrained(cls.tmpdirname)

        @classmethod
        def tearDownClass(cls) -> None:
            shutil.rmtree(cls.tmpdirname)

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        tokenizer = byte_level_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        return tokenizer

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return square_image_processor(tiny_vision_config())


@without_unknown_tests
class AdaptiveSuite(ProcessorSuite):
    """Our processors."""

    processor_class = AdaptiveLlavaProcessor
    video_token = VIDEO_TOKEN  # a word that a call with videos replaces; the tests write it where they pass videos
    preset: str

    @classmethod
    def prepare_processor_dict(cls) -> dict[str, Any]:
        tester = type("tester", (AdaptiveTester,), {"preset": cls.preset})
        config = tester(None).get_config()
        return {
            "chat_template": CHAT_TEMPLATES["vicuna"],
            "compressor": config.compressor,
            "router": config.router,
            "grid": config.vision_grid,
        }

    def skip_processor_without_typed_kwargs(self, processor: Any) -> None:
        """Skip nothing: our calls take the options that transformers 4 looks for in an annotation."""

    def test_apply_chat_template_video_frame_sampling(self):
        self.skipTest("a frame is an image of its own, in `pixel_values`; tests/test_videos.py samples them")

    @staticmethod
    def does_processor_return_mm_offsets(processor_class: type, method_name: str) -> bool:
        # the test takes the first base for `ProcessorMixin`
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        # refused too, in words of our own
        def refused(kind: type[Exception], _: str) -> Any:
            return unittest.TestCase.assertRaisesRegex(self, kind, "`(images|videos)` has 4 rows for 3 prompts")

        with mock.patch.object(self, "assertRaisesRegex", refused):
            super().test_if_input_has_mismatching_tokens_and_mm_data()

    def test_get_num_multimodal_tokens_matches_processor_call(self):
        # what engines ask for is the count of the expanded layout, and exact where the count is fixed
        processor = self.get_processor()
        processor.layout, processor.router = "expanded", {"type": "fixed"}
        with mock.patch.object(self, "get_processor", return_value=processor):
            super().test_get_num_multimodal_tokens_matches_processor_call()


class StockLlava(ProcessorSuite, unittest.TestCase):
    """The peer."""

    processor_class = LlavaProcessor

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {
            "chat_template": CHAT_TEMPLATES["vicuna"],
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }


def _suite(preset: str) -> type:
    return type(suite_name(preset), (AdaptiveSuite, unittest.TestCase), {"preset": preset})


globals().update({suite_name(preset): _suite(preset) for preset in PRESETS})
