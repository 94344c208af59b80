"""What stage 5 trains with: batches of pairs with the loss on the answer, the order they come in, a Trainer that ranks.

The training text is the scoring text plus the answer. With `loss: answer`, logits are computed at the answer's positions
only. With `group_by: item`, pairs of one item come together and what their prompts share (the picture, nearly all of the
tokens) is read once for all of them: each pair's own text follows the shared beginning and does not see the other pairs'.
Loss and gradients are those of reading every pair by itself, but for what LoRA's dropout leaves out.
"""

import itertools

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.functional import pad
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from data_processing.errors import InputError
from data_processing.metrics import by_user, per_user, pooled_auc
from Inference.scoring import common_length, group_by_item, has_plain_positions, probability, score_pairs


class Collator:
    """Lines of train.jsonl -> one right-padded batch.

    `logits_to_keep` (rows, answer tokens) holds the positions before the answers' tokens and `shift_labels` the tokens
    themselves, which is how transformers takes labels that need no shifting.
    """

    def __init__(self, reader, loss, share=False):
        self.reader, self.chat, self.loss, self.share = reader, reader.chat, loss, share

    def text(self, row):
        """The rendered pair, question and answer."""
        return self.reader.prompt(row)[0] + self.chat.answer_texts[row["label"]]

    def __call__(self, rows):
        if self.share:
            return self._sharing(rows)
        batch = self.chat.encode([self.text(row) for row in rows], [self.reader.image(row) for row in rows], side="right")
        answers = [self.chat.answer_ids[row["label"]] for row in rows]
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, length, answer, ids in zip(rows, lengths, answers, batch["input_ids"].tolist(), strict=True):
            if ids[length - len(answer) : length] != answer:
                raise InputError(
                    f"user {row['user_id']!r}, item {row['item_id']!r}: the rendered text does not end with the answer's tokens"
                )
        if self.loss == "sequence":
            not_text = (batch["attention_mask"] == 0) | (batch["input_ids"] == self.chat.image_token_id)
            batch["labels"] = batch["input_ids"].masked_fill(not_text, -100)
            return batch
        places = [list(range(length - len(answer) - 1, length - 1)) for length, answer in zip(lengths, answers, strict=True)]
        return _with_labels(batch, places, answers)

    def _sharing(self, rows):
        """One row of the batch for each item: beginning, own text and answer of the first pair, of the second pair, …"""
        firsts, packs, places, answers = [], [], [], []
        for indices in group_by_item(rows):
            group = [rows[index] for index in indices]
            image = self.reader.image(group[0])
            prompts = [self.reader.prompt(row) for row in group]
            image_tokens = self.chat.image_tokens(image)
            wholes = [self.chat.expand(ids, image_tokens) for _, ids in prompts]
            start = common_length(wholes)
            if self.chat.image_token_id in wholes[0][start:]:
                raise InputError("--group_by item needs a chat template that starts with the picture; use --group_by length")
            pack, place, answer = Pack(wholes[0][:start]), [], []
            for row, ids in zip(group, wholes, strict=True):
                answer_ids = self.chat.answer_ids[row["label"]]
                end = pack.add(ids[start:] + answer_ids[:-1])  # nothing is predicted from the last token
                place += range(end - len(answer_ids), end)
                answer += answer_ids
            firsts.append((prompts[0][0], image))
            packs.append(pack)
            places.append(place)
            answers.append(answer)
        batch = self.chat.encode([text for text, _ in firsts], [image for _, image in firsts], side="right")
        batch |= packed(packs, self.chat.tokenizer.pad_token_id)
        return _with_labels(batch, places, answers)


def _with_labels(batch, places, answers):
    longest = max(map(len, answers))
    batch["logits_to_keep"] = torch.tensor([place + [0] * (longest - len(place)) for place in places])
    batch["labels"] = batch["shift_labels"] = torch.tensor([answer + [-100] * (longest - len(answer)) for answer in answers])
    return batch


class Pack:
    """Token ids of a shared beginning and of the texts that follow it, each at the positions it would have by itself."""

    def __init__(self, beginning):
        self.ids, self.positions, self.parts = list(beginning), list(range(len(beginning))), [0] * len(beginning)
        self.shared = len(beginning)

    def add(self, own):
        """Appends one text; returns where it ends."""
        self.ids += own
        self.positions += range(self.shared, self.shared + len(own))
        self.parts += [self.parts[-1] + 1] * len(own)
        return len(self.ids)


def packed(packs, pad_token_id):
    """dict input_ids, position_ids (rows, longest) and attention_mask (rows, 1, longest, longest), True = may be looked at.

    A token sees what stands before it in the beginning and in its own part.
    """
    longest = max(len(pack.ids) for pack in packs)

    def padded(values, fill):
        return torch.stack([pad(torch.tensor(value), (0, longest - len(value)), value=fill) for value in values])

    parts = padded([pack.parts for pack in packs], -1)
    before = torch.ones(longest, longest, dtype=torch.bool).tril()
    same_or_beginning = (parts[:, None, :] == parts[:, :, None]) | (parts[:, None, :] == 0)
    return {
        "input_ids": padded([pack.ids for pack in packs], pad_token_id),
        "position_ids": padded([pack.positions for pack in packs], 0),
        "attention_mask": (before & same_or_beginning)[:, None],
    }


class Order(torch.utils.data.Sampler):
    """The order of an epoch's pairs, drawn from (seed, epoch), so that a run that goes on draws what it would have drawn.

    rows: lines of train.jsonl; lengths: tokens of each; step: pairs in a step, all processes and passes together, to which
    the epoch is filled up with its first pairs, so that it is the same for any number of processes; group_by: none, length
    (like lengths come together), or item (up to a pass, but at most half a step, of one item's pairs come together);
    in_pass: pairs in a pass.
    """

    def __init__(self, rows, lengths, step, in_pass, group_by, seed):
        self.rows, self.lengths, self.step, self.in_pass, self.group_by, self.seed = rows, lengths, step, in_pass, group_by, seed
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return -(-len(self.rows) // self.step) * self.step

    def __iter__(self):
        return itertools.islice(itertools.cycle(self._each_once()), len(self))

    def _each_once(self):
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.group_by == "length":
            return get_length_grouped_indices(self.lengths, self.step, generator=chance)
        order = torch.randperm(len(self.rows), generator=chance).tolist()
        if self.group_by == "item":
            size = max(1, min(self.in_pass, self.step // 2))
            groups = [[order[k] for k in group] for group in group_by_item([self.rows[index] for index in order])]
            chunks = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
            passes = put_together([chunks[k] for k in torch.randperm(len(chunks), generator=chance).tolist()], self.in_pass)
            order = [index for group in passes for index in group]
        return order


def put_together(chunks, size):
    """Chunks of at most `size` pairs as passes of `size`, so that none is torn apart; what finds no partner comes last."""
    full, waiting = [], {free: [] for free in range(1, size)}  # waiting: passes by how many pairs they still take
    for chunk in chunks:
        free = next((free for free in range(len(chunk), size) if waiting[free]), None)  # the fullest one that takes it
        together = (waiting[free].pop() if free else []) + chunk
        (full if len(together) == size else waiting[size - len(together)]).append(together)
    return full + [rest for passes in waiting.values() for rest in passes]


def check_sharing(args):
    """Raises InputError if `--group_by item` cannot be had with these options."""
    if args.loss != "answer":
        raise InputError("--group_by item needs --loss answer: one position cannot predict the next words of several texts")
    if args.batch_size < 2:
        raise InputError("--group_by item shares nothing with one pair in a pass; set --batch_size to 2 or more")
    if args.attention not in ("auto", "sdpa"):
        raise InputError(f"--group_by item needs --attention sdpa, which takes a mask of its own for each pair, not {args.attention}")


def check_positions(model):
    """Raises InputError if the model numbers its tokens in a way that `--group_by item` cannot follow."""
    if not has_plain_positions(model):
        raise InputError(f"--group_by item needs a model with plain positions, not {model.config.model_type}; use --group_by length")


class RecommenderTrainer(Trainer):
    """Ranks in place of a validation loss: AUC and HR@5 over whole candidate lists are what the model is chosen by."""

    def __init__(self, *args, order, reader, score_batch_tokens, **options):
        super().__init__(*args, **options)
        self.order, self.reader, self.score_batch_tokens = order, reader, score_batch_tokens

    def _get_train_sampler(self, *_):
        return self.order

    def evaluate(self, *_, **__):
        rows = self.eval_dataset
        everyone_scores_all = self.is_fsdp_enabled or self.args.world_size == 1  # FSDP: every process must make the same passes
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        part = (0, 1) if everyone_scores_all else (self.args.process_index, self.args.world_size)
        scored = [
            {**{key: rows[i][key] for key in ("user_id", "item_id", "label")}, "score": probability(yes, no)}
            for i, yes, no in score_pairs(model, self.reader, rows, self.score_batch_tokens, part=part)
        ]
        scored = scored if everyone_scores_all else gather_object(scored)
        scores, labels = map(np.stack, zip(*by_user(scored, "validation.jsonl").values(), strict=True))
        metrics = {"eval_auc": pooled_auc(scores, labels), "eval_hr@5": float(per_user(scores)["hr@5"].mean())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _steps_in_epoch(args, state):
    return state.max_steps // int(args.num_train_epochs)


class TellEpoch(TrainerCallback):
    """Tells the order which epoch begins: of several processes that go on in mid-epoch, the data loader would not."""

    def __init__(self, order):
        self.order = order

    def on_epoch_begin(self, args, state, *_, **__):
        self.order.set_epoch(state.global_step // _steps_in_epoch(args, state))


class EverySteps(TrainerCallback):
    """A checkpoint every so many steps, besides the one after each epoch: what a killed run loses is less than that.

    The loss is logged with each: a checkpoint does not hold the sum that the next line of the log would be the mean of.
    """

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        ends_epoch = state.global_step % _steps_in_epoch(args, state) == 0  # saved there, after the validation
        if self.steps and state.global_step % self.steps == 0 and not ends_epoch:
            control.should_save = control.should_log = True
        return control

    def on_epoch_end(self, _, __, control, **___):
        control.should_log = True
        return control


def mean_loss(log):
    """Mean of the loss over all steps. log: the Trainer's log rows, whose losses are means over the steps since the last."""
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    return float(np.average(list(losses.values()), weights=np.diff([0, *losses])))


class AfterLog(TrainerCallback):
    """Calls `write(log rows)` in the main process whenever something was logged."""

    def __init__(self, write):
        self.write = write

    def on_log(self, _, state, *__, **___):
        if state.is_world_process_zero:
            self.write(state.log_history)
