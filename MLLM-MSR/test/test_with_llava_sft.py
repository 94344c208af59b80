"""Stage 6: every test pair is scored by one forward pass, p = p(yes) / (p(yes) + p(no)) (paper, equation 1).

In:  {output_dir}/test.jsonl, {output_dir}/adapter/
Out: {output_dir}/{variant}/scores.jsonl   user_id, item_id, label, yes_logit, no_logit, score
     scores.rejected.jsonl                 all pairs of users with a question that cannot be made to fit

    python MLLM-MSR/test/test_with_llava_sft.py --config configs/microlens.yaml
    python MLLM-MSR/test/test_with_llava_sft.py --config configs/microlens.yaml --adapter none     (the paper's LLaVA without SFT)

`--hide nothing image preference` also scores with the picture greyed out and with the preference left empty: what each is worth.
Started again, it goes on where it stopped. Sample: 10,164 pairs in about 12 seconds on 2 CPU cores.
LLaVA-v1.6-Mistral-7B: a GPU; its weights take 15 GB in bfloat16; memory and time: not measured yet.
"""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_processing.candidates import score_row
from data_processing.config import option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.jsonl import read_rows
from data_processing.pairs import first_users, with_preference
from data_processing.run_record import digests, settings_of
from data_processing.stage_output import StageOutput
from Inference.recommender import RecommenderArgs, attach_adapter, check_adapter, load_recommender

SPEED_OPTIONS = ("batch_tokens", "reuse_prefix", "adapter", "variant", "hide")
HIDEABLE = ("nothing", "image", "preference")


@dataclass
class Args(RecommenderArgs):
    adapter: str = option("", "folder of the LoRA weights, or none; default: {output_dir}/adapter")
    variant: str = option(
        "", "name of the row in metrics.json; default: sft, or zero_shot without adapter, with _no_image or _no_preference behind it"
    )
    hide: list[str] = option(["nothing"], f"what the model does not get to see, one variant for each: {', '.join(HIDEABLE)}")
    batch_tokens: int = option(16384, "tokens in a batch, pictures counted")
    reuse_prefix: bool = option(True, "compute what all prompts of an item share only once")


def variant_name(args, hidden):
    name = args.variant or ("zero_shot" if args.adapter == "none" else "sft")
    return name if hidden == "nothing" else f"{name}_no_{hidden}"


def main(argv=None):
    args = parse_args(Args, "score", argv, __doc__)
    show(args, "stage 6, scoring")
    for hidden in args.hide:
        if hidden not in HIDEABLE:
            raise InputError(f"--hide {hidden} is unknown; choose among: {', '.join(HIDEABLE)}")
    folder = Path(args.output_dir)
    adapter = None if args.adapter == "none" else Path(args.adapter or folder / "adapter")
    test_path = folder / "test.jsonl"
    rows = read_rows(test_path)
    if adapter is not None:
        check_adapter(adapter, args.model, args.image_tiles)
    pairs = {(row["user_id"], row["item_id"]): row for row in rows}
    if len(pairs) != len(rows):
        raise InputError(f"{test_path} holds a pair twice; make it again with scripts/04_datasets.sh")
    inputs = digests(test_path, args.model, *([adapter] if adapter else []))
    limit = len(first_users(rows, args.limit))
    outputs = {}
    for hidden in args.hide:
        path, settings = folder / variant_name(args, hidden) / "scores.jsonl", settings_of(args, SPEED_OPTIONS, hidden=hidden)
        output = StageOutput(path, ("user_id", "item_id"), pairs, args, settings, inputs, limit=limit)
        if output.finished:
            print(f"{path} is up to date, nothing to do")
        else:
            outputs[hidden] = output
    if outputs:
        score_all(pairs, folder, adapter, outputs, args)
    print("next: python MLLM-MSR/test/compute_metrics.py")


def score_all(pairs, folder, adapter, outputs, args):
    """Loads the model and writes a score for every pair that is still to do. outputs: dict what is hidden -> StageOutput."""
    # Imported here, so that --help and a missing input answer at once.
    from Inference.pair_reader import PairReader
    from Inference.scoring import probability, score_pairs

    model, chat = load_recommender(args)
    if adapter:
        model = attach_adapter(model, adapter, args.model)
    for hidden, output in outputs.items():
        reader = PairReader(chat, folder, args.max_text_tokens, grey=hidden == "image")
        rows = [pairs[pair] for pair in output.wanted]
        if hidden == "preference":
            rows = [with_preference(row, "") for row in rows]
        too_long, _ = reader.look_through(rows)
        rows, aside = [r for r in rows if r["user_id"] not in too_long], [r for r in rows if r["user_id"] in too_long]
        wanted = {index for index, row in enumerate(rows) if (row["user_id"], row["item_id"]) in output.left}
        with output, tqdm(total=len(output.todo), desc=f"scores, {output.path.parent.name}", unit="pair") as progress:
            for row in aside if output.rank == 0 else ():  # the whole user: a list with a hole would be scored wrong
                if (row["user_id"], row["item_id"]) in output.left:
                    output.reject((row["user_id"], row["item_id"]), too_long[row["user_id"]])
            part = (output.rank, output.world)
            for index, yes, no in score_pairs(model, reader, rows, args.batch_tokens, args.reuse_prefix, wanted, part):
                row = rows[index]
                output.write(score_row(row["user_id"], row["item_id"], row["label"], probability(yes, no), yes, no))
                progress.update()
            output.counts["shortened"] = reader.shortened
        print(output.summary())


if __name__ == "__main__":
    run(main)
