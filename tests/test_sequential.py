"""Sequential baselines: what a state depends on, what is learned from, and that it is learned."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from mllmrec.data.sample_world import draw_cover
from mllmrec.evaluation.metrics import evaluate
from mllmrec.sequential.baseline_run import is_test, scored_rows, with_other_histories
from mllmrec.sequential.gru4rec_model import GRU4Rec
from mllmrec.sequential.image_features import encode_images
from mllmrec.sequential.items import ItemVectors, encode
from mllmrec.sequential.sasrec_model import SASRec
from mllmrec.sequential.sequences import SequenceData, padded, windows
from mllmrec.sequential.training import (
    fit,
    new_optimizer,
    next_item_loss,
    score_candidates,
    start_truncated_normal,
    validation_metrics,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

MODELS = {"sasrec": SASRec, "gru4rec": GRU4Rec}
ITEMS = [f"i{n}" for n in range(30)]


def options_of(name, **changes):
    stage = load_script(f"MLLM-MSR/baselines/{name}.py")
    defaults = {"width": 16, "max_length": 8, "dropout": 0.1, "batch_size": 16, "epochs": 12}
    return stage.Options(**{**defaults, "learning_rate": 1e-2, **changes})


def new_model(name, options, features=None):
    torch.manual_seed(options.seed)
    return MODELS[name](len(ITEMS), features, options)


def chain_users(n_users, seed=0):
    """Users who walk through the items in steps of one or two; 20 negatives; a fifth is tested."""
    rng = np.random.default_rng(seed)
    users, splits = [], ("test", "validation", "train", "train", "train")
    for number in range(n_users):
        walk = np.cumsum([rng.integers(30), *rng.integers(1, 3, 6)]) % 30
        history, target = [ITEMS[k] for k in walk[:-1]], ITEMS[walk[-1]]
        others = [item for item in ITEMS if item not in {*history, target}]
        user = {"user_id": f"u{number}", "history": history, "target": target, "fold": None}
        user |= {"negatives": rng.choice(others, 20, replace=False).tolist()}
        users.append({**user, "split": splits[number % 5]})
    return users


def fitted(name, users, **changes):
    """(what `fit` found, options, lists of validation users, data)."""
    options, data = options_of(name, **changes), SequenceData.of(users, ITEMS)
    model, validation = new_model(name, options), data.candidate_lists(users, "validation")
    found = fit(model, data, lambda: validation_metrics(model, validation, options), options)
    return found, options, validation, data


def trained(name, users, **changes):
    """(what `fit` found, scores.jsonl rows of the test users)."""
    found, options, _, data = fitted(name, users, **changes)
    lists = data.candidate_lists(users, "test")
    return found, scored_rows(users, lists, score_candidates(found.model, lists, options))


@pytest.mark.parametrize("name", MODELS)
def test_a_state_depends_on_the_items_up_to_there_and_not_on_padding(name):
    model = new_model(name, options_of(name)).eval()
    with torch.no_grad():
        states = model(torch.tensor([[3, 7, 2, 9]]))
        later = model(torch.tensor([[3, 7, 5, 1]]))
        longer = model(torch.tensor([[3, 7, 2, 9, 0, 0], [1, 1, 1, 1, 1, 1]]))
        earlier = model(torch.tensor([[4, 7, 2, 9]]))
    assert states.shape == (1, 4, 16)
    assert torch.allclose(states[:, :2], later[:, :2], atol=1e-6)
    assert not torch.allclose(states[:, 2], later[:, 2], atol=1e-3)
    assert torch.allclose(states[0], longer[0, :4], atol=1e-6)
    assert not torch.allclose(states[:, 3], earlier[:, 3], atol=1e-4), "it remembers"


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("name", MODELS)
def test_the_next_item_is_learned(name, loss):
    found, rows = trained(name, chain_users(200), loss=loss, epochs=25, patience=25)
    metrics = evaluate(rows, resamples=20)
    assert metrics["hr@5"] > 0.9
    assert metrics["auc"] > 0.9, "scores of different users are comparable"
    assert found.log[-1]["loss"] < found.log[0]["loss"]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_learned_from_test_users(name):
    """Other targets, negatives and histories of test users: the same parameters, bit by bit."""
    users = chain_users(60)

    def changed(split, **changes):
        return [user | changes if user["split"] == split else user for user in users]

    def parameters(users):
        return trained(name, users, epochs=3)[0].model.state_dict()

    wanted = parameters(users)
    other = changed("test", history=ITEMS[6::-1], target=ITEMS[7], negatives=ITEMS[8:28])
    found = parameters(other)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    found = parameters(changed("train", target=ITEMS[0]))
    assert not all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_random_targets_are_ranked_by_chance():
    users = chain_users(600)
    rng = np.random.default_rng(2)
    for user in users:
        if user["split"] == "test":
            drawn = rng.choice([i for i in ITEMS if i not in user["history"]], 21, replace=False)
            user["target"], user["negatives"] = drawn[0], drawn[1:].tolist()
    low, high = evaluate(trained("sasrec", users)[1])["auc_per_user_ci95"]
    assert low < 0.5 < high


def test_without_a_better_epoch_training_stops_and_the_best_one_is_kept():
    users = chain_users(100)
    found, options, validation, _ = fitted("gru4rec", users, epochs=60, patience=2)
    assert len(found.log) < 60
    assert found.log[-1]["epoch"] == found.best["epoch"] + 2
    again, *_ = fitted("gru4rec", users, epochs=int(found.best["epoch"]), patience=60)
    kept, wanted = (score_candidates(f.model, validation, options) for f in (found, again))
    assert kept == wanted


def test_without_validation_users_the_last_epoch_is_kept():
    users = [user for user in chain_users(60) if user["split"] != "validation"]
    found, rows = trained("gru4rec", users, epochs=4, patience=1)
    assert found.best["epoch"] == len(found.log) == 4
    first = trained("gru4rec", users, epochs=1)[1]
    assert [row["score"] for row in rows] != [row["score"] for row in first]


def test_the_losses_by_hand():
    """Two users, one of whom has a shorter sequence: its padding does not count."""
    model = new_model("sasrec", options_of("sasrec", dropout=0.0))
    rows = padded([[1, 2, 3], [4, 5]])
    inputs, targets = rows[:, :-1], rows[:, 1:]
    states, vectors = model(inputs), model.items()
    wanted = [(states[0, 0], 2), (states[0, 1], 3), (states[1, 0], 5)]
    drawn = torch.randint(1, 31, (3,), generator=torch.Generator().manual_seed(5))
    cross_entropy, bce = [], []
    for (state, item), negative in zip(wanted, drawn, strict=True):
        weights = (vectors[1:] @ state).double().exp()
        cross_entropy.append(-math.log((weights[item - 1] / weights.sum()).item()))
        up, down = (torch.sigmoid((vectors[i] @ state).double()).item() for i in (item, negative))
        bce.append(-math.log(up) - math.log(1 - down))
    for name, expected in (("cross_entropy", cross_entropy), ("bce", bce)):
        generator = torch.Generator().manual_seed(5)
        options = SimpleNamespace(loss=name, padding_class=False)
        loss = next_item_loss(model, inputs, targets, options, generator)
        assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    whole = [-(vectors @ s).log_softmax(0)[item].item() for s, item in wanted]
    options = SimpleNamespace(loss="cross_entropy", padding_class=True)
    loss = next_item_loss(model, inputs, targets, options, generator)
    assert loss.item() == pytest.approx(np.mean(whole), rel=1e-5)
    assert np.mean(whole) > np.mean(cross_entropy) + 1e-3, "one class more"


def test_validations_by_steps_are_every_so_many_batches_and_at_the_end():
    users = chain_users(100)
    found, *_ = fitted("gru4rec", users, epochs=3, validation_steps=4, batch_size=8, patience=60)
    batches = found.log[-1]["step"]
    assert [line["step"] for line in found.log] == sorted({*range(4, batches + 1, 4), batches})
    assert batches % 3 == 0 and found.log[-1]["epoch"] == 3
    stopped, *_ = fitted("gru4rec", users, epochs=99, validation_steps=4, patience=2)
    assert stopped.log[-1]["step"] == stopped.best["step"] + 8


def test_long_lists_and_first_items_as_the_released_code_has_them():
    data = SequenceData({}, [[5, 6, 7, 8, 9], [1, 2]])

    def targets(**changes):
        options = options_of("gru4rec", max_length=2, **changes)
        batches = data.training_batches(options, torch.Generator().manual_seed(0))
        found = [(row, wanted) for b in batches for row, wanted in zip(*b, strict=True)]
        return sorted(([*map(int, r)], [*map(int, w)]) for r, w in found)

    assert targets() == [([1, 2], [2, 0]), ([5, 6], [6, 7]), ([7, 8], [8, 9])]
    assert targets(long_lists="last") == [([1, 2], [2, 0]), ([7, 8], [8, 9])]
    first = targets(first_item=True, long_lists="last")
    assert first == [([0, 1], [1, 2]), ([7, 8], [8, 9])], "number 0 stands for no history"


def test_weights_start_and_decay_as_the_released_code_has_them():
    options = options_of("gru4rec", weight_decay=0.1, decay_norms=False)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(40, 40), "norm": torch.nn.LayerNorm(4)})
    kept, spared = (len(g["params"]) for g in new_optimizer(model, options).param_groups)
    assert (kept, spared) == (1, 3)
    assert len(new_optimizer(model, options_of("gru4rec")).param_groups) == 1
    start_truncated_normal(model)
    weight = model["a"].weight
    assert weight.abs().max() <= 0.04 and weight.std().item() == pytest.approx(0.0176, rel=0.1)
    assert torch.equal(model["norm"].weight, torch.ones(4))
    clipped, plain = (
        fitted("gru4rec", chain_users(60), epochs=1, clip=clip)[0].model.state_dict()
        for clip in (1e-3, 0.0)
    )
    assert not all(torch.equal(clipped[key], plain[key]) for key in plain)


def test_scores_are_log_probabilities_of_all_items():
    users = chain_users(10)
    options = options_of("gru4rec")
    data = SequenceData.of(users, ITEMS)
    lists = data.candidate_lists(users, "test")
    lists.candidates = [list(range(1, 31))] * len(lists.users)
    scores = score_candidates(new_model("gru4rec", options), lists, options)
    assert np.exp(scores).sum(1) == pytest.approx(1.0, abs=1e-5)


def test_features_are_part_of_an_items_vector_or_all_of_it():
    features = torch.randn(30, 5)
    both = ItemVectors(30, 16, features)
    assert torch.allclose(both()[4], both.ids.weight[4] + both.project(features[3]))
    only = ItemVectors(30, 16, features, with_ids=False)
    assert torch.allclose(only()[4], only.project(features[3]))
    with pytest.raises(InputError, match="--item_ids false needs --features"):
        ItemVectors(30, 16, None, with_ids=False)


@pytest.mark.slow
def test_the_encoder_puts_titles_of_one_topic_near_each_other():
    texts = ["a recipe for noodle soup", "how to cook pasta at home", "the football world cup"]
    vectors = encode(texts, "sentence-transformers/all-MiniLM-L6-v2")
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a random CLIP: 12 projected features of images of 30 x 30."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "projection_dim": 12}
    torch.manual_seed(0)
    vision = size | {"image_size": 30, "patch_size": 10}
    config = transformers.CLIPConfig(
        text_config=size | {"vocab_size": 99}, vision_config=vision, projection_dim=12
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    square = {"height": 30, "width": 30}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": square}))
    return folder


def test_images_have_vectors_of_clip_of_llavas_tower_and_none_is_zero(clip, tmp_path):
    paths = [tmp_path / "0.png", None, tmp_path / "2.jpg"]
    for path, colour in ((paths[0], "red"), (paths[2], "blue")):
        Image.new("RGB", (40, 60), colour).save(path)
    found = encode_images(paths, str(clip))
    assert found.shape == (3, 12) and found.norm(dim=1).tolist() == pytest.approx([1, 0, 1])
    assert (found[0] - found[2]).abs().max() > 1e-3, "each is of its image"
    model = transformers.CLIPModel.from_pretrained(clip)
    processor = transformers.AutoImageProcessor.from_pretrained(clip)
    pixels = processor(images=[Image.open(paths[2])], return_tensors="pt")["pixel_values"]
    projected = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert torch.allclose(found[2], projected[0] / projected.norm(), atol=1e-5)
    llava = encode_images(paths, str(TINY / "llava"))
    assert llava.shape[1] == 96 and llava[1].norm() == 0
    paths[0].write_bytes(b"GIF")
    with pytest.raises(InputError, match=r"0\.png: .*; take it out of items"):
        encode_images(paths, str(clip))
    with pytest.raises(InputError, match="no item has an image"):
        encode_images([None], str(clip))


def test_an_image_encoder_that_lacks_weights_is_refused(clip, tmp_path):
    image = Image.new("RGB", (40, 60))
    image.save(tmp_path / "a.png")
    shutil.copytree(clip, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    weights = load_file(path)
    del weights["visual_projection.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="lacks the weight visual_projection"):
        encode_images([tmp_path / "a.png"], str(tmp_path / "model"))
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"--image_encoder .* cannot be loaded"):
        encode_images([tmp_path / "a.png"], str(tmp_path / "model"))


def test_efficientnet_sees_what_is_alike(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="scripts/get_model.sh efficientnet")
    rng = np.random.default_rng(0)
    kinds = (("red", "star"), ("red", "star"), ("blue", "cross"))
    covers = [draw_cover(colour, shape, rng) for colour, shape in kinds]
    for n, cover in enumerate(covers):
        cover.save(tmp_path / f"{n}.png")
    vectors = encode_images([tmp_path / f"{n}.png" for n in range(3)], "efficientnet-lite0")
    assert vectors.shape == (3, 1280)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


@pytest.mark.parametrize("name", MODELS)
def test_a_baseline_writes_scores_of_the_test_users(name, small_run, tmp_path):
    summaries = str(small_run.system / "image_summaries.jsonl")
    words = ["--output_dir", str(tmp_path), "--epochs", "2", "--summaries", summaries]
    words += ["--features", "title", "summary", "image", "--variant", "own"]
    words += ["--image_encoder", str(TINY / "llava")]
    small_run.run(f"MLLM-MSR/baselines/{name}.py", *words)
    path = tmp_path / "baselines" / "own" / "scores.jsonl"
    rows, users = read_rows(path), read_rows(small_run.folder / "users.jsonl")
    tested = {user["user_id"]: user for user in users if user["split"] == "test"}
    assert {row["user_id"] for row in rows} == tested.keys()
    assert evaluate(rows, resamples=5)["candidates"] == 21
    assert all(row["item_id"] == tested[row["user_id"]]["target"] for row in rows if row["label"])
    assert [line["epoch"] for line in read_record(path)["log"]] == [1, 2]
    before = path.stat().st_mtime_ns
    small_run.run(f"MLLM-MSR/baselines/{name}.py", *words)
    assert path.stat().st_mtime_ns == before, "it is up to date"
    words = [*words[:2], "--epochs", "1", "--control", "other_histories"]
    small_run.run(f"MLLM-MSR/baselines/{name}.py", *words)
    assert (tmp_path / f"baselines/{name}_other_histories/scores.jsonl").exists()


def test_titles_of_a_history_stand_where_the_preference_would(small_run, tmp_path):
    words = ["--output_dir", str(tmp_path), "--system", "titles", "--max_titles", "2"]
    small_run.run("MLLM-MSR/baselines/title_history.py", *words)
    rows = read_rows(tmp_path / "titles" / "user_preferences.jsonl")
    users = read_by_id(small_run.folder / "users.jsonl", "user_id")
    items = read_by_id(small_run.folder / "items.jsonl", "item_id")
    assert [row["user_id"] for row in rows] == list(users)
    for row in rows:
        user = users[row["user_id"]]
        titles = [items[item]["title"] for item in user["history"][-2:]]
        assert row["preference"] == "; ".join(f"{n}. {t}" for n, t in enumerate(titles, start=1))
        assert user["target"] not in row["blocks"][0]["items"]


def test_windows_hold_each_next_item_once():
    for length in range(1, 9):
        row = list(range(1, 18))
        parts = windows(row, length)
        pairs = [pair for part in parts for pair in itertools.pairwise(part)]
        assert sorted(pairs) == list(itertools.pairwise(row))
        assert max(map(len, parts)) <= length + 1
        assert parts[0][-1] == row[-1], "the latest window is a full one"
    assert windows([5], 3) == []


def test_histories_of_others_and_targets_that_are_in_no_training_list_leave_no_skill():
    """Chains of items: with its own history a target is nearly always found."""
    users = chain_users(400)
    _, own = trained("gru4rec", users)
    others = with_other_histories(users)
    tested = [(user, new) for user, new in zip(users, others, strict=True) if is_test(user)]
    assert all(user["target"] == new["target"] for user, new in tested)
    assert sum(user["history"] == new["history"] for user, new in tested) < len(tested) / 10
    _, permuted = trained("gru4rec", others)
    assert evaluate(own, resamples=20)["auc_per_user"] > 0.9
    assert abs(evaluate(permuted, resamples=20)["auc_per_user"] - 0.5) < 0.1


def test_left_out_items_are_in_no_training_list():
    data = SequenceData.of(chain_users(50), ITEMS)
    before = sum(map(len, data.training))
    data.leave_out([3, 4, 5, 6])
    left = [number for row in data.training for number in row]
    assert not {3, 4, 5, 6} & set(left)
    assert 0 < len(left) < before
    assert min(map(len, data.training)) > 1
