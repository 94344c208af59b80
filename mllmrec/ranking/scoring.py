"""Answer logits of rows from one forward pass each (paper, equation 1).

Prompts and images come from a `RowReader`; `score_rows` reads the logits at the last position only.
Prompts of one item start with the same image and title, prompts without image of one user with the
same history. So rows are grouped: keys and values of what the prompts of a group share are computed
once, and extended by each row's own text. In 16 bit, the texts of a group are one sequence then:
the keys and values of its prefix are read once, not copied for each row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from PIL import Image

from mllmrec.data.candidates import score_row
from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.compat import has_plain_positions, select_cache_rows, takes_masks_of_pairs
from mllmrec.models.padding import common_prefix_length, pad_with_mask
from mllmrec.ranking.answers import AnswerSet
from mllmrec.ranking.packing import PackedSequence, collate_behind, packs_behind
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.rows import item_ids, row_name
from mllmrec.stage.errors import InputError
from mllmrec.stage.output import RowOutput
from mllmrec.stage.progress import Progress
from mllmrec.stage.schema import Row

GROUPS_PER_CHUNK = 32  # the unit of work that processes share and that a resumed run repeats

RowLogits = tuple[int, list[float]]  # index of a row, logits of the answers


@dataclass(frozen=True)
class ScoringOptions:
    """How rows are scored.

    batch_tokens: tokens in one batch, padding included. reuse_prefix: compute what the prompts of
    one group share only once; templates that do not start with the image, and models with M-RoPE,
    take the plain pass. pack_rows: see the module's docstring; None: in 16 bit, as in float32 the
    last digits of a score would change. shard: (k, n) for the k-th of n processes.
    """

    batch_tokens: int = 16384
    reuse_prefix: bool = True
    pack_rows: bool | None = None
    shard: tuple[int, int] = (0, 1)


@dataclass
class _Encoded:
    """One row ready for the model. ids: of the prompt, the image token repeated as it needs."""

    index: int
    prompt: str
    image: Image.Image | None
    ids: list[int]


def probability(positive: float, negative: float) -> float:
    """p(yes) / (p(yes) + p(no)) of two logits, equation 1 of the paper."""
    return torch.sigmoid(torch.tensor(positive - negative, dtype=torch.float64)).item()


def candidate_scores(row: Row, logits: Sequence[float], answers: AnswerSet) -> list[Row]:
    """The lines of scores.jsonl of one row.

    One candidate: p of the second of two answers, with both logits. A list: the softmax over its
    candidates' answers, each with its own logit. logits: one per answer of the set.
    """
    user_id = row["user_id"]
    if "item_ids" not in row:
        negative, positive = logits
        both = dict(zip(answers.answers, logits, strict=True))
        score = probability(positive, negative)
        return [score_row(user_id, row["item_id"], row["label"], score, both)]
    listed = row["item_ids"]
    scores = torch.tensor(logits[: len(listed)], dtype=torch.float64).softmax(0).tolist()
    return [
        score_row(user_id, item_id, int(place == row["label"]), score, {answers.text(place): logit})
        for place, (item_id, score, logit) in enumerate(zip(listed, scores, logits, strict=False))
    ]


@torch.no_grad()  # not inference mode: what a sharded model gathers here is used in training, too
def score_rows(
    model: Any,
    reader: RowReader,
    rows: Sequence[Row],
    options: ScoringOptions | None = None,
    wanted: set[int] | None = None,
) -> Iterator[RowLogits]:
    """Yield (index into rows, logits of the answers) for every row, groups together.

    wanted: indices to yield, None = all. Groups are processed in chunks of fixed size, so a score's
    last digits depend on neither what was scored before nor the number of processes; an image is
    decoded and a prompt rendered only for chunks that hold a wanted row of this process.
    """
    options = options or ScoringOptions()
    groups = reader.groups(rows)
    shard, n_shards = options.shard
    reuse = options.reuse_prefix and has_plain_positions(model)
    for number, first in enumerate(range(0, len(groups), GROUPS_PER_CHUNK)):
        chunk = groups[first : first + GROUPS_PER_CHUNK]
        if number % n_shards != shard:
            continue
        if wanted is not None and not any(i in wanted for group in chunk for i in group):
            continue
        for batch in _batches(chunk, reader, rows, options.batch_tokens):
            if reuse:
                scored = _score_with_prefixes(model, reader, batch, options)
            else:
                flat = [row for group in batch for row in group]
                scored = _score_plainly(model, reader, flat, options.batch_tokens)
            for index, logits in scored:
                if not all(map(math.isfinite, logits)):
                    raise InputError(
                        f"{row_name(rows[index])}: the logits {logits} are not finite numbers: the "
                        "weights are damaged, or --dtype float16 is too narrow for them; restore "
                        "them, or pass --dtype float32"
                    )
                if wanted is None or index in wanted:
                    yield index, logits


def write_scores(
    model: Any,
    reader: RowReader,
    rows: Sequence[Row],
    output: RowOutput,
    options: ScoringOptions,
    progress: Progress,
) -> None:
    """Score the rows that `output` lacks, and write their lines as they come.

    output: an open scores.jsonl, keyed by user and item; options.shard is that of its process;
    progress: counts rows.
    """
    options = replace(options, shard=(output.rank, output.world))
    rows, wanted = _unscored_rows(rows, reader, output)
    for index, logits in score_rows(model, reader, rows, options, wanted):
        for line in candidate_scores(rows[index], logits, reader.answers):
            if (line["user_id"], line["item_id"]) in output.left:  # a list may be half written
                output.write(line)
        progress.update()


def _unscored_rows(
    rows: Sequence[Row], reader: RowReader, output: RowOutput
) -> tuple[list[Row], set[int]]:
    """(rows of the users whose questions fit, indices of those that `output` lacks).

    Users with a question that is too long are rejected whole: an incomplete list would be ranked
    wrongly.
    """
    too_long, _ = reader.find_too_long(rows)
    if output.rank == 0:
        for row in rows:
            for key in _keys(row) if row["user_id"] in too_long else ():
                if key in output.left:
                    output.reject(key, too_long[row["user_id"]])
    kept = [row for row in rows if row["user_id"] not in too_long]
    return kept, {n for n, row in enumerate(kept) if any(k in output.left for k in _keys(row))}


def _keys(row: Row) -> list[tuple[str, str]]:
    """(user, item) of each candidate of a row."""
    return [(row["user_id"], item) for item in item_ids(row)]


def _batches(
    chunk: list[list[int]], reader: RowReader, rows: Sequence[Row], batch_tokens: int
) -> Iterator[list[list[_Encoded]]]:
    """Lists of encoded groups whose longest prompts would together fit into one batch."""
    batch: list[list[_Encoded]] = []
    longest = 0
    for indices in chunk:
        group = _encoded_group(indices, reader, rows)
        length = max(len(row.ids) for row in group)
        longest = max(longest, length)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], length
        batch.append(group)
    if batch:
        yield batch


def _encoded_group(indices: list[int], reader: RowReader, rows: Sequence[Row]) -> list[_Encoded]:
    image = reader.image(rows[indices[0]])
    n_image_tokens = reader.chat.count_image_tokens(image)
    group = []
    for index in indices:
        prompt, ids = reader.prompt(rows[index])
        group.append(
            _Encoded(index, prompt, image, reader.chat.expand_image_token(ids, n_image_tokens))
        )
    return group


def _score_plainly(
    model: Any, reader: RowReader, rows: list[_Encoded], batch_tokens: int
) -> Iterator[RowLogits]:
    """Left-padded batches of whole prompts."""
    size = max(1, batch_tokens // max(len(row.ids) for row in rows))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = reader.chat.encode([row.prompt for row in part], [row.image for row in part])
        logits = _answer_logits(model, reader, **to_model(batch, model), use_cache=False)
        yield from zip((row.index for row in part), logits.tolist(), strict=True)


def _score_with_prefixes(
    model: Any, reader: RowReader, groups: list[list[_Encoded]], options: ScoringOptions
) -> Iterator[RowLogits]:
    """First the shared prefixes of all groups in one left-padded batch, then each row's rest."""
    shared: list[tuple[list[_Encoded], int]] = []  # (group, length of its prefix)
    alone: list[_Encoded] = []
    for group in groups:
        length = shared_prefix_length([row.ids for row in group], reader.chat.image_token_id)
        if length:
            shared.append((group, length))
        else:
            alone += group
    if alone:
        yield from _score_plainly(model, reader, alone, options.batch_tokens)
    if not shared:
        return
    prefix, cache = _prefill_prefixes(model, reader.chat, shared)
    mask, pad = prefix["attention_mask"], reader.chat.tokenizer.pad_token_id
    is_packed = options.pack_rows
    if is_packed is None:
        is_packed = model.dtype != torch.float32 and takes_masks_of_pairs(model)
    waiting: list[tuple[int, PackedSequence, list[int]]] = []  # group, its texts, which rows
    for place, (group, length) in enumerate(shared):
        indices = iter([row.index for row in group])
        # In longer ones, attention would mostly compute pairs that the mask removes.
        longest = length if is_packed else 0
        for pack in packs_behind([row.ids[length:] for row in group], length, longest):
            waiting.append((place, pack, list(islice(indices, len(pack.ends)))))
    waiting.sort(key=lambda entry: len(entry[1].ids))
    while waiting:
        size = max(1, options.batch_tokens // (mask.shape[1] + len(waiting[-1][1].ids)))
        part, waiting = waiting[-size:], waiting[:-size]
        packs = [pack for _, pack, _ in part]
        places = torch.tensor([place for place, _, _ in part], device=model.device)
        inputs = collate_behind(packs, mask[places], pad)
        inputs["past_key_values"] = select_cache_rows(cache, places)
        logits = _answer_logits(model, reader, packs if is_packed else None, **inputs)
        yield from zip((n for _, _, rows in part for n in rows), logits.tolist(), strict=True)


def shared_prefix_length(prompts: Sequence[Sequence[int]], image_token_id: int | None) -> int:
    """How many leading tokens of a group's prompts are computed once.

    0: none, as for a single prompt, or where image tokens would be left over.
    """
    if len(prompts) == 1:
        return 0
    length = common_prefix_length(prompts)
    return 0 if image_token_id in prompts[0][length:] else length


def _prefill_prefixes(
    model: Any, chat: ChatProcessor, shared: list[tuple[list[_Encoded], int]]
) -> tuple[Any, Any]:
    """(batch, cache) of the prefixes, one row per group."""
    firsts = [group[0] for group, _ in shared]
    batch = chat.encode([row.prompt for row in firsts], [row.image for row in firsts])
    batch["input_ids"], batch["attention_mask"] = pad_with_mask(
        [group[0].ids[:n] for group, n in shared], chat.tokenizer.pad_token_id
    )
    batch = to_model(batch, model)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch, model(**batch, logits_to_keep=1, use_cache=True).past_key_values


def _answer_logits(
    model: Any, reader: RowReader, packs: list[PackedSequence] | None = None, **inputs: Any
) -> torch.Tensor:
    """float32 (rows, answers): logits of the answers at the end of each row.

    packs: of a left-padded batch of several rows each; None: each row ends at the last position.

    In 16 bit, the last hidden state is multiplied by the answers' rows of the LM head in float32,
    and by no others: in bfloat16 a logit near 20 has a resolution of an eighth, and many candidates
    would tie; and where LoRA has frozen the weights, torch would copy the LM head for every row.
    """
    token_ids = reader.answer_tokens.first_ids
    kept: list[torch.Tensor] = []
    ends = [(n, end - 1 - len(p.ids)) for n, p in enumerate(packs or ()) for end in p.ends]

    def keep(layer: Any, inputs: Any) -> tuple[torch.Tensor] | None:
        # Inside the pass, where weights that are sharded over GPUs are whole.
        hidden, device = inputs[0], inputs[0].device.type
        last = hidden[tuple(torch.tensor(ends).T)] if ends else hidden[:, -1]
        if layer.weight.dtype == torch.float32 and not torch.is_autocast_enabled(device):
            return (last[:, None],) if ends else None
        with torch.autocast(device, enabled=False):  # training computes in 16 bit around it
            kept.append(last.float() @ layer.weight[token_ids].float().T)
        return (hidden[:, :0],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        output = model(**inputs, logits_to_keep=int(not ends))
    finally:
        hook.remove()
    return kept[0] if kept else output.logits[:, -1, token_ids]
