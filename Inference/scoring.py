"""Yes/no logits of (user, candidate) pairs from one forward pass each (paper, equation 1).

Prompts and pictures come from a `PairReader`; `score_pairs` reads the logits at the last position only.

The prompt starts with the picture, and a candidate is offered to many users. So pairs are grouped by item: keys and
values of what their prompts share (picture, title) are computed once, and extended by each user's own text.
"""

import copy
from dataclasses import dataclass

import torch
from PIL import Image

from Inference.chat import on_device


def probability(yes_logit, no_logit):
    """p(yes) / (p(yes) + p(no)), equation 1 of the paper."""
    return torch.sigmoid(torch.tensor(yes_logit - no_logit, dtype=torch.float64)).item()


def group_by_item(rows):
    """Indices of `rows`, those of one item (and picture) next to each other, items in order of first appearance."""
    groups = {}
    for index, row in enumerate(rows):
        groups.setdefault((row["item_id"], row["images"][0]), []).append(index)
    return list(groups.values())


@torch.no_grad()  # not inference mode: what a model split among GPUs gathers here is used in training, too
def score_pairs(model, reader, rows, batch_tokens=16384, reuse_prefix=True, wanted=None, part=(0, 1)):
    """Yields (index into rows, yes logit, no logit) for every pair, items together.

    batch_tokens: tokens in one batch, padding counted. reuse_prefix: compute what the prompts of one item share only
    once; templates that do not start with the picture, and models with their own position ids, take the plain pass.
    wanted: indices to yield, None = all; part: (k, n) for the k-th of n processes. What is batched together depends on
    `rows` alone, so that a score's last digits do not depend on what was done before or by whom.
    """
    chat, reuse_prefix = reader.chat, reuse_prefix and has_plain_positions(model)
    for number, chunk in enumerate(_chunks(group_by_item(rows), batch_tokens, chat, reader, rows)):
        indices = {pair.index for group in chunk for pair in group}
        if number % part[1] != part[0] or (wanted is not None and not indices & wanted):
            continue
        if reuse_prefix:
            scored = _score_with_prefixes(model, chat, chunk, batch_tokens)
        else:
            scored = _score_plainly(model, chat, [pair for group in chunk for pair in group], batch_tokens)
        yield from (found for found in scored if wanted is None or found[0] in wanted)


@dataclass
class _Pair:
    """One pair ready for the model. ids: of the prompt as the model sees it, the picture's token repeated."""

    index: int
    prompt: str
    image: Image.Image
    ids: list[int]


def _chunks(groups, batch_tokens, chat, reader, rows):
    """Lists of groups of _Pairs; the longest prompts of a chunk's groups would fit into one batch."""
    chunk, longest = [], 0
    for indices in groups:
        image = reader.image(rows[indices[0]])
        image_tokens = chat.image_tokens(image)
        prompts = [(i, *reader.prompt(rows[i])) for i in indices]
        group = [_Pair(i, prompt, image, chat.expand(ids, image_tokens)) for i, prompt, ids in prompts]
        length = max(len(pair.ids) for pair in group)
        longest = max(longest, length)
        if chunk and longest * (len(chunk) + 1) > batch_tokens:
            yield chunk
            chunk, longest = [], length
        chunk.append(group)
    if chunk:
        yield chunk


def has_plain_positions(model):
    """False for models that number picture positions in two dimensions (Qwen2.5-VL); their prefix is not reused."""
    return not any(hasattr(module, "get_rope_index") for module in model.modules())


def _score_plainly(model, chat, pairs, batch_tokens):
    """One left-padded pass over whole prompts."""
    size = max(1, batch_tokens // max(len(pair.ids) for pair in pairs))
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        batch = on_device(chat.encode([pair.prompt for pair in part], [pair.image for pair in part], side="left"), model)
        yield from _read(part, _answer_logits(model, chat, **batch, use_cache=False))


def _score_with_prefixes(model, chat, groups, batch_tokens):
    """First all items' shared beginnings in one left-padded pass, then each pair's own text behind its item's."""
    shared, alone = [], []  # shared: (group, length of what its prompts share)
    for group in groups:
        length = common_length([pair.ids for pair in group])
        if len(group) > 1 and chat.image_token_id not in group[0].ids[length:]:
            shared.append((group, length))
        else:
            alone += group
    if alone:
        yield from _score_plainly(model, chat, alone, batch_tokens)
    if not shared:
        return
    first = on_device(chat.encode([group[0].prompt for group, _ in shared], [group[0].image for group, _ in shared]), model)
    first["input_ids"], first["attention_mask"] = _left_padded([group[0].ids[:n] for group, n in shared], chat, model.device)
    first["position_ids"] = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = model(**first, logits_to_keep=1, use_cache=True).past_key_values

    lengths = torch.tensor([n for _, n in shared], device=model.device)
    waiting = [(place, pair, pair.ids[n:]) for place, (group, n) in enumerate(shared) for pair in group]
    waiting.sort(key=lambda entry: len(entry[2]))
    while waiting:
        size = max(1, batch_tokens // (first["input_ids"].shape[1] + len(waiting[-1][2])))
        part, waiting = waiting[-size:], waiting[:-size]
        places = torch.tensor([place for place, _, _ in part], device=model.device)
        ids, mask = _left_padded([own for _, _, own in part], chat, model.device)
        logits = _answer_logits(
            model,
            chat,
            input_ids=ids,
            attention_mask=torch.cat([first["attention_mask"][places], mask], dim=1),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0) + lengths[places, None],
            past_key_values=_select(cache, places),
        )
        yield from _read([pair for _, pair, _ in part], logits)


def _answer_logits(model, chat, **inputs):
    """float32 (rows, 2): yes and no logits at the last position.

    The last hidden state is multiplied by the two answers' rows of the output layer in float32: in bfloat16 a logit near
    20 is known to an eighth, and many candidates would tie.
    """
    answers, found = [chat.answer_ids[1][0], chat.answer_ids[0][0]], []

    def keep(layer, hidden, logits):  # inside the pass, where weights that are split among GPUs are whole
        if logits.dtype != torch.float32:
            with torch.autocast(logits.device.type, enabled=False):  # training computes in 16 bit around it
                logits = hidden[0][:, -1:].float() @ layer.weight[answers].float().T
            found.append(logits[:, -1])
        else:
            found.append(logits[:, -1, answers])

    hook = model.get_output_embeddings().register_forward_hook(keep)
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0]


def _read(pairs, logits):
    """(index, yes logit, no logit) of each pair."""
    for pair, (yes_logit, no_logit) in zip(pairs, logits.tolist(), strict=True):
        yield pair.index, yes_logit, no_logit


def common_length(ids):
    """How many leading tokens all lists share; at least one token of each is left over."""
    shortest = min(map(len, ids))
    first = ids[0]
    for n in range(shortest - 1):
        if any(other[n] != first[n] for other in ids[1:]):
            return n
    return shortest - 1


def _left_padded(rows, chat, device):
    """(ids, mask) of shape (rows, longest), padding on the left."""
    longest = max(map(len, rows))
    ids = [[chat.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _select(cache, places):
    """A copy of the cache that holds, for each entry of `places`, the keys and values of that row."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(places)
    return chosen
