"""MLLM4Rec, ranker: an LLM with LoRA names the letter of the next item among twenty.

(MLLM4Rec, JIIS 2024, built on LlamaRec.)

In:  {data_dir}/users.jsonl, items.jsonl
     {output_dir}/{system}/retriever/candidates.jsonl      from train_retriever.py
     {output_dir}/{system}/image_summaries.jsonl           captions; without it, titles only
Out, all in {output_dir}/{system}/:
     train.jsonl, validation.jsonl, test.jsonl   questions; retrieved users only, but in training
     adapter/, training_log.jsonl, checkpoints/  as stage 5 of MLLM-MSR writes them
     ranked/scores.jsonl                         retrieved users: softmax over the letters' logits
     {variant}/scores.jsonl                      all users: the others keep the retriever's list
     {variant}/metrics.json                      retriever, ranker on retrieved users, overall
     retriever_order/, random_order/             scores.jsonl of the same lists as ranked/, to
                                                 compare with

    python MLLM4Rec/train_ranker.py --dataset_code ml-100k --llm_base_model meta-llama/Llama-2-7b-hf

Trained on the target among 19 random negatives, tested on the retriever's 20. The best epoch is
that with the highest NDCG@10 on the validation users whose target was retrieved. `--lists users`
needs no retriever: validation and test users have the candidates of users.jsonl, which MLLM-MSR
ranks, too (scripts/compare_systems.sh). A GPU for Llama-2-7B; not run yet at that size.
"""

from mllmrec.stage.main import run_main

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
from mllmrec.ranking.fine_tuning import Task, fine_tune
from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import read_users, users_of_split
from mllmrec.ranking.rows import LETTER_ANSWERS
from mllmrec.ranking.training_options import TRAINING_SPEED_OPTIONS, FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows, require, write_json, write_rows
from mllmrec.stage.options import DatasetCode, option, parse_options, print_options
from mllmrec.stage.output import RowOutput, WholeOutput
from mllmrec.stage.progress import progress_bar
from mllmrec.stage.record import Job, file_digests

SECTION = "ranker"
SCORE_OPTIONS = ("ranked", "variant", "reuse_prefix", "retrieved", "summaries")  # no new adapter
ROW_OPTIONS = ("dataset_code", "seed", "model", "captions", "text_tokens", "max_history", "lists")
ROW_OPTIONS += ("max_text_tokens",)
ROW_OPTIONS += ("role", "hybrid", "candidates", "prompt_format", "control")


@dataclass
class Options(FineTuningOptions, DatasetCode):
    system: str = option("mllm4rec", "subfolder of output_dir", pattern=r"^[\w-]+$")
    lists: Literal["retrieved", "users"] = option(
        "retrieved", "what is ranked; retrieved: the retriever's items; users: users.jsonl's"
    )
    retrieved: str = option("", "the retriever's folder, default: {output_dir}/{system}/retriever")
    summaries: str = option("", "default: {output_dir}/{system}/image_summaries.jsonl")
    ranked: str = option("ranked", "folder of the ranker's own scores", pattern=r"^[\w-]+$")
    variant: str = option("ranker", "folder of the scores", pattern=r"^[\w-]+$")
    model: str = option("meta-llama/Llama-2-7b-hf", "text model, hub id or folder")
    llm_base_model: str = option("", "another name of --model, as in the published command")
    captions: bool = option(True, "false: titles only (ablation: without images)")
    role: bool = option(True, "false: without the role (ablation)")
    hybrid: bool = option(True, "false: without the words of the instruction (ablation)")
    text_tokens: int = option(32, "of a title, and of a caption (published: 32)", ge=1)
    max_history: int = option(20, "last items in the prompt (published: 20)", ge=1)
    candidates: int = option(20, "of a training row (published: 20)", ge=2, le=26)
    control: Literal["none", "shuffled_labels"] = option(
        "none", "shuffled_labels: a random letter is learned, which should rank by chance"
    )
    max_text_tokens: int = option(1536, "of a prompt (published: 1,536)", ge=0)
    epochs: int = option(1, "epochs (published: 1)", ge=1)
    learning_rate: float = option(1e-4, "of AdamW (published: 1e-4)", ge=0)
    lora_dropout: float = option(0.05, "dropout (published: 0.05)", ge=0, lt=1)
    lora_layers: list[str] = option(["q_proj", "v_proj"], "layers (published: q_proj, v_proj)")
    reuse_prefix: bool = option(True, "in scoring: compute what prompts share only once")


def input_paths(options):
    """{name: path} of users, items, captions and candidates, those that the options need."""
    data_dir, folder = Path(options.data_dir), options.system_dir
    code = f"--config {options.config}"
    maker = f"MLLM4Rec/process_item.py {code}"
    paths = {name: require(data_dir / f"{name}.jsonl", maker=maker) for name in ("users", "items")}
    captions = Path(options.summaries or folder / "image_summaries.jsonl")
    if options.captions and (options.summaries or captions.exists()):
        paths["captions"] = require(captions, maker=f"MLLM4Rec/process_item_blip2.py {code}")
    if options.lists == "retrieved":
        maker = f"MLLM4Rec/train_retriever.py {code}"
        paths["candidates"] = require(retrieved_dir(options) / "candidates.jsonl", maker=maker)
    return paths


def retrieved_dir(options):
    return Path(options.retrieved or options.system_dir / "retriever")


def list_format(paths, options):
    """ListFormat of the items' texts, with a question's length in tokens of this model."""
    from mllmrec.models.loading import load_processor
    from mllmrec.prompts.mllm4rec import ROLES
    from mllmrec.prompts.templates import user_turn
    from mllmrec.ranking.lists import ListFormat, item_texts
    from mllmrec.ranking.reader import chat_processor

    items = read_by_id(paths["items"], "item_id")
    captions = read_by_id(paths["captions"], "item_id") if "captions" in paths else {}
    captions = {item_id: row["summary"] for item_id, row in captions.items()}
    chat = chat_processor(load_processor(options.model, options), options)
    texts = item_texts(items, captions, chat.tokenizer, options.text_tokens)

    def fits(question):
        longest = options.max_text_tokens
        return not longest or chat.count(chat.render([user_turn(question)])) <= longest

    if options.role and not options.dataset_code:
        raise InputError(
            f"the config {options.config} is not called like a data set, so the role is unknown; "
            f"pass --dataset_code {'|'.join(ROLES)} or --role false"
        )
    role = ROLES[options.dataset_code] if options.role else ""
    return ListFormat(texts, LETTER_ANSWERS, role, options.hybrid, options.max_history, fits)


def write_questions(options):
    """Users, items, captions and candidates -> train, validation and test.jsonl."""
    from mllmrec.ranking.lists import list_rows, own_candidates, shuffle_labels, training_rows

    paths = input_paths(options)
    outputs = [options.system_dir / f"{split}.jsonl" for split in ("train", "validation", "test")]
    others = set(asdict(options)) - set(ROW_OPTIONS)
    job = Job.of(options, file_digests(*paths.values()), ignore=others)
    with WholeOutput(job, outputs) as output:
        if not output.is_needed:
            return
        users, form = read_users(paths["users"]), list_format(paths, options)
        rng = np.random.default_rng([options.seed, 5])
        rows = training_rows(users_of_split(users, "train"), form, options.candidates, rng)
        if options.control == "shuffled_labels":
            rows = shuffle_labels(rows, form.letters, rng)
        write_rows(outputs[0], rows)
        counts = {"train": len(rows)}
        if options.lists == "users":
            lines = [own_candidates(user) for user in users]
        else:
            lines = read_rows(paths["candidates"])
        for split, path in zip(("validation", "test"), outputs[1:], strict=True):
            own = [line for line in lines if line["split"] == split]
            by_id = {user["user_id"]: user for user in users_of_split(users, split)}
            rows = list_rows(own, by_id, form, rng, with_answer=split == "validation")
            write_rows(path, rows)
            counts |= {split: len(rows), f"{split}_not_retrieved": len(own) - len(rows)}
        counts["shortened"] = form.counts["shortened"]  # histories that lost their oldest items
        output.finish(counts)
        shown = ", ".join(f"{n:,} {name}" for name, n in counts.items())
        print(f"wrote {options.system_dir}: {shown}")


def score_questions(options):
    """test.jsonl, adapter/ -> ranked/scores.jsonl; return its path. Resumes."""
    folder = options.system_dir
    rows, path = read_rows(folder / "test.jsonl"), folder / options.ranked / "scores.jsonl"
    inputs = file_digests(folder / "test.jsonl", options.model, folder / "adapter")
    keys = [(row["user_id"], item) for row in rows for item in row["item_ids"]]
    job = Job.of(options, inputs, (*TRAINING_SPEED_OPTIONS, *SCORE_OPTIONS))
    output = RowOutput(path, ("user_id", "item_id"), keys, job)
    if output.is_up_to_date():
        return path
    from mllmrec.models.adapters import load_adapter
    from mllmrec.ranking.answers import answer_set
    from mllmrec.ranking.reader import RowReader, load_ranker
    from mllmrec.ranking.scoring import ScoringOptions, score_output

    model, chat = load_ranker(options)
    model = load_adapter(model, folder / "adapter", options.model)
    answers = answer_set("letters", options)
    reader = RowReader(chat, folder, options.max_text_tokens, answers=answers)
    scoring = ScoringOptions(options.score_batch_tokens, options.reuse_prefix)
    with output, progress_bar(len(rows), "ranking", "user") as progress:
        for _ in score_output(model, reader, rows, output, scoring):
            progress.update()
    output.log_summary()
    return path


def combine(ranked_path, options):
    """Write the lists of all test users, those of the ranker where it ranked, and the metrics."""
    from mllmrec.evaluation.metrics import evaluate

    folder, retrieved_path = options.system_dir, retrieved_dir(options) / "scores.jsonl"
    outputs = [folder / options.variant / name for name in ("scores.jsonl", "metrics.json")]
    orders = [folder / f"{name}_order" / "scores.jsonl" for name in ("retriever", "random")]
    job = Job.of(options, file_digests(ranked_path, retrieved_path), TRAINING_SPEED_OPTIONS)
    with WholeOutput(job, [*outputs, *orders]) as output:
        if not output.is_needed:
            return
        ranked, retrieved = read_rows(ranked_path), read_rows(retrieved_path)
        users = {row["user_id"] for row in ranked}
        same_lists = [row for row in retrieved if row["user_id"] in users]
        overall = ranked + [row for row in retrieved if row["user_id"] not in users]
        write_rows(outputs[0], overall)
        write_rows(orders[0], same_lists)
        # Ties count as a random order does on average.
        write_rows(orders[1], ({**row, "score": 0.0} for row in same_lists))
        metrics = {
            "retriever": evaluate(retrieved, retrieved_path, retrieved=True),
            "retriever_on_ranked": evaluate(same_lists, orders[0]),
            "ranker_on_ranked": evaluate(ranked, ranked_path),
            "overall": evaluate(overall, outputs[0], retrieved=True),
        }
        write_json(outputs[1], metrics)
        everybody = len({row["user_id"] for row in retrieved})
        output.finish({"users": everybody, "ranked": len(users)}, metrics=metrics)
        for name, found in metrics.items():
            shown = ", ".join(f"{m} {100 * found[m]:.2f}" for m in ("hr@5", "ndcg@5", "hr@10"))
            print(f"{name:20} {found['users']:>6,} users: {shown} (x100)")
        print(f"wrote {outputs[0]} and {outputs[1]}")


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    if options.llm_base_model:
        options = replace(options, model=options.llm_base_model, llm_base_model="")
    print_options(options, "MLLM4Rec, ranker")
    write_questions(options)
    maker = "MLLM4Rec/train_ranker.py"
    fine_tune(options, Task("letters", "ndcg@10", maker, SCORE_OPTIONS))
    ranked_path = score_questions(options)
    if options.lists == "retrieved":
        combine(ranked_path, options)


if __name__ == "__main__":
    run_main(main)
