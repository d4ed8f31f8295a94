"""Loading, saving and publishing: what a checkpoint must hold, and what goes with one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone_assembly import OWN_PARTS
from .checkpoint_trust import check_stored_weights
from .code_files import copy_code
from .configuration_adaptive_llava import AdaptiveLlavaConfig


class AdaptiveLlavaPreTrainedModel(PreTrainedModel):
    """Loading, saving and what transformers wants to know of every model."""

    config_class = AdaptiveLlavaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012, transformers reads a list
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: AdaptiveLlavaConfig, *args: Any, **kwargs: Any):
        config.check_options()
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if "position_ids" in module._non_persistent_buffers_set:
            # of towers that are plain modules in transformers 5.0 to 5.4, whose own class is not asked
            positions = cast(Tensor, module.position_ids)
            positions.copy_(torch.arange(positions.shape[-1]))
        # by name: as remote code, the config brings classes of its own copy of these files
        if hasattr(module, "initialise") and not _is_loaded(module):
            module.initialise()  # last: transformers has visited the layers inside

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: in custom code, transformers 5 passes over modules, its own too, that only hold other modules."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that lacks weights of the projector, compressor or router is refused.

        Weights are read from safetensors alone, unless `use_safetensors=False` asks for more.

        Raises:
            ValueError: Weights of these parts are missing or have another shape; they are named. Or the weights are a
                pickle, are damaged, or stand outside of the folder.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
            check_stored_weights(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"`{args[0] if args else 'The checkpoint'}` has weights that are no safetensors, or are damaged: "
                f"{error}. Download it again, or save it again with `save_pretrained`."
            ) from error
        except RuntimeError as error:
            known = ("size mismatch", "ignore_mismatched_sizes", "loading state_dict")
            if not any(part in str(error) for part in known):
                raise
            raise ValueError(
                f"The checkpoint's tensors do not fit its config: {error}\nUse the config it was saved with. If the "
                "compressor or its options were changed, start from the original model with "
                "`from_llava(..., preset=...)` instead."
            ) from error
        model.base_model.router.requires_grad_(False)  # as built: transformers makes every loaded weight trainable
        missing = sorted(key for key in info["missing_keys"] if any(f"{part}." in key for part in OWN_PARTS))
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights this model needs: {', '.join(missing)}. It was saved "
                "from another architecture, or incompletely. Save it again, or build the model with `from_llava` or "
                "`from_backbones`, which initialise new parts."
            )
        if any(f"{part}." in str(key) for key in info["mismatched_keys"] for part in OWN_PARTS if part != "router"):
            model.config.compressor_trained = False  # the caller had them start anew: `ignore_mismatched_sizes=True`
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, untrained: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, with the code; `untrained` as of `push_to_hub`, if that is asked for too."""
        if kwargs.get("push_to_hub"):
            self._check_trained(untrained)
        if self.config.code_repository is None:
            copy_code(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, untrained: bool = False, **kwargs: Any) -> Any:
        """As in transformers: one commit, with the code, and with a card if the repository has none.

        Args:
            repo_id: Hub id of the repository.
            args: As in transformers.
            untrained: Whether a model with parts that were never trained is meant; its card then says so.
            kwargs: As in transformers.

        Raises:
            ValueError: Parts were never trained, and `untrained` is False.
        """
        self._check_trained(untrained)
        return super().push_to_hub(repo_id, *args, **kwargs)

    def _check_trained(self, untrained: bool) -> None:
        if not (self.config.compressor_trained or untrained):
            raise ValueError(
                "The model has `config.compressor_trained=False`: parts of it were never trained, and its answers "
                "would mean nothing to whoever loads it. Train it first; set the field to True if you did, with a "
                "trainer of another package; or pass `untrained=True`, and its card says so."
            )

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # the one place through which transformers' commits go, after it has put its empty card there
        if (Path(working_dir) / "README.md").is_file():
            try:
                from adaptive_llava.hub_cards.pushed_card import complete_card
            except ImportError:
                pass  # as remote code, without the package: the card is transformers' own
            else:
                complete_card(self, Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: `save_pretrained` writes the code and `auto_map` itself."""

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        # 4.57 passes over configs with this mark, and takes it only from those the main config names, not pre-fusion's
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_attn_was_changed", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_decoder().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.get_decoder().set_input_embeddings(value)


def _is_loaded(part: nn.Module) -> bool:
    # transformers 5 marks the weights that a checkpoint has brought
    return all(getattr(parameter, "_is_hf_initialized", False) for parameter in part.parameters())
