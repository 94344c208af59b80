"""The data set in the form of another library of recommenders, with our candidate lists.

In:  {data_dir}/users.jsonl, items.jsonl, and the images for mmrec
Out: {data_dir}/export/{format}/{name}/
     candidates.tsv   split, user_id, item_id, label of all validation and test candidates
     recbole: {name}.item; leave-one-out: {name}.inter, to be split by RecBole; split by users:
              {name}.train.inter, .valid.inter, .test.inter, a line for each item that is learned or
              asked for with the items before it (RecBole's `benchmark_filename`)
     mmrec:   {name}.inter with x_label 0, 1, 2 (train, validation, test), users and items numbered;
              u_id_mapping.csv, i_id_mapping.csv; text_feat.npy, image_feat.npy (items, features)

    python MLLM-MSR/baselines/export_interactions.py --config configs/sample.yaml --format recbole

Times are those of users.jsonl, or the places in a user's list where it has none. What comes back is
read by external.py. CPU; features: as long as the encoders take.
"""

from mllmrec.stage.main import run_main

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import (
    candidates,
    is_leave_one_out,
    read_users_and_items,
    users_of_split,
)
from mllmrec.data.images import image_inputs, item_images
from mllmrec.prompts.templates import plain_text
from mllmrec.sequential.sequential_options import EncoderOptions
from mllmrec.stage.jsonl import atomic_file, require
from mllmrec.stage.options import NAME, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

SECTION = "export"
X_LABEL = {"train": 0, "validation": 1, "test": 2}
RECBOLE = {"train": "train", "validation": "valid", "test": "test"}


@dataclass
class Options(EncoderOptions):
    format: Literal["recbole", "mmrec"] = option("recbole", "the library that reads it")
    name: str = option("mllmrec", "name of the data set there", pattern=NAME)


def sequence(user: Row) -> list[tuple[str, int]]:
    """[(item, time)] of a line's history and target; times: places where the line has none."""
    items = [*user["history"], user["target"]]
    times = list(range(1, len(items) + 1))
    if "times" in user:
        times = [*user["times"], user["target_time"]]
    return list(zip(items, times, strict=True))


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with tabs; no field may hold one."""
    with atomic_file(path) as file:
        for row in (header, *rows):
            file.write(("\t".join(map(str, row)) + "\n").encode())


def recbole_tables(users: Sequence[Row], leave_one_out: bool) -> dict[str, list[tuple[Any, ...]]]:
    """suffix -> lines, the header first."""
    if leave_one_out:
        lines = [
            (user["user_id"], item, time)
            for user in users_of_split(users, "test")
            for item, time in sequence(user)
        ]
        return {"inter": [("user_id:token", "item_id:token", "timestamp:float"), *lines]}
    header = ("user_id:token", "item_id_list:token_seq", "item_id:token", "timestamp:float")
    tables: dict[str, list[tuple[Any, ...]]] = {f"{s}.inter": [header] for s in RECBOLE.values()}
    for user in users:
        pairs, split = sequence(user), user["split"]
        first = 1 if split == "train" else len(pairs) - 1
        for place in range(first, len(pairs)):
            before = " ".join(item for item, _ in pairs[:place])
            line = (user["user_id"], before, *pairs[place])
            tables[f"{RECBOLE[split]}.inter"].append(line)
    return tables


def mmrec_lines(
    users: Sequence[Row], items: Iterable[str], leave_one_out: bool
) -> Iterator[tuple[Any, ...]]:
    """userID, itemID, rating, timestamp, x_label of each interaction.

    items: ids in the order of their numbers. What a history has is known (0), a target is asked
    for; leave-one-out: the item before a test target is that of the validation.
    """
    number = {item: n for n, item in enumerate(items)}
    for code, user in enumerate(users):
        pairs = sequence(user)
        labels = [0] * (len(pairs) - 1) + [X_LABEL[user["split"]]]
        if leave_one_out:
            labels[-2] = X_LABEL["validation"]
        for (item, time), label in zip(pairs, labels, strict=True):
            yield code, number[item], 1, time, label


def features(items: dict[str, Row], items_path: Path, options: Options) -> dict[str, Any]:
    """{file name: (items, features)} of titles and, where there are any, images."""
    from mllmrec.sequential.image_features import encode_images
    from mllmrec.sequential.items import encode

    titles = [item["title"] for item in items.values()]
    found = {"text_feat.npy": encode(titles, options.encoder).numpy()}
    paths = list(item_images(items, items_path).values())
    if options.with_images and any(paths):
        found["image_feat.npy"] = encode_images(paths, options.image_encoder).numpy()
    return found


def write_export(folder: Path, users: list[Row], items: dict[str, Row], options: Options) -> None:
    """Write the files of the format."""
    leave_one_out = is_leave_one_out(users)
    listed = (
        (user["split"], user["user_id"], item, label)
        for user in users
        if user["split"] != "train"
        for item, label in candidates(user)
    )
    write_table(folder / "candidates.tsv", ("split", "user_id", "item_id", "label"), listed)
    if options.format == "recbole":
        for suffix, (header, *lines) in recbole_tables(users, leave_one_out).items():
            write_table(folder / f"{options.name}.{suffix}", header, lines)
        titles = ((item_id, plain_text(item["title"])) for item_id, item in items.items())
        header = ("item_id:token", "title:token_seq")
        write_table(folder / f"{options.name}.item", header, titles)
        return
    whole = users_of_split(users, "test") if leave_one_out else users
    header = ("userID", "itemID", "rating", "timestamp", "x_label")
    inter = mmrec_lines(whole, items, leave_one_out)
    write_table(folder / f"{options.name}.inter", header, inter)
    for name, ids in (("u", [user["user_id"] for user in whole]), ("i", list(items))):
        pairs = ((own, number) for number, own in enumerate(ids))
        kind = "user" if name == "u" else "item"
        write_table(folder / f"{name}_id_mapping.csv", (f"{kind}_id", f"{kind}ID"), pairs)
    for file_name, values in features(
        items, Path(options.data_dir) / "items.jsonl", options
    ).items():
        with atomic_file(folder / file_name) as file:
            np.save(file, values)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, f"export for {options.format}")
    data_dir = Path(options.data_dir)
    users_path, items_path = (require(data_dir / f"{n}.jsonl") for n in ("users", "items"))
    digests = file_digests(users_path, items_path)
    if options.format == "mmrec" and options.with_images:
        digests |= image_inputs(items_path, options.data_dir, options.image_roots)
    job = Job.of(options, digests, stage=SECTION)
    folder = data_dir / "export" / options.format / options.name
    with WholeOutput(job, [folder]) as output:
        if output.is_needed:
            users, items = read_users_and_items(users_path, items_path, ("history", "target"))
            output.begin()
            folder.mkdir(parents=True, exist_ok=True)
            write_export(folder, users, items, options)
            output.finish({"users": len({user["user_id"] for user in users}), "items": len(items)})
            print(f"wrote {folder}")


if __name__ == "__main__":
    run_main(main)
