"""Exports: TRL's first loss is ours, and the others' forms have what their loaders ask for."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_scoring import data  # noqa: F401  (fixture)

from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal
from mllmrec.models.lora import add_lora
from mllmrec.models.model_options import LoraOptions
from mllmrec.prompts.templates import assistant_turn
from mllmrec.ranking.batches import Collator
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.rows import YES_NO_ANSWERS, question_text
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def exported(data, tmp_path):  # noqa: F811
    """Function (format, options) -> (rows of train.jsonl, lines of the export, its folder)."""
    folder, rows = data
    system = tmp_path / "mllm_msr"
    system.mkdir()
    rows = [
        {
            **row,
            "images": [str(folder / row["images"][0])],
            "messages": [*row["messages"], assistant_turn(YES_NO_ANSWERS[row["label"]])],
        }
        for row in rows[:8]
    ]
    for split in ("train", "validation"):
        write_rows(system / f"{split}.jsonl", rows)

    def export(kind, *options):
        config = str(ROOT / "configs/sample.yaml")
        words = ["--config", config, "--output_dir", str(tmp_path), "--data_dir", str(folder)]
        script = load_script("MLLM-MSR/train/export_dataset.py")
        script.main([*words, "--image_roots", str(folder), "--format", kind, *options])
        out = system / "export" / kind
        lines = (out / "mllmrec_train.jsonl").read_text().splitlines()
        return read_rows(system / "train.jsonl"), [json.loads(line) for line in lines], out

    return export


def test_trl_trains_from_the_export_and_its_first_loss_is_ours(exported, tmp_path):
    from datasets import Image, List, load_dataset
    from trl import SFTConfig, SFTTrainer

    rows, _, out = exported("trl")
    llava, processor = load_multimodal(str(TINY / "llava"))
    model = add_lora(llava, LoraOptions(lora_dropout=0.0))
    reader = RowReader(ChatProcessor(processor), tmp_path / "mllm_msr", 512)
    batch = Collator(reader, "answer")(rows[:4])
    batch.pop("row_names")
    ours = model(**batch).loss.item()
    files = str(out / "mllmrec_train.jsonl")
    dataset = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        max_length=None,
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=dataset.cast_column("images", List(Image())),
        processing_class=processor,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(ours, abs=1e-4)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("kind", ["llamafactory", "swift"])
def test_messages_are_strings_with_one_mark_per_image(exported, kind):
    rows, lines, out = exported(kind)
    for row, line in zip(rows, lines, strict=True):
        user, assistant = line["messages"]
        assert user == {"role": "user", "content": f"<image>{question_text(row)}"}
        assert assistant == {"role": "assistant", "content": YES_NO_ANSWERS[row["label"]]}
        assert line["images"] == row["images"]
        assert user["content"].count("<image>") == len(line["images"]) == 1
    if kind == "llamafactory":
        info = json.loads((out / "dataset_info.json").read_text())
        for entry in info.values():
            assert (out / entry["file_name"]).exists()
            assert set(entry["columns"].values()) == set(lines[0])
            assert entry["tags"]["user_tag"] == lines[0]["messages"][0]["role"]


def test_the_export_has_the_preferences_that_stage_5_trains_on(exported):
    rows, lines, _ = exported("swift", "--max_text_tokens", "72")
    long = max(rows, key=lambda row: len(question_text(row)))
    text = lines[rows.index(long)]["messages"][0]["content"].removeprefix("<image>")
    assert len(text) < len(question_text(long))
    start = long["preference_span"][0]
    assert text[:start] == question_text(long)[:start], "only the preference is shorter"
    assert text.endswith("Answer with yes or no only.")


def test_the_card_and_the_config_of_an_adapter_tell_others_what_it_is(small_run):
    adapter = small_run.system / "adapter"
    card, record = (adapter / "README.md").read_text(), read_record(adapter)
    for value in ("pipeline_tag: image-text-to-text", "library_name: peft", "Will this {person}"):
        assert value in card
    for value in (record["git_commit"], record["date"], record["command"], "30 training rows"):
        assert str(value) in card
    assert "[More Information Needed]" not in card, "PEFT's blank card"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    names = config["target_modules"]
    assert names == sorted(names) and all("." not in name for name in names), "as SGLang wants them"
