"""Callbacks of the training: epochs, checkpoints, the log, the curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from mllmrec.evaluation import plots
from mllmrec.ranking.checkpoints import seal_checkpoint
from mllmrec.ranking.sampler import EpochSampler
from mllmrec.stage.jsonl import atomic_file, write_rows
from mllmrec.stage.progress import Progress, progress_bar
from mllmrec.stage.schema import Row


def _steps_per_epoch(args: Any, state: Any) -> int:
    return state.max_steps // int(args.num_train_epochs)


class SetEpochCallback(TrainerCallback):
    """Set the sampler's epoch: with several processes that resume in mid-epoch, the loader would
    not.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Derive the epoch from the step."""
        self.sampler.set_epoch(state.global_step // _steps_per_epoch(args, state))


class CheckpointCallback(TrainerCallback):
    """A checkpoint every `steps` steps, besides the one after each epoch.

    The loss is logged with each: a checkpoint does not hold the sum that the next line of the log
    would be the mean of.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and log; the last step of an epoch is saved after the validation."""
        ends_epoch = state.global_step % _steps_per_epoch(args, state) == 0
        if self.steps and state.global_step % self.steps == 0 and not ends_epoch:
            control.should_save = control.should_log = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint: from here on it can be resumed from."""
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Log the rest of the epoch."""
        control.should_log = True
        return control


class LogFileCallback(TrainerCallback):
    """Writes training_log.jsonl and training_curve.png into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the whole log; the curve only when more than a loss was logged."""
        if not state.is_world_process_zero:
            return
        log = state.log_history
        write_rows(self.folder / "training_log.jsonl", log)
        if "loss" not in log[-1]:
            with atomic_file(self.folder / "training_curve.png") as file:
                file.write(plots.training_curve(log))


class ProgressCallback(TrainerCallback):
    """Progress over the steps, and a line with the metrics after each validation.

    transformers' own is meant for a terminal.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start where the training resumes."""
        if state.is_world_process_zero:
            self.progress = progress_bar(state.max_steps, "training", "step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        if self.progress is not None:
            self.progress.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the validation metrics."""
        metrics: dict[str, float] = kwargs["metrics"]
        if self.progress is not None:
            losses = [row["loss"] for row in state.log_history if "loss" in row]
            shown = [f"loss {losses[-1]:.4f}"] if losses else []
            shown += [
                f"{name.removeprefix('eval_')} {value:.4f}"
                for name, value in metrics.items()
                if name.startswith("eval_")
            ]
            line = f"epoch {state.epoch:.0f} of {args.num_train_epochs:.0f}: {', '.join(shown)}"
            tqdm.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the last line."""
        if self.progress is not None:
            self.progress.close()


def mean_loss(log: Sequence[Row]) -> float:
    """Mean of the loss over all steps.

    log: the Trainer's rows, each loss a mean since the last row.
    """
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    return float(np.average(list(losses.values()), weights=np.diff([0, *losses])))
