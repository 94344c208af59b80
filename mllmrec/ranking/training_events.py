"""What happens beside the steps of a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from mllmrec.evaluation import plots
from mllmrec.ranking.batches import EpochSampler
from mllmrec.ranking.checkpoints import seal_checkpoint
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.jsonl import atomic_file, write_rows
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.progress import Progress, progress_bar
from mllmrec.stage.schema import Row


class TrainingEvents(TrainerCallback):
    """What happens beside the steps: epochs of the sampler, checkpoints, log, curve, progress."""

    def __init__(self, sampler: EpochSampler, options: FineTuningOptions) -> None:
        self.sampler, self.folder = sampler, options.system_dir
        self.steps_per_epoch = len(sampler) // sampler.settings.step
        self.checkpoint_steps = options.checkpoint_steps
        self.progress: Progress | None = None
        self.overwritten: WholeOutput | None = None  # deleted when there is a first step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the progress where the training resumes."""
        if state.is_world_process_zero:
            self.progress = progress_bar(state.max_steps, "training", "step", state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Derive the sampler's epoch from the step: resumed in mid-epoch, the loader would not."""
        self.sampler.set_epoch(state.global_step // self.steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save every `checkpoint_steps` steps; the last of an epoch is saved when it is validated.

        The loss is logged with each checkpoint, which does not hold the sum of the losses since.
        """
        if self.overwritten is not None:
            self.overwritten.begin()
            self.overwritten = None
        if self.progress is not None:
            self.progress.update()
        ends_epoch = state.global_step % self.steps_per_epoch == 0
        steps = self.checkpoint_steps
        if steps and state.global_step % steps == 0 and not ends_epoch:
            control.should_save = control.should_log = True
        if args.eval_strategy == "steps":
            control.should_evaluate |= state.global_step >= state.max_steps
            control.should_save |= control.should_evaluate
            control.should_log |= control.should_evaluate

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the rest of the epoch."""
        control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint: from here on it can be resumed from."""
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write training_log.jsonl; training_curve.png only when more than a loss was logged."""
        if not state.is_world_process_zero:
            return
        log = state.log_history
        write_rows(self.folder / "training_log.jsonl", log)
        if "loss" not in log[-1]:
            with atomic_file(self.folder / "training_curve.png") as file:
                file.write(plots.training_curve(log))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the validation metrics."""
        if self.progress is not None:
            losses = [row["loss"] for row in state.log_history if "loss" in row]
            shown = [f"loss {losses[-1]:.4f}"] if losses else []
            metrics: Mapping[str, float] = kwargs["metrics"]
            for name, value in metrics.items():
                if name.startswith("eval_"):
                    shown.append(f"{name.removeprefix('eval_')} {value:.4f}")
            place = f"epoch {state.epoch:.0f} of {args.num_train_epochs:.0f}"
            if args.eval_strategy == "steps":
                place = f"step {state.global_step:,} of {state.max_steps:,}"
            tqdm.write(f"{place}: {', '.join(shown)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the last line of the progress."""
        if self.progress is not None:
            self.progress.close()


def mean_loss(log: Sequence[Row]) -> float:
    """Mean loss over all steps. log: the Trainer's rows, each loss a mean since the last row."""
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    return float(np.average(list(losses.values()), weights=np.diff([0, *losses])))
