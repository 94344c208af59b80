"""MLLM4Rec, ranker: an LLM with LoRA names the letter of the next item among twenty.

(MLLM4Rec, JIIS 2024, built on LlamaRec.)

In:  {data_dir}/users.jsonl, items.jsonl
     {output_dir}/{system}/{retriever}/candidates.jsonl    from train_retriever.py
     {output_dir}/{system}/image_summaries.jsonl           captions; without it, titles only
Out, all in {output_dir}/{system}/:
     train.jsonl, validation.jsonl, test.jsonl   questions; retrieved users only, but in training
     adapter/, training_log.jsonl, checkpoints/  as stage 5 of MLLM-MSR writes them
     ranked/scores.jsonl                         retrieved users: softmax over the letters' logits
     {variant}/scores.jsonl                      all users: the others keep the retriever's list
     {variant}/metrics.json                      retriever, ranker on retrieved users, overall

    python MLLM4Rec/train_ranker.py --dataset_code ml-100k --llm_base_model meta-llama/Llama-2-7b-hf

Trained on the target among 19 random negatives, tested on the retriever's 20. The best epoch is
that with the highest NDCG@10 on the validation users whose target was retrieved. A GPU for
Llama-2-7B; not run yet at that size.
"""

from mllmrec.stage.main import run_main

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from mllmrec.data.candidates import read_users
from mllmrec.ranking.fine_tuning import Task, fine_tune
from mllmrec.ranking.options import TRAINING_SPEED_OPTIONS, FineTuningOptions
from mllmrec.ranking.rows import LETTER_ANSWERS
from mllmrec.stage.jsonl import read_by_id, read_rows, require, write_json, write_rows
from mllmrec.stage.options import DatasetCode, option, parse_options, print_options
from mllmrec.stage.output import ResumableOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.transaction import writing

SECTION = "ranker"
SCORE_OPTIONS = ("ranked", "variant", "reuse_prefix")  # they change no adapter
ROW_OPTIONS = ("dataset_code", "seed", "model", "captions", "text_tokens", "max_history")
ROW_OPTIONS += ("role", "hybrid", "candidates", "prompt_format")


@dataclass
class Options(FineTuningOptions, DatasetCode):
    system: str = option("mllm4rec", "subfolder of output_dir", pattern=r"^[\w-]+$")
    retriever: str = option("retriever", "folder of candidates.jsonl", pattern=r"^[\w-]+$")
    ranked: str = option("ranked", "folder of the ranker's own scores", pattern=r"^[\w-]+$")
    variant: str = option("ranker", "folder of the scores", pattern=r"^[\w-]+$")
    model: str = option("meta-llama/Llama-2-7b-hf", "text model, hub id or folder")
    llm_base_model: str = option("", "another name of --model, as in the published command")
    captions: bool = option(True, "false: titles only (ablation: without images)")
    role: bool = option(True, "false: without the role (ablation)")
    hybrid: bool = option(True, "false: without the words of the instruction (ablation)")
    text_tokens: int = option(32, "of a title, and of a caption (published: 32)", ge=1)
    max_history: int = option(20, "last items in the prompt (published: 20)", ge=1)
    candidates: int = option(20, "of a training row (published: 20)", ge=2, le=20)
    max_text_tokens: int = option(1536, "of a prompt (published: 1,536)", ge=0)
    epochs: int = option(1, "epochs (published: 1)", ge=1)
    learning_rate: float = option(1e-4, "of AdamW (published: 1e-4)", ge=0)
    lora_dropout: float = option(0.05, "dropout (published: 0.05)", ge=0, lt=1)
    lora_layers: list[str] = option(["q_proj", "v_proj"], "layers (published: q_proj, v_proj)")
    reuse_prefix: bool = option(True, "in scoring: compute what prompts share only once")


def write_questions(options):
    """users.jsonl, items.jsonl, candidates.jsonl -> train, validation and test.jsonl."""
    from mllmrec.models.loading import load_tokenizer
    from mllmrec.prompts.mllm4rec import ROLES
    from mllmrec.ranking.lists import ListFormat, item_texts, retrieved_rows, training_rows

    data_dir, folder = Path(options.data_dir), options.system_dir
    maker = f"MLLM4Rec/process_item.py --dataset_code {options.dataset_code}"
    users_path, items_path = (
        require(data_dir / name, maker=maker) for name in ("users.jsonl", "items.jsonl")
    )
    maker = f"MLLM4Rec/train_retriever.py --dataset_code {options.dataset_code}"
    candidates_path = require(folder / options.retriever / "candidates.jsonl", maker=maker)
    inputs = [users_path, items_path, candidates_path]
    captions_path, captions = folder / "image_summaries.jsonl", {}
    if options.captions and captions_path.exists():
        inputs.append(captions_path)
        captions = {row["item_id"]: row["summary"] for row in read_rows(captions_path)}
    paths = [folder / f"{split}.jsonl" for split in ("train", "validation", "test")]
    others = set(asdict(options)) - set(ROW_OPTIONS)
    job = Job.of(options, file_digests(*inputs), ignore=others)
    with writing(job, paths) as output:
        if not output.is_needed:
            return
        users, items = read_users(users_path), read_by_id(items_path, "item_id")
        by_split = {
            split: {user["user_id"]: user for user in users if user["split"] == split}
            for split in ("train", "validation", "test")
        }
        tokenizer = load_tokenizer(options.model, options)
        texts = item_texts(items, captions, tokenizer, options.text_tokens)
        role = ROLES[options.dataset_code] if options.role else ""
        form = ListFormat(texts, LETTER_ANSWERS, role, options.hybrid, options.max_history)
        rng = np.random.default_rng([options.seed, 5])
        write_rows(
            paths[0], training_rows(by_split["train"].values(), form, options.candidates, rng)
        )
        lines, counts = read_rows(candidates_path), {"train": len(by_split["train"])}
        for split, path in zip(("validation", "test"), paths[1:], strict=True):
            own = [line for line in lines if line["split"] == split]
            rows = retrieved_rows(own, by_split[split], form, rng, split == "validation")
            write_rows(path, rows)
            counts |= {split: len(rows), f"{split}_not_retrieved": len(own) - len(rows)}
        output.finish(counts)
        print(f"wrote {folder}: {', '.join(f'{n:,} {name}' for name, n in counts.items())}")


def score_questions(options):
    """test.jsonl, adapter/ -> ranked/scores.jsonl; return its path. Resumes."""
    folder = options.system_dir
    rows, path = read_rows(folder / "test.jsonl"), folder / options.ranked / "scores.jsonl"
    inputs = file_digests(folder / "test.jsonl", options.model, folder / "adapter")
    keys = [(row["user_id"], item) for row in rows for item in row["item_ids"]]
    job = Job.of(options, inputs, (*TRAINING_SPEED_OPTIONS, *SCORE_OPTIONS))
    output = ResumableOutput(path, ("user_id", "item_id"), keys, job)
    if output.is_up_to_date():
        return path
    from mllmrec.models.lora import load_adapter
    from mllmrec.ranking.answers import answer_set
    from mllmrec.ranking.reader import RowReader, load_ranker
    from mllmrec.ranking.scoring import ScoringOptions, score_output

    model, chat = load_ranker(options)
    model = load_adapter(model, folder / "adapter", options.model)
    answers = answer_set("letters", options)
    reader = RowReader(chat, folder, options.max_text_tokens, answers=answers)
    scoring = ScoringOptions(options.score_batch_tokens, options.reuse_prefix)
    with output, tqdm(total=len(rows), desc="ranking", unit="user") as progress:
        for _ in score_output(model, reader, rows, output, scoring):
            progress.update()
    print(output.summary())
    return path


def combine(ranked_path, options):
    """Write the lists of all test users, those of the ranker where it ranked, and the metrics."""
    from mllmrec.evaluation.metrics import evaluate

    folder = options.system_dir / options.variant
    retrieved_path = options.system_dir / options.retriever / "scores.jsonl"
    outputs = [folder / "scores.jsonl", folder / "metrics.json"]
    job = Job.of(options, file_digests(ranked_path, retrieved_path), TRAINING_SPEED_OPTIONS)
    with writing(job, outputs) as output:
        if not output.is_needed:
            return
        ranked, retrieved = read_rows(ranked_path), read_rows(retrieved_path)
        users = {row["user_id"] for row in ranked}
        overall = ranked + [row for row in retrieved if row["user_id"] not in users]
        metrics = {
            "retriever": evaluate(retrieved, retrieved_path, retrieved=True),
            "retriever_on_ranked": evaluate(
                [row for row in retrieved if row["user_id"] in users], retrieved_path
            ),
            "ranker_on_ranked": evaluate(ranked, ranked_path),
            "overall": evaluate(overall, outputs[0], retrieved=True),
        }
        write_rows(outputs[0], overall)
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
    combine(score_questions(options), options)


if __name__ == "__main__":
    run_main(main)
