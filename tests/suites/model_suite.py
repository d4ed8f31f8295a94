"""`ModelTesterMixin` and the generation suite, for stock LLaVA and each preset.

python -m pytest tests/suites/model_suite.py::Dfmr
"""

from __future__ import annotations

import inspect
import unittest
from typing import Any
from unittest import mock

from transformers import LlavaConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from adaptive_llava import PRESETS, AdaptiveLlavaConfig
from adaptive_llava.modeling import pretrained_base
from tests.suites.generation_suite import GenerationTesterMixin
from tests.suites.model_testers import AdaptiveTester, StockLlavaTester
from tests.suites.preset_names import suite_name
from tests.suites.source_tests import load_tests, without_unknown_tests


ModelTesterMixin: Any = load_tests("test_modeling_common").ModelTesterMixin

# As for a model inside transformers: the tests look up by class name what inputs and outputs a class has.
modeling_auto.MODEL_MAPPING_NAMES["adaptive_llava"] = "AdaptiveLlavaModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["adaptive_llava"] = "AdaptiveLlavaForConditionalGeneration"


class ModelSuite(ModelTesterMixin, GenerationTesterMixin):
    """What stock LLaVA and our models have in common."""

    model_tester_class: Any
    _is_composite = True
    # what transformers 4 could do with old language models; its own tests of LLaVA leave these out
    test_pruning = test_head_masking = False

    def setUp(self) -> None:
        self.model_tester = self.model_tester_class(self)
        self.all_model_classes = self.model_tester_class.model_classes


@without_unknown_tests
class AdaptiveSuite(ModelSuite):
    """Our models."""

    def test_attention_outputs(self):
        # attentions are those of the expanded rows, which the test does not know beforehand
        self.model_tester.expanded = True
        super().test_attention_outputs()

    def test_retain_grad_hidden_states_attentions(self):
        # the hidden states at one placeholder per image are picked from those that lead to the output
        self.model_tester.expanded = True
        super().test_retain_grad_hidden_states_attentions()

    def test_internal_model_config_and_subconfig_are_same(self):
        # the layers of pre-fusion are a language model too, by intent with fewer layers: the test takes its config for
        # a copy of `text_config`
        self.model_tester.prefusion = False
        super().test_internal_model_config_and_subconfig_are_same()

    def test_model_weights_reload_no_missing_tied_weights(self):
        # the test loads an empty checkpoint: ours is refused, by name; what stock classes do is checked without that
        with self.assertRaisesRegex(ValueError, "The checkpoint lacks .* weights this model needs"):
            super().test_model_weights_reload_no_missing_tied_weights()
        with mock.patch.object(pretrained_base, "OWN_PARTS", ()):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_init_all_missing_weights(self):
        if self.tower_is_unwrapped:
            self.skipTest(
                "the wrapper that transformers 4 puts around a tower, and ours is without, draws its weights"
            )

        # an empty checkpoint again; and the test reads the year of a model in the first lines of a file, where ours
        # has no copyright: it gets LLaVA's
        def file_of(thing: Any) -> str:
            return getfile(LlavaConfig if thing is AdaptiveLlavaConfig else thing)

        getfile = inspect.getfile
        with mock.patch.object(pretrained_base, "OWN_PARTS", ()), mock.patch("inspect.getfile", file_of):
            super().test_can_init_all_missing_weights()

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any):
        # the tests of transformers 5 ask no gradient of weights that a model freezes on purpose, as ours a classifier
        # that routes: its choice has none. Those of transformers 4 ask all weights or none
        if self.tower_is_unwrapped:
            model = self.all_model_classes[0](self.model_tester.get_config())
            self.test_all_params_have_gradient = all(weight.requires_grad for weight in model.parameters())
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_sdpa_can_dispatch_composite_models(self):
        if not self.tower_is_unwrapped:
            return super().test_sdpa_can_dispatch_composite_models()
        # the tests of transformers 4 look for the parts on the model with the head, where only old models show them,
        # and ask the tower what only its wrapper says
        self.all_model_classes = self.all_model_classes[:1]
        with mock.patch.object(self.tower_class, "_supports_sdpa", True, create=True):
            super().test_sdpa_can_dispatch_composite_models()

    @property
    def tower_class(self) -> type:
        """Class of the vision tower inside our models."""
        return type(self.all_model_classes[0](self.model_tester.get_config()).vision_tower)

    @property
    def tower_is_unwrapped(self) -> bool:
        """Whether this release's class of a whole tower is a wrapper, which our models do without."""
        return not issubclass(self.tower_class, PreTrainedModel)


class StockLlava(ModelSuite, unittest.TestCase):
    """The peer."""

    model_tester_class = StockLlavaTester


def _suite(preset: str) -> type:
    tester = type(f"{preset} tester", (AdaptiveTester,), {"preset": preset})
    return type(suite_name(preset), (AdaptiveSuite, unittest.TestCase), {"model_tester_class": tester})


globals().update({suite_name(preset): _suite(preset) for preset in PRESETS})
