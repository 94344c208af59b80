"""A dress rehearsal of the full-size path on a CPU: every stage once, 7B and 8B weights in nf4.

In:  nothing; optional titles of MicroLens-50k in data/raw/microlens (else titles of the sample)
Out: {folder}/rehearsal.json: per stage peak memory and seconds; checkpoints, data and outputs in
     {folder}

    python scripts/rehearsal/rehearse.py --folder outputs/rehearsal

Weights are random, so texts and scores mean nothing; shapes, tokens, memory and every line of code
on the way are those of the real checkpoints. A stage that is done is not run again. At most two
checkpoints (31 GB) are on disk at a time with --delete.
"""

from mllmrec.stage.main import run_main

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from checkpoints import write_checkpoint

from mllmrec.data import sample_world as world
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.options import ROOT
from mllmrec.stage.scripts import load_script

COVER = (300, 640)  # pixels; LLaVA-NeXT cuts it into two tiles beside the whole image
BASE_GB = "base_gb"


@dataclass(frozen=True)
class Step:
    """A stage of the rehearsal.

    model: of the checkpoints, "" for none; words: of the command.
    """

    name: str
    script: str
    model: str = ""
    words: tuple[str, ...] = ()


STEPS = (
    Step("stage 2, image summaries", "Inference/image_summary.py", "llava"),
    Step("stage 3, preferences", "Inference/preference_recurrent.py", "llama3"),
    Step("stage 4, training rows", "MLLM-MSR/train/dataset_create.py"),
    Step("stage 4, test rows", "MLLM-MSR/test/multi_col_dataset.py"),
    Step("stage 5, one optimizer step", "MLLM-MSR/train/train_llava_sft.py", "llava"),
    Step("stage 6, scores", "MLLM-MSR/test/test_with_llava_sft.py", "llava"),
    Step(
        "MLLM4Rec's ranker",
        "MLLM4Rec/train_ranker.py",
        "llama2",
        ("--lists", "users", "--dataset_code", "sample", "--summaries"),
    ),
)


def titles(count):
    """Titles of MicroLens-50k if they are there, else of the sample."""
    path = ROOT / "data/raw/microlens/MicroLens-50k_titles.csv"
    if path.exists():
        found, _ = load_script("data_processing/microlens.py").read_titles(path)
        return found.head(count).tolist()
    rng = np.random.default_rng(0)
    return [world.random_item(rng)["title"] for _ in range(count)]


def write_data(folder):
    """items.jsonl, users.jsonl and covers: a user of each split with two blocks and one negative.

    Targets and negatives have covers; items of the histories have none, so that stage 2, the
    slowest one, has two rows only.
    """
    rng, names = np.random.default_rng(0), titles(6)
    (folder / "covers").mkdir(parents=True, exist_ok=True)
    items = []
    for number, title in enumerate(names):
        image = None
        if number >= 4:
            image = f"covers/{number}.png"
            world.draw_cover("red", "star", rng).resize(COVER).save(folder / image)
        items.append({"item_id": str(number), "title": title, "image": image})
    line = {"history": ["0", "1", "2", "3"], "target": "4", "negatives": ["5"], "fold": None}
    users = [
        {"user_id": split, **line, "split": split} for split in ("train", "validation", "test")
    ]
    write_rows(folder / "items.jsonl", items)
    write_rows(folder / "users.jsonl", users)


def write_config(folder):
    """The config of the rehearsal, with the published hyper-parameters where they fit two cores."""
    models, path = folder / "models", folder / "config.yaml"
    quantised = {"quantization": "nf4"}
    ranking = quantised | {"model": str(models / "llava"), "image_tiles": "single"}
    short = {"epochs": 1, "batch_size": 1, "accumulation": 2, "workers": 0}
    config = {
        "base": str(ROOT / "configs/systems/mllm_msr.yaml"),
        "common": {"data_dir": str(folder / "data"), "output_dir": str(folder / "outputs")},
        "image_summary": quantised | {"model": str(models / "llava"), "max_new_tokens": 4},
        "preference": quantised | {"model": str(models / "llama3"), "max_new_tokens": 8},
        "train": ranking | short,
        "score": ranking,
        "ranker": quantised | short | {"model": str(models / "llama2"), "prompt_format": "{text}"},
    }
    config["ranker"] |= {"candidates": 2, "gradient_checkpointing": True, "accumulation": 1}
    path.write_text(yaml.safe_dump(config))
    return path


class PeakMemory(threading.Thread):
    """Watches a process: peak of its own memory, without files that are mapped, in GB."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process, self.gb = process, 0.0

    def run(self):
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                self.gb = max(self.gb, int(fields["RssAnon"].split()[0]) * 1024 / 1e9)
            except (OSError, KeyError, ValueError):
                pass  # the process has just ended
            time.sleep(0.2)


def measured(words):
    """(peak in GB, seconds) of a Python process. Raises InputError if it fails."""
    started = time.time()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ)
    watch = PeakMemory(process)
    watch.start()
    if process.wait():
        raise InputError(f"python {' '.join(words)} ended with exit code {process.returncode}")
    watch.join()
    return round(watch.gb, 2), round(time.time() - started, 1)


def rehearse(folder, size, delete):
    """Run all steps that are not in rehearsal.json yet."""
    path = folder / "rehearsal.json"
    found = json.loads(path.read_text()) if path.exists() else {"size": size}
    if found["size"] != size:
        raise InputError(
            f"{path} is of size {found['size']}; name another --folder for size {size}"
        )
    if not (folder / "data/users.jsonl").exists():
        write_data(folder / "data")
    config, later = write_config(folder), [step.model for step in STEPS]
    if BASE_GB not in found:  # what Python and its libraries take without any model
        found[BASE_GB] = measured(["-c", "import mllmrec.models.loading, mllmrec.models.lora"])[0]
    for number, step in enumerate(STEPS):
        if step.name in found:
            continue
        if step.model:
            write_checkpoint(folder / "models" / step.model, step.model, size, folder)
        words = list(step.words)
        if step.words:
            words.append(str(folder / "outputs/mllm_msr/image_summaries.jsonl"))
        # All of the stage, also what an interrupted rehearsal has done of it.
        gb, seconds = measured(
            [step.script, "--config", str(config), "--overwrite", "true", *words]
        )
        found[step.name] = {"peak_gb": gb, "seconds": seconds}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{step.name}: {gb} GB, {seconds} s", flush=True)
        if delete and step.model and step.model not in later[number + 1 :]:
            shutil.rmtree(folder / "models" / step.model)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="outputs/rehearsal")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--delete", action="store_true", help="a checkpoint after its last stage")
    args = parser.parse_args(argv)
    folder = Path(args.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rehearse(folder, args.size, args.delete)
    rows = len(list(read_rows(folder / "outputs/mllm_msr/sft/scores.jsonl")))
    print(f"all stages ran; {rows} candidates scored; {folder / 'rehearsal.json'}")


if __name__ == "__main__":
    run_main(main)
