"""Toy stages, one for each kind of output, for the tests of outputs and of kills.

tone: the setting that decides the content; stop_after: crash after so many rows or steps.
"""

import json
import shutil
import zipfile
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.ranking.checkpoints import last_complete_checkpoint, seal_checkpoint
from mllmrec.stage.jsonl import rejected_path, write_json, write_rejected, write_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import RowOutput, WholeOutput, new_folder
from mllmrec.stage.record import Job

IDS = [f"i{n}" for n in range(12)]
STEPS = (1, 2, 3)


@dataclass
class Toy(CommonOptions):
    tone: str = "low"


def toy_job(inputs=None, stage="toy", **options):
    return Job.of(Toy(config="none", **options), inputs or {}, stage=stage)


def stop():
    raise RuntimeError("stop")


def reasons(tone):
    """Rejected ids with their reasons."""
    return {"i2": f"too {tone}"} if tone == "low" else {}


def open_files(folder, **options):
    paths = [folder / "one.jsonl", folder / "two.jsonl"]
    return WholeOutput(toy_job(**options), paths, [rejected_path(paths[0])])


def write_files(folder, tone="low", **options):
    """Two outputs and an optional third."""
    with open_files(folder, tone=tone, **options) as output:
        if output.is_needed:
            output.begin()
            for path in output.outputs:
                write_rows(path, [{"id": i, "text": f"{path.stem} {tone}"} for i in IDS])
            lines = [{"id": i, "reason": reason} for i, reason in reasons(tone).items()]
            write_rejected(output.optional[0], lines)
            output.finish({"out": len(IDS)})


def write_folder(folder, tone="low", **options):
    """A folder."""
    target = folder / "merged"
    with WholeOutput(toy_job(tone=tone, **options), [target]) as output:
        if output.is_needed:
            with new_folder(target) as temporary:
                write_json(temporary / "config.json", tone)
                write_json(temporary / f"{tone}.json", tone)
                output.finish({}, temporary)


def open_rows(folder, retry=False, **options):
    return RowOutput(folder / "x.jsonl", "item_id", IDS, toy_job(**options), retry)


def append_rows(folder, tone="low", retry=False, stop_after=None, **options):
    """Rows that are resumed; returns the ids that were computed. retry: nothing is rejected."""
    output, computed = open_rows(folder, retry, tone=tone, **options), []
    if output.is_up_to_date():
        return computed
    with output:
        for item_id in output.todo:
            if len(computed) == stop_after:
                stop()
            if item_id in reasons(tone) and not retry:
                output.reject(item_id, reasons(tone)[item_id])
            else:
                output.write({"item_id": item_id, "summary": f"{tone} {item_id}"})
            computed.append(item_id)
    return computed


def open_training(folder, **options):
    files = [folder / "training_log.jsonl", folder / "training.rejected.jsonl"]
    return WholeOutput(toy_job(**options), [folder / "adapter"], files, folder / "checkpoints")


def train_adapter(folder, tone="low", stop_after=None, **options):
    """A folder that takes long: each step adds to what the checkpoint of the last one holds."""
    with open_training(folder, tone=tone, **options) as output:
        if not output.is_needed:
            return
        output.begin()
        last = last_complete_checkpoint(output.checkpoints)
        weights = json.loads(Path(last, "weights.json").read_bytes()) if last else []
        for step in STEPS[len(weights) :]:
            weights.append(f"{tone} {step}")
            write_checkpoint(output.checkpoints / f"checkpoint-{step}", weights)
            if step == stop_after:  # in the middle of the checkpoint
                (output.checkpoints / f"checkpoint-{step}" / "digests.json").unlink()
                (output.checkpoints / f"checkpoint-{step}" / "weights.json").write_text("[")
                stop()
            for old in output.checkpoints.glob(f"checkpoint-{step - 2}"):
                shutil.rmtree(old)  # as transformers does
        log, rejected = output.optional
        write_rows(log, [{"step": step} for step in STEPS])
        write_rejected(rejected, [{"reason": reason} for reason in reasons(tone).values()])
        with new_folder(output.path) as temporary:
            write_json(temporary / "weights.json", weights)
            output.finish({}, temporary)


def write_checkpoint(folder, weights):
    """As the Trainer does: file by file, over what is there."""
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(json.dumps(weights))
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": null}')
    with zipfile.ZipFile(folder / "rng_state.pth", "w") as file:
        file.writestr(zipfile.ZipInfo("data"), "state")
    seal_checkpoint(folder)
