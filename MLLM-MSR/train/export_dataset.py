"""The training and validation rows in the form that another trainer reads.

In:  {output_dir}/{system}/train.jsonl, validation.jsonl, and their images
Out: {output_dir}/{system}/export/{format}/mllmrec_train.jsonl, mllmrec_validation.jsonl
     llamafactory: also dataset_info.json, its list of data sets

    python MLLM-MSR/train/export_dataset.py --config configs/microlens.yaml --format trl

trl: rendered `prompt` and `completion`, so that only the answer is learned, as here. llamafactory
(its "sharegpt" form) and swift: `messages` with <image> in the text. Image paths are absolute.
Preferences are as long as --max_text_tokens of stage 5 lets them be, for the model of stage 5. CPU.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from mllmrec.ranking.row_checks import check_row_images
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.jsonl import read_rows, require, write_json, write_rows
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

if TYPE_CHECKING:
    from mllmrec.ranking.reader import RowReader

SECTION = "train"
ROW_OPTIONS = ("format", "model", "max_text_tokens", "image_tiles", "prompt_format")


@dataclass
class Options(FineTuningOptions):
    format: Literal["trl", "llamafactory", "swift"] = option("trl", "the trainer that reads it")


def trl_row(row: Row, images: list[str], reader: "RowReader") -> Row:
    """A line for TRL's SFTTrainer: rendered prompt and completion, special tokens as text.

    Rendered here, because TRL adds no BOS token, and a template may end an answer in another way.
    """
    prompt, _ = reader.prompt(row)
    if reader.chat.adds_bos(prompt):
        prompt = reader.chat.tokenizer.bos_token + prompt
    completion = reader.answer_tokens.texts[row["label"]]
    return {"prompt": prompt, "completion": completion, "images": images}


def messages_row(row: Row, images: list[str], reader: "RowReader") -> Row:
    """A line for LLaMA-Factory and ms-swift: strings, <image> where the image stands."""
    text = "<image>" * len(images) + reader.question(row)
    turns = [("user", text), ("assistant", reader.answers.text(row["label"]))]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "images": images}


def dataset_info(names: Sequence[str]) -> dict[str, Any]:
    """LLaMA-Factory's description of the files. names: of the splits."""
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    return {
        f"mllmrec_{name}": {
            "file_name": f"mllmrec_{name}.jsonl",
            "formatting": "sharegpt",
            "columns": columns,
            "tags": tags,
        }
        for name in names
    }


def exported(path: Path, options: Options) -> tuple[list[Row], int]:
    """(lines of train.jsonl or validation.jsonl in the other form, number of rejected users).

    As in stage 5, users with a question that is too long are rejected.
    """

    from mllmrec.models.processors import load_processor
    from mllmrec.ranking.reader import RowReader, chat_processor

    rows = read_rows(path)
    check_row_images(rows, path, options)
    chat = chat_processor(load_processor(options.model, options), options)
    reader = RowReader(chat, path.parent, options.max_text_tokens)
    new_row = trl_row if options.format == "trl" else messages_row
    kept, too_long, _ = reader.fitting_rows(rows, path)

    def images(row: Row) -> list[str]:
        return [str((path.parent / name).resolve()) for name in row["images"]]

    return [new_row(row, images(row), reader) for row in kept], len(too_long)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, f"export for {options.format}")
    folder = options.system_dir
    splits = ("train", "validation")
    paths = [require(folder / f"{s}.jsonl", maker="scripts/04_datasets.sh") for s in splits]
    out = folder / "export" / options.format
    outputs = [out / f"mllmrec_{split}.jsonl" for split in splits]
    extra = [out / "dataset_info.json"] if options.format == "llamafactory" else []
    others = [name for name in vars(options) if name not in ROW_OPTIONS]
    job = Job.of(options, file_digests(*paths, options.model), others, stage="export")
    with WholeOutput(job, [*outputs, *extra]) as output:
        if not output.is_needed:
            return
        counts: dict[str, int] = {}
        output.begin()
        for split, path, exported_path in zip(splits, paths, outputs, strict=True):
            rows, rejected = exported(path, options)
            counts |= {split: len(rows), f"{split}_rejected_users": rejected}
            write_rows(exported_path, rows)
        for path in extra:
            write_json(path, dataset_info(splits))
        output.finish(counts)
        shown = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items())
        print(f"wrote {out}: {shown}")


if __name__ == "__main__":
    run_main(main)
