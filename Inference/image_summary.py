"""Stage 2: a frozen multimodal model describes each item (paper, "Multimodal Summarisation").

In:  {data_dir}/items.jsonl              item_id, title, image
Out: {output_dir}/image_summaries.jsonl  item_id, summary
     image_summaries.rejected.jsonl      item_id, reason: items whose image is missing or broken

    python Inference/image_summary.py --config configs/microlens.yaml

`summary: image` describes the image, as the released code does; `summary: fused` follows the paper: the image is
described, the title is summarised, and a third prompt joins both. Started again, it goes on where it stopped.
Sample: 200 covers in a few seconds on 2 CPU cores. LLaVA-v1.6-Mistral-7B: a GPU; its weights take 15 GB in bfloat16;
memory and time: not measured yet.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_processing import prompts
from data_processing.config import ModelArgs, option, parse_args, show
from data_processing.errors import run
from data_processing.images import ImageError, open_image
from data_processing.jsonl import read_by_id
from data_processing.prompts import fill, plain_text
from data_processing.run_record import digests, settings_of
from data_processing.stage_output import StageOutput

SPEED_OPTIONS = ("batch_tokens",)  # another value of these gives the same summaries


@dataclass
class Args(ModelArgs):
    model: str = option("llava-hf/llava-v1.6-mistral-7b-hf", "multimodal chat model, hub id or folder (paper: LLaVA)")
    summary: Literal["image", "fused"] = option("image", "image: released code; fused: paper (image + text + fusion prompt)")
    max_new_tokens: int = option(200, "length of a summary (released code: 200)")
    temperature: float = option(0.0, "0 = greedy; the released code samples")
    top_p: float = option(1.0, "nucleus sampling, used if temperature > 0")
    batch_tokens: int = option(16384, "tokens in a batch, pictures and answers counted")
    retry_rejected: bool = option(False, "try items again that were set aside earlier")
    image_prompt: str = option(prompts.IMAGE, "template of the image prompt")
    title_prompt: str = option(prompts.TITLE, "template of the text prompt (fused)")
    fusion_prompt: str = option(prompts.FUSION, "template of the fusion prompt (fused)")


def summarise(item, image, ask, args):
    """The dialogue that makes one item's summary (paper, "Multimodal Summarisation").

    item: a row of items.jsonl; image: its picture; ask: (text, image or None) -> Prompt.
    """
    image_summary = yield ask(fill(args.image_prompt, args.domain), image)
    if args.summary == "image":
        return image_summary
    text_summary = yield ask(fill(args.title_prompt, args.domain, title=plain_text(item["title"])), None)
    return (
        yield ask(
            fill(args.fusion_prompt, args.domain, image_summary=plain_text(image_summary), text_summary=plain_text(text_summary)),
            None,
        )
    )


def main(argv=None):
    args = parse_args(Args, "image_summary", argv, __doc__)
    show(args, "stage 2, image summaries")
    items_path = Path(args.data_dir) / "items.jsonl"
    items = read_by_id(items_path, "item_id")
    path = Path(args.output_dir) / "image_summaries.jsonl"
    output = StageOutput(
        path, "item_id", items, args, settings_of(args, SPEED_OPTIONS), digests(items_path, args.model), args.retry_rejected
    )
    if output.finished:
        print(f"{path} is up to date, nothing to do")
    else:
        describe_all(items, items_path.parent, output, args)
    print(f"next: bash scripts/03_preference.sh {args.config}")


def describe_all(items, folder, output, args):
    """Loads the model and writes a summary, or a reason, for every item that is still to do."""
    # Imported here, so that --help and a missing input answer at once.
    from Inference.chat import Chat, user_turn
    from Inference.engine import Engine, Prompt, Refused, run_dialogues
    from Inference.models import load_multimodal

    model, processor = load_multimodal(args.model, args.dtype, args.attention)
    chat = Chat(processor)
    engine = Engine(model, chat, args.max_new_tokens, args.batch_tokens, args.temperature, args.top_p, args.seed)

    def ask(text, image):
        rendered = chat.render([user_turn(text, images=int(image is not None))])
        return Prompt(rendered, image, chat.count(rendered) + (chat.image_tokens(image) if image else 0))

    def dialogue(item):
        if item["image"] is None:
            raise Refused("image: the item has none")
        try:
            image = open_image(folder / item["image"])
        except ImageError as error:
            raise Refused(f"image {item['image']}: {error}") from None
        summary = yield from summarise(item, image, ask, args)
        return {"item_id": item["item_id"], "summary": summary}

    output.fill(run_dialogues(engine, ((i, dialogue(items[i])) for i in output.todo)), "image summaries", "item")


if __name__ == "__main__":
    run(main)
