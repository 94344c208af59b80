"""Answer sets: what a model may answer, and which token ids stand for each answer.

A row's `label` is the index of the right answer in its answer set. Rows about one candidate use a
set of two answers (No, Yes), so their label is 0 or 1; rows about a list of candidates use one
answer per candidate (letters A to Z), so their label is the place of the target in the list.
"""

from dataclasses import dataclass
from typing import Literal

from mllmrec.models.chat import ChatProcessor
from mllmrec.models.padding import common_prefix_length
from mllmrec.prompts.templates import Turn, assistant_turn, user_turn
from mllmrec.ranking.rows import ANSWERS
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.errors import InputError


@dataclass(frozen=True)
class AnswerSet:
    """The answers a model chooses among, in the order of their indices.

    token: which token is scored, see `RankerOptions.answer_token`; end_token: an answer is followed
    by the end token in training. Both are for comparison with the released code.
    """

    answers: tuple[str, ...]
    token: Literal["rendered", "bare", "alone"] = "rendered"
    end_token: bool = True

    def text(self, label: int) -> str:
        """The answer with this index."""
        return self.answers[label]


YES_NO = AnswerSet(ANSWERS["yes_no"])
LETTERS = AnswerSet(ANSWERS["letters"])


def answer_set(name: str, options: RankerOptions) -> AnswerSet:
    """yes_no: No and Yes; letters: A to Z; as the options of a stage say."""
    return AnswerSet(ANSWERS[name], options.answer_token, options.end_token)


@dataclass(frozen=True)
class AnswerTokens:
    """What each answer of a set adds to a rendered prompt.

    texts: as text, up to the end token; ids: as token ids; first_ids: one id for each, all
    different, by which answers are scored: the first of `ids`, or as `answers.token` says.
    """

    answers: AnswerSet
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    first_ids: list[int]


def answer_tokens(chat: ChatProcessor, answers: AnswerSet = YES_NO) -> AnswerTokens:
    """The tokens of an answer set, derived from rendered text with and without the answer.

    They are not looked up by a string: `Yes` and ` Yes` are different tokens, and which one follows
    depends on the template. After the answer stands the tokenizer's end token and nothing else,
    whatever the template writes there: some published ones end with characters that are not a
    token, which would be learned for nothing. Raises InputError if the template or the tokenizer
    does not keep answers apart.
    """
    question = [user_turn("A question.", images=int(chat.takes_images))]
    prompt = chat.render(question)
    texts = _added_texts(chat, question, prompt, answers)
    before = chat.ids(prompt)
    whole = [chat.ids(prompt + text) for text in texts]
    if any(ids[: len(before)] != before for ids in whole):
        raise InputError(
            "the tokenizer joins the end of the prompt and the answer into one token; "
            "use another model"
        )
    ids = tuple(tuple(ids[len(before) :]) for ids in whole)
    first_ids = [one[0] for one in ids]
    if answers.token == "bare":
        first_ids = _bare_ids(chat, answers)
    elif answers.token == "alone":
        tokenized = chat.tokenizer(list(answers.answers), add_special_tokens=False)
        first_ids = [one[0] for one in tokenized["input_ids"]]
    tokens = AnswerTokens(answers, texts, ids, first_ids)
    first: dict[int, str] = {}
    for answer, token_id in zip(answers.answers, first_ids, strict=True):
        if token_id in first:
            raise InputError(
                f"the tokenizer starts {first[token_id]!r} and {answer!r} with the same token; "
                "use another model"
            )
        first[token_id] = answer
    return tokens


def _bare_ids(chat: ChatProcessor, answers: AnswerSet) -> list[int]:
    """Ids of the answers as literal tokens, e.g. `Yes`, which the released code reads."""
    ids = chat.tokenizer.convert_tokens_to_ids(list(answers.answers))
    for answer, token_id in zip(answers.answers, ids, strict=True):
        if token_id is None or token_id == chat.tokenizer.unk_token_id:
            raise InputError(f"the tokenizer has no token {answer!r}; use --answer_token rendered")
    return list(ids)


def _added_texts(
    chat: ChatProcessor, question: list[Turn], prompt: str, answers: AnswerSet
) -> tuple[str, ...]:
    """What a rendered turn with each answer adds to the prompt, plus the end token."""
    added = []
    for answer in answers.answers:
        whole = chat.render([*question, assistant_turn(answer)], add_generation_prompt=False)
        if not whole.startswith(prompt) or len(whole) == len(prompt):
            raise InputError(
                "the chat template does not put the answer behind the prompt, so the model cannot "
                "be trained with it"
            )
        added.append(whole[len(prompt) :])
    common = common_prefix_length(added)  # characters before every answer
    texts = []
    for answer, text in zip(answers.answers, added, strict=True):
        start = text.rfind(answer, 0, common + len(answer))
        if start < 0:
            raise InputError(
                "the chat template changes the answer, so the model cannot be trained with it"
            )
        end = chat.tokenizer.eos_token if answers.end_token else ""
        texts.append(text[: start + len(answer)] + end)
    return tuple(texts)
