"""What of a folder goes up to the Hub: the files that loading needs, this package's code, the card and the results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from adaptive_llava.hub_cards.code_manifest import differing_files
from adaptive_llava.modeling.checkpoint_trust import INDEX, read_index
from adaptive_llava.modeling.code_files import AUTO_MAP, MANIFEST_NAME, auto_map, copy_code
from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.training.finite_training import spoiled_tensor


CONFIG, PROCESSOR, ADAPTER, CARD = "config.json", "processor_config.json", "adapter_config.json", "README.md"
MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
RESULT_FILES = ("results.json", "*_results.json", "evaluation*.json")
# Everything else stays where it is: optimizer states, logs, caches, and whatever else happens to lie in a folder.
GOES_UP = (
    CONFIG, "generation_config.json", PROCESSOR, "preprocessor_config.json", "video_preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja",
    CARD, "LICENSE", "LICENSE.*",
    *RESULT_FILES, "documents_day.json", "router_training.json",
    ".eval_results/*.yaml",
)  # fmt: skip
_PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

UNTRAINED_TAG = "untrained"
UNTRAINED_NOTE = (
    "> **Untrained.** The compressor or projector of this checkpoint has weights that were never trained "
    "(`compressor_trained: false`). It is a start for fine-tuning; its answers mean nothing yet.\n\n"
)


@dataclass
class UploadPlan:
    """Files by their name in the repository, what stays behind, and where the code stands.

    Attributes:
        files: Sources on the disk, in the folder itself or in the staging folder.
        left_out: Names in the folder that do not go up.
        code_repository: Hub id of the repository that has the code; `None` if it goes up beside the weights.
        is_adapter: Whether the weights are an adapter, to be loaded onto its base.
        notes: Sentences for the user.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    code_repository: str | None = None
    is_adapter: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def weights_in(self, names: Iterable[str]) -> set[str]:
        """Weights among the files of a repository: what is not sent again must go, or loading might take it."""
        patterns = ADAPTER_WEIGHTS if self.is_adapter else MODEL_WEIGHTS
        return {name for name in names if any(_matches(name, pattern) for pattern in (*patterns, *_PICKLED_WEIGHTS))}

    def check_kind(self, name: str, there: set[str]) -> None:
        """Refuse a model where an adapter stands, and the other way round: loading would mix them up.

        Args:
            name: Hub id, for the message.
            there: Files of the repository.
        """
        if (CONFIG if self.is_adapter else ADAPTER) in there:
            kinds = ("a whole model", "an adapter")
            standing, here = kinds if self.is_adapter else kinds[::-1]
            raise ValueError(f"{name} holds {standing}, and this is {here}. Push it to a repository of its own.")


def plan_upload(
    folder: Path,
    staging: Path,
    *,
    code_repository: str | None = None,
    base: str | None = None,
    untrained: bool = False,
    results: Iterable[str | Path] = (),
) -> UploadPlan:
    """Decide what goes up, and write into `staging` what goes up in another form.

    Args:
        folder: What `save_pretrained` of a model or of an adapter, and of the processor, wrote.
        staging: Empty folder.
        code_repository: Hub id of the repository that has the code; by default what the config says.
        base: Hub id that the adapter's config names as its base; by default what it says now.
        untrained: Whether a checkpoint with untrained parts is meant.
        results: Further files with results. `out/receipts/results.json` goes up as `receipts_results.json`.

    Raises:
        ValueError: Something is missing, unsafe, incomplete or untrained; the message says what to do.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Pass one that `save_pretrained` of a model and its processor wrote.")
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    plan = UploadPlan(is_adapter=ADAPTER in names and CONFIG not in names)
    weights = (ADAPTER, *ADAPTER_WEIGHTS) if plan.is_adapter else MODEL_WEIGHTS
    card = (folder / CARD).read_text(encoding="utf-8") if CARD in names else ""
    for name in names:
        shown = name.endswith(_PICTURES) and re.search(rf"[\s(\"'/]{re.escape(name)}\b", card)
        if shown or any(_matches(name, pattern) for pattern in (*GOES_UP, *weights)):
            plan.files[name] = folder / name
        elif not (name.endswith(".py") or name == MANIFEST_NAME):
            plan.left_out.append(name)
    for path in map(Path, results):
        if path.suffix != ".json" or not path.is_file():
            raise ValueError(f"`results` names {path}, which is no JSON file. Pass files that `evaluate` wrote.")
        whose = path.absolute().parent.name
        plan.files[f"{whose}_results.json" if path.name == "results.json" else path.name] = path
    _check_weights(folder, plan)
    if plan.is_adapter:
        _name_base(plan, staging, base)
    elif base is not None:
        raise ValueError(f"`base={base!r}` is for adapters, and {folder} holds a whole model. Leave it out.")
    config = None if plan.is_adapter else _check_config(folder)
    plan.code_repository = code_repository or getattr(config, "code_repository", None)
    _add_code(folder, plan, staging)
    if config is not None and not config.compressor_trained:
        if not untrained:
            raise ValueError(
                f"{folder} has `compressor_trained: false`: parts of it were never trained, and its answers would "
                "mean nothing to whoever loads it. Train it first, or pass --untrained; its card then says so."
            )
        _replace(plan, staging, CARD, untrained_card(card))
    return plan


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _replace(plan: UploadPlan, staging: Path, name: str, text: str) -> None:
    (staging / name).write_text(text, encoding="utf-8")
    plan.files[name] = staging / name


def untrained_card(card: str) -> str:
    """The card (`""`: none yet) with a tag and, before its text, a note that parts of the model are untrained."""
    found = ModelCard(card if card.strip() else "---\nlibrary_name: transformers\n---\n", ignore_metadata_errors=True)
    data: Any = found.data
    data.tags = sorted({*(data.tags or ()), UNTRAINED_TAG})
    if UNTRAINED_NOTE not in found.text:
        found.text = UNTRAINED_NOTE + found.text.lstrip()
    return str(found)


def _check_weights(folder: Path, plan: UploadPlan) -> None:
    """Refuse weights that are absent, pickled, cut off or not finite, or shards of which some are missing."""
    weights = [name for name in plan.files if name.endswith(".safetensors")]
    pickled = [name for name in plan.left_out if any(fnmatch(name, pattern) for pattern in _PICKLED_WEIGHTS)]
    if not weights:
        if pickled:
            raise ValueError(
                f"{folder / pickled[0]} is a pickle, which runs code when it is loaded. Load the model and save it "
                "again: `save_pretrained` writes safetensors."
            )
        raise ValueError(f"{folder} holds no weights. Pass a folder that `save_pretrained` of a model wrote.")
    if INDEX in plan.files:
        if "model.safetensors" in weights:
            raise ValueError(
                f"{folder} holds model.safetensors and shards, and loading would take the former. Remove the ones "
                "that are not meant."
            )
        shards = set(read_index(plan.files[INDEX]).values())
        missing = sorted(shards - set(weights))
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names. Save the model again.")
        for name in sorted(set(weights) - shards):  # of an earlier save
            plan.left_out.append(name)
            del plan.files[name]
    elif not plan.is_adapter and "model.safetensors" not in weights:
        raise ValueError(f"{folder} holds shards without {INDEX}. Save the model again.")
    for name in [name for name in weights if name in plan.files]:
        try:
            with safe_open(str(folder / name), "pt") as file:
                spoiled = spoiled_tensor((tensor, file.get_tensor(tensor)) for tensor in file.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is broken ({error}). Save the model again.") from error
        if spoiled is not None:
            raise ValueError(
                f"{folder / name} holds NaN or infinite numbers in `{spoiled}`, and its answers would be none. Take "
                "an earlier checkpoint, or train again with a smaller learning rate."
            )


def _check_config(folder: Path) -> AdaptiveLlavaConfig:
    path = folder / CONFIG
    kind = _read(path).get("model_type") if path.is_file() else None
    if kind != AdaptiveLlavaConfig.model_type:
        raise ValueError(
            f"{path} has `model_type={kind!r}`, and only {AdaptiveLlavaConfig.model_type!r} models and their adapters "
            "are pushed here. Pass the folder of one."
        )
    if not (folder / PROCESSOR).is_file():
        raise ValueError(
            f"{folder} has no {PROCESSOR}, without which nobody can prepare its inputs. Save the processor there too: "
            f"`processor.save_pretrained({str(folder)!r})`."
        )
    return AdaptiveLlavaConfig.from_pretrained(str(folder))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _name_base(plan: UploadPlan, staging: Path, base: str | None) -> None:
    config = _read(plan.files[ADAPTER])
    named = base or config.get("base_model_name_or_path") or ""
    if not HUB_ID.fullmatch(named) or Path(named).exists():
        raise ValueError(
            f"The adapter names {named!r} as its base, which nobody else can load. Push the base first, then pass "
            "--base user/base."
        )
    if base:
        _replace(plan, staging, ADAPTER, json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n")


def _add_code(folder: Path, plan: UploadPlan, staging: Path) -> None:
    """Put the code beside what needs it, or point both configs to where it stands."""
    _check_code_in(folder, plan)
    wanted = [name for name in (CONFIG, PROCESSOR) if name in plan.files]
    origin = plan.code_repository
    if origin is not None and (not HUB_ID.fullmatch(origin) or Path(origin).exists()):
        raise ValueError(f"`code_repository={origin!r}` is no id of a repository on the Hub. Pass --code user/name.")
    for name in wanted:
        config, references = _read(plan.files[name]), auto_map(origin)
        if name == PROCESSOR:
            references = {"AutoProcessor": references["AutoProcessor"]}
        new = config | {"auto_map": references, "code_repository": origin}
        if new != config:
            _replace(plan, staging, name, json.dumps(new, indent=2) + "\n")
    if wanted and origin is None:
        plan.files |= {name: staging / name for name in (*copy_code(staging), MANIFEST_NAME)}


def _check_code_in(folder: Path, plan: UploadPlan) -> None:
    """Code in the folder is replaced by this package's, unless somebody changed it."""
    manifest = folder / MANIFEST_NAME
    sums = _read(manifest)["sha256"] if manifest.is_file() else {}
    found = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    own = {reference.split(".")[0] + ".py" for reference in AUTO_MAP.values()} & set(found)
    changed = [name for name in differing_files(found, sums) if name in sums or own]
    if changed:
        raise ValueError(
            f"{', '.join(sorted(changed))} in {folder} differ from what was saved there ({MANIFEST_NAME}). Remove the "
            "Python files, and this package's go up in their place. Code of your own goes up with `hf upload`; "
            "`verify` refuses it."
        )
    if differing_files(found):
        plan.notes.append("The code in the folder is another release's; this package's goes up in its place.")
