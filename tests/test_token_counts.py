"""Tokens counted from the files are those that the model gets."""

import pytest
from conftest import TINY
from test_scoring import data, model  # noqa: F401  (fixtures)

from mllmrec.generation.dialogues import Prompt
from mllmrec.generation.local_engine import GenerationEngine
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_text
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.scoring import ScoringOptions, score_rows
from mllmrec.ranking.token_counts import dialogue_tokens, scoring_tokens

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def seen_tokens(model):  # noqa: F811
    """How many tokens, padding left out, went through the model: a list with one number a call."""
    seen = []

    def count(module, arguments, inputs):
        new = inputs["input_ids"].shape[1]
        seen.append(int(inputs["attention_mask"][:, -new:].sum()))

    hook = model[0].register_forward_pre_hook(count, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_scoring_computes_the_tokens_that_are_counted(model, data, seen_tokens, reuse_prefix):  # noqa: F811
    (llava, processor), (folder, rows) = model, data
    reader = RowReader(ChatProcessor(processor), folder)
    counts = scoring_tokens(rows, reader, reuse_prefix)
    list(score_rows(llava, reader, rows, ScoringOptions(reuse_prefix=reuse_prefix)))
    assert counts.computed == sum(seen_tokens)
    assert (counts.computed < counts.prompt) == reuse_prefix
    assert counts.requests == len(rows) and counts.generated == 0
    images = sum(reader.chat.count_image_tokens(reader.image(row)) for row in rows)
    assert counts.image == images > 0


def test_a_dialogue_has_the_tokens_that_the_engine_saw():
    llama, tokenizer = load_text(str(TINY / "llama"))
    chat = ChatProcessor(tokenizer)

    def dialogue(words):
        texts = []
        for word in words:
            text = chat.render([{"role": "user", "content": [{"type": "text", "text": word}]}])
            texts.append((yield Prompt(text, chat.count(text))))
        return texts

    asked = {"u": ["music", "a red square"], "v": ["cooking"]}
    engine = GenerationEngine(llama, chat, GenerationStageOptions(max_new_tokens=12))
    sent, generated, generate = [], [], llama.generate

    def count(**batch):
        ids, length = generate(**batch), batch["input_ids"].shape[1]
        sent.append(int(batch["attention_mask"].sum()))
        generated.append(int((ids[:, length:] != tokenizer.pad_token_id).sum()))
        return ids

    llama.generate = count
    results = engine.run((user, dialogue(words)) for user, words in asked.items())
    found = {row_id: texts for row_id, texts, _ in results}
    again = ((dialogue(asked[user]), texts) for user, texts in found.items())
    counts = dialogue_tokens(again, chat, 12)
    assert counts.prompt == counts.computed == sum(sent)
    assert (counts.requests, counts.generated) == (3, sum(generated))
