"""Stage 6: every test row is scored by one forward pass, p = p(yes) / (p(yes) + p(no)).

(Paper, equation 1.)

In:  {output_dir}/{system}/test.jsonl, adapter/
Out: {output_dir}/{system}/{variant}/scores.jsonl   user_id, item_id, label, score,
                                                    logits: {No, Yes}
     scores.rejected.jsonl                          all rows of users with a question that is too
                                                    long

    python MLLM-MSR/test/test_with_llava_sft.py --config configs/microlens.yaml
    python MLLM-MSR/test/test_with_llava_sft.py --config configs/microlens.yaml --adapter none

`--split validation` scores validation.jsonl instead, to {variant}/validation_scores.jsonl.
`--adapter none` is the paper's LLaVA without SFT. `--hide nothing image preference` also scores
with gray images and with empty preferences: what each contributes. An interrupted run resumes.
Sample: 10,164 rows in about 12 seconds on 2 CPU cores. LLaVA-v1.6-Mistral-7B: a GPU; its weights
take 15 GB in bfloat16; 20 rows a second on an H200 (docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from mllmrec.data.images import image_digests, padded_sizes
from mllmrec.evaluation.metrics import CandidateLists
from mllmrec.models.model_options import ALLOW_OTHER
from mllmrec.ranking.row_checks import check_row_images, check_rows_source
from mllmrec.ranking.rows import first_users, question_text, replace_preference
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import CommonOptions, option, parse_options, print_next, print_options
from mllmrec.stage.output import RowOutput
from mllmrec.stage.progress import progress_bar
from mllmrec.stage.record import Digests, Job, file_digests
from mllmrec.stage.schema import Row

SECTION = "score"
SPEED_OPTIONS = (
    "batch_tokens",
    "reuse_prefix",
    "adapter",
    "variant",
    "hide",
    "allow_other",
    "split",
)


@dataclass
class Options(RankerOptions):
    adapter: str = option(
        "", "folder of the LoRA weights, or none; default: {output_dir}/{system}/adapter"
    )
    variant: str = option(
        "",
        "name of the row in metrics.json; default: sft, or zero_shot without adapter, after the "
        "name of a --system other than mllm_msr, followed by _no_image or _no_preference",
        pattern=r"^[\w-]*$",
    )
    split: Literal["test", "validation"] = option(
        "test", "users that are scored; validation: to validation_scores.jsonl, for the fusion"
    )
    hide: list[Literal["nothing", "image", "preference"]] = option(
        ["nothing"],
        "what the model does not get, one variant each: nothing, image, preference",
        min_length=1,
    )
    allow_other: list[str] = option([], ALLOW_OTHER)
    batch_tokens: int = option(16384, "tokens in a batch, images included", ge=1)
    reuse_prefix: bool = option(
        True, "compute what all prompts of an item (without images: of a user) share only once"
    )


def score(
    rows: list[Row], hidden: str, output: RowOutput, model: Any, chat: Any, options: Options
) -> None:
    """Score the rows that `output` lacks: p = p(yes) / (p(yes) + p(no)) (paper, equation 1).

    Both probabilities come from one forward pass, from the logits at the last position of the
    prompt. Prompts of one item begin with the same image and title, those without image with one
    user's preference: rows are grouped by that prefix, whose keys and values are computed once.
    """
    from mllmrec.ranking.answers import answer_set
    from mllmrec.ranking.reader import RowReader
    from mllmrec.ranking.scoring import ScoringOptions, write_scores

    answers, gray = answer_set("yes_no", options), hidden == "image"
    reader = RowReader(chat, options.system_dir, options.max_text_tokens, gray, answers)
    reader.pad_images(rows, options.pad_images)
    rows = rows[: len(output.wanted)]
    if hidden == "preference":
        rows = [replace_preference(row, "") for row in rows]
    settings = ScoringOptions(options.batch_tokens, options.reuse_prefix)
    name = f"scores, {output.path.parent.name}"
    with output, progress_bar(len(output.todo), name, "row") as progress:
        write_scores(model, reader, rows, output, settings, progress)
        output.counts["shortened"] = reader.shortened
    output.log_summary()


def variant_name(options: Options, hidden: str) -> str:
    """Folder of the scores, and name of the row in metrics.json."""
    name = options.variant or ("zero_shot" if options.adapter == "none" else "sft")
    if not options.variant and options.system != CommonOptions().system:
        name = f"{options.system}_{name}"  # a row of the table names one variant of one system
    return name if hidden == "nothing" else f"{name}_no_{hidden}"


def row_images(rows: list[Row], options: Options) -> list[tuple[Any, Any]]:
    """(digest, size to which it is padded) of each row's image, None without one."""
    names = [row["images"][0] if row["images"] else None for row in rows]
    paths = [options.system_dir / name if name else None for name in names]
    padded = padded_sizes(paths, options.pad_images) if options.pad_images else [None] * len(rows)
    digests = image_digests(paths)
    return [(digests[path], size) for path, size in zip(paths, padded, strict=True)]


def open_outputs(rows: list[Row], inputs: Digests, options: Options) -> dict[str, RowOutput]:
    """What is hidden -> its scores.jsonl, of the variants that are not up to date."""
    images = row_images(rows, options)
    limit = len(first_users(rows, options.limit))  # --limit counts users
    outputs: dict[str, RowOutput] = {}
    for hidden in dict.fromkeys(options.hide):
        name = "scores.jsonl" if options.split == "test" else "validation_scores.jsonl"
        path = options.system_dir / variant_name(options, hidden) / name
        job = Job.of(options, inputs, SPEED_OPTIONS, stage=SECTION, hidden=hidden)
        job = replace(job, limit=limit)
        sources = {
            (row["user_id"], row["item_id"]): job.source(question_text(row), row["label"], *image)
            for row, image in zip(rows, images, strict=True)
        }
        output = RowOutput(path, ("user_id", "item_id"), sources, job)
        if not output.is_up_to_date():
            outputs[hidden] = output
    return outputs


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 6, scoring")
    folder, test_path = options.system_dir, options.system_dir / f"{options.split}.jsonl"
    rows = read_rows(test_path)
    if len({(row["user_id"], row["item_id"]) for row in rows}) != len(rows):
        raise InputError(f"{test_path} has a row twice; make it again with scripts/04_datasets.sh")
    check_row_images(rows, test_path, options)
    check_rows_source(rows, test_path, options.split, options)
    # Imported here, so that --help and a missing input are answered at once.
    from mllmrec.models.adapters import check_adapter, check_use, load_adapter
    from mllmrec.ranking.reader import load_ranker

    adapter = None if options.adapter == "none" else Path(options.adapter or folder / "adapter")
    if adapter is not None:
        check_adapter(adapter, options.model)
    check_use(adapter or options.model, options, options.allow_other)
    inputs = file_digests(options.model, *([adapter] if adapter else []))
    outputs = open_outputs(rows, inputs, options)
    if outputs:
        # Lists that cannot be ranked are refused before the model is loaded.
        CandidateLists.of([{**row, "score": 0.0} for row in rows], test_path)
        model, chat = load_ranker(options)
        if adapter is not None:
            model = load_adapter(model, adapter, options.model)
        for hidden, output in outputs.items():
            score(rows, hidden, output, model, chat, options)
    print_next("scripts/07_report.sh", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
