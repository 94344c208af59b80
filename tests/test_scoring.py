"""Scores: one forward pass per row, and shared prefixes computed once, are the same to 1e-5."""

import numpy as np
import pytest
import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model
from PIL import Image
from random_models import random_llava, random_qwen_vl

from mllmrec.data import sample_world as world
from mllmrec.models.adapters import load_adapter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal
from mllmrec.models.model_options import ModelOptions
from mllmrec.ranking.answers import answer_tokens
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.reader import PromptTooLongError, RowReader
from mllmrec.ranking.rows import group_rows
from mllmrec.ranking.scoring import ScoringOptions, probability, score_rows
from mllmrec.stage.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def question_row(user_id, item, label, image, preference):
    """A line of test.jsonl."""
    candidate = Candidate(user_id, item["item_id"], item["title"], image, label)
    return candidate_row(candidate, preference, QuestionFormat(), with_answer=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, rows): 10 items with covers of mixed shapes, 6 users; texts of mixed lengths."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(4)
    items = [{**world.random_item(rng), "item_id": str(n)} for n in range(10)]
    for n, item in enumerate(items):
        cover = world.draw_cover(item["colour"], item["shape"], rng)
        cover.resize((48 + 30 * (n % 3), 64 - 9 * (n % 4))).save(folder / f"{n}.png")
    rows = []
    for user in range(6):
        preference = world.preference_text(world.random_item(rng))
        preference += " And of other things, too." * (user % 3)
        for n, item in enumerate(items):
            if (user + n) % 2 or n == 3:
                rows.append(question_row(f"u{user}", item, int(n == 0), f"{n}.png", preference))
    rows.append(question_row("u9", items[4], 0, "4.png", "Alone."))
    return folder, rows


def page_row(title, preference="A taste."):
    """A question about an item with a title of choice."""
    return question_row("u7", {"item_id": "0", "title": title}, 0, "0.png", preference)


@pytest.fixture(scope="module")
def model():
    return load_multimodal(str(TINY / "llava"))


def scored(model, processor, folder, rows, gray_images=False, **options):
    reader = RowReader(ChatProcessor(processor), folder, gray_images=gray_images)
    scores = dict(score_rows(model, reader, rows, ScoringOptions(**options)))
    assert sorted(scores) == list(range(len(rows))), "every row once"
    return np.array([scores[index] for index in range(len(rows))])


def one_by_one(model, processor, folder, rows):
    """Logits of the last position, each rendered prompt alone through the processor."""
    token_ids, found = answer_tokens(ChatProcessor(processor)).first_ids, []
    for row in rows:
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True)
        image = Image.open(folder / row["images"][0]).convert("RGB")
        batch = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0, -1]
        found.append(logits[token_ids].tolist())
    return np.array(found)


def assert_exact(found, wanted):
    """Equal to 1e-5 of the largest logit."""
    assert np.abs(found - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


@pytest.fixture(scope="module")
def wanted(model, data):
    """The logits that scoring is to give."""
    return one_by_one(*model, *data)


@pytest.mark.parametrize("batch_tokens", [1, 400, 65536])
def test_prefix_reuse_and_batches_change_no_score(model, data, wanted, batch_tokens):
    for reuse, packed in ((True, False), (True, True), (False, False)):
        options = {"reuse_prefix": reuse, "pack_rows": packed}
        assert_exact(scored(*model, *data, batch_tokens=batch_tokens, **options), wanted)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["next", "1.5"])
def test_prefix_reuse_changes_no_score_of_another_model(data, kind, packed):
    """Random weights, grouped-query attention; several tiles (next) or one square image (1.5)."""
    model = random_llava("tiny", kind)
    wanted, found = one_by_one(*model, *data), scored(*model, *data, pack_rows=packed)
    assert np.abs(found - wanted).max() < 1e-5
    difference = wanted[:, 0] - wanted[:, 1]
    assert difference.std() > 1e-3
    assert (np.argsort(found[:, 0] - found[:, 1]) == np.argsort(difference)).mean() > 0.99


def test_logits_keep_their_digits_where_training_computes_in_16_bit(model, data):
    """In bfloat16 a logit near 20 has a resolution of an eighth: candidates would tie."""
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.from_numpy(scored(*model, *data)).float()
    assert (found != found.bfloat16().float()).float().mean() > 0.9


def test_prefix_reuse_changes_no_score_with_an_adapter(model, data, tmp_path):
    base, processor = load_multimodal(str(TINY / "llava"))
    torch.manual_seed(1)
    layers = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    config = LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    base, _ = load_multimodal(str(TINY / "llava"))
    adapted = load_adapter(base, tmp_path, str(TINY / "llava"))
    wanted = one_by_one(adapted, processor, *data)
    assert np.abs(wanted - scored(*model, *data)).max() > 0.1, "the adapter does something"
    assert_exact(scored(adapted, processor, *data), wanted)


def test_scores_in_16_bit_are_those_that_training_validates_with(data, tmp_path):
    """LoRA in float32 computed under autocast; and no logits but the answers' are computed."""
    options = ModelOptions(dtype="bfloat16")
    base, processor = load_multimodal(str(TINY / "llava"), options)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trained = get_peft_model(base, config).eval()
    trained.save_pretrained(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = scored(trained, processor, *data)
    adapted = load_adapter(load_multimodal(str(TINY / "llava"), options)[0], tmp_path, "llava")
    positions = []
    adapted.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, logits: positions.append(logits.shape[1])
    )
    assert np.array_equal(scored(adapted, processor, *data), wanted)
    assert 0 in positions, "but for the prefixes, whose logits nobody reads"
    float32 = load_adapter(load_multimodal(str(TINY / "llava"))[0], tmp_path, "llava")
    assert np.abs(scored(float32, processor, *data) - wanted).max() > 1e-3, "digits of 16 bit"


def test_in_16_bit_the_texts_behind_a_prefix_are_one_sequence(data):
    """Not where the attention takes no mask of pairs: eager, sliding windows."""

    def rows_behind_prefixes(dtype, **settings):
        """How many sequences continue a cache: each has a copy of its prefix's keys and values."""
        model, processor = random_llava("tiny", dtype=dtype)
        for name, value in settings.items():
            setattr(model.config.text_config, name, value)
        behind = []

        def watch(_, args, words):
            held = words["past_key_values"].get_seq_length() if words["past_key_values"] else 0
            behind.extend([held] * words["inputs_embeds"].shape[0] if held else [])

        model.model.language_model.register_forward_pre_hook(watch, with_kwargs=True)
        scored(model, processor, *data)
        return len(behind)

    shared = sum(len(group) for group in group_rows(data[1]) if len(group) > 1)
    assert rows_behind_prefixes(torch.float32) == shared
    assert rows_behind_prefixes(torch.bfloat16) < 0.8 * shared
    for setting in ({"sliding_window": 4096}, {"_attn_implementation": "eager"}):
        assert rows_behind_prefixes(torch.bfloat16, **setting) == shared


def test_the_prefix_of_an_item_is_computed_once(model, data):
    seen, rows = [], data[1]

    def watch(_, args, kwargs):
        seen.append((args or list(kwargs.values()))[0].shape[0])

    hook = model[0].model.vision_tower.register_forward_pre_hook(watch, with_kwargs=True)
    scored(*model, *data)
    hook.remove()
    n_items = len(group_rows(rows))
    assert sum(seen) == 2 * n_items < 2 * len(rows), "overview and one tile of each item"


def test_the_image_is_attended_to(model, data):
    difference = scored(*model, *data) - scored(*model, *data, gray_images=True)
    assert np.abs(difference).max() > 0.1


def test_a_long_preference_loses_its_tail_only(model, data):
    chat, row = ChatProcessor(model[1]), page_row("A title", "word " * 300 + "tail")
    reader = RowReader(chat, data[0], max_text_tokens=70)
    prompt, ids = reader.prompt(row)
    assert len(ids) == chat.count(prompt) <= 70
    assert len(ids) > 60, "as much as fits is kept"
    assert reader.shortened == 1
    whole, _ = RowReader(chat, data[0]).prompt(row)
    head, end = whole[: whole.index("word")], whole[whole.index("tail") + 4 :]
    assert prompt.startswith(head)
    assert prompt.endswith(end), "title, question and what closes the turn stay"
    message = "longer than 9 tokens even without a preference; raise --max_text_tokens"
    with pytest.raises(PromptTooLongError, match=message):
        RowReader(chat, data[0], max_text_tokens=9).prompt(row)


def test_a_missing_image_is_named(model, data):
    folder, rows = data
    with pytest.raises(InputError, match=r"gone.png, item '0': the file is missing"):
        scored(*model, folder, [{**rows[0], "item_id": "0", "images": ["gone.png"]}])


def test_probability_is_equation_1():
    for yes, no in ((0.0, 0.0), (2.0, -1.0), (-30.0, 30.0)):
        wanted = np.exp(yes) / (np.exp(yes) + np.exp(no))
        assert probability(yes, no) == pytest.approx(wanted, rel=1e-12)


def test_a_user_whose_question_cannot_fit_is_found_beforehand(model, data):
    chat, endless = ChatProcessor(model[1]), page_row("word " * 60)
    reader = RowReader(chat, data[0], max_text_tokens=100)
    assert set(reader.find_too_long([*data[1], endless])[0]) == {"u7"}
    assert reader.shortened == 0, "looking ahead is not counted"
    assert RowReader(chat, data[0]).find_too_long([endless]) == ({}, [])


def test_an_image_that_the_processor_refuses_is_found_beforehand(data, tmp_path):
    """Qwen2.5-VL takes no image with an aspect ratio above 200."""
    reader = RowReader(ChatProcessor(random_qwen_vl()[1]), tmp_path)
    for name, size in (("good.png", (200, 1)), ("long.png", (20_000, 10))):
        Image.new("RGB", size).save(tmp_path / name)
    good, long = (
        {**data[1][n], "images": [f"{name}.png"]} for n, name in ((0, "good"), (1, "long"))
    )
    assert reader.fitting_rows([good, good], "train.jsonl")[0] == [good, good]
    message = "the model's processor refuses the image long.png of 20000 x 10 pixels .*aspect ratio"
    with pytest.raises(InputError, match=f"train.jsonl, line 3, user .*: {message}"):
        reader.fitting_rows([good, good, long], "train.jsonl")
    with pytest.raises(InputError, match=f"{tmp_path}/test.jsonl, line 2, user .*: {message}"):
        reader.find_too_long([good, long])


def test_a_run_in_which_no_question_fits_is_refused(small_run):
    words = ("--max_text_tokens", "5", "--variant", "short", "--adapter", "none")
    with pytest.raises(InputError, match=r"no question fits, the first: .* raise --max_text_tok"):
        small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *words)
    assert not (small_run.system / "short/scores.jsonl").exists()


def test_a_title_of_a_whole_page_is_cut_in_stage_4():
    row = page_row("word " * 600)
    text = row["messages"][0]["content"][1]["text"]
    assert text.count("word") == 60
    assert text[slice(*row["preference_span"])] == "A taste."


def test_in_bfloat16_candidates_do_not_tie(data):
    """Logits of a bfloat16 LM head near 20 are an eighth apart; ours are computed in float32."""
    model, processor = random_llava("tiny", dtype=torch.bfloat16)
    model.lm_head.weight.data *= 300
    found = scored(model, processor, *data)
    assert np.abs(found).max() > 16
    on_the_grid_of_bfloat16 = (found * 256 == np.round(found * 256)).all(axis=1)
    assert not on_the_grid_of_bfloat16.any()


def test_a_template_that_does_not_start_with_the_image_takes_the_plain_pass(data):
    model, processor = load_multimodal(str(TINY / "llava"))
    part = "{%% for part in message['content'] if part['type'] == '%s' %%}{{ %s }}{%% endfor %%}"
    text, image = part % ("text", "part['text']"), part % ("image", "'<image>\\n'")
    assert image + text in processor.chat_template
    processor.chat_template = processor.chat_template.replace(image + text, text + image)
    assert_exact(scored(model, processor, *data), one_by_one(model, processor, *data))
