"""MLLM4Rec, retriever: LRURec ranks all items; its best go to the ranker.

(MLLM4Rec, JIIS 2024, built on LlamaRec; LRURec: Yue et al., WSDM 2024.)

In:  {data_dir}/users.jsonl, items.jsonl                    leave-one-out: three lines per user
Out: {output_dir}/{system}/retriever/candidates.jsonl       user_id, split, item_ids, scores,
                                                            has_target, source; of validation
                                                            and test
     {output_dir}/{system}/retriever/scores.jsonl           the same of the test, a line per item
     {output_dir}/{system}/retriever/metrics.json           recall, mrr, ndcg at 5, 10, 20, of both

    python MLLM4Rec/train_retriever.py --dataset_code ml-100k
    python MLLM4Rec/train_retriever.py --dataset_code ml-100k --retriever sasrec

Learns from the training lines, which end before the validation target. What is kept is chosen by
Recall@10 on the validation lines, after each epoch or every `--validation_steps` batches. Items of
a history are not found again. CPU or GPU; ml-latest-small: see docs/results.md.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import is_leave_one_out, read_users_and_items, score_row
from mllmrec.sequential.sequential_options import SequentialOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require, write_json, write_rows
from mllmrec.stage.options import DatasetCode, option, parse_options, print_next, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

if TYPE_CHECKING:
    from mllmrec.sequential.retrieval import Scorer
    from mllmrec.sequential.sequences import SequenceData

SECTION = "retriever"


@dataclass
class Options(SequentialOptions, DatasetCode):
    system: str = option("mllm4rec", "subfolder of output_dir", pattern=r"^[\w-]+$")
    retriever: Literal["lrurec", "sasrec", "gru4rec", "popularity"] = option(
        "lrurec", "what ranks the items (published: lrurec)"
    )
    dropout: float = option(0.2, "dropout (published: chosen from 0.1 to 0.5)", ge=0, lt=1)
    weight_decay: float = option(0.01, "of AdamW (published: 0 or 0.01)", ge=0)
    max_length: int = option(50, "last items that are read (published: 50, ML 200)", ge=1)
    epochs: int = option(500, "most epochs (published: 500)", ge=1)
    patience: int = option(
        20, "stop after this many validations without a better Recall@10 (published: 20)", ge=1
    )
    init: Literal["model", "truncated_normal"] = option(
        "truncated_normal",
        "weights at the start; truncated_normal: of deviation .02, but for norms and decays "
        "(released code; better on the sample's validation lines, docs/results.md)",
    )
    dropout_first: bool = option(
        False, "lrurec: dropout stands before the first norm, not behind it (released code)"
    )
    select_with_history: bool = option(
        False, "in validation, items of the history compete, too (released code)"
    )
    layers: int = option(2, "blocks (published: 2)", ge=1, le=64)
    heads: int = option(2, "attention heads of sasrec", ge=1)
    hidden: int = option(128, "state of gru4rec", ge=1, le=8192)
    retrieved: int = option(20, "items that go to the ranker (published: 20)", ge=2, le=1000)


def train(
    users: list[Row], data: "SequenceData", options: Options
) -> tuple["Scorer", list[Any], int]:
    """(scorer of all items, log of the epochs, best epoch): the retriever, trained."""
    import torch

    from mllmrec.sequential.baseline_run import chosen_device, print_epoch
    from mllmrec.sequential.gru4rec_model import GRU4Rec
    from mllmrec.sequential.lrurec import LRURec
    from mllmrec.sequential.retrieval import (
        RankedUsers,
        model_scorer,
        popularity_scorer,
        retrieval_metrics,
    )
    from mllmrec.sequential.sasrec_model import SASRec
    from mllmrec.sequential.training import fit

    if options.retriever == "popularity":
        return popularity_scorer(users, data), [], 0
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    new_model = {"lrurec": LRURec, "sasrec": SASRec, "gru4rec": GRU4Rec}[options.retriever]
    model = new_model(len(data.number), None, options).to(chosen_device(options.device))
    score = model_scorer(model, options.max_length)
    validation = RankedUsers.of(users, data, "validation")

    def validate() -> dict[str, float]:
        model.eval()
        return retrieval_metrics(score, validation, options.select_with_history)

    found = fit(model, data, validate, options, "recall@10", print_epoch)
    model.eval()
    return score, found.log, int(found.best["epoch"])


def write_candidates(
    score: "Scorer", users: list[Row], data: "SequenceData", output: WholeOutput, options: Options
) -> dict[str, dict[str, float]]:
    """Write candidates.jsonl, scores.jsonl and metrics.json; return the metrics."""
    from mllmrec.sequential.retrieval import RankedUsers, retrieval_metrics, retrieve

    metrics: dict[str, dict[str, float]] = {}
    lines: list[Row] = []
    by_id = {(user["user_id"], user["split"]): user for user in users}
    for split in ("validation", "test"):
        ranked = RankedUsers.of(users, data, split)
        metrics[split] = retrieval_metrics(score, ranked)
        for line in retrieve(score, ranked, list(data.number), split, options.retrieved):
            user = by_id[line["user_id"], split]
            source = output.job.source(user["history"], user["target"])
            lines.append({**line, "source": source})
    candidates_path, scores_path, metrics_path = output.outputs
    output.begin()
    write_rows(candidates_path, lines)
    targets = {user["user_id"]: user["target"] for user in users if user["split"] == "test"}
    scores = (
        score_row(line["user_id"], item, int(item == targets[line["user_id"]]), value)
        for line in lines
        if line["split"] == "test"
        for item, value in zip(line["item_ids"], line["scores"], strict=True)
    )
    write_rows(scores_path, scores)
    write_json(metrics_path, metrics)
    return metrics


def read_data(users_path: Path, items_path: Path) -> tuple[list[Row], list[str]]:
    """(lines of users.jsonl, item ids), checked: leave-one-out, and no item that is unknown."""
    users, items = read_users_and_items(users_path, items_path, ("history", "target"))
    if not is_leave_one_out(users):
        raise InputError(
            f"{users_path} is split by user, the retriever needs three lines of each; make it with "
            "--split_by leave_one_out"
        )
    return users, list(items)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "MLLM4Rec, retriever")
    maker = f"MLLM4Rec/process_item.py --config {options.config}"
    data_dir = Path(options.data_dir)
    paths = [require(data_dir / n, maker=maker) for n in ("users.jsonl", "items.jsonl")]
    job = Job.of(options, file_digests(*paths), ("threads", "device"), stage=SECTION)
    folder = options.system_dir / (options.variant or "retriever")
    outputs = [folder / name for name in ("candidates.jsonl", "scores.jsonl", "metrics.json")]
    with WholeOutput(job, outputs, takes_long=True) as output:
        if output.is_needed:
            from mllmrec.sequential.baseline_run import peak_gb
            from mllmrec.sequential.sequences import SequenceData

            users, items = read_data(*paths)
            data = SequenceData.of(users, items)
            score, log, best = train(users, data, options)
            metrics = write_candidates(score, users, data, output, options)
            counts = {"training_users": len(data.training), "items": len(items)}
            output.finish(
                counts, log=log, epochs=best, peak_gb=peak_gb(), metrics=metrics, lists="retrieved"
            )
            test = metrics["test"]
            print(f"test, epoch {best}: " + ", ".join(f"{n} {v:.4f}" for n, v in test.items()))
            print(f"wrote {outputs[0]}")
    print_next("scripts/mllm4rec/04_ranker.sh", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
