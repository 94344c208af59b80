"""The adapter of stage 5, added into its base model: one model folder that needs neither PEFT nor this repository.

In:  {output_dir}/adapter/
Out: {output_dir}/merged/   weights, processor and run.json; `--model {output_dir}/merged --adapter none` scores with it

    python MLLM-MSR/train/merge_adapter.py --config configs/microlens.yaml

As much memory as the model's weights take (7B: 15 GB in 16 bit). Number format: that of the training, unless --dtype is set.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from data_processing.config import ModelArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.run_record import digests, is_up_to_date, read_record, settings_of, write_record
from Inference.recommender import adapter_base, attach_adapter, check_adapter


@dataclass
class Args(ModelArgs):
    adapter: str = option("", "folder of the LoRA weights; default: {output_dir}/adapter")
    model: str = option("", "the model that the adapter was trained on; default: the one that the adapter names")
    merged: str = option("", "default: {output_dir}/merged")


def main(argv=None):
    args = parse_args(Args, "merge", argv, __doc__)
    show(args, "merging the adapter into its base model")
    folder = Path(args.output_dir)
    adapter, merged = Path(args.adapter or folder / "adapter"), Path(args.merged or folder / "merged")
    if args.quantization != "none":
        raise InputError("a quantised model cannot take up an adapter exactly; merge without --quantization, then load the result with it")
    name = args.model or adapter_base(adapter)
    check_adapter(adapter, name)
    settings, inputs = settings_of(args, ("adapter", "merged", "model")), digests(adapter, name)
    if is_up_to_date([merged], settings, inputs, args.overwrite):
        print(f"{merged} is up to date, nothing to do")
        return
    started = time.monotonic()
    record = read_record(adapter) or {}
    merge(name, adapter, merged, record.get("dtype", "auto") if args.dtype == "auto" else args.dtype, args.attention)
    write_record(merged, args, settings, inputs, time.monotonic() - started, {})
    tiles = record.get("settings", {}).get("image_tiles", "full")
    options = f"--model {merged} --adapter none --variant merged" + (f" --image_tiles {tiles}" if tiles != "full" else "")
    print(f"wrote {merged}; score with it: python MLLM-MSR/test/test_with_llava_sft.py --config {args.config} {options}")


def merge(name, adapter, merged, dtype, attention):
    from Inference.models import load_multimodal

    model, processor = load_multimodal(name, dtype, attention)
    model = attach_adapter(model, adapter, name).merge_and_unload(safe_merge=True)
    model.save_pretrained(merged)
    processor.save_pretrained(merged)


if __name__ == "__main__":
    run(main)
