"""The generation engine: batching changes nothing, sampling included; what is refused is told, images reach the model."""

import numpy as np
import pytest
import torch
from conftest import TINY, script
from PIL import Image

from data_processing import prompts
from data_processing import sample_world as world
from data_processing.errors import InputError
from Inference import sampling
from Inference.chat import Chat, user_turn
from Inference.engine import Engine, Prompt, Refused, read_ahead, run_dialogues
from Inference.models import load_multimodal, load_text
from Inference.preference_recurrent import Args, recurrent_preference
from Inference.preferences import Asker
from Inference.random_models import random_llama, random_llava, random_qwen3, random_qwen_vl

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def llama():
    model, tokenizer = load_text(str(TINY / "llama"))
    return model, Chat(tokenizer)


@pytest.fixture(scope="module")
def llava():
    model, processor = load_multimodal(str(TINY / "llava"))
    return model, Chat(processor)


def histories(n, seed=3):
    rng = np.random.default_rng(seed)
    items = world.catalogue(80, rng)
    lives = [world.simulate_user(items, int(rng.integers(4, 17)), rng)[0] for _ in range(n)]
    return (
        [
            [(str(i), items[i]["title"], world.caption(items[i])) for i in chosen]
            for chosen in lives
        ],
        items,
        lives,
    )


def preferences(
    model, chat, told, batch_tokens, order=None, max_new_tokens=40, portion_tokens=None, **options
):
    engine = Engine(model, chat, max_new_tokens, batch_tokens, **options)
    engine.portion_tokens = portion_tokens or engine.portion_tokens

    def dialogue(history):
        return (yield from recurrent_preference(history, Asker(chat, 1000, "video").ask, Args()))

    names = order if order is not None else range(len(told))
    return {
        name: result
        for name, result, _ in run_dialogues(engine, ((n, dialogue(told[n])) for n in names))
    }


TEXT_MODELS = {
    "llama": lambda: load_text(str(TINY / "llama")),
    "random llama": lambda: random_llama("tiny"),
    "qwen3": random_qwen3,
}
PICTURE_MODELS = {
    "next": lambda: load_multimodal(str(TINY / "llava")), "random next": lambda: random_llava("tiny"),
    "1.5": lambda: random_llava("tiny", kind="1.5"), "qwen2.5-vl": random_qwen_vl,
}  # fmt: skip
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5}


@pytest.mark.parametrize("kind", TEXT_MODELS)
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_recurrence_in_batches_and_continuously_is_the_recurrence_one_by_one(kind, how):
    model, tokenizer = TEXT_MODELS[kind]()
    chat, (told, _, _) = Chat(tokenizer), histories(10)
    single = preferences(model, chat, told, batch_tokens=1, max_new_tokens=20, **how)
    assert (
        preferences(model, chat, told, 20_000, order=range(9, -1, -1), max_new_tokens=20, **how)
        == single
    )
    assert (
        preferences(model, chat, told, 20_000, max_new_tokens=20, portion_tokens=400, **how)
        == single
    ), "read in portions"
    assert preferences(model, chat, told, 1, continuous=True, max_new_tokens=20, **how) == single


def test_another_seed_or_user_or_block_is_another_draw(llama):
    told, _, _ = histories(1)
    same = [told[0]] * 2
    first, second = (
        preferences(*llama, same, 20_000, temperature=3.0, seed=seed) for seed in (1, 2)
    )
    texts = [
        block["preference"]
        for found in (first, second)
        for user in (0, 1)
        for block in found[user]["blocks"]
    ]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_softmax(top_p):
    """Over many users the share of each token is its probability, to four standard errors."""
    scores, n = torch.tensor([[2.0, 1.0, 0.5, -1.0, -4.0]]), 20_000
    rows = scores.repeat(n, 1)
    for warp in sampling.warpers(0.7, top_p):
        rows = warp(None, rows)
    draws = sampling.GumbelMax([sampling.stream(42, str(user), 0) for user in range(n)], 3)
    chosen = draws(torch.zeros(n, 3), rows).argmax(1)
    share, wanted = torch.bincount(chosen, minlength=5) / n, rows[0].softmax(0)
    assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / n).sqrt() + 1e-9).all()
    later = draws(torch.zeros(n, 4), rows).argmax(1)
    joint = torch.stack(
        [
            torch.bincount(later[chosen == token], minlength=5) / (chosen == token).sum()
            for token in (0, 1)
        ]
    )
    assert (joint - wanted).abs().max() < 0.03, (
        "the next position's draw does not hang on this one's"
    )


def test_noise_is_finite_at_its_ends():
    """Half a step beside 0 and 1, where one more bit would round to 1 and give infinity."""
    ends = sampling.gumbel_of(torch.tensor([0, (1 << 23) - 1]))
    assert ends.isfinite().all()
    assert ends[0] < -2.7
    assert ends[1] > 16
    noise = sampling.gumbel(torch.tensor([sampling.draw(7, place) for place in range(40)]), 50_000)
    assert noise.isfinite().all()
    assert noise.max() > 14
    assert noise.mean() == pytest.approx(0.5772, abs=0.003)
    assert noise.std() == pytest.approx(1.2825, abs=0.003)


def test_pictures_that_wait_have_a_limit_in_memory():
    from types import SimpleNamespace

    from Inference import engine

    small, large = np.zeros((1, 100)), np.zeros((1, 1 << 20))
    turns = lambda array, n: (
        [engine._Turn("", 0, None, Prompt("", 10, {"pixel_values": array}))] * n
    )  # noqa: E731
    settings = SimpleNamespace(batch_tokens=10**6, max_new_tokens=10)
    assert not engine._enough(settings, turns(small, 300))
    assert not engine._enough(settings, turns(large, 300))
    assert engine._enough(settings, turns(large, 500))
    assert engine._enough(SimpleNamespace(batch_tokens=1000, max_new_tokens=10), turns(small, 100))


def test_a_full_memory_halves_the_batch_and_nothing_is_lost(llama, monkeypatch, capsys):
    told, _, _ = histories(8)
    wanted = preferences(*llama, told, 20_000)
    model, chat = llama
    whole, sizes = type(model).generate, []

    def generate(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return whole(self, **inputs)

    monkeypatch.setattr(type(model), "generate", generate)
    assert preferences(model, chat, told, 20_000) == wanted
    assert (
        "out of memory with 8 prompts at once; going on with --batch_tokens"
        in capsys.readouterr().out
    )
    assert sizes[:2] == [8, 4]
    assert max(sizes[5:]) <= 3, "later batches start small"


def test_a_prompt_that_does_not_fit_alone_stops_with_a_remedy(llama, monkeypatch):
    def generate(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(type(llama[0]), "generate", generate)
    with pytest.raises(
        InputError, match=r"a single prompt .* does not fit into the memory .* --quantization nf4"
    ):
        preferences(*llama, histories(2)[0], 20_000)


def test_other_errors_of_the_model_are_not_taken_for_a_full_memory(llama, monkeypatch):
    def generate(self, **_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(type(llama[0]), "generate", generate)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        preferences(*llama, histories(2)[0], 20_000)


def test_where_continuous_batching_fails_batches_go_on(llama, monkeypatch, capsys):
    told, _, _ = histories(6)
    wanted = preferences(*llama, told, 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(
            Engine,
            "start_manager",
            lambda self: (_ for _ in ()).throw(ValueError("no such device")),
        )
        assert preferences(*llama, told, 20_000, continuous=True) == wanted
    assert (
        "continuous batching cannot be used here (no such device); going on in batches"
        in capsys.readouterr().out
    )

    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

    steps, whole = [], ContinuousBatchProcessor._generation_step

    def failing(self, *args, **options):
        steps.append(1)
        if len(steps) == 60:
            raise RuntimeError("a kernel is missing")
        return whole(self, *args, **options)

    monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", failing)
    assert preferences(*llama, told, 20_000, continuous=True) == wanted
    assert len(steps) == 60
    assert "continuous batching failed" in capsys.readouterr().out


def test_a_models_own_generation_settings_do_not_mix_in(llama):
    """Published checkpoints come with a temperature, a repetition penalty and more."""
    told, _, _ = histories(3)
    wanted = preferences(*llama, told, 20_000)
    model, tokenizer = load_text(str(TINY / "llama"))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.8)
    assert preferences(model, Chat(tokenizer), told, 20_000) == wanted


def test_each_block_is_read_with_the_preference_before_it(llama):
    """The dialogue's own prompts, written down: P_k's prompt holds P_{k-1} and block k, and nothing of later blocks."""
    told, _, _ = histories(1)
    asked, answers = (
        [],
        iter(["taste one", "taste two", "taste three", "taste four", "taste five", "taste six"]),
    )

    def ask(template, block, **texts):
        asked.append((template, [item for item, _, _ in block], texts))
        return "prompt"

    dialogue = recurrent_preference(told[0], ask, Args())
    assert next(dialogue) == "prompt"
    result = None
    while result is None:
        try:
            dialogue.send(next(answers))
        except StopIteration as end:
            result = end.value
    assert asked[0][0] == prompts.PREFERENCE_FIRST
    assert asked[0][2] == {}
    names = ["one", "two", "three", "four", "five", "six"]
    for place, (template, _, texts) in enumerate(asked[1:]):
        assert template == prompts.PREFERENCE_NEXT
        assert texts == {"preference": f"taste {names[place]}"}
    assert [block for _, block, _ in asked] == [block["items"] for block in result["blocks"]]
    assert [item for block in result["blocks"] for item in block["items"]] == [
        item for item, _, _ in told[0]
    ]


def test_the_tiny_llama_keeps_the_rule_on_its_own_output(llama):
    """Recurrent summaries, five blocks long, at least 95% right per slot."""
    told, items, lives = histories(150, seed=8)
    found = preferences(*llama, told, batch_tokens=20_000)
    right = {attribute: [] for attribute in world.ATTRIBUTES}
    last_block = []
    for n, chosen in enumerate(lives):
        wanted = world.rolled_preferences([items[i] for i in chosen])
        for block, values in zip(found[n]["blocks"], wanted, strict=True):
            for attribute, value in values.items():
                right[attribute].append(f" {value} " in block["preference"])
                if len(wanted) >= 5 and values is wanted[-1]:
                    last_block.append(right[attribute][-1])
    assert {attribute: np.mean(hits) >= 0.95 for attribute, hits in right.items()} == dict.fromkeys(
        right, True
    )
    assert len(last_block) > 60
    assert np.mean(last_block) >= 0.95


def unseen_covers(n, seed=12):
    rng = np.random.default_rng(seed)
    items = [world.random_item(rng) for _ in range(n)]
    return items, [world.draw_cover(item["colour"], item["shape"], rng) for item in items]


def captions(model, chat, covers, batch_tokens, portion_tokens=None, **options):
    engine = Engine(model, chat, 40, batch_tokens, **options)
    engine.portion_tokens = portion_tokens or engine.portion_tokens
    text = chat.render([user_turn(prompts.fill(prompts.IMAGE, "video"), images=1)])

    def dialogue(cover):
        inputs = chat.encode_one(text, cover)
        return (yield Prompt(text, inputs["input_ids"].shape[1], inputs))

    return {
        n: found
        for n, found, _ in run_dialogues(
            engine, ((n, dialogue(cover)) for n, cover in enumerate(covers))
        )
    }


def test_the_tiny_llava_describes_unseen_covers(llava):
    """At least 95% right per attribute."""
    items, covers = unseen_covers(300)
    found = captions(*llava, covers, batch_tokens=20_000)
    for attribute in ("colour", "shape"):
        right = np.mean([f" {item[attribute]} " in found[n] for n, item in enumerate(items)])
        assert right >= 0.95, attribute


@pytest.mark.parametrize("kind", PICTURE_MODELS)
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_captions_in_batches_of_mixed_shapes_are_the_captions_one_by_one(kind, how):
    model, processor = PICTURE_MODELS[kind]()
    _, covers = unseen_covers(9)
    covers = [
        cover.resize((48 + 20 * (n % 3), 64 - 11 * (n % 4))) for n, cover in enumerate(covers)
    ]
    chat = Chat(processor)
    batched = captions(model, chat, covers, batch_tokens=20_000, **how)
    assert batched == captions(model, chat, covers, batch_tokens=1, **how)
    assert batched == captions(
        model, chat, covers, batch_tokens=20_000, portion_tokens=150, **how
    ), "read in portions of unlike length"
    assert len(set(batched.values())) > 1


@pytest.mark.parametrize("kind", PICTURE_MODELS)
def test_prompts_encoded_one_by_one_join_to_what_the_processor_makes_of_all(kind):
    _, processor = PICTURE_MODELS[kind]()
    chat, rng = Chat(processor), np.random.default_rng(0)
    texts = [
        chat.render([user_turn("Say what it shows" + ", please" * n, images=1)]) for n in range(3)
    ]
    sizes = [(48, 64), (200, 90), (64, 300)]
    covers = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    wanted = chat.encode(texts, covers)
    joined = chat.join([chat.encode_one(*pair) for pair in zip(texts, covers, strict=True)])
    assert joined.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(joined[name], wanted[name]), name
    assert (joined["input_ids"] == chat.image_token_id).sum(1).tolist() == [
        chat.image_tokens(cover) for cover in covers
    ]


def test_the_fused_summary_asks_three_times_and_joins_both(llava):
    stage = script("Inference/image_summary.py")
    item = {"colour": "red", "shape": "star", "title": "music: quiet garden"}
    cover = world.draw_cover("red", "star", np.random.default_rng(1))
    model, chat = llava
    asked = []
    text = chat.render([user_turn(prompts.fill(prompts.IMAGE, "video"), images=1)])
    inputs = chat.encode_one(text, cover)

    def ask(template, **texts):
        asked.append(prompts.fill(template, "video", **texts))
        rendered = chat.render([user_turn(asked[-1])])
        return Prompt(rendered, chat.count(rendered))

    shown = Prompt(text, inputs["input_ids"].shape[1], inputs)
    [(_, summary, _)] = run_dialogues(
        Engine(model, chat, 40),
        [("1", stage.summarise(item, shown, ask, stage.Args(summary="fused")))],
    )
    assert len(asked) == 2
    assert "music: quiet garden" in asked[0]
    assert " red star " in asked[1], "the fusion prompt holds what the image prompt brought"
    assert " red star " in summary
    assert " music " in summary


def test_what_is_read_ahead_comes_in_order_from_any_number_of_processes():
    stage = script("Inference/image_summary.py")
    chat = Chat(load_multimodal(str(TINY / "llava"))[1])
    items = {str(n): {"image": None if n % 5 == 3 else f"{n}.png"} for n in range(12)}
    pictures = stage.Pictures(list(items), items, TINY, chat, "text")
    alone, helped = list(read_ahead(pictures, 0)), list(read_ahead(pictures, 2))
    assert [row[0] for row in alone] == [row[0] for row in helped] == list(items)
    assert alone == helped


def test_a_refused_dialogue_is_told_and_the_others_go_on(llama):
    model, chat = llama
    engine = Engine(model, chat, max_new_tokens=3)
    text = chat.render([user_turn("Hello")])

    def good():
        return (yield Prompt(text, chat.count(text)))

    def bad():
        yield Prompt(text, chat.count(text))
        raise Refused("no good")

    ended = {
        name: (result, reason)
        for name, result, reason in run_dialogues(
            engine, [("a", good()), ("b", bad()), ("c", good())]
        )
    }
    assert ended["b"] == (None, "no good")
    assert ended["a"] == ended["c"] != (None, None)


def test_a_long_prompt_is_shortened_by_its_summaries_and_counted(llama):
    _, chat = llama
    asker = Asker(chat, limit=120, domain="video")
    block = [
        (str(n), "music: quiet garden", "A red star on a plain ground. " * 20) for n in range(3)
    ]
    prompt = asker.ask(prompts.PREFERENCE_FIRST, block)
    assert prompt.length == chat.count(prompt.text) <= 120
    assert prompt.length > 100, "as much as fits is kept"
    assert prompt.text.count("quiet garden") == 3
    assert asker.cut == {"shortened": 1}
    with pytest.raises(Refused, match="longer than 20 tokens even without titles"):
        Asker(chat, limit=20, domain="video").ask(prompts.PREFERENCE_FIRST, block)


def test_direct_leaves_the_oldest_items_out_and_counts_them(llama):
    model, chat = llama
    stage = script("Inference/preference_direct.py")
    told, _, _ = histories(1, seed=5)
    history = told[0] * 3
    whole = chat.count(Asker(chat, 10_000, "video").ask(prompts.PREFERENCE_FIRST, history).text)
    limit = whole // 2

    def dialogue():
        return (
            yield from stage.direct_preference(
                history, Asker(chat, limit, "video").ask, stage.Args()
            )
        )

    [(_, row, _)] = run_dialogues(Engine(model, chat, 40), [("u", dialogue())])
    left_out = row["items_left_out"]
    assert 0 < left_out < len(history)
    assert row["blocks"][0]["items"] == [item for item, _, _ in history[left_out:]]
    one_more = Asker(chat, 10_000, "video").ask(prompts.PREFERENCE_FIRST, history[left_out - 1 :])
    assert one_more.length > limit, "no item leaves that would have fitted"
