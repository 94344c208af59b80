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
from data_processing.stage_output import SHORTENED, StageOutput

SPEED_OPTIONS = ("batch_tokens", "workers", "retry_rejected")  # another value of these gives the same summaries (in float32)


@dataclass
class Args(ModelArgs):
    model: str = option("llava-hf/llava-v1.6-mistral-7b-hf", "multimodal chat model, hub id or folder (paper: LLaVA)")
    summary: Literal["image", "fused"] = option("image", "image: released code; fused: paper (image + text + fusion prompt)")
    max_new_tokens: int = option(200, "length of a summary (released code: 200)")
    temperature: float = option(0.0, "0 = greedy; the released code samples")
    top_p: float = option(1.0, "nucleus sampling, used if temperature > 0")
    batch_tokens: int = option(0, "tokens in a batch, pictures and answers counted; 0: what a GPU's free memory holds, 32,768 on a CPU")
    workers: int = option(-1, "processes that read pictures ahead of the model; -1: up to 8 beside a GPU, none on a CPU")
    retry_rejected: bool = option(False, "try items again that were set aside earlier")
    image_prompt: str = option(prompts.IMAGE, "template of the image prompt")
    title_prompt: str = option(prompts.TITLE, "template of the text prompt (fused)")
    fusion_prompt: str = option(prompts.FUSION, "template of the fusion prompt (fused)")


def summarise(item, shown, ask, args):
    """The dialogue that makes one item's summary (paper, "Multimodal Summarisation").

    item: a row of items.jsonl; shown: the Prompt with the item's picture; ask: (template, texts by name) -> Prompt.
    """
    image_summary = yield shown
    if args.summary == "image":
        return image_summary
    text_summary = yield ask(args.title_prompt, title=item["title"])
    return (yield ask(args.fusion_prompt, image_summary=image_summary, text_summary=text_summary))


def main(argv=None):
    args = parse_args(Args, "image_summary", argv, __doc__)
    show(args, "stage 2, image summaries")
    items_path = Path(args.data_dir) / "items.jsonl"
    items = read_by_id(items_path, "item_id")
    path = Path(args.output_dir) / "image_summaries.jsonl"
    settings, inputs = settings_of(args, SPEED_OPTIONS), digests(items_path, args.model)
    output = StageOutput(path, "item_id", items, args, settings, inputs, args.retry_rejected, counted=SHORTENED)
    if output.finished:
        print(f"{path} is up to date, nothing to do")
    else:
        describe_all(items, items_path.parent, output, args)
    print(f"next: bash scripts/03_preference.sh {args.config}")


class Pictures:
    """What worker processes read ahead of the model: (item id, its picture in the image prompt as arrays, reason why not)."""

    def __init__(self, ids, items, folder, chat, prompt):
        self.ids, self.items, self.folder, self.chat, self.prompt = ids, items, folder, chat, prompt

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, n):
        item_id = self.ids[n]
        name = self.items[item_id]["image"]
        if name is None:
            return item_id, None, "image: the item has none"
        try:
            return item_id, self.chat.encode_one(self.prompt, open_image(self.folder / name)), None
        except (ImageError, ValueError) as error:  # ValueError: some processors refuse the narrowest pictures
            return item_id, None, f"image {name}: {error}"


def describe_all(items, folder, output, args):
    """Loads the model and writes a summary, or a reason, for every item that is still to do."""
    # Imported here, so that --help and a missing input answer at once.
    from Inference.chat import Chat, fit, user_turn
    from Inference.engine import Engine, Prompt, Refused, read_ahead, run_dialogues
    from Inference.models import load_multimodal, room_for_prompts

    model, processor = load_multimodal(args.model, args.dtype, args.attention, args.quantization)
    chat, limit = Chat(processor), room_for_prompts(model, args.max_new_tokens)
    engine = Engine(model, chat, args.max_new_tokens, args.batch_tokens, args.temperature, args.top_p, args.seed)
    pictures = Pictures(output.todo, items, folder, chat, chat.render([user_turn(fill(args.image_prompt, args.domain), images=1)]))

    def dialogue(item_id, picture, reason):
        if reason:
            raise Refused(reason)
        cut = []

        def ask(template, **texts):
            def rendered(values):
                return chat.render([user_turn(fill(template, args.domain, **dict(zip(texts, values, strict=True))))])

            prompt, was_cut = fit(rendered, [plain_text(text) for text in texts.values()], lambda text: chat.count(text) <= limit)
            cut.extend([1] * was_cut)
            return Prompt(prompt, chat.count(prompt))

        shown = Prompt(pictures.prompt, picture["input_ids"].shape[1], picture)
        if shown.length > limit:
            raise Refused(f"image {items[item_id]['image']}: its prompt takes {shown.length} tokens, the model has room for {limit}")
        summary = yield from summarise(items[item_id], shown, ask, args)
        return {"item_id": item_id, "summary": summary, **({"shortened": len(cut)} if cut else {})}

    dialogues = ((entry[0], dialogue(*entry)) for entry in read_ahead(pictures, args.workers))
    output.fill(run_dialogues(engine, dialogues), "image summaries", "item")


if __name__ == "__main__":
    run(main)
