"""The adapter of stage 5, merged into its base model: a model folder that needs no PEFT.

In:  {output_dir}/{system}/adapter/
Out: {output_dir}/{system}/merged/   weights, processor and run.json; score it with
                                     `--model {output_dir}/{system}/merged --adapter none`

    python MLLM-MSR/train/merge_adapter.py --config configs/microlens.yaml

As much memory as the model's weights take (7B: 15 GB in 16 bit). dtype: that of the training,
unless --dtype is set. An adapter of a quantised model is merged with `--allow_other quantization`
only: its scores become others, and what a trial question says of it is printed.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.models.model_options import ALLOW_OTHER, ModelOptions
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option, parse_options, print_next, print_options
from mllmrec.stage.output import WholeOutput, new_folder
from mllmrec.stage.record import Job, file_digests, read_record

SECTION = "merge"


@dataclass
class Options(ModelOptions):
    adapter: str = option("", "folder of the LoRA weights; default: {output_dir}/{system}/adapter")
    model: str = option("", "the base model; default: the one that the adapter names")
    merged: str = option("", "default: {output_dir}/{system}/merged")
    allow_other: list[str] = option([], ALLOW_OTHER)


def merge(name: str, adapter: Path, merged: Path, options: Options) -> float | None:
    """W + (alpha / r) B A for every adapted layer, saved as a plain model.

    Returns by how much a logit of a trial question changes if the adapter is of a quantised model.
    """
    from mllmrec.models.adapters import load_adapter, trained_with
    from mllmrec.models.chat import ChatProcessor
    from mllmrec.models.loading import load_multimodal
    from mllmrec.models.trial import trial_logits

    used, before = trained_with(adapter), None
    prompt_format, stored = used.get("prompt_format", ""), used.get("quantization", "none")
    if stored != "none":
        model, processor = load_multimodal(name, replace(options, quantization=stored))
        chat = ChatProcessor(processor, prompt_format=prompt_format)
        before = trial_logits(load_adapter(model, adapter, name), chat)
        del model
    model, processor = load_multimodal(name, options)
    model = load_adapter(model, adapter, name).merge_and_unload(safe_merge=True)
    model.save_pretrained(merged)
    processor.save_pretrained(merged)
    if before is None:
        return None
    after = trial_logits(model, ChatProcessor(processor, prompt_format=prompt_format))
    return float((after.float() - before.float()).abs().max())


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
    if merged.exists() and (read_record(merged) or {}).get("stage") != SECTION:
        raise InputError(
            f"{merged} is there and is no merged model of this script, so it would be lost; move "
            "it away or name another --merged"
        )
    from mllmrec.models.adapters import adapter_base, check_adapter, trained_with
    from mllmrec.models.model_card import write_model_card

    name = options.model or adapter_base(adapter)
    check_adapter(adapter, name)
    used = trained_with(adapter)
    stored = used.get("quantization", "none")
    if stored != "none" and "quantization" not in options.allow_other:
        raise InputError(
            f"{adapter} was trained with --quantization {stored}: merged into a model that is not, "
            "it has other scores; if that is wanted, pass --allow_other quantization"
        )
    ignore = ("adapter", "merged", "model", "allow_other")
    job = Job.of(options, file_digests(adapter, name), ignore, stage=SECTION)
    record, used = read_record(adapter) or {}, used | {"quantization": "none"}
    with WholeOutput(job, [merged]) as output:
        if not output.is_needed:
            return
        if options.dtype == "auto":
            options.dtype = record.get("dtype", "auto")
        with new_folder(merged) as folder:
            change = merge(name, adapter, folder, options)
            output.finish({}, folder, trained_with=used)
            if record:
                write_model_card(folder, record, merged=True)
    if change is not None:
        print(
            "the adapter was trained on a quantised model: scores differ after the merge, logits "
            f"of a trial question by up to {change:.3f}"
        )
    print(f"wrote {merged}")
    words = ["--model", str(merged), "--adapter", "none", "--variant", "sft_merged"]
    default = asdict(RankerOptions())
    for option_name, value in used.items():
        if value != default[option_name]:
            words += [f"--{option_name}", str(value)]
    print_next("MLLM-MSR/test/test_with_llava_sft.py", options.config, options.words, words)


if __name__ == "__main__":
    run_main(main)
