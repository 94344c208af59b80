"""What is uploaded to the hub: weights and card, on demand derived files, never raw data."""

import inspect
import json
import warnings

import pytest

from mllmrec.stage.errors import InputError
from mllmrec.stage.options import parse_options
from mllmrec.stage.scripts import load_script

script = load_script("MLLM-MSR/train/push_to_hub.py")


class Hub:
    """Keeps what it is asked to do."""

    def __init__(self):
        self.repositories, self.files = {}, {}

    def create_repo(self, repo_id, repo_type="model", private=False, exist_ok=False):
        self.repositories[repo_id] = (repo_type, private)

    def upload_folder(self, repo_id, folder_path, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        names = sorted(p.name for p in script.Path(folder_path).iterdir() if p.is_file())
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            self.files[repo_id, name] = None

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id, repo_type="model"):
        self.files[repo_id, path_in_repo] = path_or_fileobj


def test_the_hub_has_these_functions_and_parameters():
    from huggingface_hub import HfApi

    for name in ("create_repo", "upload_folder", "upload_file"):
        own = set(inspect.signature(getattr(Hub, name)).parameters)
        assert own <= set(inspect.signature(getattr(HfApi, name)).parameters)


def options(small_run, *words):
    folders = ["--data_dir", str(small_run.folder), "--output_dir", str(small_run.folder)]
    config = ["--config", str(small_run.config)]
    return parse_options(script.Options, script.SECTION, [*config, *folders, *words])


def test_weights_and_card_are_uploaded_and_derived_files_on_demand(small_run):
    hub, adapter = Hub(), small_run.system / "adapter"
    script.upload(adapter, options(small_run, "--repo_id", "me/model"), hub)
    assert hub.repositories == {"me/model": ("model", True)}
    names = {name for _, name in hub.files}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert "run.json" not in names and not any(name.endswith(".jsonl") for name in names)
    text = hub.files["me/model", "README.md"].decode()
    metrics = json.loads((small_run.folder / "metrics.json").read_text())
    assert f"{100 * metrics['sft']['auc']:.2f}" in text, "the test metrics"
    words = ("--repo_id", "me/model", "--derived", "true", "--derived_repo_id", "me/texts")
    script.upload(adapter, options(small_run, *words), hub)
    derived = {name for repository, name in hub.files if repository == "me/texts"}
    assert derived == {"image_summaries.jsonl", "user_preferences.jsonl"}
    assert hub.repositories["me/texts"] == ("dataset", True)


def test_what_is_missing_is_named(small_run, tmp_path):
    folders = ["--data_dir", str(small_run.folder), "--output_dir", str(small_run.folder)]
    with pytest.raises(InputError, match="--repo_id is missing"):
        script.main(folders)
    with pytest.raises(InputError, match="--derived_repo_id is missing"):
        script.main([*folders, "--repo_id", "me/model", "--derived", "true"])
    with pytest.raises(InputError, match="has no run record"):
        script.main([*folders, "--repo_id", "me/model", "--folder", str(tmp_path)])


def test_the_card_of_an_adapter_is_filled(small_run):
    text = (small_run.system / "adapter" / "README.md").read_text()
    record = json.loads((small_run.system / "adapter" / "run.json").read_text())
    assert "pipeline_tag: image-text-to-text" in text and "library_name: peft" in text
    for value in (record["git_commit"], record["date"], record["dtype"]):
        assert str(value) in text
    assert "Will this {person}" in text, "the question"
    assert "AutoModelForImageTextToText.from_pretrained" in text
    assert "[More Information Needed]" not in text, "PEFT's blank card"
    base = json.loads((small_run.system / "adapter" / "adapter_config.json").read_text())
    assert script.Path(base["base_model_name_or_path"]).is_absolute()
    assert isinstance(base["target_modules"], list)
    assert base["target_modules"] == sorted(base["target_modules"])
    assert all("." not in name for name in base["target_modules"]), "names, as SGLang wants them"


def test_the_adapter_loads_in_plain_peft_from_another_folder(small_run, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    adapter = small_run.system / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that do not fit
        model = AutoModelForImageTextToText.from_pretrained(base)
        model = PeftModel.from_pretrained(model, str(adapter))
    names = [name for name, value in model.named_parameters() if "lora_B" in name and value.any()]
    assert len(names) == 21, "seven layers of three blocks, trained"
    assert not any("vision" in name for name in names)
