"""Options that make training and scoring those of the released code, each one alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from mllmrec.generation.local_engine import GenerationEngine
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.lora import add_lora
from mllmrec.ranking.answers import AnswerSet, answer_set, answer_tokens
from mllmrec.ranking.batches import Collator
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.scoring import score_rows
from mllmrec.ranking.trainer import training_arguments
from mllmrec.ranking.training_options import FineTuningOptions, check_training_options
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore")
TRAIN, SCORE = "MLLM-MSR/train/train_llava_sft.py", "MLLM-MSR/test/test_with_llava_sft.py"


def trainable(**options):
    """Modules with LoRA weights, of the tiny LLaVA."""
    model, _ = load_multimodal(str(TINY / "llava"))
    adapted = add_lora(model, FineTuningOptions(**options))
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    return adapted, sorted({name.split(".lora_")[0] for name in names})


def test_lora_vision_also_lands_on_the_vision_tower_by_name():
    """21 layers of the language model; q, k and v of the three vision layers match their names."""
    _, language = trainable()
    _, both = trainable(lora_vision=True)
    vision = sorted(set(both) - set(language))
    assert (len(language), len(both)) == (21, 30), "paper_facts: 9 of 30 are in the vision tower"
    assert all("vision_tower" in name for name in vision)
    assert {name.rsplit(".", 1)[1] for name in vision} == {"q_proj", "k_proj", "v_proj"}
    _, some = trainable(lora_vision=True, lora_layers=["q_proj"])
    assert len(some) == 6


def test_gaussian_initialisation_of_lora():
    """PEFT: A is Kaiming uniform, bounded; Gaussian: standard deviation 1 / r; B is zero."""
    for init, bounded in (("kaiming", True), ("gaussian", False)):
        torch.manual_seed(0)
        model, _ = trainable(lora_init=init)
        weights = dict(model.named_parameters())
        a = torch.cat([w.flatten() for name, w in weights.items() if "lora_A" in name])
        assert all(not w.any() for name, w in weights.items() if "lora_B" in name)
        widest = max(w.shape[1] for name, w in weights.items() if "lora_A" in name)
        assert (a.abs().max() < 2 * (6 / widest) ** 0.5) == bounded
        if init == "gaussian":
            assert a.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_the_optimiser_is_that_of_the_options(small_run):
    where = {"config": "c", "output_dir": str(small_run.folder), "dtype": "float32"}
    plain = training_arguments(FineTuningOptions(**where), True, "auc")
    assert (plain.weight_decay, plain.load_best_model_at_end) == (0.0, True)
    assert plain.lr_scheduler_type == "linear"
    released = {"weight_decay": 0.01, "schedule": "constant", "keep": "last"}
    arguments = training_arguments(FineTuningOptions(**where, **released), True, "auc")
    assert (arguments.weight_decay, arguments.load_best_model_at_end) == (0.01, False)
    assert arguments.lr_scheduler_type == "constant"
    with pytest.raises(InputError, match="--keep last would not keep"):
        check_training_options(FineTuningOptions(**where, keep="last", patience=1))


@pytest.fixture(scope="module")
def llava():
    model, processor = load_multimodal(str(TINY / "llava"))
    return model, ChatProcessor(processor)


def test_bare_answers_are_the_tokens_called_like_them(llava):
    _, chat = llava
    rendered, bare = (
        answer_tokens(chat, AnswerSet(("No", "Yes"), token)) for token in ("rendered", "bare")
    )
    assert rendered.first_ids == [ids[0] for ids in rendered.ids]
    assert bare.first_ids == chat.tokenizer.convert_tokens_to_ids(["No", "Yes"])
    assert set(bare.first_ids).isdisjoint(rendered.first_ids)
    assert (bare.texts, bare.ids) == (rendered.texts, rendered.ids), "training is the same"


def test_a_vocabulary_without_bare_answers_is_refused():
    chat = ChatProcessor(load_text(str(TINY / "llama"))[1])
    missing = AnswerSet(("No", "Perhaps so"), token="bare")
    with pytest.raises(InputError, match=r"no token 'Perhaps so'; use --answer_token rendered"):
        answer_tokens(chat, missing)


def test_without_end_token_a_training_text_ends_with_the_answer(llava, small_run):
    _, chat = llava
    rows = read_rows(small_run.system / "train.jsonl")[:2]
    plain = Collator(RowReader(chat, small_run.system))
    bare = Collator(
        RowReader(chat, small_run.system, answers=AnswerSet(("No", "Yes"), end_token=False))
    )
    for row in rows:
        assert plain.text(row) == bare.text(row) + chat.tokenizer.eos_token
        assert plain.answer_ids(row) == [*bare.answer_ids(row), chat.tokenizer.eos_token_id]
    assert bare(rows)["input_ids"].shape[1] == plain(rows)["input_ids"].shape[1] - 1


def test_raw_prompts_of_the_released_code(llava, small_run):
    """No chat template: mistyped tag in training, another one in scoring, no end token."""
    _, chat = llava
    row = read_rows(small_run.system / "train.jsonl")[0]
    question = row["messages"][0]["content"][-1]["text"]
    image, bos = chat.processor.image_token, chat.tokenizer.bos_token_id
    raw = AnswerSet(("No", "Yes"), end_token=False)
    training = ChatProcessor(chat.processor, prompt_format="[INST] {image}\n{text} [\\INST]")
    text = Collator(RowReader(training, small_run.system, answers=raw)).text(row)
    answer = ("No", "Yes")[row["label"]]
    assert text == f"[INST] {image}\n{question} [\\INST] {answer}"
    scoring = ChatProcessor(chat.processor, prompt_format="[INST]{image}\n{text} [/INST]")
    prompt, ids = RowReader(scoring, small_run.system).prompt(row)
    assert prompt == f"[INST]{image}\n{question} [/INST]"
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_the_options_reach_the_score(llava, small_run):
    """The same row, scored by the bare and by the rendered answers."""
    model, chat = llava
    rows = read_rows(small_run.system / "test.jsonl")[:3]
    stage, found = load_script(SCORE), {}
    for kind in ("rendered", "bare"):
        answers = answer_set("yes_no", stage.Options(config="c", answer_token=kind))
        reader = RowReader(chat, small_run.system, answers=answers)
        found[kind] = [logits for _, logits in score_rows(model, reader, rows)]
    assert all(a != b for a, b in zip(found["rendered"], found["bare"], strict=True))
    assert not answer_set("yes_no", stage.Options(config="c", end_token=False)).end_token


def test_padding_makes_a_score_depend_on_its_batch(llava, small_run, tmp_path):
    """Rows of one size are as ever; a larger image beside them changes theirs, and only theirs."""
    model, chat = llava
    rows = read_rows(small_run.system / "test.jsonl")[:6]
    shutil.copytree(small_run.folder / "covers", tmp_path / "covers")
    (tmp_path / "mllm_msr").mkdir()
    folder = tmp_path / "mllm_msr"

    def scores(n):
        reader = RowReader(chat, folder)
        reader.pad_images(rows, n)
        return [logits for _, logits in sorted(score_rows(model, reader, rows))]

    assert np.allclose(scores(3), scores(0), atol=1e-4)
    large = folder / rows[1]["images"][0]
    Image.open(large).resize((200, 90)).save(large)
    changed = [not np.allclose(a, b, atol=1e-4) for a, b in zip(scores(0), scores(3), strict=True)]
    assert changed == [True, False, True, False, False, False], "the largest stays as it is"
    batch = Collator(RowReader(chat, folder), pad_images=True)
    training = read_rows(small_run.system / "train.jsonl")[:2]
    shapes = {tuple(size) for size in batch(training)["image_sizes"].tolist()}
    assert len(shapes) == 1


def test_stage_2_pads_the_images_of_all_items_whichever_are_left(small_run, tmp_path):
    """8 items in a batch; a pilot and its resumed run give the texts of one run."""
    shutil.copytree(small_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("mllm_msr"))
    Image.new("RGB", (300, 40), "red").save(tmp_path / "run" / "covers" / "i003.png")
    texts = {}
    for name, limits in (("whole", ("0",)), ("parts", ("5", "0")), ("plain", ("0",))):
        where = ["--data_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / name)]
        where += ["--pad_images", "0" if name == "plain" else "8"]
        for limit in limits:
            small_run.run("Inference/image_summary.py", *where, "--limit", limit)
        texts[name] = (tmp_path / name / "mllm_msr" / "image_summaries.jsonl").read_bytes()
    assert texts["whole"] == texts["parts"] != texts["plain"]
    rows = [[json.loads(line)["summary"] for line in texts[n].splitlines()] for n in texts]
    assert rows[0][8:] == rows[2][8:], "other batches are as they were"


def test_prompts_of_stage_3_may_name_user_and_items(small_run, tmp_path, monkeypatch):
    """Worded from a config; the prompts themselves are read off the engine."""
    seen = []
    generate = GenerationEngine.generate

    def noted(engine, requests):
        seen.extend(request.prompt.text for request in requests)
        return generate(engine, requests)

    monkeypatch.setattr(GenerationEngine, "generate", noted)
    words = ["--summaries", str(small_run.system / "image_summaries.jsonl"), "--limit", "2"]
    words += ["--output_dir", str(tmp_path), "--block_line", "[{item_id}] {title}: {summary}"]
    words += ["--first_prompt", "User {user_id} saw {block}"]
    words += ["--next_prompt", "{block} then {preference} of {user_id}"]
    small_run.run("Inference/preference_recurrent.py", *words)
    users = read_rows(small_run.folder / "users.jsonl")[:2]
    for user in users:
        (first,) = (text for text in seen if f"User {user['user_id']} saw" in text)
        assert [f"[{i}] " in first for i in user["history"][:4]] == [True, True, True, False]
        later = [text for text in seen if f" of {user['user_id']}" in text]
        assert len(later) == -(-len(user["history"]) // 3) - 1
