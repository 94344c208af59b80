"""MLLM4Rec's retriever: the recurrence, ranks over the whole catalogue, what is handed on."""

import json

import numpy as np
import pytest
import torch
from test_sequential import ITEMS, chain_users

from mllmrec.data.candidates import item_popularity
from mllmrec.evaluation.metrics import evaluate
from mllmrec.sequential.lrurec import CHUNK, LinearRecurrentUnit, LRURec, linear_recurrence
from mllmrec.sequential.retrieval import RankedUsers, popularity_scorer, retrieval_metrics, retrieve
from mllmrec.sequential.sequences import SequenceData
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

stage = load_script("MLLM4Rec/train_retriever.py")


def step_by_step(inputs, log_decay):
    """The states, one position after the other."""
    decay, state, states = torch.exp(log_decay), torch.zeros_like(inputs[:, 0]), []
    for position in range(inputs.shape[1]):
        state = decay * state + inputs[:, position]
        states.append(state)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 50, 200, 1000])
def test_the_recurrence_is_that_of_a_loop(length):
    """States and gradients; float32 against a loop in float64."""
    torch.manual_seed(0)
    unit = LinearRecurrentUnit(8)
    log_decay = torch.complex(-unit.log_rate.exp(), unit.log_angle.exp()).detach()
    inputs = torch.randn(3, length, 16, dtype=torch.complex64)
    weights = torch.randn(3, length, 16, dtype=torch.complex64)
    found = []
    for recurrence, kind in (
        (linear_recurrence, torch.complex64),
        (step_by_step, torch.complex128),
    ):
        own = [t.detach().to(kind).requires_grad_() for t in (inputs, log_decay)]
        states = recurrence(*own)
        assert states.dtype == kind and states.shape == inputs.shape
        (states * weights.to(kind)).sum().real.backward()
        found.append((states.detach(), own[0].grad, own[1].grad))
    for ours, expected in zip(*found, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (ours - expected).abs().max() < 1e-5 * scale


def model_of(**changes):
    options = stage.Options(**{"width": 16, "max_length": 8, "dropout": 0.1, **changes})
    torch.manual_seed(1)
    return LRURec(len(ITEMS), None, options), options


def test_padding_on_either_side_changes_no_score_and_later_items_change_no_earlier_state():
    model, _ = model_of()
    model.eval()
    with torch.no_grad():
        plain = model(torch.tensor([[3, 7, 2, 9]]))
        left = model(torch.tensor([[0, 0, 0, 3, 7, 2, 9]]))
        right = model(torch.tensor([[3, 7, 2, 9, 0, 0]]))
        later = model(torch.tensor([[3, 7, 2, 5]]))
        earlier = model(torch.tensor([[4, 7, 2, 9]]))
        vectors = model.items()
    assert torch.allclose(left[:, 3:] @ vectors.T, plain @ vectors.T, atol=1e-6)
    assert torch.allclose(right[:, :4] @ vectors.T, plain @ vectors.T, atol=1e-6)
    assert torch.equal(later[:, :3], plain[:, :3])
    assert not torch.allclose(earlier[:, 3], plain[:, 3], atol=1e-4), "it remembers"


def leave_one_out(users):
    """Three lines per user, as stage 1 writes them with --split_by leave_one_out."""
    return [
        {**user, "history": row[:-skip], "target": row[-skip], "negatives": [], "split": split}
        for user in users
        for row in [[*user["history"], user["target"]]]
        for split, skip in (("train", 3), ("validation", 2), ("test", 1))
    ]


def test_metrics_over_the_catalogue_by_hand():
    """Items 1 to 30; item n scores n. The history holds 30 and 28, so 29 is first."""
    score = lambda histories: torch.arange(31.0).expand(len(histories), -1)  # noqa: E731
    ranked = RankedUsers(["a", "b", "c"], [[30, 28], [30, 28], [30]], [29, 24, 3])
    found = retrieval_metrics(score, ranked)
    ranks = [1, 5, 27]
    assert found["recall@5"] == pytest.approx(2 / 3)
    assert found["mrr@10"] == pytest.approx(sum(1 / r for r in ranks if r <= 10) / 3)
    assert found["ndcg@5"] == pytest.approx(sum(1 / np.log2(r + 1) for r in ranks if r <= 5) / 3)
    constant = lambda histories: torch.zeros(len(histories), 31)  # noqa: E731
    tied = retrieval_metrics(constant, RankedUsers(["a"], [[1, 2]], [9]))
    assert tied["recall@10"] == pytest.approx(10 / 28), "a random order of 28 items"


def test_retrieved_items_are_the_best_that_the_user_has_not_had():
    users = leave_one_out(chain_users(20))
    data = SequenceData.of(users, ITEMS)
    counts = item_popularity(users)
    ranked = RankedUsers.of(users, data, "test")
    lines = list(retrieve(popularity_scorer(users, data), ranked, ITEMS, "test", 5))
    assert len(lines) == 20
    for line, user in zip(lines, (u for u in users if u["split"] == "test"), strict=True):
        left = [item for item in ITEMS if item not in user["history"]]
        expected = sorted(left, key=lambda item: (-counts[item], ITEMS.index(item)))[:5]
        assert line["item_ids"] == expected
        assert line["scores"] == [counts[item] for item in expected]
        assert line["has_target"] == (user["target"] in expected)


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory):
    """(folder, users) of a run of the stage on chains of items."""
    folder = tmp_path_factory.mktemp("retriever")
    users = leave_one_out(chain_users(200))
    write_rows(folder / "users.jsonl", users)
    items = [{"item_id": item, "title": item, "image": None} for item in ITEMS]
    write_rows(folder / "items.jsonl", items)
    return folder, users


def run(folder, *words):
    config = folder / "c.yaml"
    config.write_text("common:\n")
    small = ["--width", "16", "--epochs", "15", "--learning_rate", "0.01", "--retrieved", "6"]
    own = ["--config", str(config), "--data_dir", str(folder), "--output_dir", str(folder / "out")]
    stage.main([*own, *small, *words])


@pytest.mark.parametrize("name", ["lrurec", "sasrec", "gru4rec", "popularity"])
def test_the_stage_writes_candidates_that_say_what_its_metrics_say(retrieved, name):
    folder, users = retrieved
    run(folder, "--retriever", name, "--variant", name)
    out = folder / "out" / "mllm4rec" / name
    lines = read_rows(out / "candidates.jsonl")
    assert [line["split"] for line in lines] == ["validation"] * 200 + ["test"] * 200
    targets = {(u["user_id"], u["split"]): u["target"] for u in users}
    for line in lines:
        target = targets[line["user_id"], line["split"]]
        assert line["has_target"] == (target in line["item_ids"])
        assert line["scores"] == sorted(line["scores"], reverse=True)
    metrics = json.loads((out / "metrics.json").read_text())
    scored = evaluate(read_rows(out / "scores.jsonl"), resamples=2, retrieved=True)
    found = sum(line["has_target"] for line in lines[200:]) / 200
    assert scored["hr@5"] == pytest.approx(metrics["test"]["recall@5"], abs=0.02)
    assert found >= scored["hr@5"]
    if name == "popularity":
        assert metrics["test"]["recall@5"] < 0.4
    else:
        assert metrics["test"]["recall@5"] > 0.8
        record = read_record(out / "candidates.jsonl")
        best = max(record["log"], key=lambda line: line["recall@10"])
        assert record["epochs"] == best["epoch"]


def test_what_is_not_leave_one_out_is_refused(retrieved, tmp_path):
    folder, users = retrieved
    write_rows(tmp_path / "users.jsonl", [user for user in users if user["split"] == "test"])
    (tmp_path / "items.jsonl").write_text((folder / "items.jsonl").read_text())
    with pytest.raises(InputError, match="split by user, the retriever needs three lines of each"):
        run(tmp_path)


def test_nothing_is_learned_from_validation_and_test_targets(retrieved):
    """Other targets of the test: the same scores of the same histories, bit by bit."""
    _, users = retrieved
    changed = [{**u, "target": ITEMS[0]} if u["split"] == "test" else u for u in users]
    options = stage.Options(width=16, epochs=3, max_length=8)
    scores = []
    for own in (users, changed):
        data = SequenceData.of(own, ITEMS)
        score, _, _ = stage.train(own, data, options)
        with torch.inference_mode():
            scores.append(score(RankedUsers.of(own, data, "test").histories))
    assert torch.equal(*scores)
