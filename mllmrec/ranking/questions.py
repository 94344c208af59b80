"""Questions about candidates as rows of train.jsonl, validation.jsonl and test.jsonl.

One builder serves training and scoring, so a training text is the scoring text plus the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import assistant_turn, cut, fill, plain_text, user_turn
from mllmrec.ranking.rows import YES_NO_ANSWERS
from mllmrec.stage.schema import Row

_PREFERENCE = "\0"  # placeholder; `plain_text` leaves no such character in a title


@dataclass(frozen=True)
class QuestionFormat:
    """How a question about a candidate is worded.

    domain: see `templates.DOMAINS`; template: of the question; max_title_characters: longer titles
    are cut, 0 = no limit.
    """

    domain: str = "video"
    template: str = prompts.RECOMMEND
    max_title_characters: int = 300

    def question(
        self, title: str, preference: str, ids: Mapping[str, str] | None = None
    ) -> tuple[str, list[int]]:
        """(text, [start, end]): the question, and where in it the preference stands.

        The preference is the only part that is shortened when a prompt is too long. ids: user_id
        and item_id, for templates that name them.
        """
        if self.max_title_characters:
            title = cut(title, self.max_title_characters)
        plain_ids = {name: plain_text(text) for name, text in (ids or {}).items()}
        data = {"title": plain_text(title), "preference": _PREFERENCE}
        text = fill(self.template, self.domain, plain_ids, **data)
        start, preference = text.index(_PREFERENCE), plain_text(preference)
        return text.replace(_PREFERENCE, preference), [start, start + len(preference)]


@dataclass(frozen=True)
class Candidate:
    """One candidate of a user. image: path relative to the file of the row, None without image."""

    user_id: str
    item_id: str
    title: str
    image: str | None
    label: int


def candidate_row(
    candidate: Candidate, preference: str, question_format: QuestionFormat, with_answer: bool
) -> Row:
    """One line about one candidate. messages: Hugging Face multimodal chat turns."""
    ids = {"user_id": candidate.user_id, "item_id": candidate.item_id}
    text, span = question_format.question(candidate.title, preference, ids)
    images = [candidate.image] if candidate.image is not None else []
    messages = [user_turn(text, images=len(images))]
    if with_answer:
        messages.append(assistant_turn(YES_NO_ANSWERS[candidate.label]))
    return {
        "user_id": candidate.user_id,
        "item_id": candidate.item_id,
        "label": candidate.label,
        "images": images,
        "messages": messages,
        "preference_span": span,
    }


def list_row(
    user_id: str,
    item_ids: Sequence[str],
    question: str,
    label: int | None,
    answers: Sequence[str] | None = None,
) -> Row:
    """One line about a list of candidates.

    question: names the candidates in the order of `item_ids`, each with its answer (a letter);
    label: place of the target, None if the list lacks it; answers: of the set, given for training.
    """
    messages = [user_turn(question)]
    if answers is not None and label is not None:
        messages.append(assistant_turn(answers[label]))
    return {
        "user_id": user_id,
        "item_ids": list(item_ids),
        "label": label,
        "images": [],
        "messages": messages,
    }
