"""What lines were made from: what is kept, computed again or refused when inputs change."""

import shutil

import pytest
import yaml
from conftest import write_unchecked
from PIL import Image

from mllmrec.data.summaries import read_summaries
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.record import Job, read_record
from mllmrec.stage.scripts import load_script

STAGES = (
    "data_processing/split.py",
    "Inference/image_summary.py",
    "Inference/preference_recurrent.py",
    "MLLM-MSR/train/dataset_create.py",
    "MLLM-MSR/test/multi_col_dataset.py",
)
SCORE = "MLLM-MSR/test/test_with_llava_sft.py"
SUMMARIES, PREFERENCES = "image_summaries.jsonl", "user_preferences.jsonl"


class Run:
    """A run of stages 1 to 4 on data of one's own, in a folder."""

    def __init__(self, folder, small_run):
        self.folder, self.raw, self.small_run = folder, folder.parent / "raw", small_run
        folder.mkdir(exist_ok=True)
        config = yaml.safe_load(small_run.config.read_text())
        config["common"] = {"data_dir": str(folder / "data"), "output_dir": str(folder)}
        config["common"]["image_roots"] = [str(self.raw)]
        config["data"] = {"user_core": 2, "item_core": 1, "raw_dir": str(self.raw)}
        (folder / "own.yaml").write_text(yaml.safe_dump(config | {"dataset": "split"}))

    def write_raw(self):
        """The small world as interactions.csv, catalogue.jsonl and covers."""
        data, self.log = self.small_run.folder, []
        shutil.copytree(data / "covers", self.raw / "covers")
        self.items = read_rows(data / "items.jsonl")
        for user in read_rows(data / "users.jsonl")[:20]:
            for time, item in enumerate([*user["history"], user["target"]]):
                self.log.append((user["user_id"], item, time))
        self.write()

    def write(self):
        write_unchecked(self.raw / "catalogue.jsonl", self.items)
        lines = ["user,item,timestamp", *(",".join(map(str, line)) for line in self.log)]
        (self.raw / "interactions.csv").write_text("\n".join(lines) + "\n")

    def run(self, *options, stages=STAGES):
        for stage in stages:
            words = ["--config", str(self.folder / "own.yaml")]
            given = options if stage == "data_processing/split.py" else ()
            self.small_run.run(stage, *words, *given)

    def records(self):
        """The run records of summaries and preferences."""
        return [read_record(self.folder / "mllm_msr" / name) for name in (SUMMARIES, PREFERENCES)]

    def written(self, before):
        """How many summaries and preferences were written since."""
        pairs = zip(before, self.records(), strict=True)
        return [0 if now == old else now["rows"]["written_by_this_run"] for old, now in pairs]

    def outputs(self):
        """Path -> bytes of what the stages wrote, but for records."""
        files = [p for p in self.folder.rglob("*.jsonl") if not p.match("*.unused.jsonl")]
        return {p.relative_to(self.folder): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_run):
    """The folder of a finished run and its raw data."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run(folder / "run", small_run)
    run.write_raw()
    run.run()
    return run


@pytest.fixture
def run(finished, tmp_path, small_run):
    """A copy of a finished run."""
    shutil.copytree(finished.folder.parent, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path / "run", small_run)
    run.items, run.log = read_rows(run.raw / "catalogue.jsonl"), list(finished.log)
    return run


def new_item(run):
    Image.new("RGB", (48, 64), "red").save(run.raw / "covers" / "new.png")
    run.items.append({"item_id": "new", "title": "music: new song", "image": "covers/new.png"})
    run.log.append((run.log[0][0], "new", 5.5))


def another_title(run):
    run.items[3]["title"] = "music: another song"


def another_cover(run):
    Image.new("RGB", (48, 64), "blue").save(run.raw / run.items[3]["image"])


def cover_saved_again(run):
    """Other bytes of the same pixels: the summary has the same text."""
    path = run.raw / run.items[3]["image"]
    Image.open(path).save(path, compress_level=1)


# Name -> change of the raw data, options of stage 1, how many summaries are written again.
CHANGES = {
    "new item": (new_item, (), 1),
    "title": (another_title, (), 0),
    "cover": (another_cover, (), 1),
    "cover saved again": (cover_saved_again, (), 1),
    "seed": (lambda run: None, ("--seed", "7"), 0),
    "negatives": (lambda run: None, ("--negatives", "30"), 0),
    "split": (lambda run: None, ("--train_fraction", "0.6"), 0),
}


SLOW = ("seed", "split")


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CHANGES]
)
def test_only_lines_whose_inputs_changed_are_computed_again(run, tmp_path, small_run, change):
    apply, options, n_summaries = CHANGES[change]
    before = run.records()
    apply(run)
    run.write()
    run.run(*options)
    # The preferences of the users who have the item, whose summary or title is another one.
    item = {"new item": "new", "title": run.items[3]["item_id"], "cover": run.items[3]["item_id"]}
    users = read_rows(run.folder / "data/users.jsonl")
    n_preferences = sum(item.get(change) in user["history"] for user in users)
    assert run.written(before) == [n_summaries, n_preferences]
    fresh = Run(tmp_path / "fresh", small_run)
    fresh.run(*options)
    assert run.outputs() == fresh.outputs()


def test_summaries_of_other_covers_are_refused(run):
    another_cover(run)
    run.write()
    message = (
        r"image_summaries.jsonl, line \d+ .*made from another image or title than .*items.jsonl"
    )
    for stage in STAGES[2:4]:
        with pytest.raises(InputError, match=message):
            run.run(stages=[stage])


def test_a_fused_summary_is_made_from_the_title_too(tmp_path):
    stage = load_script(STAGES[1])
    items = [{"item_id": "i", "title": title, "image": None} for title in ("old", "new")]
    write_unchecked(tmp_path / "items.jsonl", items[:1])
    found = {}
    for kind in ("fused", "image"):
        options = stage.Options(data_dir=str(tmp_path), summary=kind)
        job = Job.of(options, {})
        found[kind] = [stage.summary_sources({"i": item}, {}, job, options)["i"] for item in items]
        path, line = tmp_path / "image_summaries.jsonl", {"item_id": "i", "summary": "s"}
        write_unchecked(path, [line | {"source": found[kind][0]}])
        assert read_summaries(path, {"i": items[0]}, tmp_path / "items.jsonl", "i") == {"i": "s"}
        if kind == "fused":
            with pytest.raises(InputError, match="another image or title"):
                read_summaries(path, {"i": items[1]}, tmp_path / "items.jsonl", "i")
    assert found["fused"][0] != found["fused"][1] and found["image"][0] == found["image"][1]


TRAIN = "MLLM-MSR/train/train_llava_sft.py"
EDITS = {
    "summary": (SUMMARIES, {"summary": "Another."}, STAGES[2], STAGES[3]),
    "preference": (PREFERENCES, {"preference": "Another."}, STAGES[3], TRAIN),
    "label": ("train.jsonl", {"label": 0}, TRAIN, TRAIN),
}
MESSAGES = {
    "summary": r"preferences.jsonl, line \d+ .*made from other titles or summaries than .*items",
    "preference": "train.jsonl, line 1: .*has another preference than in .*preferences.jsonl",
    "label": "train.jsonl, line 1: .*with the label 0 is no candidate of a train user in .*users",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_line_is_refused_where_it_is_read(run, edit):
    """Also without the record, where lines that were made from it are compared."""
    name, changed, reader, later = EDITS[edit]
    path = run.folder / "mllm_msr" / name
    rows = read_rows(path)
    if edit == "preference":
        user = read_rows(path.with_name("train.jsonl"))[0]["user_id"]
        rows.sort(key=lambda row: row["user_id"] != user)
    write_unchecked(path, [rows[0] | changed, *rows[1:]])
    with pytest.raises(InputError, match=f"{name} was changed after it was written"):
        run.run(stages=[reader])
    path.with_suffix(".run.json").unlink()
    with pytest.raises(InputError, match=MESSAGES[edit]):
        run.run(stages=[later])
