"""What is run for each row of a table: stages and their options.

A step is `SCRIPT OPTIONS`: a numbered script of scripts/, or a Python stage by its path. Every step
also gets the config, the seed and the folders of its run; one that is up to date does nothing.
`{full}` stands for the folder of MLLM-MSR's outputs and `{second}` for that of MLLM4Rec's, which
other rows read.
"""

import shlex
from dataclasses import dataclass, replace

from mllmrec.stage.options import ROOT, load_config

SCORE = "MLLM-MSR/test/test_with_llava_sft.py --hide nothing"
POPULARITY = "MLLM-MSR/baselines/popularity.py"


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    label: its name there; scores: folder of its scores.jsonl below the run's folder; steps: after
    stage 1, in order; world: key of WORLDS; against: key of the row that it is compared with, ""
    for none; retrieved: its lists are the retriever's best items, which may lack the target;
    preferences: file below the run's folder whose texts it needs, as part of its costs.
    """

    label: str
    scores: str
    steps: tuple[str, ...]
    world: str = "main"
    against: str = ""
    retrieved: bool = False
    preferences: str = ""


def full_system(label: str, world: str = "main") -> TableRow:
    """MLLM-MSR as the config says."""
    steps = ("02_image_summary", "03_preference", "04_datasets", "05_train", SCORE)
    preferences = "mllm_msr/user_preferences.jsonl"
    return TableRow(label, "mllm_msr/sft", steps, world, preferences=preferences)


def other_training(
    name: str, label: str, options: tuple[str, str, str], world: str = "main", against: str = "ours"
) -> TableRow:
    """The full system's preferences, and other options in stages 4, 5 and 6.

    options: those of the three stages.
    """
    rows, train, score = options
    steps = (
        "02_image_summary",
        "03_preference",
        f"04_datasets --system {name} --preferences {{full}}/user_preferences.jsonl {rows}",
        f"05_train --system {name} {train}",
        f"{SCORE} --system {name} --variant {name} {score}",
    )
    return TableRow(label, f"{name}/{name}", steps, world, against)


def other_scoring(name: str, label: str, options: str) -> TableRow:
    """The full system's adapter, scored with other options."""
    steps = (*full_system(label).steps[:-1], f"{SCORE} --variant {name} {options}")
    return TableRow(label, f"mllm_msr/{name}", steps, against="ours")


def popularity(label: str, world: str = "main") -> TableRow:
    return TableRow(label, "baselines/popularity", (POPULARITY,), world)


def padded(label: str, world: str, against: str) -> TableRow:
    """Images padded with black in stages 2 and 6, as many at a time as in the released code."""
    steps = (
        "02_image_summary --system padded --pad_images 8",
        "03_preference --system padded",
        "04_datasets --system padded",
        "05_train --system padded",
        f"{SCORE} --system padded --variant padded --pad_images 6",
    )
    return TableRow(label, "padded/padded", steps, world, against)


def released_options(section: str, only: str = "", leave_out: tuple[str, ...] = ()) -> str:
    """Options of a section of configs/systems/mllm_msr_released.yaml, as words of a command."""
    values = load_config(ROOT / "configs/systems/mllm_msr_released.yaml")[section]
    words = [
        word
        for name, value in values.items()
        if name not in leave_out and only in ("", name)
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    return shlex.join(words)


# name -> options of stage 1: data that differ from the config's, in a run folder of their own.
WORLDS = {
    "main": "",
    "varied": "--cover_shapes varied",
    "released": "--history released --released_order time",
    "popular": "--negative_sampling popularity",
    "period": "--negative_sampling period",
    "letters": "--train_negatives 20",  # for lists of 21 in training, too
}
PROMPT = "prompt_format"
# What depends on the size of models and data stays as in the config.
SIZES = ("dtype", "limit", "epochs", "accumulation", "lora_r", "max_text_tokens", "reuse_prefix")

# Each option of the released code alone (docs/fidelity.md), then all of them together.
DEVIATIONS = {
    "ours": full_system("ours: all defaults"),
    "sequence": other_training(
        "sequence", "loss on the whole sequence", ("", "--loss sequence", "")
    ),
    "vision": other_training(
        "vision", "LoRA also on the vision tower", ("", "--lora_vision true", "")
    ),
    "optimiser": other_training(
        "optimiser",
        "constant schedule, weight decay, Gaussian LoRA, last epoch kept",
        (
            "",
            "--schedule constant --warmup_ratio 0 --weight_decay 0.01 --lora_init gaussian "
            "--keep last",
            "",
        ),
    ),
    "question": other_training(
        "question",
        "preference before title in the question",
        (released_options("datasets"), "", ""),
    ),
    "raw": other_training(
        "raw",
        "raw prompts, no end token",
        (
            "",
            f"--end_token false {released_options('train', PROMPT)}",
            released_options("score", PROMPT),
        ),
    ),
    "bare": other_scoring("bare", "bare answer token in scoring", "--answer_token bare"),
    "varied": full_system("ours, covers of three shapes", "varied"),
    "padded": padded("images padded with black, covers of three shapes", "varied", "varied"),
    "lists": full_system("ours, released histories", "released"),
    "released": other_training(
        "released",
        "all released settings, released histories",
        (
            released_options("datasets"),
            released_options("train", leave_out=SIZES),
            released_options("score", leave_out=SIZES),
        ),
        "released",
        "lists",
    ),
    "popularity": popularity("popularity"),
    "popularity_lists": popularity("popularity, released histories", "released"),
}

FULL = full_system("MLLM-MSR")
SUMMARIES = FULL.steps[:1]
# How stage 3 writes an item whose image was not described.
NO_SUMMARY = "--block_line '{number}. Title: {title}. {image_word}: not known.'"
TEXT_QUESTION = (
    "--with_images false --recommend_prompt 'The {person} {past}: {preference} Will this {person} "
    "{act} the {item} called {title} next? Answer with yes or no only.'"
)


def baseline(
    script: str, label: str, variant: str, options: str = "", world: str = "main"
) -> TableRow:
    """A script of MLLM-MSR/baselines/ that writes scores."""
    step = f"MLLM-MSR/baselines/{script}.py --variant {variant} {options}"
    return TableRow(label, f"baselines/{variant}", (step,), world)


def ablation(name: str, label: str, preferences: str) -> TableRow:
    """MLLM-MSR with other preferences; preferences: the step that writes them."""
    steps = (
        *SUMMARIES,
        f"{preferences} --system {name}",
        f"04_datasets --system {name}",
        f"05_train --system {name}",
        f"{SCORE} --system {name} --variant {name}",
    )
    return TableRow(label, f"{name}/{name}", steps, against="full")


def recurrent(name: str, label: str, options: str) -> TableRow:
    """MLLM-MSR with other options in stage 3."""
    step = f"03_preference --summaries {{full}}/image_summaries.jsonl {options}"
    return ablation(name, label, step)


ZERO_SHOT = TableRow(
    "LLaVA without SFT",
    "mllm_msr/zero_shot",
    (*FULL.steps[:3], f"{SCORE} --adapter none"),
    against="full",
)
TALLREC = TableRow(
    "TALLRec (text only, titles)",
    "tallrec/tallrec",
    (
        "MLLM-MSR/baselines/title_history.py --system tallrec",
        f"04_datasets --system tallrec {TEXT_QUESTION}",
        "05_train --system tallrec --model {text_model}",
        f"{SCORE} --system tallrec --variant tallrec --model {{text_model}}",
    ),
    against="full",
)
TITLES = ablation(
    "titles", "LLaVA SFT, titles for the preference", "MLLM-MSR/baselines/title_history.py"
)
DIRECT = ablation(
    "direct",
    "without recurrence",
    "Inference/preference_direct.py --summaries {full}/image_summaries.jsonl",
)
NO_SUMMARIES = recurrent("no_summary", "without image summaries", NO_SUMMARY)

SEQUENTIAL = {
    "popularity": popularity("popularity"),
    "gru4rec": baseline("gru4rec", "GRU4Rec", "gru4rec"),
    "gru4rec_f": baseline("gru4rec", "GRU4Rec-F (titles)", "gru4rec_f", "--features title"),
    "sasrec_bce": baseline("sasrec", "SASRec, published loss", "sasrec_bce", "--loss bce"),
    "sasrec": baseline("sasrec", "SASRec, cross-entropy", "sasrec"),
    "sasrec_f": baseline("sasrec", "SASRec-F (titles)", "sasrec_f", "--features title"),
}
MAIN_RESULTS = {
    **SEQUENTIAL,
    "zero_shot": ZERO_SHOT,
    "tallrec": TALLREC,
    "titles": TITLES,
    "full": FULL,
}
ABLATIONS = {"full": FULL, "direct": DIRECT, "no_summary": NO_SUMMARIES, "titles": TITLES}
BLOCK_SIZES = {
    **{
        f"block{size}": recurrent(f"block{size}", f"block size {size}", f"--block_size {size}")
        for size in (1, 2, 4, 5)
    },
    **{
        f"length{tokens}": recurrent(
            f"length{tokens}",
            f"preference of at most {tokens} tokens",
            f"--max_new_tokens {tokens}",
        )
        for tokens in (10, 20)
    },
    "full": FULL,
}
SUMMARY_ONLY = "--features summary --item_ids false"
PRELIMINARY = {
    "gru4rec_summary": TableRow(
        "GRU4Rec on image summaries",
        "baselines/gru4rec_summary",
        (*SUMMARIES, f"MLLM-MSR/baselines/gru4rec.py --variant gru4rec_summary {SUMMARY_ONLY}"),
    ),
    "gru4rec": SEQUENTIAL["gru4rec"],
    "popularity": SEQUENTIAL["popularity"],
}

# What a sequential row owes to popularity and to time, and runs that should be near chance.
CONTROLS = {
    "popularity": popularity("popularity"),
    "sasrec": SEQUENTIAL["sasrec"],
    "popularity_popular": popularity("popularity, negatives weighted by popularity", "popular"),
    "sasrec_popular": baseline(
        "sasrec", "SASRec, negatives weighted by popularity", "sasrec", world="popular"
    ),
    "popularity_period": popularity("popularity, negatives of the target's period", "period"),
    "sasrec_period": baseline(
        "sasrec", "SASRec, negatives of the target's period", "sasrec", world="period"
    ),
    "other_histories": baseline(
        "sasrec",
        "SASRec, histories of other test users",
        "sasrec_other_histories",
        "--control other_histories",
    ),
    "unseen_targets": baseline(
        "sasrec",
        "SASRec, no target of the test in a training list",
        "sasrec_unseen_targets",
        "--control unseen_targets",
    ),
}

HIDDEN = "MLLM-MSR/test/test_with_llava_sft.py --hide"
# The sample's own rows: what image, preference, title and order contribute, and the bounds.
SAMPLE = {
    "full": FULL,
    "zero_shot": ZERO_SHOT,
    "no_image": TableRow(
        "SFT, gray images",
        "mllm_msr/sft_no_image",
        (*FULL.steps[:4], f"{HIDDEN} image"),
        against="full",
    ),
    "no_preference": TableRow(
        "SFT, empty preferences",
        "mllm_msr/sft_no_preference",
        (*FULL.steps[:4], f"{HIDDEN} preference"),
        against="full",
    ),
    "popularity": popularity("popularity"),
    **{
        rule: TableRow(f"`{rule}`", f"bounds/{rule}", ())
        for rule in ("title_only", "no_recency", "ceiling")
    },
}


def retriever(name: str, label: str, options: str = "") -> TableRow:
    """A retriever of MLLM4Rec over all items."""
    step = f"MLLM4Rec/train_retriever.py --retriever {name} --variant {name} {options}"
    return TableRow(label, f"mllm4rec/{name}", (step,), retrieved=True)


RETRIEVAL = {
    "popularity": retriever("popularity", "popularity"),
    "gru4rec": retriever("gru4rec", "GRU4Rec"),
    # Chosen on the validation lines of ml-latest-small (docs/results.md).
    "sasrec": retriever("sasrec", "SASRec", "--max_length 50 --dropout 0.3"),
    "lrurec": retriever("lrurec", "LRURec"),
}

CAPTIONED = ("MLLM4Rec/process_item_blip2.py", "MLLM4Rec/train_retriever.py")


def ranker(name: str, label: str, options: str, against: str = "ranker") -> TableRow:
    """MLLM4Rec's ranker with other options, on the same retrieved lists."""
    words = "--retrieved {second}/retriever --summaries {second}/image_summaries.jsonl"
    step = f"MLLM4Rec/train_ranker.py --system {name} {words} {options}"
    return TableRow(label, f"{name}/ranked", (*CAPTIONED, step), against=against)


RANKER_STEPS = (*CAPTIONED, "MLLM4Rec/train_ranker.py")
# The ranker on the users whose target was retrieved; every row ranks the same 20 items of a user.
RANKER = {
    "random": TableRow("random order", "mllm4rec/random_order", RANKER_STEPS),
    "retriever": TableRow(
        "the retriever's order", "mllm4rec/retriever_order", RANKER_STEPS, against="random"
    ),
    "ranker": TableRow("MLLM4Rec's ranker", "mllm4rec/ranked", RANKER_STEPS, against="retriever"),
    "no_image": ranker("no_image", "without images (titles only)", "--captions false"),
    "no_role": ranker("no_role", "without role", "--role false"),
    "no_hybrid": ranker("no_hybrid", "without hybrid prompt", "--hybrid false"),
    "shuffled": ranker(
        "shuffled", "trained on shuffled labels", "--control shuffled_labels", "random"
    ),
}
# Over all users: the ranker's list where the target was retrieved, else the retriever's.
OVERALL = {
    "retriever": TableRow("LRURec", "mllm4rec/retriever", RANKER_STEPS, retrieved=True),
    "overall": TableRow("MLLM4Rec", "mllm4rec/ranker", RANKER_STEPS, retrieved=True),
}


# Both systems and the baselines on one users.jsonl: the same users, the same 1 + 20 candidates.
def one_negative(row: TableRow) -> TableRow:
    """A row of yes/no questions, where training users have more negatives, for the letters."""
    steps = (s + " --train_negatives 1" * s.startswith("04_datasets") for s in row.steps)
    return replace(row, steps=tuple(steps), world="letters")


COMPARED = {
    **{
        key: replace(SEQUENTIAL[key], world="letters")
        for key in ("popularity", "sasrec", "sasrec_f")
    },
    "tallrec": one_negative(TALLREC),
    "full": one_negative(FULL),
    "ranker": TableRow(
        "MLLM4Rec's ranker",
        "mllm4rec/ranked",
        (
            *SUMMARIES,
            "MLLM4Rec/train_ranker.py --lists users --candidates 21 "
            "--summaries {full}/image_summaries.jsonl",
        ),
        "letters",
        "full",
    ),
}

# Tables whose script is not reproduce_{table}.sh.
SCRIPTS = {"systems": "compare_systems", "overall": "reproduce_ranker"}
TABLES = {
    "sample": SAMPLE,
    "deviations": DEVIATIONS,
    "table3": MAIN_RESULTS,
    "figure4": ABLATIONS,
    "figure5": BLOCK_SIZES,
    "preliminary": PRELIMINARY,
    "controls": CONTROLS,
    "retrieval": RETRIEVAL,
    "ranker": RANKER,
    "overall": OVERALL,
    "systems": COMPARED,
}
