"""The adapter of stage 5, merged into its base model: a model folder that needs no PEFT.

In:  {output_dir}/{system}/adapter/
Out: {output_dir}/{system}/merged/   weights, processor and run.json; score it with
                                     `--model {output_dir}/{system}/merged --adapter none`

    python MLLM-MSR/train/merge_adapter.py --config configs/microlens.yaml

As much memory as the model's weights take (7B: 15 GB in 16 bit). dtype: that of the training,
unless --dtype is set.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.models.model_options import ModelOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.output import WholeOutput, new_folder
from mllmrec.stage.record import Job, file_digests, read_record

SECTION = "merge"


@dataclass
class Options(ModelOptions):
    adapter: str = option("", "folder of the LoRA weights; default: {output_dir}/{system}/adapter")
    model: str = option("", "the base model; default: the one that the adapter names")
    merged: str = option("", "default: {output_dir}/{system}/merged")


def merge(name: str, adapter: Path, merged: Path, options: Options) -> None:
    """W + (alpha / r) B A for every adapted layer, saved as a plain model."""
    from mllmrec.models.adapters import load_adapter
    from mllmrec.models.loading import load_multimodal

    model, processor = load_multimodal(name, options)
    model = load_adapter(model, adapter, name).merge_and_unload(safe_merge=True)
    model.save_pretrained(merged)
    processor.save_pretrained(merged)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "merging the adapter into its base model")
    adapter = Path(options.adapter or options.system_dir / "adapter")
    merged = Path(options.merged or options.system_dir / "merged")
    if options.quantization != "none":
        raise InputError(
            "an adapter cannot be merged exactly into a quantised model; merge without "
            "--quantization, then load the result with it"
        )
    if merged.exists() and read_record(merged) is None:  # it would be deleted
        raise InputError(
            f"{merged} is there and is no merged model of this script; move it away or "
            "name another --merged"
        )
    from mllmrec.models.adapters import adapter_base, check_adapter
    from mllmrec.models.model_card import write_model_card

    name = options.model or adapter_base(adapter)
    check_adapter(adapter, name)
    job = Job.of(options, file_digests(adapter, name), ("adapter", "merged", "model"))
    record = read_record(adapter) or {}
    with WholeOutput(job, [merged]) as output:
        if not output.is_needed:
            return
        if options.dtype == "auto":
            options.dtype = record.get("dtype", "auto")
        with new_folder(merged) as folder:
            merge(name, adapter, folder, options)
            output.finish({}, folder)
            if record:
                write_model_card(folder, record, merged=True)
    tiles = record.get("settings", {}).get("image_tiles", "full")
    words = f"--model {merged} --adapter none --variant merged"
    words += f" --image_tiles {tiles}" if tiles != "full" else ""
    print(
        f"wrote {merged}; score it with: python MLLM-MSR/test/test_with_llava_sft.py "
        f"--config {options.config} {words}"
    )


if __name__ == "__main__":
    run_main(main)
