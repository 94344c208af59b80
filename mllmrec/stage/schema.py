"""The files that stages exchange: types, ranges and cross-checks of one line, and who writes it.

A row stays a plain dict. It is checked by pydantic when it is read and when it is written, with the
file, the line, the key and the remedy in the message. Keys beyond those named here are kept: stages
add counts such as `shortened`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

Row = dict[str, Any]

_STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
Id = Annotated[str, Field(min_length=1)]
Label = Annotated[int, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]
SHOWN_CHARACTERS = 60  # of a wrong value in a message


@with_config(_STRICT)
class _Item(TypedDict):
    item_id: Id
    title: str
    image: str | None


@with_config(_STRICT)
class _User(TypedDict):
    user_id: Id
    history: Annotated[list[Id], Field(min_length=1)]
    target: Id
    negatives: list[Id]  # empty where only retrieval is measured
    split: Split
    fold: Annotated[int, Field(ge=0)] | None
    times: NotRequired[list[int]]  # of the history's items, in the raw log's unit
    target_time: NotRequired[int]
    cold: NotRequired[bool]  # no training line has the target


@with_config(_STRICT)
class _Touched(TypedDict):
    user_id: Id
    item_ids: Annotated[list[Id], Field(min_length=1)]


@with_config(_STRICT)
class _Summary(TypedDict):
    item_id: Id
    summary: str


@with_config(_STRICT)
class _Block(TypedDict):
    items: Annotated[list[Id], Field(min_length=1)]
    preference: str


@with_config(_STRICT)
class _Preference(TypedDict):
    user_id: Id
    split: NotRequired[Split]
    preference: str
    blocks: Annotated[list[_Block], Field(min_length=1)]


@with_config(_STRICT)
class _Part(TypedDict):
    type: Literal["text", "image"]
    text: NotRequired[str]


@with_config(_STRICT)
class _Turn(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[_Part], Field(min_length=1)]


@with_config(_STRICT)
class _ModelRow(TypedDict):
    user_id: Id
    item_id: NotRequired[Id]
    item_ids: NotRequired[Annotated[list[Id], Field(min_length=2)]]
    label: Annotated[int, Field(ge=0)] | None
    images: Annotated[list[Id], Field(max_length=1)]
    messages: Annotated[list[_Turn], Field(min_length=1)]
    preference_span: NotRequired[
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    ]


@with_config(_STRICT)
class _Score(TypedDict):
    user_id: Id
    item_id: Id
    label: Label
    score: float
    logits: dict[str, float] | None


@with_config(_STRICT)
class _TrainUser(TypedDict):
    user_id: Id
    item_ids: Annotated[list[Id], Field(min_length=2)]


@with_config(_STRICT)
class _ItemText(TypedDict):
    item_id: Id
    text: str


@with_config(_STRICT)
class _Candidates(TypedDict):
    user_id: Id
    split: Split
    item_ids: Annotated[list[Id], Field(min_length=1)]
    scores: list[float]
    has_target: bool


@with_config(_STRICT)
class _ImageUrl(TypedDict):
    item_id: Id
    url: Any  # a wrong one rejects its image, not the file


@with_config(_STRICT)
class _Image(TypedDict):
    item_id: Id
    url: str
    bytes: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]


@with_config(_STRICT)
class _LogRow(TypedDict):
    step: Annotated[int, Field(ge=0)]
    loss: NotRequired[float]
    eval_auc: NotRequired[float]


@with_config(_STRICT)
class _Rejected(TypedDict):
    reason: Annotated[str, Field(min_length=1)]


def _check_user(row: Row) -> Row:
    negatives = row["negatives"]
    if row["target"] in negatives:
        raise ValueError(f"the target {row['target']!r} is among the negatives")
    if len(set(negatives)) < len(negatives):
        raise ValueError(f"the negative {_repeated(negatives)!r} is listed twice")
    if "times" in row and len(row["times"]) != len(row["history"]):
        raise ValueError(
            f"there are {len(row['history'])} items and {len(row['times'])} times, there must be "
            "one of each"
        )
    return row


def _check_candidates(row: Row) -> Row:
    if len(row["scores"]) != len(row["item_ids"]):
        raise ValueError(
            f"there are {len(row['item_ids'])} items and {len(row['scores'])} scores, there must "
            "be one of each"
        )
    if len(set(row["item_ids"])) < len(row["item_ids"]):
        raise ValueError(f"the item {_repeated(row['item_ids'])!r} is listed twice")
    return row


def _check_model_row(row: Row) -> Row:
    if ("item_id" in row) == ("item_ids" in row):
        raise ValueError("it must have one of item_id and item_ids")
    question = row["messages"][0]
    if question["role"] != "user":
        raise ValueError("the first message must be the user's question")
    listed = row.get("item_ids")
    if listed is None and row["label"] not in (0, 1):
        raise ValueError(f"the label is {row['label']!r}, it must be 0 or 1")
    if listed is not None and len(set(listed)) < len(listed):
        raise ValueError(f"the candidate {_repeated(listed)!r} is listed twice")
    if listed is not None and row["label"] is not None and row["label"] >= len(listed):
        most = len(listed) - 1
        raise ValueError(f"the label is {row['label']!r}, it must be 0 to {most}")
    places = sum(part["type"] == "image" for part in question["content"])
    if len(row["images"]) != places:
        raise ValueError(
            f"there are {len(row['images'])} images and {places} places for them, there must be "
            "one of each or none"
        )
    texts = [part.get("text") for part in question["content"] if part["type"] == "text"]
    if len(texts) != 1 or texts[0] is None or question["content"][-1]["type"] != "text":
        raise ValueError("the question must have one text, behind its image")
    start, end = row.get("preference_span", (0, 0))
    if not start <= end <= len(texts[0]):
        raise ValueError(f"preference_span {[start, end]} is not a part of the question")
    return row


def _repeated(values: Sequence[str]) -> str:
    return next(value for n, value in enumerate(values) if value in values[:n])


@dataclass(frozen=True)
class FileSchema:
    """row: checks one line; maker: the script that writes the file; may_be_empty: a file without
    lines is a right one.
    """

    row: TypeAdapter[Any]
    maker: str
    may_be_empty: bool = True

    @classmethod
    def of(cls, kind: Any, maker: str, may_be_empty: bool = True) -> "FileSchema":
        """kind: a TypedDict, with validators or without."""
        return cls(TypeAdapter(kind), maker, may_be_empty)


_MODEL_ROWS = FileSchema.of(
    Annotated[_ModelRow, AfterValidator(_check_model_row)], "scripts/04_datasets.sh"
)
SCHEMAS = {
    "items.jsonl": FileSchema.of(_Item, "scripts/01_prepare_data.sh", may_be_empty=False),
    "users.jsonl": FileSchema.of(
        Annotated[_User, AfterValidator(_check_user)],
        "scripts/01_prepare_data.sh",
        may_be_empty=False,
    ),
    "touched.jsonl": FileSchema.of(_Touched, "scripts/01_prepare_data.sh"),
    "image_urls.jsonl": FileSchema.of(_ImageUrl, "scripts/01_prepare_data.sh"),
    "images.jsonl": FileSchema.of(_Image, "scripts/01_prepare_data.sh"),
    "image_summaries.jsonl": FileSchema.of(_Summary, "scripts/02_image_summary.sh"),
    "user_preferences.jsonl": FileSchema.of(_Preference, "scripts/03_preference.sh"),
    "train.jsonl": _MODEL_ROWS,
    "validation.jsonl": _MODEL_ROWS,
    "test.jsonl": _MODEL_ROWS,
    "train_users.jsonl": FileSchema.of(_TrainUser, "MLLM4Rec/train_ranker.py"),
    "item_texts.jsonl": FileSchema.of(_ItemText, "MLLM4Rec/train_ranker.py"),
    "training_log.jsonl": FileSchema.of(_LogRow, "scripts/05_train.sh"),
    "candidates.jsonl": FileSchema.of(
        Annotated[_Candidates, AfterValidator(_check_candidates)], "MLLM4Rec/train_retriever.py"
    ),
    "scores.jsonl": FileSchema.of(_Score, "scripts/06_score.sh"),
    "validation_scores.jsonl": FileSchema.of(_Score, "scripts/06_score.sh"),
}
REJECTED = FileSchema.of(_Rejected, "the script that wrote it")


def schema_of(name: str) -> FileSchema | None:
    """The schema of a file of this name, None for a name that no stage exchanges."""
    if name.endswith(".rejected.jsonl"):
        return REJECTED
    return SCHEMAS.get(name)


def problem(error: ValidationError) -> str:
    """What is wrong with a row, in half a sentence that names the key."""
    first = error.errors()[0]
    kind, value = first["type"], repr(first["input"])
    shown = value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}..."
    if kind == "json_invalid":
        return f"not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    if not first["loc"]:
        no_object = f"a line must hold one object, not {shown}"
        return str(first["ctx"]["error"]) if "ctx" in first else no_object
    name = str(first["loc"][0]) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]
    )
    if kind == "missing":
        return f"key {name!r} is missing"
    if kind == "string_type":
        return f"{name} must be a string, not {shown}"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, not {shown}"
