"""configs/*_released.yaml say what the facts say, value by value."""

import pytest
import yaml
from conftest import ROOT, STAGES, options_class
from safetensors.numpy import load_file

from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import load_config, parse_options
from mllmrec.stage.scripts import load_script

SECTIONS = {
    "data": "data_processing/microlens.py",
    "image_summary": "Inference/image_summary.py",
    "preference": "Inference/preference_recurrent.py",
    "train": "MLLM-MSR/train/train_llava_sft.py",
    "score": "MLLM-MSR/test/test_with_llava_sft.py",
}
# What is known of the released code (docs/fidelity.md).
FACTS = {
    "data": {
        "user_core": 6,
        "item_core": 5,
        "history": "released",
        "released_order": "time",
        "split_by": "released",
        "seed": 42,
        "negatives": 20,
        "train_negatives": 1,
        "negative_sampling": "uniform",
    },
    "image_summary": {
        "model": "llava-hf/llava-v1.6-mistral-7b-hf",
        "summary": "image",
        "max_new_tokens": 200,
        "pad_images": 8,
        "prompt_format": "[INST] {image}\n{text} [/INST]",
        "dtype": "float16",
    },
    "preference": {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "block_size": 3,
        "max_new_tokens": 1024,
        "temperature": 0.6,
        "top_p": 0.9,
    },
    "train": {
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_layers": [],
        "lora_vision": True,
        "lora_init": "gaussian",
        "learning_rate": 2e-5,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.01,
        "clip": 1.0,
        "dtype": "float16",
        "batch_size": 1,
        "accumulation": 4 * 6,
        "epochs": 4,
        "max_text_tokens": 1024,
        "loss": "sequence",
        "limit": 25000,
        "keep": "last",
        "end_token": False,
        "prompt_format": "[INST] {image}\n{text} [\\INST]",
        "group_by": "none",
        "image_tiles": "full",
        "quantization": "none",
    },
    "score": {
        "limit": 100,
        "pad_images": 6,
        "answer_token": "bare",
        "prompt_format": "[INST]{image}\n{text} [/INST]",
        "dtype": "float16",
        "max_text_tokens": 1024,
    },
}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_released_config_has_the_values_of_the_facts(section, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage = load_script(SECTIONS[section])
    config = ["--config", "configs/microlens_released.yaml"]
    options = parse_options(options_class(stage), section, config)
    found = {name: getattr(options, name) for name in FACTS[section]}
    assert found == FACTS[section]


@pytest.mark.parametrize("category", ["games", "baby"])
def test_amazons_released_lists_train_one_to_one_on_described_titles(category, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ["--config", f"configs/amazon_{category}_released.yaml"]
    lists = load_script("data_processing/released_lists.py")
    assert parse_options(lists.Options, "data", config).item_text == "described"
    create = load_script("MLLM-MSR/train/dataset_create.py")
    assert parse_options(create.DatasetOptions, "datasets", config).train_negatives == 1


RETRIEVER, RANKER = "MLLM4Rec/train_retriever.py", "MLLM4Rec/train_ranker.py"
# MLLM4Rec's paper (P4) and released code (C4): stage -> option -> (paper, released code).
MLLM4REC = {
    "Inference/image_summary.py": {
        "model": ("Salesforce/blip2-opt-2.7b",) * 2,
        "image_prompt": ("",) * 2,
        "dtype": ("auto", "float16"),
        "max_new_tokens": (32, 20),
    },
    RETRIEVER: {
        "retriever": ("lrurec",) * 2,
        "retrieved": (20, 20),
        "learning_rate": (1e-3, 1e-3),
        "epochs": (500, 500),
        "patience": (20, 20),
        "weight_decay": (0.01, 0.01),
        "clip": (0.0, 5.0),
        "init": ("truncated_normal",) * 2,  # C; the paper does not say
        "decay_norms": (True, False),
        "padding_class": (False, True),
        "first_item": (False, True),
        "long_lists": ("windows", "last"),
        "dropout_first": (False, True),
        "select_with_history": (False, True),
    },
    RANKER: {
        "model": ("meta-llama/Llama-2-7b-hf",) * 2,
        "quantization": ("nf4", "nf4"),
        "train_rows": ("prefixes", "prefixes"),
        "candidates": (20, 20),
        "candidate_order": ("retriever", "retriever"),
        "max_history": (20, 25),
        "text_tokens": (32, 32),
        "max_text_tokens": (1536, 1536),
        "lora_r": (8, 8),
        "lora_alpha": (32, 32),
        "lora_dropout": (0.05, 0.05),
        "lora_layers": (["q_proj", "v_proj"],) * 2,
        "learning_rate": (1e-4, 1e-4),
        "epochs": (1, 100),
        "validation_steps": (100, 1),
        "patience": (0, 10),
        "warmup_steps": (0, 100),
        "answer_token": ("rendered", "alone"),
        "prompt_format": ("{text}", "{text}\n"),
        "end_token": (True, True),
    },
}
# Of one data set: (micro-batch of the ranker, length and batch of the retriever).
OF_DATASET = {
    "beauty": ((6, 6), (50, 50), (64, 64)),
    "toys": ((2, 2), (50, 50), (64, 64)),
    "games": ((2, 2), (50, 50), (64, 64)),
    "ml-100k": ((3, 2), (200, 200), (16, 16)),  # the paper's length is 50
}


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("code", OF_DATASET)
def test_mllm4rec_has_the_values_of_its_paper_and_of_its_released_code(code, column, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ["--config", f"configs/mllm4rec/{code}{'_released' * column}.yaml"]
    batch, length, retriever_batch = OF_DATASET[code]
    own = {RANKER: {"batch_size": batch}}
    own[RETRIEVER] = {"max_length": length, "batch_size": retriever_batch}
    if code != "ml-100k" or column:
        own[RETRIEVER]["validation_steps"] = (500, 500)
    for path, facts in MLLM4REC.items():
        stage = load_script(path)
        options = parse_options(options_class(stage), stage.SECTION, config)
        facts = {name: values[column] for name, values in (facts | own.get(path, {})).items()}
        assert {name: getattr(options, name) for name in facts} == facts
        if path == RANKER:
            assert (options.accumulation == 1) == bool(column)
        if path in (RANKER, RETRIEVER):
            assert options.dataset_code == code, "which chooses the role"
    loader = "movielens" if code == "ml-100k" else "amazon_2014"
    stage = load_script(f"data_processing/{loader}.py")
    options = parse_options(stage.Options, "data", config)
    assert (options.user_core, options.item_core, options.split_by) == (5, 5, "leave_one_out")
    assert options.require_image == (code == "games")
    if code == "ml-100k":
        assert options.titles == ("published", "natural")[column]
    else:
        assert options.pages == ("2018" if code == "games" else "2014")


def test_the_released_prompts_have_the_released_places_in_the_released_order(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ["--config", "configs/microlens_released.yaml"]
    stage = load_script(SECTIONS["preference"])
    options = parse_options(stage.Options, "preference", config)
    places = ("{item_id}", "{title}", "{summary}")
    assert sorted(places, key=options.block_line.index) == list(places)
    assert "{user_id}" in options.first_prompt
    places = ("{user_id}", "{block}", "{preference}")
    assert sorted(places, key=options.next_prompt.index) == list(places)
    create = load_script("MLLM-MSR/train/dataset_create.py")
    datasets = parse_options(create.DatasetOptions, "datasets", config)
    places = ("{preference}", "{title}", "Answer")
    assert sorted(places, key=datasets.recommend_prompt.index) == list(places)
    assert datasets.max_title_characters == 0


@pytest.mark.slow
def test_the_released_settings_run_through_all_stages(small_run, tmp_path, monkeypatch):
    """On the sample with tiny models: as the config says, but for models, dtype and sizes."""
    monkeypatch.chdir(ROOT)
    merged = load_config(ROOT / "configs/microlens_released.yaml")
    sample = load_config(small_run.config)
    for section in ("image_summary", "preference", "train", "score"):
        merged[section] |= {"model": sample[section]["model"], "dtype": "float32"}
    for section in ("image_summary", "preference"):
        merged[section]["max_new_tokens"] = 20
    merged["train"] |= {"epochs": 1, "accumulation": 4, "workers": 0, "limit": 40}
    merged["score"] |= {"limit": 2}
    merged["data"] |= {"n_users": 40, "n_items": 60, "user_core": 2, "item_core": 1}
    folder = {"data_dir": str(tmp_path), "output_dir": str(tmp_path)}
    merged["common"] |= folder
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(merged | {"dataset": "sample"}))
    for stage in STAGES[:7]:
        more = ["--hide", "nothing"] if "test_with" in stage else []
        load_script(stage).main(["--config", str(tmp_path / "c.yaml"), *more])
    users = read_rows(tmp_path / "users.jsonl")
    assert all(len(user["history"]) == 5 for user in users)
    tested = [user["user_id"] for user in users if user["split"] == "test"][:2]
    scores = read_rows(tmp_path / "mllm_msr" / "sft" / "scores.jsonl")
    assert list(dict.fromkeys(row["user_id"] for row in scores)) == tested, "the first two"
    adapter = tmp_path / "mllm_msr" / "adapter"
    assert any("vision_tower" in name for name in load_file(adapter / "adapter_model.safetensors"))
    log = read_rows(tmp_path / "mllm_msr" / "training_log.jsonl")
    assert len({row["learning_rate"] for row in log if "learning_rate" in row}) == 1
