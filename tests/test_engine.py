"""The generation engine: batches change no text, sampled or greedy; rejected rows have a reason."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from random_models import random_llama, random_llava, random_qwen3, random_qwen_vl

from mllmrec.data import sample_world as world
from mllmrec.generation import local_engine, sampling
from mllmrec.generation.dialogues import (
    GeneratedText,
    Prompt,
    RejectedError,
    advance,
    first_request,
    stream_id,
)
from mllmrec.generation.engine import read_ahead
from mllmrec.generation.local_engine import GenerationEngine
from mllmrec.generation.preferences import HistoryItem, UserHistory
from mllmrec.generation.prompt_writer import EncodedImage, ImagePrompts, PromptWriter
from mllmrec.models import compat
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.compat import packed_linears
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import fill, user_turn
from mllmrec.stage.errors import InputError
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore")

RECURRENT = load_script("Inference/preference_recurrent.py")
DIRECT = load_script("Inference/preference_direct.py")
IMAGE_SUMMARY = load_script("Inference/image_summary.py")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB."


TEXT_MODELS = {
    "llama": lambda: load_text(str(TINY / "llama")),
    "random llama": lambda: random_llama("tiny"),
    "qwen3": random_qwen3,
}
IMAGE_MODELS = {
    "next": lambda: load_multimodal(str(TINY / "llava")),
    "random next": lambda: random_llava("tiny"),
    "1.5": lambda: random_llava("tiny", kind="1.5"),
    "qwen2.5-vl": random_qwen_vl,
}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5}


def loaded(make):
    """(model, chat)"""
    model, processor = make()
    return model, ChatProcessor(processor)


@pytest.fixture(scope="module")
def llama():
    return loaded(TEXT_MODELS["llama"])


@pytest.fixture(scope="module")
def llava():
    return loaded(IMAGE_MODELS["next"])


@pytest.fixture(scope="module", params=TEXT_MODELS)
def text_model(request):
    return loaded(TEXT_MODELS[request.param])


@pytest.fixture(scope="module", params=IMAGE_MODELS)
def image_model(request):
    return loaded(IMAGE_MODELS[request.param])


def simulated_histories(n, seed=3):
    """(histories of n users, the items of the world, indices of each user's items)."""
    rng = np.random.default_rng(seed)
    items = world.catalogue(80, rng)
    chosen = [world.simulate_user(items, int(rng.integers(4, 17)), rng)[0] for _ in range(n)]
    histories = [
        [HistoryItem(str(i), items[i]["title"], world.caption(items[i])) for i in indices]
        for indices in chosen
    ]
    return histories, items, chosen


def new_engine(model, chat, max_new_tokens=40, chunk_tokens=None, **options):
    options = GenerationStageOptions(max_new_tokens=max_new_tokens, **options)
    engine = GenerationEngine(model, chat, options)
    engine.chunk_tokens = chunk_tokens or engine.chunk_tokens
    return engine


def ended_dialogues(engine, dialogues):
    """Name -> what each of a dict of dialogues ended with."""
    return {name: found for name, found, _ in engine.run(dialogues.items())}


def preferences(model, chat, histories, batch_tokens=20_000, order=None, **options):
    """User number -> the output row of the recurrence."""
    writer, dialogues = PromptWriter(chat, 1000, "video"), {}
    for n in order or range(len(histories)):
        user = UserHistory({"user_id": str(n)}, histories[n])
        dialogues[n] = RECURRENT.recurrent_preference(user, writer, RECURRENT.Options())
    engine = new_engine(model, chat, batch_tokens=batch_tokens, **options)
    return ended_dialogues(engine, dialogues)


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_recurrence_in_batches_equals_the_recurrence_one_by_one(text_model, how):
    histories, how = simulated_histories(4)[0], {"max_new_tokens": 12, **how}
    single = preferences(*text_model, histories, batch_tokens=1, **how)
    assert preferences(*text_model, histories, order=range(3, -1, -1), **how) == single
    chunked = preferences(*text_model, histories, chunk_tokens=400, **how)
    assert chunked == single, "chunked prefill"


def test_another_seed_user_or_block_gives_another_sample(llama):
    same = simulated_histories(1)[0] * 2
    how = {"temperature": 3.0, "max_new_tokens": 12}
    found = [
        preferences(*llama, same, seed=seed, **how)[user] for seed in (1, 2) for user in (0, 1)
    ]
    texts = [block["preference"] for row in found for block in row["blocks"]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_follow_the_softmax(top_p):
    """Over many users the share of each token is its probability, to four standard errors."""
    scores, n = torch.tensor([[2.0, 1.0, 0.5, -1.0, -4.0]]), 20_000
    rows = scores.repeat(n, 1)
    for warp in sampling.warpers(0.7, top_p):
        rows = warp(None, rows)
    streams = [stream_id(42, str(user), 0) for user in range(n)]
    sampler = sampling.GumbelMaxSampler(streams, 3, 9)
    chosen = sampler(torch.zeros(n, 3), rows).argmax(1)
    share, wanted = torch.bincount(chosen, minlength=5) / n, rows[0].softmax(0)
    assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / n).sqrt() + 1e-9).all()
    later = sampler(torch.zeros(n, 4), rows).argmax(1)
    for token in (0, 1):  # the sample at the next position does not depend on this one
        share = torch.bincount(later[chosen == token], minlength=5) / (chosen == token).sum()
        assert (share - wanted).abs().max() < 0.03


def test_noise_is_finite_at_its_ends():
    """Half a step beside 0 and 1, where one more bit would round to 1 and give infinity."""
    ends = sampling.gumbel_of_bits(torch.tensor([0, (1 << 23) - 1]))
    assert ends.isfinite().all()
    assert ends[0] < -2.7
    assert ends[1] > 16
    counters = torch.tensor([sampling.counter(7, position) for position in range(40)])
    noise = sampling.gumbel_noise(counters, 50_000)
    assert noise.isfinite().all()
    assert noise.max() > 14
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0.5772, 1.2825), abs=0.003)


def test_images_that_wait_have_a_limit_in_memory():
    def enough(n_pixels, n_prompts, batch_tokens=10**6):
        prompt = Prompt("", 10, {"pixel_values": np.zeros((1, n_pixels))})
        settings = SimpleNamespace(batch_tokens=batch_tokens, max_new_tokens=10)
        waiting = [local_engine.Request("", 0, None, prompt)] * n_prompts
        return local_engine._enough(settings, waiting)

    assert not enough(100, 300)
    assert not enough(1 << 20, 300)
    assert enough(1 << 20, 500)
    assert enough(100, 100, batch_tokens=1000)


def test_out_of_memory_halves_the_batch_and_loses_nothing(llama, monkeypatch, capsys):
    histories = [history[:6] for history in simulated_histories(8)[0]]  # two blocks each
    wanted = preferences(*llama, histories, max_new_tokens=12)
    whole, sizes = type(llama[0]).generate, []

    def generate(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return whole(self, **inputs)

    monkeypatch.setattr(type(llama[0]), "generate", generate)
    assert preferences(*llama, histories, max_new_tokens=12) == wanted
    message = "out of memory with a batch of 8; continuing with --batch_tokens"
    assert message in capsys.readouterr().err
    assert sizes[:2] == [8, 4]
    assert max(sizes[5:]) <= 3, "later batches start small"


ALONE = r"a single prompt .* does not fit into the memory .* --quantization nf4"
FAILURES = [
    (torch.OutOfMemoryError(OUT_OF_MEMORY), InputError, ALONE),
    (RuntimeError("shapes do not match"), RuntimeError, "shapes do not match"),
]


@pytest.mark.parametrize(("error", "kind", "message"), FAILURES)
def test_only_out_of_memory_gets_a_remedy(llama, monkeypatch, error, kind, message):
    monkeypatch.setattr(type(llama[0]), "generate", Mock(side_effect=error))
    with pytest.raises(kind, match=message):
        preferences(*llama, simulated_histories(2)[0])


def test_generation_settings_of_a_checkpoint_are_not_used(llama):
    """Published checkpoints come with a temperature, a repetition penalty and more."""
    histories, _, _ = simulated_histories(3)
    wanted = preferences(*llama, histories, max_new_tokens=20)
    model, tokenizer = load_text(str(TINY / "llama"))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.8)
    assert preferences(model, ChatProcessor(tokenizer), histories, max_new_tokens=20) == wanted


class RecordingWriter(PromptWriter):
    """A prompt writer that remembers what the prompts were filled with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.histories, self.texts = [], []

    def history_prompt(self, template, items, **texts):
        self.histories.append((template, [item.item_id for item in items], texts))
        return super().history_prompt(template, items, **texts)

    def text_prompt(self, template, **texts):
        self.texts.append(fill(template, self.domain, **texts))
        return super().text_prompt(template, **texts)


def test_each_block_is_read_with_the_preference_before_it(llama):
    """The prompt of P_k holds P_{k-1} and block k, and nothing of later blocks."""
    [history], _, _ = simulated_histories(1)
    writer = RecordingWriter(llama[1], 1000, "video")
    user = UserHistory({"user_id": "u"}, history)
    dialogue = RECURRENT.recurrent_preference(user, writer, RECURRENT.Options())
    row, answers = None, [f"taste {n}" for n in range(9)]
    next(dialogue)
    while row is None:
        try:
            dialogue.send(answers[len(writer.histories) - 1])
        except StopIteration as end:
            row = end.value
    n = len(writer.histories)
    assert n > 2
    wanted = [(prompts.PREFERENCE_FIRST, {})]
    wanted += [(prompts.PREFERENCE_NEXT, {"preference": text}) for text in answers[: n - 1]]
    assert [(template, texts) for template, _, texts in writer.histories] == wanted
    blocks = [block["items"] for block in row["blocks"]]
    assert [items for _, items, _ in writer.histories] == blocks
    assert [item for block in blocks for item in block] == [item.item_id for item in history]
    assert [block["preference"] for block in row["blocks"]] == answers[:n]
    assert row == {"user_id": "u", "preference": answers[n - 1], "blocks": row["blocks"]}


def test_the_tiny_llama_keeps_the_rule_on_its_own_output(llama):
    """Recurrent summaries, five blocks long, at least 95% right per slot."""
    histories, items, chosen = simulated_histories(150, seed=8)
    found = preferences(*llama, histories)
    right, last_block = {attribute: [] for attribute in world.ATTRIBUTES}, []
    for n, indices in enumerate(chosen):
        wanted = world.rolled_preferences([items[i] for i in indices])
        for block, values in zip(found[n]["blocks"], wanted, strict=True):
            for attribute, value in values.items():
                right[attribute].append(f" {value} " in block["preference"])
                if len(wanted) >= 5 and values is wanted[-1]:
                    last_block.append(right[attribute][-1])
    assert all(np.mean(hits) >= 0.95 for hits in right.values()), right
    assert len(last_block) > 60
    assert np.mean(last_block) >= 0.95


def unseen_covers(n, seed=12):
    rng = np.random.default_rng(seed)
    items = [world.random_item(rng) for _ in range(n)]
    return items, [world.draw_cover(item["colour"], item["shape"], rng) for item in items]


def image_dialogue(chat, cover):
    """The dialogue that asks for the description of an image."""
    text = chat.render([user_turn(fill(prompts.IMAGE, "video"), images=1)])
    inputs = chat.encode_arrays(text, cover)
    return (yield Prompt(text, inputs["input_ids"].shape[1], inputs))


def captions(model, chat, covers, batch_tokens=20_000, **options):
    """Cover number -> the generated description."""
    engine = new_engine(model, chat, batch_tokens=batch_tokens, **options)
    dialogues = {n: image_dialogue(chat, cover) for n, cover in enumerate(covers)}
    return ended_dialogues(engine, dialogues)


def test_the_tiny_llava_describes_unseen_covers(llava):
    """At least 95% right per attribute."""
    items, covers = unseen_covers(150)
    found = captions(*llava, covers)
    for attribute in ("colour", "shape"):
        right = np.mean([f" {item[attribute]} " in found[n] for n, item in enumerate(items)])
        assert right >= 0.95, attribute


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_captions_in_batches_of_mixed_shapes_equal_captions_one_by_one(image_model, how):
    _, covers = unseen_covers(7)
    how = {"max_new_tokens": 20, **how}
    covers = [c.resize((48 + 20 * (n % 3), 64 - 11 * (n % 4))) for n, c in enumerate(covers)]
    batched = captions(*image_model, covers, **how)
    assert batched == captions(*image_model, covers, batch_tokens=1, **how)
    chunked = captions(*image_model, covers, chunk_tokens=150, **how)
    assert batched == chunked, "chunked prefill, chunks of unequal length"
    assert len(set(batched.values())) > 1


def test_prompts_encoded_one_by_one_collate_to_what_the_processor_makes_of_all(image_model):
    (_, chat), rng = image_model, np.random.default_rng(0)
    turns = [user_turn("Say what it shows" + ", please" * n, images=1) for n in range(3)]
    texts, sizes = [chat.render([turn]) for turn in turns], [(64, 48), (90, 200), (300, 64)]
    covers = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]
    wanted = chat.encode(texts, covers)
    encoded = [chat.encode_arrays(*pair) for pair in zip(texts, covers, strict=True)]
    collated = chat.collate_arrays(encoded)
    assert collated.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(collated[name], wanted[name]), name
    counted = [chat.count_image_tokens(cover) for cover in covers]
    assert (collated["input_ids"] == chat.image_token_id).sum(1).tolist() == counted


def test_the_fused_summary_takes_three_prompts_and_joins_both(llava):
    item = {"item_id": "1", "title": "music: quiet garden"}
    cover = world.draw_cover("red", "star", np.random.default_rng(1))
    model, chat = llava
    image = EncodedImage("1", next(image_dialogue(chat, cover)), None)
    writer, options = RecordingWriter(chat, 1000, "video"), IMAGE_SUMMARY.Options(summary="fused")
    dialogue = IMAGE_SUMMARY.summarise(item, image, writer, options)
    row = ended_dialogues(new_engine(model, chat), {"1": dialogue})["1"]
    assert len(writer.texts) == 2
    assert "music: quiet garden" in writer.texts[0]
    assert " red star " in writer.texts[1], "the fusion prompt holds the answer to the image prompt"
    assert row.keys() == {"item_id", "summary"}
    assert row["item_id"] == "1"
    assert " red star " in row["summary"]
    assert " music " in row["summary"]


def test_images_read_ahead_come_in_order_from_any_number_of_processes(llava):
    items = [{"item_id": str(n), "image": None if n % 5 == 3 else f"{n}.png"} for n in range(12)]
    images = ImagePrompts(items, TINY, llava[1], user_turn("text", images=1))
    alone, helped = list(read_ahead(images, 0)), list(read_ahead(images, 2))
    assert [image.item_id for image in alone] == [item["item_id"] for item in items]
    assert alone == helped


def test_a_rejected_dialogue_has_its_reason_and_the_others_continue(llama):
    model, chat = llama
    text = chat.render([user_turn("Hello")])

    def good():
        return (yield Prompt(text, chat.count(text)))

    def bad():
        yield Prompt(text, chat.count(text))
        raise RejectedError("no good")

    engine = new_engine(model, chat, max_new_tokens=3)
    dialogues = [("a", good()), ("b", bad()), ("c", good())]
    ended = {name: (result, reason) for name, result, reason in engine.run(dialogues)}
    assert ended["b"] == (None, "no good")
    assert ended["a"] == ended["c"] != (None, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "an empty text"), ("<think> Hm", "<think>"), ("Hm </think> Jazz", "<think>")],
)
def test_a_text_without_an_answer_is_rejected(text, reason):
    def dialogue():
        yield Prompt("", 9)
        raise AssertionError("taken for an answer")

    waiting, begun = [], first_request("a", dialogue())
    assert list(advance(waiting, begun, None)) == []
    [(name, result, why)] = advance([], waiting[0], GeneratedText(text))
    assert (name, result) == ("a", None)
    assert reason in why


def test_a_long_prompt_is_shortened_by_its_summaries_and_counted(llama):
    _, chat = llama
    writer = PromptWriter(chat, max_prompt_tokens=120, domain="video")
    summary = "A red star on a plain ground. " * 20
    block = [HistoryItem(str(n), "music: quiet garden", summary) for n in range(3)]
    prompt = writer.history_prompt(prompts.PREFERENCE_FIRST, block)
    assert prompt.length == chat.count(prompt.text) <= 120
    assert prompt.length > 100, "as much as fits is kept"
    assert prompt.text.count("quiet garden") == 3
    assert writer.counts == writer.nonzero_counts() == {"shortened": 1}
    with pytest.raises(RejectedError, match="longer than 20 tokens even without titles"):
        PromptWriter(chat, 20, "video").history_prompt(prompts.PREFERENCE_FIRST, block)


def test_the_direct_form_leaves_the_oldest_items_out_and_counts_them(llama):
    model, chat = llama
    history = simulated_histories(1, seed=5)[0][0] * 3

    def whole_length(items):
        writer = PromptWriter(chat, 10_000, "video")
        return writer.history_prompt(prompts.PREFERENCE_FIRST, items).length

    limit = whole_length(history) // 2
    user, writer = UserHistory({"user_id": "u"}, history), PromptWriter(chat, limit, "video")
    dialogue = DIRECT.direct_preference(user, writer, DIRECT.Options())
    row = ended_dialogues(new_engine(model, chat), {"u": dialogue})["u"]
    left_out = row["items_left_out"]
    assert 0 < left_out < len(history)
    assert row["blocks"][0]["items"] == [item.item_id for item in history[left_out:]]
    assert whole_length(history[left_out - 1 :]) > limit, "an item that would fit is not left out"


def test_weights_are_packed_while_a_cpu_decodes(llama, monkeypatch):
    """A packed layer has a forward method of its own."""
    model, chat = llama
    layers = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    seen, generate = [], model.generate

    def watched(*args, **options):
        seen.append(sum("forward" in vars(layer) for layer in layers))
        return generate(*args, **options)

    monkeypatch.setattr(model, "generate", watched)
    preferences(model, chat, simulated_histories(2)[0], 4096)
    assert set(seen) == {len(layers)}
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_plain_one(bias):
    layer = torch.nn.Linear(96, 40, bias=bias).eval()
    inputs = {rows: torch.randn(rows, 1, 96) for rows in (1, 5, 7)}
    with torch.inference_mode():
        plain = {rows: layer(x) for rows, x in inputs.items()}
        with packed_linears(layer):
            assert "forward" in vars(layer)
            for rows, x in inputs.items():
                torch.testing.assert_close(layer(x), plain[rows], rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="stop"), packed_linears(layer):
            raise ValueError("stop")
    assert "forward" not in vars(layer)


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch):
    layer = torch.nn.Linear(8, 8)
    with packed_linears(layer.half()):
        assert "forward" not in vars(layer)
    layer.float().forward = hook = lambda x: x  # accelerate replaces forward, too
    with packed_linears(layer):
        assert layer.forward is hook
    assert layer.forward is hook
    del layer.forward
    monkeypatch.setattr(compat, "MAX_PACKED_BYTES", layer.weight.nbytes - 1)
    with packed_linears(layer):
        assert "forward" not in vars(layer)
