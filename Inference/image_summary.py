"""Stage 2: a frozen multimodal model describes each item (paper, "Multimodal Summarisation").

In:  {data_dir}/items.jsonl                       item_id, title, image
Out: {output_dir}/{system}/image_summaries.jsonl  item_id, summary, source
     image_summaries.rejected.jsonl               item_id, reason: image missing or broken

    python Inference/image_summary.py --config configs/microlens.yaml

`summary: image` describes the image, as the released code does; `summary: fused` follows the paper:
the image is described, the title is summarised, and a third prompt joins both. An interrupted run
resumes. Sample: 200 covers in a few seconds on 2 CPU cores. LLaVA-v1.6-Mistral-7B: a GPU; its
weights take 15 GB in bfloat16; 200 images in 23 s on an H200 (docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from mllmrec.data.images import check_item_images, item_images, padded_sizes
from mllmrec.data.summaries import summary_inputs
from mllmrec.models.model_options import GENERATION_SPEED_OPTIONS, GenerationStageOptions
from mllmrec.prompts import mllm_msr
from mllmrec.prompts.templates import check_template, fill, user_turn
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id
from mllmrec.stage.options import option, parse_options, print_next, print_options
from mllmrec.stage.output import SHORTENED, RowOutput
from mllmrec.stage.provenance import file_digest
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

if TYPE_CHECKING:
    from mllmrec.generation.dialogues import Dialogue
    from mllmrec.generation.prompt_writer import EncodedImage, PromptWriter

SECTION = "image_summary"
SPEED_OPTIONS = (*GENERATION_SPEED_OPTIONS, "workers")  # these change no summary
Sizes = dict[str, tuple[int, int] | None]


@dataclass
class Options(GenerationStageOptions):
    model: str = option(
        "llava-hf/llava-v1.6-mistral-7b-hf", "multimodal model, hub id or folder (paper: LLaVA)"
    )
    summary: Literal["image", "fused"] = option(
        "image", "image: released code; fused: paper (image, text and fusion prompt)"
    )
    max_new_tokens: int = option(200, "length of a summary (released code: 200)", ge=1)
    workers: int = option(
        -1,
        "processes that read images ahead of the model; -1: up to 8 beside a GPU, none on a CPU",
        ge=-1,
        le=256,
    )
    pad_images: int = option(
        0,
        "pad the images of N consecutive items with black to the largest (released code: 8); "
        "0 = none",
        ge=0,
    )
    placeholders: list[str] = option(
        [],
        "sha256 of image files that say 'no image', which are not described (MLLM4Rec's released "
        "code has one for games)",
    )
    image_prompt: str = option(mllm_msr.IMAGE, "template of the image prompt")
    title_prompt: str = option(mllm_msr.TITLE, "template of the text prompt (fused)")
    fusion_prompt: str = option(mllm_msr.FUSION, "template of the fusion prompt (fused)")


def summarise(
    item: Row, image: "EncodedImage", writer: "PromptWriter", options: Options
) -> "Dialogue":
    """The dialogue that makes one item's summary (paper, "Multimodal Summarisation").

    item: a row of items.jsonl. Each `yield` hands a prompt to the engine and receives the text that
    the model generated.
    """
    summary = yield writer.image_prompt(image)
    if options.summary == "fused":
        text_summary = yield writer.text_prompt(options.title_prompt, title=item["title"])
        summary = yield writer.text_prompt(
            options.fusion_prompt, image_summary=summary, text_summary=text_summary
        )
    return {"item_id": item["item_id"], "summary": summary, **writer.nonzero_counts()}


def summary_sources(
    items: dict[str, Row], sizes: Sizes, job: Job, options: Options
) -> dict[str, str]:
    """Item id -> `source` of its summary: its image, and its title if the prompts use it."""
    inputs = summary_inputs(items, Path(options.data_dir) / "items.jsonl")
    if options.summary == "fused":
        inputs = {i: [*image, items[i]["title"]] for i, image in inputs.items()}
    return {i: job.source(*own, batch=sizes.get(i)) for i, own in inputs.items()}


def write_summaries(
    items: dict[str, Row], sizes: Sizes, output: RowOutput, options: Options
) -> None:
    """Describe the items that `output` lacks; workers read images ahead of the model.

    sizes: item id -> the size to which its image is padded.
    """
    from mllmrec.generation.engine import load_engine, read_ahead
    from mllmrec.generation.prompt_writer import ImagePrompts, PromptWriter
    from mllmrec.generation.text_quality import measure_texts, report_quality

    engine, max_prompt_tokens = load_engine(options.model, options, multimodal=True)
    chat, folder = engine.chat, Path(options.data_dir)
    todo = [items[str(item_id)] for item_id in output.todo]
    turn = user_turn(fill(options.image_prompt, options.domain), images=1)
    is_remote = options.engine == "server"
    prompts = ImagePrompts(todo, folder, chat, turn, sizes, as_url=is_remote)
    images = read_ahead(prompts, options.workers, is_remote)

    def new_writer(item: Row) -> PromptWriter:
        ids = {"item_id": item["item_id"]}
        return PromptWriter(chat, max_prompt_tokens, options.domain, ids)

    def checked(image: "EncodedImage", item: Row) -> "EncodedImage":
        if image.prompt and file_digest(folder / item["image"]) in options.placeholders:
            return image._replace(prompt=None, reason="image: one of --placeholders")
        return image

    dialogues = (
        (item["item_id"], summarise(item, checked(image, item), new_writer(item), options))
        for item, image in zip(todo, images, strict=True)
    )
    template = options.image_prompt if options.summary == "image" else options.fusion_prompt
    measure_texts(output, "summary", template, engine)
    output.write_results(engine.run(dialogues), "image summaries", "item")
    report_quality(output)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    own = options.system == "mllm4rec"
    follows = f"scripts/{'mllm4rec/03_retriever' if own else '03_preference'}.sh"
    if not options.with_images:
        print("with_images: false, so there is no image to describe")
        print_next(follows, options.config, options.words)
        return
    if odd := [text for text in options.placeholders if not re.fullmatch("[0-9a-f]{64}", text)]:
        raise InputError(
            f"--placeholders {odd[0]} is no sha256 digest, 64 of 0-9a-f; `sha256sum FILE` prints it"
        )
    print_options(options, "stage 2, image summaries")
    items_path = Path(options.data_dir) / "items.jsonl"
    items = read_by_id(items_path, "item_id")
    check_item_images(items, items_path, options.data_dir, options.image_roots)
    path = options.system_dir / "image_summaries.jsonl"
    check_template(options.title_prompt, options.domain, ["item_id"], "title")
    texts = ("image_summary", "text_summary")
    check_template(options.fusion_prompt, options.domain, ["item_id"], *texts)
    sizes: Sizes = {}
    if options.pad_images:  # of all items, whichever are left to do
        paths = item_images(items, items_path)
        padded = padded_sizes(list(paths.values()), options.pad_images)
        sizes = dict(zip(paths, padded, strict=True))
    job = Job.of(options, file_digests(options.model), SPEED_OPTIONS, stage=SECTION)
    sources = summary_sources(items, sizes, job, options)
    output = RowOutput(path, "item_id", sources, job, options.retry_rejected, SHORTENED)
    if not output.is_up_to_date():
        write_summaries(items, sizes, output, options)
    print_next(follows, options.config, options.words)


if __name__ == "__main__":
    run_main(main)
