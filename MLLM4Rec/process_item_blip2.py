"""MLLM4Rec, captions: an image-text model describes each item's image in a few words.

Runs `Inference/image_summary.py` with the data set's config (section `image_summary`); other
options are passed on.

In:  {data_dir}/items.jsonl
Out: {output_dir}/mllm4rec/image_summaries.jsonl    item_id, summary: the caption

    python MLLM4Rec/process_item_blip2.py --dataset_code sample
    python MLLM4Rec/process_item_blip2.py --config FILE --model_path Salesforce/blip2-opt-2.7b

Any model that transformers' AutoModelForImageTextToText loads. Items without an image are rejected,
each with its reason, and have no caption. A GPU for BLIP-2; not run yet at that size.
"""

from mllmrec.stage.main import run_main

import sys
from collections.abc import Sequence

from mllmrec.stage.options import config_of_dataset
from mllmrec.stage.scripts import load_script


def main(argv: Sequence[str] | None = None) -> None:
    config, words = config_of_dataset(sys.argv[1:] if argv is None else list(argv), __doc__)
    words = [word.replace("--model_path", "--model", 1) for word in words]
    if not any(word.split("=")[0] == "--system" for word in words):
        words += ["--system", "mllm4rec"]
    load_script("Inference/image_summary.py").main(["--config", config, *words])


if __name__ == "__main__":
    run_main(main)
