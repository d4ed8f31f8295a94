"""A trainer that leaves nothing half-written and no checkpoint with numbers that are not finite.

A checkpoint is written below `<output_dir>/_unfinished`, brought to the disk and given its name at the end; older ones
are removed only then. The final model goes the same way, and its config comes last. So whoever looks at `output_dir`,
also after a kill, sees whole checkpoints, and a model that is whole or does not load at all.

A loss that is NaN or infinite stops the training when it is logged, or before anything is saved; weights and optimizer
are looked at before they are saved. Nothing else makes the host wait for the device.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import trainer_utils
from trl import SFTTrainer

from adaptive_llava.hub_cards.card_facts import FACTS, note_training
from adaptive_llava.hub_cards.push import Pushed, push
from adaptive_llava.training.finite_training import FirstSpoiledStep, all_finite
from adaptive_llava.training.resume_point import UNFINISHED, newest_whole
from adaptive_llava.training.whole_folder import NotWritten, move_into, replace_folder, tell_what_is_not_written


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, what is left, and what to do."""


class WholeCheckpointTrainer(SFTTrainer):
    """`SFTTrainer` as the module's docstring says; takes the arguments of `SFTTrainer`.

    Raises:
        TrainingStopped: In training and saving: a loss, weights or optimizer that are not finite, or a checkpoint that
            could not be written.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self._stage: Path | None = None
        super().__init__(*arguments, **options)
        self._spoiled = FirstSpoiledStep(self.accelerator)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        self._spoiled.note(self.state.global_step + 1, loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_losses()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        final = str(self.args.output_dir)
        if _internal_call or output_dir not in (None, final):
            super().save_model(output_dir, _internal_call)
            return
        self._check_numbers()
        with self._staging(final, "model") as stage:
            super().save_model(str(stage / "model"), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_into(stage / "model", Path(final))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Pushed | None:
        """Upload the final model as `python -m adaptive_llava push` does: one commit, without what only trainers read.

        Args:
            commit_message: Title of the commit.
            blocking: Is taken for True: the upload is complete when this returns.
            token: By default that of the training arguments, then that of `hf auth login`.
            revision: Branch, by default that of the training arguments, then `main`.
            card: See `create_model_card`.

        Returns:
            The commit; `None` in any process but the first.

        Raises:
            ValueError: What was saved cannot be pushed; it is in `output_dir`, and the message says what to do.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = str(self.hub_model_id)
        self.create_model_card(model_name=card.pop("model_name", name.split("/")[-1]), **card)
        self._finish_current_push()
        revision = revision or getattr(self.args, "hub_revision", None)
        options: dict[str, Any] = {"token": token, "revision": revision, "message": commit_message}
        return push(str(self.args.output_dir), name, untrained=True, **options)

    def save_state(self) -> None:
        with self._small_files():
            super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        with self._small_files("all_results.json"):
            super().save_metrics(split, metrics, combined)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """State base and dataset in `card.yaml`, from which `card` and `push` write the card.

        TRL's own is for text models: its snippet would not run.

        Args:
            model_name: Is not used: the card has the name of the repository.
            dataset_name: What it was trained on.
            tags: Are not used.
        """
        if self.is_world_process_zero():
            with self._small_files(FACTS):
                config: Any = self.model.config
                note_training(Path(str(self.args.output_dir)), config._name_or_path, dataset_name)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_numbers()
        folder = self._get_output_dir(trial)
        name = f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._staging(folder, name) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == stage:  # where it will be
                self.state.best_model_checkpoint = os.path.join(folder, name)
                if self.args.should_save:
                    self.state.save_to_json(str(stage / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                replace_folder(stage / name, Path(folder, name))
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(os.path.join(folder, name))
        if self.args.should_save:
            self._remove_older(folder)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._stage is None else str(self._stage)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not from a folder that is about to be renamed: the upload goes on in the background."""

    def _remove_older(self, folder: str) -> None:
        rotate: Any = getattr(self, "_rotate_checkpoints", None)  # transformers 4
        if rotate is not None:
            rotate(use_mtime=True, output_dir=folder)
            return
        trainer_utils.rotate_checkpoints(
            output_dir=folder,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    @contextmanager
    def _staging(self, folder: str, name: str) -> Iterator[Path]:
        """The folder in which `name` is to be written; all processes enter it together."""
        stage = Path(folder, UNFINISHED)
        if self.args.should_save:
            shutil.rmtree(stage, ignore_errors=True)  # a killed run's
        self.accelerator.wait_for_everyone()
        try:
            with self._told(Path(folder, name)):
                if self.args.should_save:
                    stage.mkdir(parents=True, exist_ok=True)
                yield stage
        finally:
            if self.args.should_save:
                shutil.rmtree(stage, ignore_errors=True)

    @contextmanager
    def _small_files(self, *kept: str) -> Iterator[None]:
        """What is written to `args.output_dir` in the block appears whole; `kept` are read there and written again."""
        if not self.is_world_process_zero():
            yield
            return
        final = str(self.args.output_dir)
        stage = Path(final, UNFINISHED, "files")
        try:
            with self._told(Path(final, "the run's record")):
                stage.mkdir(parents=True, exist_ok=True)
                for name in kept:
                    if Path(final, name).is_file():
                        shutil.copy(Path(final, name), stage / name)
                self.args.output_dir = str(stage)
                yield
                move_into(stage, Path(final))
        finally:
            self.args.output_dir = final
            shutil.rmtree(stage, ignore_errors=True)
            if self._stage is None:
                shutil.rmtree(stage.parent, ignore_errors=True)

    def _check_losses(self) -> None:
        step = self._spoiled.ask()
        if step is not None:
            raise TrainingStopped(self._not_finite(step, "the loss"))

    def _check_numbers(self) -> None:
        self._check_losses()
        model: Any = self.model
        if not all_finite(model, getattr(self.optimizer, "optimizer", self.optimizer), self.accelerator):
            raise TrainingStopped(self._not_finite(self.state.global_step, "a weight or the optimizer's memory of it"))

    def _not_finite(self, step: int, what: str) -> str:
        return (
            f"Training stopped at step {step}: {what} became NaN or infinite. Nothing was saved since. {self._left()} "
            "The same command would come to the same step. If a row of the data is the cause, mend it first; if "
            f"`learning_rate={self.args.learning_rate}` is, start again with a smaller one in another `output_dir`, "
            "since a checkpoint keeps its rate."
        )

    @contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        try:
            with tell_what_is_not_written(path, self.args.output_dir):
                yield
        except NotWritten as error:
            raise TrainingStopped(
                f"Training stopped at step {self.state.global_step}: {error} {self._left()}"
            ) from error

    def _left(self) -> str:
        newest = newest_whole(str(self.args.output_dir))
        if newest is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {newest}; --resume_from_checkpoint last goes on from it."
