"""MLLM4Rec, ranker: an LLM with LoRA names the letter of the next item among twenty.

(MLLM4Rec, JIIS 2024, built on LlamaRec.)

In:  {data_dir}/users.jsonl, items.jsonl
     {output_dir}/{system}/retriever/candidates.jsonl      from train_retriever.py
     {output_dir}/{system}/image_summaries.jsonl           captions; without it, titles only
Out, all in {output_dir}/{system}/:
     train_users.jsonl, item_texts.jsonl         user_id, item_ids; item_id, text: what training
                                                 rows are made of
     validation.jsonl, test.jsonl                questions, about retrieved users only
     adapter/, training_log.jsonl, checkpoints/  as stage 5 of MLLM-MSR writes them
     ranked/scores.jsonl                         retrieved users: softmax over the letters' logits
     {variant}/scores.jsonl                      all users: the others keep the retriever's list
     {variant}/metrics.json                      retriever, ranker on retrieved users, overall
     retriever_order/, random_order/             scores.jsonl of the same lists as ranked/, to
                                                 compare with

    python MLLM4Rec/train_ranker.py --dataset_code ml-100k --llm_base_model meta-llama/Llama-2-7b-hf

Trained on each item that a user had, among 19 random negatives (`--train_rows prefixes`, as the
released code; docs/mllm4rec.md), tested on the retriever's 20. What is kept has the highest NDCG@10
on the validation users whose target was retrieved, after each epoch or every `--validation_steps`
steps. `--adapter DIR` scores with weights that are there, `--adapter none` without any. `--lists
users` needs no retriever: validation and test users have the candidates of users.jsonl, which
MLLM-MSR ranks, too (the table `systems`). `--limit N`: the first N users of each split, and no
{variant}/, which is of all. A GPU for Llama-2-7B; not run yet at that size.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mllmrec.data.candidates import (
    own_candidates,
    read_candidates,
    read_users_and_items,
    users_of_split,
)
from mllmrec.ranking.list_options import ROW_OPTIONS, SCORE_OPTIONS, ListOptions
from mllmrec.ranking.row_checks import check_training_rows
from mllmrec.ranking.rows import LETTER_ANSWERS, first_users, question_text
from mllmrec.ranking.training_options import (
    TRAINING_SPEED_OPTIONS,
    check_training_options,
    training_files,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.options import parse_options, print_options
from mllmrec.stage.output import RowOutput, WholeOutput
from mllmrec.stage.progress import progress_bar
from mllmrec.stage.record import Job, file_digests

SECTION = "ranker"


def write_questions(options: ListOptions) -> None:
    """1. What is asked: users and item texts of the training, questions of validation and test.

    A training row asks for the target among random negatives and is made when it is needed
    (`PrefixRows`), a test row for the target among what was retrieved.
    """
    folder, paths = options.system_dir, options.input_paths()
    names = ("train_users", "item_texts", "validation", "test")
    outputs = [folder / f"{name}.jsonl" for name in names]
    others = set(asdict(options)) - set(ROW_OPTIONS)
    job = Job.of(options, file_digests(*paths.values()), others, stage=SECTION)
    with WholeOutput(job, outputs) as output:
        if not output.is_needed:
            return
        from mllmrec.models.processors import load_processor
        from mllmrec.ranking import lists
        from mllmrec.ranking.reader import chat_processor

        users, items = read_users_and_items(paths["users"], paths["items"], ("history", "target"))
        chat = chat_processor(load_processor(options.model, options), options)
        tokens = options.text_tokens
        texts = lists.item_texts(paths["items"], paths.get("captions"), chat.tokenizer, tokens)
        form = lists.list_format(texts, chat, options)
        if options.lists == "users":
            lines = [own_candidates(user, items) for user in users]
        else:
            lines = read_candidates(paths["candidates"], users, items)
        is_shuffled = options.candidate_order == "shuffled" or options.lists == "users"
        rng = np.random.default_rng([options.seed, 5]) if is_shuffled else None
        training = lists.training_users(users)
        output.begin()
        write_rows(outputs[0], training)
        write_rows(outputs[1], ({"item_id": i, "text": text} for i, text in texts.items()))
        counts = {"train_users": len(training)}
        for split, path in zip(names[2:], outputs[2:], strict=True):
            own = [line for line in lines if line["split"] == split]
            asked = users_of_split(users, split)
            rows = lists.list_rows(own, asked, form, rng, with_answer=split == "validation")
            write_rows(path, rows)
            counts |= {split: len(rows), f"{split}_not_retrieved": len(own) - len(rows)}
        counts["shortened"] = form.counts["shortened"]  # histories that lost their oldest items
        output.finish(counts)
    shown = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    print(f"wrote {folder}: {shown}")


def fine_tune(options: ListOptions) -> None:
    """2. LoRA learns the letter of the target: training users, validation lists -> adapter/.

    The loss is on the letter; what has the highest NDCG@10 on the validation lists is kept.
    """
    folder = options.system_dir
    paths = [folder / f"{name}.jsonl" for name in ("train_users", "item_texts", "validation")]
    users, validation = read_rows(paths[0]), read_rows(paths[2])
    texts = {row["item_id"]: row["text"] for row in read_rows(paths[1])}
    if not users:
        raise InputError(f"{paths[0]} is empty: there are no training users; make them again")
    inputs = file_digests(*paths, options.model)
    ignore = (*TRAINING_SPEED_OPTIONS, *SCORE_OPTIONS)
    job = Job.of(options, inputs, ignore, stage=SECTION, limit=options.limit)
    outputs = [folder / "adapter"]
    with WholeOutput(job, outputs, training_files(options), folder / "checkpoints") as output:
        if not output.is_needed:
            return
        users = first_users(users, options.limit)
        validation = first_users(first_users(validation, options.limit), options.validation_users)
        check_training_rows(validation, paths[2], LETTER_ANSWERS)
        from transformers import set_seed

        from mllmrec.models.compat import empty_device_cache
        from mllmrec.ranking.answers import answer_set
        from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings
        from mllmrec.ranking.lists import PrefixRows, list_format
        from mllmrec.ranking.reader import RowReader
        from mllmrec.ranking.trainer import RankingTrainer, load_with_lora, save_adapter

        set_seed(options.seed)
        model, chat = load_with_lora(options)
        rows = PrefixRows(users, list_format(texts, chat, options), options)
        answers = answer_set("letters", options)
        reader = RowReader(chat, folder, options.max_text_tokens, answers=answers)
        validation, rejected, _ = reader.fitting_rows(validation, paths[2])
        counts = {"in": len(rows), "users": len(users), "validation_rows": len(validation)}
        lengths = rows.lengths() if options.group_by == "length" else None
        sampler = EpochSampler(rows, lengths, EpochSettings.of(options))
        collator = Collator(reader, options.loss)
        trainer = RankingTrainer(model, sampler, collator, validation, options, "ndcg@10")
        trainer.train_or_resume(output)
        save_adapter(trainer, chat, output, counts, rejected)
        # The trainer's objects refer to each other, and scoring loads a model again.
        del model, trainer
        empty_device_cache(collect_garbage=True)


def score(options: ListOptions) -> Path:
    """3. Softmax over the letters' logits: test.jsonl, adapter/ -> {ranked}/scores.jsonl."""
    folder = options.system_dir
    rows, path = read_rows(folder / "test.jsonl"), folder / options.ranked / "scores.jsonl"
    asked = first_users(rows, options.limit)
    adapter = None if options.adapter == "none" else Path(options.adapter or folder / "adapter")
    inputs = file_digests(options.model, *([adapter] if adapter else []))
    job = Job.of(options, inputs, (*TRAINING_SPEED_OPTIONS, *SCORE_OPTIONS), stage=SECTION)
    sources = {
        (row["user_id"], item): job.source(question_text(row), row["label"])
        for row in rows
        for item in row["item_ids"]
    }
    limit = sum(len(row["item_ids"]) for row in asked)  # of candidates
    output = RowOutput(path, ("user_id", "item_id"), sources, replace(job, limit=limit))
    if output.is_up_to_date():
        return path
    from mllmrec.models.adapters import check_adapter, load_adapter
    from mllmrec.ranking.answers import answer_set
    from mllmrec.ranking.reader import RowReader, load_ranker
    from mllmrec.ranking.scoring import ScoringOptions, write_scores

    if adapter:
        check_adapter(adapter, options.model)
    model, chat = load_ranker(options)
    if adapter:
        model = load_adapter(model, adapter, options.model)
    answers = answer_set("letters", options)
    reader = RowReader(chat, folder, options.max_text_tokens, answers=answers)
    settings = ScoringOptions(options.score_batch_tokens, options.reuse_prefix)
    with output, progress_bar(len(asked), "ranking", "user") as progress:
        write_scores(model, reader, asked, output, settings, progress)
    output.log_summary()
    return path


def combine(ranked_path: Path, options: ListOptions) -> None:
    """4. All test users: the ranker's list where the target was retrieved, else the retriever's."""
    folder, retrieved_path = options.system_dir, options.retrieved_dir / "scores.jsonl"
    outputs = [folder / options.variant / name for name in ("scores.jsonl", "metrics.json")]
    outputs += [folder / f"{name}_order" / "scores.jsonl" for name in ("retriever", "random")]
    inputs = file_digests(ranked_path, retrieved_path)
    job = Job.of(options, inputs, TRAINING_SPEED_OPTIONS, stage=f"{SECTION}, all lists")
    with WholeOutput(job, outputs) as output:
        if not output.is_needed:
            return
        from mllmrec.ranking.lists import write_overall_lists

        metrics = write_overall_lists(ranked_path, retrieved_path, output)
        for name, found in metrics.items():
            shown = ", ".join(f"{m} {100 * found[m]:.2f}" for m in ("hr@5", "ndcg@5", "hr@10"))
            print(f"{name:20} {found['users']:>6,} users: {shown} (x100)")
        print(f"wrote {outputs[0]} and {outputs[1]}")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(ListOptions, SECTION, argv, __doc__)
    print_options(options, "MLLM4Rec, ranker")
    if options.llm_base_model:
        options.model, options.llm_base_model = options.llm_base_model, ""
    check_training_options(options)
    if options.group_by == "item":
        raise InputError("--group_by item shares nothing here: each row has a history of its own")
    if options.adapter == "none":
        options.ranked = f"zero_shot_{options.ranked}"
        options.variant = f"zero_shot_{options.variant}"
    write_questions(options)
    if not options.adapter:
        fine_tune(options)
    ranked_path = score(options)
    if options.lists == "retrieved" and options.limit:
        print(f"{options.variant}/ holds the lists of all users: run without --limit for it")
    elif options.lists == "retrieved":
        combine(ranked_path, options)


if __name__ == "__main__":
    run_main(main)
