"""`ImageProcessingTestMixin`, for the image processors that stock LLaVA and each preset use.

python -m pytest tests/suites/image_processor_suite.py::Dfmr
"""

from __future__ import annotations

import unittest
from typing import Any

from transformers import CLIPImageProcessor

from adaptive_llava import PRESETS
from adaptive_llava.processing.tower_image_processor import square_image_processor
from tests.suites.model_testers import AdaptiveTester
from tests.suites.preset_names import suite_name
from tests.suites.source_tests import load_tests, without_unknown_tests


image_processing = load_tests("test_image_processing_common")
ImageProcessingTestMixin: Any = image_processing.ImageProcessingTestMixin

OPTIONS = ("size", "do_resize", "do_center_crop", "do_normalize", "do_convert_rgb", "image_mean", "image_std")


class ImageInputs:
    """What the tests ask of an image processor: its options, and images for it.

    Args:
        parent: The test case.
        image_processor: One of the kind that is tested.
    """

    batch_size, num_channels = 3, 3

    def __init__(self, parent: Any, image_processor: Any):
        self.parent = parent
        options = {name: getattr(image_processor, name) for name in OPTIONS}
        # lists, as in a file
        self.options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        self.crop_size = getattr(image_processor, "crop_size", None) if image_processor.do_center_crop else None
        self.image_processing_classes = {"pil": type(image_processor)}

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        """Options of the constructor."""
        return dict(self.options) | ({"crop_size": dict(self.crop_size)} if self.crop_size else {})

    def prepare_image_inputs(self, batch_size: int | None = None, **options: Any) -> list[Any]:
        """Images of several sizes, as the tests ask for them."""
        sizes = {"min_resolution": 30, "max_resolution": 60, "num_channels": self.num_channels}
        return image_processing.prepare_image_inputs(**(sizes | options), batch_size=batch_size or self.batch_size)

    def prepare_processor_inputs(self, **options: Any) -> dict[str, Any]:
        """Arguments of a call."""
        return {"images": self.prepare_image_inputs(**options)}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, int, int]:
        """Channels, height and width that come out, whatever comes in."""
        size = self.crop_size or self.options["size"]
        return self.num_channels, size["height"], size["width"]


@without_unknown_tests
class ImageProcessorSuite(ImageProcessingTestMixin):
    """What stock LLaVA's image processor and ours have in common."""

    test_cast_dtype = True

    @classmethod
    def build(cls) -> Any:
        """An image processor of the kind that is tested."""
        raise NotImplementedError

    def setUp(self) -> None:
        self.image_processor_tester = ImageInputs(self, self.build())
        # what the tests of transformers 4 read
        self.image_processor_list = list(self.image_processor_tester.image_processing_classes.values())
        self.image_processing_class = self.image_processor_list[0]

    def test_new_models_require_torchvision_backend(self):
        self.skipTest("a rule for models that are added to transformers; here torchvision is never needed")

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()


class AdaptiveSuite(ImageProcessorSuite):
    """What `AdaptiveLlavaProcessor.from_config` takes for a preset's vision tower."""

    preset: str

    @classmethod
    def build(cls) -> Any:
        tester = type("tester", (AdaptiveTester,), {"preset": cls.preset})
        return square_image_processor(tester(None).get_config().vision_config)


class StockLlava(ImageProcessorSuite, unittest.TestCase):
    """The peer: that of LLaVA-1.5."""

    @classmethod
    def build(cls) -> Any:
        return CLIPImageProcessor()


def _suite(preset: str) -> type:
    return type(suite_name(preset), (AdaptiveSuite, unittest.TestCase), {"preset": preset})


globals().update({suite_name(preset): _suite(preset) for preset in PRESETS})
