"""MLLM4Rec, data: raw files -> users.jsonl and items.jsonl, leave-one-out, and the images.

Runs scripts/01_prepare_data.sh with the data set's config; other options are passed on.

    python MLLM4Rec/process_item.py --dataset_code ml-100k
    python MLLM4Rec/process_item.py --dataset_code beauty --raw_dir DIR

The loader is the one that the config names: `data_processing/amazon_2014.py`, `movielens.py` or
`sample.py`. CPU.
"""

from mllmrec.stage.main import run_main

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import PART, ROOT, config_of_dataset, load_config, print_next


def main(argv: Sequence[str] | None = None) -> None:
    config, words = config_of_dataset(sys.argv[1:] if argv is None else list(argv), __doc__)
    command = ["bash", str(ROOT / "scripts/01_prepare_data.sh"), config, *words]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable, PART: "true"})
    if done.returncode:
        raise InputError("the data were not prepared, see above")
    folder = load_config(Path(config)).get("common", {}).get("data_dir", "")
    for word, following in pairwise([*words, ""]):
        if word.split("=")[0] == "--data_dir":
            folder = word.partition("=")[2] or following
    items = Path(folder, "items.jsonl")
    has_images = items.exists() and any(row["image"] for row in read_rows(items))
    follows = "02_captions" if has_images else "03_retriever"
    print_next(f"scripts/mllm4rec/{follows}.sh", config, words)


if __name__ == "__main__":
    run_main(main)
