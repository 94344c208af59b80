"""The generation engine: batching changes nothing, what is refused is told, images reach the model."""

import numpy as np
import pytest
from conftest import TINY, script

from data_processing import prompts
from data_processing import sample_world as world
from Inference.chat import Chat, user_turn
from Inference.engine import Engine, Prompt, Refused, run_dialogues
from Inference.models import load_multimodal, load_text
from Inference.preference_recurrent import Args, recurrent_preference
from Inference.preferences import Asker

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
    return [[(str(i), items[i]["title"], world.caption(items[i])) for i in chosen] for chosen in lives], items, lives


def preferences(model, chat, told, batch_tokens, limit=1000):
    engine = Engine(model, chat, max_new_tokens=40, batch_tokens=batch_tokens)

    def dialogue(history):
        return (yield from recurrent_preference(history, Asker(chat, limit, "video").ask, Args()))

    return {name: result for name, result, _ in run_dialogues(engine, ((n, dialogue(h)) for n, h in enumerate(told)))}


def test_the_recurrence_in_batches_is_the_recurrence_one_by_one(llama):
    told, _, _ = histories(12)
    assert preferences(*llama, told, batch_tokens=20_000) == preferences(*llama, told, batch_tokens=1)


def test_each_block_is_read_with_the_preference_before_it(llama):
    """The dialogue's own prompts, written down: P_k's prompt holds P_{k-1} and block k, and nothing of later blocks."""
    told, _, _ = histories(1)
    asked, answers = [], iter(["taste one", "taste two", "taste three", "taste four", "taste five", "taste six"])

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
    assert [item for block in result["blocks"] for item in block["items"]] == [item for item, _, _ in told[0]]


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
    assert {attribute: np.mean(hits) >= 0.95 for attribute, hits in right.items()} == dict.fromkeys(right, True)
    assert len(last_block) > 60
    assert np.mean(last_block) >= 0.95


def unseen_covers(n, seed=12):
    rng = np.random.default_rng(seed)
    items = [world.random_item(rng) for _ in range(n)]
    return items, [world.draw_cover(item["colour"], item["shape"], rng) for item in items]


def captions(model, chat, covers, batch_tokens):
    engine = Engine(model, chat, max_new_tokens=40, batch_tokens=batch_tokens)
    text = chat.render([user_turn(prompts.fill(prompts.IMAGE, "video"), images=1)])

    def dialogue(cover):
        return (yield Prompt(text, cover, chat.count(text) + chat.image_tokens(cover)))

    return {n: found for n, found, _ in run_dialogues(engine, ((n, dialogue(cover)) for n, cover in enumerate(covers)))}


def test_the_tiny_llava_describes_unseen_covers(llava):
    """At least 95% right per attribute."""
    items, covers = unseen_covers(300)
    found = captions(*llava, covers, batch_tokens=20_000)
    for attribute in ("colour", "shape"):
        right = np.mean([f" {item[attribute]} " in found[n] for n, item in enumerate(items)])
        assert right >= 0.95, attribute


def test_captions_in_batches_of_mixed_shapes_are_the_captions_one_by_one(llava):
    _, covers = unseen_covers(9)
    covers = [cover.resize((48 + 20 * (n % 3), 64 - 11 * (n % 4))) for n, cover in enumerate(covers)]
    assert captions(*llava, covers, batch_tokens=20_000) == captions(*llava, covers, batch_tokens=1)


def test_the_fused_summary_asks_three_times_and_joins_both(llava):
    stage = script("Inference/image_summary.py")
    item = {"colour": "red", "shape": "star", "title": "music: quiet garden"}
    cover = world.draw_cover("red", "star", np.random.default_rng(1))
    model, chat = llava
    asked = []

    def ask(text, image):
        asked.append((text, image))
        rendered = chat.render([user_turn(text, images=int(image is not None))])
        return Prompt(rendered, image, chat.count(rendered))

    args = stage.Args(summary="fused")
    [(_, summary, _)] = run_dialogues(Engine(model, chat, 40), [("1", stage.summarise(item, cover, ask, args))])
    assert [image is not None for _, image in asked] == [True, False, False]
    assert "music: quiet garden" in asked[1][0]
    assert " red star " in asked[2][0], "the fusion prompt holds what the image prompt brought"
    assert " red star " in summary
    assert " music " in summary


def test_a_refused_dialogue_is_told_and_the_others_go_on(llama):
    model, chat = llama
    engine = Engine(model, chat, max_new_tokens=3)
    text = chat.render([user_turn("Hello")])

    def good():
        return (yield Prompt(text, None, chat.count(text)))

    def bad():
        yield Prompt(text, None, chat.count(text))
        raise Refused("no good")

    ended = {name: (result, reason) for name, result, reason in run_dialogues(engine, [("a", good()), ("b", bad()), ("c", good())])}
    assert ended["b"] == (None, "no good")
    assert ended["a"] == ended["c"] != (None, None)


def test_a_long_prompt_is_shortened_by_its_summaries_and_counted(llama):
    _, chat = llama
    asker = Asker(chat, limit=120, domain="video")
    block = [(str(n), "music: quiet garden", "A red star on a plain ground. " * 20) for n in range(3)]
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
        return (yield from stage.direct_preference(history, Asker(chat, limit, "video").ask, stage.Args()))

    [(_, row, _)] = run_dialogues(Engine(model, chat, 40), [("u", dialogue())])
    left_out = row["items_left_out"]
    assert 0 < left_out < len(history)
    assert row["blocks"][0]["items"] == [item for item, _, _ in history[left_out:]]
    one_more = Asker(chat, 10_000, "video").ask(prompts.PREFERENCE_FIRST, history[left_out - 1 :])
    assert one_more.length > limit, "no item leaves that would have fitted"
