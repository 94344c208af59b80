"""docs/tour.md: one user of the sample, from the log to the metrics, through both systems.

    python scripts/reproduce/tour.py                         docs/tour.md from docs/tour.json
    python scripts/reproduce/tour.py --user u0399 --mllm_msr outputs/sample \\
        --mllm4rec outputs/mllm4rec/sample --mllm4rec_data data/mllm4rec/sample

In:  with --user, two finished runs: `scripts/quickstart.sh`, and `scripts/mllm4rec/` with
     configs/mllm4rec/sample.yaml
Out: docs/tour.md; with --user before it docs/tour.json, what the page shows of the runs,
     and docs/covers/, the covers that it shows

Prompts, tokens and labels are those of the stages' own functions.
"""

from mllmrec.stage.main import run_main

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import atomic_file, read_by_id, read_json, read_rows, write_json
from mllmrec.stage.options import ROOT, parse_options
from mllmrec.stage.schema import Row
from mllmrec.stage.scripts import load_script

FACTS = ROOT / "docs/tour.json"
TEMPLATE = ROOT / "docs/tour.md.j2"
PAGE = ROOT / "docs/tour.md"
COVERS = ROOT / "docs/covers"


def words_of(run: Path) -> list[str]:
    """The command line of a stage of the run."""
    config = str(ROOT / "configs/sample.yaml")
    return ["--config", config, "--data_dir", str(run), "--output_dir", str(run)]


def row_of(path: Path, user: str, **wanted: Any) -> Row:
    """The user's line of a file, the first one whose keys have the wanted values."""
    for row in read_rows(path):
        if row["user_id"] == user and all(row.get(k) == v for k, v in wanted.items()):
            return row
    raise InputError(f"{path} has no line of user {user!r} with {wanted}; name another --user")


def ranked(path: Path, user: str) -> list[Row]:
    """The user's candidates by score, best first."""
    rows = [row for row in read_rows(path) if row["user_id"] == user]
    kept = ("item_id", "label", "score", "logits")
    return [{key: row[key] for key in kept} for row in sorted(rows, key=lambda r: -r["score"])]


def preference_prompts(run: Path, user: str) -> list[str]:
    """The prompts of stage 3 for the user's blocks, as the model got them."""
    from mllmrec.generation.preferences import read_histories
    from mllmrec.generation.prompt_writer import PromptWriter
    from mllmrec.models.chat import ChatProcessor
    from mllmrec.models.processors import load_processor, max_prompt_tokens, read_config

    stage = load_script("Inference/preference_recurrent.py")
    options = parse_options(stage.Options, "preference", words_of(run))
    chat = ChatProcessor(load_processor(options.model, options), False, options.prompt_format)
    longest = max_prompt_tokens(read_config(options.model), options.max_new_tokens)
    histories = read_histories(options)
    history = next(found for found in histories.values() if found.ids["user_id"] == user)
    writer = PromptWriter(chat, longest, options.domain, history.ids, block_line=options.block_line)
    dialogue = stage.recurrent_preference(history, writer, options)
    prompts = [next(dialogue).text]
    for block in row_of(run / "mllm_msr/user_preferences.jsonl", user)["blocks"][:-1]:
        prompts.append(dialogue.send(block["preference"]).text)
    return prompts


def question(run: Path, row: Row) -> dict[str, Any]:
    """A row as training gets it: its text, its tokens, and where the loss is.

    tokens: of question and answer, the image's as one; n_image_tokens: how many those are;
    predicted: the tokens that the loss is on.
    """
    from mllmrec.models.processors import load_processor
    from mllmrec.ranking.batches import Collator
    from mllmrec.ranking.reader import RowReader, chat_processor
    from mllmrec.ranking.training_options import FineTuningOptions

    options = parse_options(FineTuningOptions, "train", words_of(run))
    chat = chat_processor(load_processor(options.model, options, multimodal=True), options)
    reader = RowReader(chat, run / "mllm_msr", options.max_text_tokens)
    batch = Collator(reader, loss=options.loss)([row])
    ids = batch["input_ids"][0].tolist()
    to_tokens = chat.tokenizer.convert_ids_to_tokens
    is_image = [token == chat.image_token_id for token in ids]
    kept = [n for n in range(len(ids)) if not (is_image[n] and n and is_image[n - 1])]
    return {
        "text": reader.question(row),
        "tokens": to_tokens([ids[n] for n in kept]),
        "n_image_tokens": sum(is_image),
        "predicted": to_tokens(batch["labels"][0].tolist()),
    }


def collect(run: Path, user: str) -> dict[str, Any]:
    """What the page shows of MLLM-MSR."""
    own = row_of(run / "users.jsonl", user, split="test")
    system = run / "mllm_msr"
    titles = {row["item_id"]: row["title"] for row in read_rows(run / "items.jsonl")}
    summaries = read_by_id(system / "image_summaries.jsonl", "item_id")
    shown = [*own["history"], own["target"], *own["negatives"]]
    target_row = row_of(system / "test.jsonl", user, item_id=own["target"])
    return {
        "user": {key: own[key] for key in ("user_id", "history", "target", "negatives", "split")},
        "titles": {item: titles[item] for item in shown},
        "summaries": {item: summaries[item]["summary"] for item in shown},
        "prompts": preference_prompts(run, user),
        "blocks": row_of(system / "user_preferences.jsonl", user)["blocks"],
        "question": question(run, target_row),
        **{name: ranked(system / name / "scores.jsonl", user) for name in ("zero_shot", "sft")},
    }


def collect_lists(run: Path, data: Path, user: str) -> dict[str, Any]:
    """What the page shows of MLLM4Rec."""
    system = run / "mllm4rec"
    titles = {row["item_id"]: row["title"] for row in read_rows(data / "items.jsonl")}
    found = row_of(system / "retriever/candidates.jsonl", user, split="test")
    if not found["has_target"]:
        raise InputError(f"the target of user {user!r} was not retrieved; name another --user")
    row = row_of(system / "test.jsonl", user)
    captions = read_by_id(system / "image_summaries.jsonl", "item_id")
    return {
        "retrieved": found["item_ids"],
        "titles": {item: titles[item] for item in found["item_ids"]},
        "captions": {item: captions[item]["summary"] for item in found["item_ids"]},
        "question": row["messages"][0]["content"][0]["text"],
        "ranked": ranked(system / "ranked/scores.jsonl", user),
    }


def metrics(rank: int, k: int) -> dict[str, float]:
    """HR, MRR and NDCG at k of one user whose target has this rank."""
    hit = rank <= k
    return {"HR": float(hit), "MRR": hit / rank, "NDCG": hit / math.log2(rank + 1)}


def rank_of(rows: list[Row]) -> int:
    """Place of the target in a ranked list, from 1."""
    return next(n for n, row in enumerate(rows, start=1) if row["label"])


def render(facts: dict[str, Any]) -> str:
    """The page as text."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    functions = {"rank_of": rank_of, "metrics": metrics, "exp": math.exp}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(**facts, **functions)


def main() -> None:
    """Write the page, with --user from runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--user")
    parser.add_argument("--mllm_msr", type=Path, default=ROOT / "outputs/sample")
    parser.add_argument("--mllm4rec", type=Path, default=ROOT / "outputs/mllm4rec/sample")
    parser.add_argument("--mllm4rec_data", type=Path, default=ROOT / "data/mllm4rec/sample")
    args = parser.parse_args()
    if args.user:
        facts = collect(args.mllm_msr, args.user)
        facts["lists"] = collect_lists(args.mllm4rec, args.mllm4rec_data, args.user)
        write_json(FACTS, facts)
        COVERS.mkdir(exist_ok=True)
        for item in (*facts["user"]["history"][:3], facts["user"]["target"]):
            shutil.copy(args.mllm_msr / f"covers/{item}.png", COVERS)
    with atomic_file(PAGE) as file:
        file.write(render(read_json(FACTS)).encode())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
