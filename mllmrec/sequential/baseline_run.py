"""A sequential baseline from users.jsonl to scores.jsonl, the same for every model."""

import logging
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mllmrec.data.candidates import (
    candidates,
    read_users_and_items,
    score_row,
    users_of_split,
)
from mllmrec.data.images import image_inputs
from mllmrec.sequential.items import read_features
from mllmrec.sequential.sequences import CandidateNumbers, SequenceData
from mllmrec.sequential.training import CHOSEN_BY, fit, score_candidates, validation_metrics
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import require, write_rows
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)

NewModel = Callable[[int, torch.Tensor | None, Any], torch.nn.Module]


def run_baseline(name: str, new_model: NewModel, options: Any) -> None:
    """Train on the training users, score the candidates of the test users, write scores.jsonl.

    name: of the row, unless --variant names another; new_model: (number of items, features,
    options) -> model; options: SequentialOptions. Nothing is learned from validation users, but
    the epoch is chosen by them; of test users only the histories are read, when they are scored.
    """
    data_dir = Path(options.data_dir)
    users_path, items_path = data_dir / "users.jsonl", data_dir / "items.jsonl"
    summaries = options.summaries or Path(options.output_dir) / "mllm_msr/image_summaries.jsonl"
    inputs = [require(users_path), require(items_path)]
    inputs += [require(summaries)] if "summary" in options.features else []
    digests = file_digests(*inputs)
    if "image" in options.features:
        digests |= image_inputs(items_path, options.data_dir, options.image_roots)
    job = Job.of(options, digests, ignore=("threads",), stage=name)
    default = name if options.control == "none" else f"{name}_{options.control}"
    folder = options.system_dir / (options.variant or default)
    paths = {"test": folder / "scores.jsonl", "validation": folder / "validation_scores.jsonl"}
    path = paths["test"]
    with WholeOutput(job, list(paths.values()), takes_long=True) as output:
        if not output.is_needed:
            return
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        users, items = read_users_and_items(users_path, items_path)
        if options.control == "other_histories":
            users = with_other_histories(users)
        data = SequenceData.of(users, list(items))
        if options.control == "unseen_targets":
            tested = users_of_split(users, "test")
            data.leave_out(data.number[user["target"]] for user in tested)
        if not data.training:
            raise InputError(f"{users_path} has no training users; make it again with stage 1")
        texts = (items_path, Path(summaries))
        features = read_features(items, texts, options)
        model = new_model(len(items), features, options).to(chosen_device(options.device))
        validation = data.candidate_lists(users, "validation")
        validate = partial(validation_metrics, model, validation, options)
        found = fit(model, data, validate, options, report=print_epoch)
        started, lists = time.monotonic(), data.candidate_lists(users, "test")
        rows = scored_rows(users, lists, score_candidates(found.model, lists, options))
        scoring_seconds = round(time.monotonic() - started, 3)
        scores = score_candidates(found.model, validation, options)
        output.begin()
        write_rows(path, rows)
        write_rows(paths["validation"], scored_rows(users, validation, scores, "validation"))
        counts = {"training_users": len(data.training), "out": len(rows)}
        best = int(found.best["epoch"])
        output.finish(
            counts,
            log=found.log,
            epochs=best,
            peak_gb=peak_gb(),
            scoring_seconds=scoring_seconds,
        )
        logger.info(f"wrote {path}: {len(rows):,} scores, epoch {found.best['epoch']}")


def peak_gb() -> float:
    """Most main memory that this process has held, in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def chosen_device(name: str) -> str:
    """cpu or cuda. name: auto, cpu or cuda. Raises InputError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; pass --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def is_test(user: Row) -> bool:
    """Whether it is a line of a test user."""
    return bool(user["split"] == "test")


def with_other_histories(users: list[Row]) -> list[Row]:
    """The lines of users.jsonl; each test user has the history of the test user before it."""
    histories = [user["history"] for user in users_of_split(users, "test")]
    others = iter(histories[-1:] + histories[:-1])
    return [{**user, "history": next(others)} if is_test(user) else user for user in users]


def scored_rows(
    users: list[Row], lists: CandidateNumbers, scores: list[list[float]], split: str = "test"
) -> list[Row]:
    """Lines of scores.jsonl. scores: of each user's candidates, in the order of `lists`."""
    tested = users_of_split(users, split)
    return [
        score_row(user_id, item, label, score)
        for user, user_id, own in zip(tested, lists.users, scores, strict=True)
        for (item, label), score in zip(candidates(user), own, strict=True)
    ]


def print_epoch(line: dict[str, float]) -> None:
    """One line per epoch: loss, validation metrics, seconds."""
    names = ("loss", CHOSEN_BY, "recall@10", "ndcg@10")
    shown = (f"{name} {value:.4f}" for name, value in line.items() if name in names)
    logger.info(f"epoch {line['epoch']}: {', '.join(shown)}, {line['seconds']:.1f} s")
