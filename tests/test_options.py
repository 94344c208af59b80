"""Options: default < `base:` configs < section `common` < the stage's own section < command line.

A mistake is one sentence that names the option.
"""

import re
from typing import Literal

import pytest
from conftest import ROOT
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mllmrec.data.split import SplitOptions
from mllmrec.stage import options as options_module
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import (
    CONFIG_VARIABLE,
    CommonOptions,
    known_sections,
    load_config,
    nearest,
    option,
    parse_options,
)
from mllmrec.stage.scripts import load_script

PREFERENCE = load_script("Inference/preference_recurrent.py")


@dataclass
class Options(CommonOptions):
    rate: float = option(0.1, "100% of it")
    loss: Literal["answer", "sequence"] = option("answer", "what is trained on")
    layers: list[str] = option([], "names")
    deep: bool = option(True, "or not")


def parse(tmp_path, text, *argv, options_class=Options, section="train"):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return parse_options(options_class, section, ["--config", str(path), *argv], "doc")


def error_of(tmp_path, text, *argv, **more):
    """The message of the InputError; it is one sentence."""
    with pytest.raises(InputError) as caught:
        parse(tmp_path, text, *argv, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_configs(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_order_of_sources(tmp_path):
    text = "common: {seed: 1, output_dir: a}\ntrain: {seed: 2, rate: 2e-5}"
    options = parse(tmp_path, text)
    found = (options.seed, options.output_dir, options.rate, options.domain)
    assert found == (2, "a", 2e-5, "video")
    assert parse(tmp_path, text, "--seed", "3").seed == 3


def test_types_come_from_the_dataclass(tmp_path):
    text = "train: {layers: [q_proj, v_proj], deep: false, rate: 1, loss: sequence}"
    options = parse(tmp_path, text)
    found = (options.layers, options.deep, options.rate, options.loss)
    assert found == (["q_proj", "v_proj"], False, 1.0, "sequence")
    assert parse(tmp_path, "train:", "--deep", "false").deep is False


def test_a_section_of_another_stage_is_ignored(tmp_path):
    assert parse(tmp_path, "score: {anything: 1}").seed == 42


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("train: {rat: 1}", [], "unknown option 'rat' in section 'train'; did you mean rate?"),
        ("common: {rate: 1}", [], "unknown option 'rate' in section 'common'"),
        ("common: {config: a}", [], "unknown option 'config' in section 'common'; known are: data"),
        ("trian: {rate: 1}", [], "unknown section 'trian'; did you mean train?"),
        (
            "train: {rate: fast}",
            [],
            "c.yaml: rate (section 'train'): Input should be a valid number",
        ),
        ("train: {rate: fast}", [], "number, not 'fast'; --help lists all options"),
        ("", ["--rate", "fast"], "--rate: Input should be a valid number"),
        (
            "train: {loss: all}",
            [],
            "loss (section 'train'): Input should be 'answer' or 'sequence'",
        ),
        ("", ["--loss", "all"], "--loss: Input should be 'answer' or 'sequence', not 'all'"),
        ("", ["--deep", "perhaps"], "--deep: Input should be a valid boolean"),
        ("", ["--limit", "-1"], "--limit: Input should be greater than or equal to 0, not '-1'"),
        ("", ["--rate"], "argument --rate: expected one argument"),
        ("train: {rate: {a: 1}}", [], "option 'rate' in section 'train' must be one value"),
        ("train: 3", [], "section 'train' must hold"),
        ("- a", [], "must hold one section per stage"),
        ("train: {rate: [}", [], "is not valid YAML"),
        ("", ["--ratee", "1"], "unknown option '--ratee'; did you mean --rate?"),
        ("", ["--rat", "1"], "unknown option '--rat'"),
        ("", ["--config", "nowhere.yaml"], "there is no config nowhere.yaml"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, argv, message):
    assert message in error_of(tmp_path, text, *argv)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("block_size", "0", "greater than or equal to 1, not '0'"),
        ("top_p", "2", "less than or equal to 1, not '2'"),
        ("top_p", "0", "greater than 0, not '0'"),
        ("temperature", "nan", "a finite number, not 'nan'"),
        ("temperature", "-0.5", "greater than or equal to 0, not '-0.5'"),
        ("max_new_tokens", "0", "greater than or equal to 1, not '0'"),
    ],
)
def test_a_value_outside_its_range_is_an_error_that_names_the_option(tmp_path, name, value, reason):
    stage = {"options_class": PREFERENCE.Options, "section": PREFERENCE.SECTION}
    in_yaml = ".nan" if value == "nan" else value
    message = error_of(tmp_path, f"preference: {{{name}: {in_yaml}}}", **stage)
    assert f"c.yaml: {name} (section 'preference'): Input should be {reason}" in message
    message = error_of(tmp_path, "", f"--{name}", value, **stage)
    assert message.startswith(f"--{name}: Input should be {reason}")


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("", ["--overwrit", "true"]),
        ("", ["--overwritee"]),
        ("", ["--over_write", "true"]),
        ("common: {overwrit: true}", []),
        ("train: {overwrites: true}", []),
    ],
)
def test_overwrite_is_never_suggested(tmp_path, text, argv):
    message = error_of(tmp_path, text, *argv)
    assert "unknown option" in message
    assert "did you mean" not in message
    assert nearest("overwrite", ["overwrite"], "--") == "; known are: overwrite"


def test_help_lists_every_option_with_its_choices_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(Options, "train", ["--config", "nowhere.yaml", "--help"], "100% doc")
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("100% doc", "--rate X", "100% of it (default: 0.1)", "{answer, sequence}"):
        assert text in printed


def test_the_default_config_is_microlens_or_that_of_the_environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert parse_options(CommonOptions, "popularity", []).output_dir == "outputs/microlens"
    monkeypatch.setenv(CONFIG_VARIABLE, "configs/sample.yaml")
    assert parse_options(CommonOptions, "popularity", []).output_dir == "outputs/sample"


def test_values_of_a_config_win_over_those_of_its_base(tmp_path):
    write_configs(
        tmp_path,
        base="common: {seed: 1, output_dir: a}\ntrain: {rate: 0.5, loss: sequence}\ndataset: x",
    )
    text = "base: base.yaml\ncommon: {seed: 2}\ntrain: {rate: 0.7}"
    options = parse(tmp_path, text)
    found = (options.seed, options.output_dir, options.rate, options.loss)
    assert found == (2, "a", 0.7, "sequence")
    assert parse(tmp_path, text, "--loss", "answer").loss == "answer"
    assert load_config(tmp_path / "c.yaml")["dataset"] == "x"
    assert "base" not in load_config(tmp_path / "c.yaml")
    empty_section = parse(tmp_path, "base: base.yaml\ncommon: {seed: 2}\ntrain:")
    assert empty_section.rate == 0.5


def test_the_own_section_of_a_base_wins_over_common_of_the_config(tmp_path):
    """Files are merged before sections are read."""
    write_configs(tmp_path, base="train: {seed: 1}")
    assert parse(tmp_path, "base: base.yaml\ncommon: {seed: 2}").seed == 1


def test_of_several_bases_the_later_one_wins_and_bases_have_bases(tmp_path):
    (tmp_path / "systems").mkdir()
    write_configs(tmp_path / "systems", system="base: ../root.yaml\ntrain: {rate: 0.2, seed: 2}")
    write_configs(
        tmp_path,
        root="train: {rate: 0.1, seed: 1, loss: sequence, layers: [q_proj]}",
        data="train: {rate: 0.3, layers: [v_proj, k_proj]}",
    )
    options = parse(tmp_path, "base: [systems/system.yaml, data.yaml]")
    assert (options.rate, options.seed, options.loss) == (0.3, 2, "sequence")
    assert options.layers == ["v_proj", "k_proj"], "a list replaces a list"
    options = parse(tmp_path, "base: [data.yaml, systems/system.yaml]")
    assert (options.rate, options.seed, options.layers) == (0.2, 2, ["q_proj"])


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("base: c.yaml", {}),
        ("base: a.yaml", {"a": "base: b.yaml", "b": "base: c.yaml"}),
        ("base: [a.yaml]", {"a": "base: [b.yaml]", "b": "base: [a.yaml]"}),
        ("base: sub/../c.yaml", {}),
        ("base: sub/a.yaml", {"sub/a": "base: ../c.yaml"}),
    ],
)
def test_a_cycle_of_bases_is_an_error(tmp_path, text, others):
    (tmp_path / "sub").mkdir()
    write_configs(tmp_path, **others)
    assert "leads back to the file itself; remove it" in error_of(tmp_path, text)


@pytest.mark.parametrize("base", ["3", "{a: b}", "[a.yaml, 3]"])
def test_a_base_that_is_no_path_is_an_error(tmp_path, base):
    write_configs(tmp_path, a="train: {rate: 0.1}")
    assert "`base:` must be a path or a list of paths, not" in error_of(tmp_path, f"base: {base}")


def test_one_file_may_be_the_base_of_two_bases(tmp_path):
    write_configs(
        tmp_path,
        root="train: {rate: 0.1}",
        a="base: root.yaml\ntrain: {seed: 1}",
        b="base: root.yaml\ntrain: {loss: sequence}",
    )
    options = parse(tmp_path, "base: [a.yaml, b.yaml]")
    assert (options.rate, options.seed, options.loss) == (0.1, 1, "sequence")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "there is no config"),
        ("trian: {rate: 1}", "base.yaml: unknown section 'trian'; did you mean train?"),
        ("train: {rat: 1}", "unknown option 'rat' in section 'train'; did you mean rate?"),
        ("train: {rate: fast}", "rate (section 'train'): Input should be a valid number"),
        ("- a", "base.yaml must hold one section per stage"),
    ],
)
def test_a_mistake_in_a_base_is_one_sentence(tmp_path, base, message):
    if base is not None:
        write_configs(tmp_path, base=base)
    assert message in error_of(tmp_path, "base: base.yaml")


def test_every_shipped_config_can_be_loaded_and_has_known_sections():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        sections = set(load_config(path)) - {"dataset"}
        assert {"common", "image_summary", "preference", "train", "score"} <= sections, path.name
        assert sections <= set(known_sections())


def test_sections_are_those_of_the_stage_scripts():
    assert set(known_sections()) >= {
        *("common", "data", "download", "image_summary", "preference", "datasets"),
        *("train", "merge", "score", "popularity", "metrics", "report"),
    }
    for script in ("Inference/image_summary.py", "MLLM-MSR/train/train_llava_sft.py"):
        assert load_script(script).SECTION in known_sections()


def stage_options():
    """[(script, its options class)] of all stages."""
    found = []
    for folder in options_module.STAGE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if 'SECTION = "' in path.read_text():
                stage = load_script(path.relative_to(ROOT))
                name = "DatasetOptions" if hasattr(stage, "DatasetOptions") else "Options"
                found.append((path.name, getattr(stage, name, SplitOptions)))
    return found


def test_every_number_has_a_range_and_every_name_stays_in_its_folder():
    """Lower and upper limit of whole numbers; a lower limit of the others, and no infinity."""
    checked = 0
    for script, options_class in stage_options():
        for name, field in options_class.__pydantic_fields__.items():
            limits = set(re.findall(r"(\w+)=", str(field.metadata)))
            if field.annotation in (int, float):
                upper = {"le", "lt"} if field.annotation is int else {"allow_inf_nan"}
                assert limits & {"ge", "gt"}, f"{script}: {name} has no lower limit"
                assert limits & upper, f"{script}: {name} has no upper limit"
                checked += 1
            if name in ("system", "variant", "name", "category"):
                options = {"config": "c", name: "../../escape"}
                with pytest.raises(ValidationError, match="pattern"):
                    TypeAdapter(options_class).validate_python(options)
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1", "10" * 20, "", "1,5"])
def test_no_number_takes_a_value_that_is_none(tmp_path, value):
    """All numeric options of all stages."""
    for script, options_class in stage_options():
        for name, field in options_class.__pydantic_fields__.items():
            if field.annotation not in (int, float):
                continue
            if value == "-1" and name == "workers" and script == "image_summary.py":
                continue  # -1: chosen by the machine
            if value == "10" * 20 and field.annotation is float:
                continue
            with pytest.raises(ValidationError) as caught:
                TypeAdapter(options_class).validate_python({"config": "c", name: value})
            assert caught.value.errors()[0]["loc"] == (name,)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--min_length", "9", "--max_length", "8"], "must rise in this order"),
        (["--n_items", "5"], "must rise in this order"),
        (["--train_fraction", "0.9", "--validation_fraction", "0.1"], "must leave users"),
        (["--folds", "1"], "--folds must be 0 or at least 2"),
        (["--folds", "5", "--test_fold", "5"], "and --test_fold one of them"),
        (["--train_fraction", "1e-9"], "none is in the train split"),
        (
            ["--n_users", "3", "--folds", "5", "--test_fold", "4"],
            "--folds 5 are more than the 3 users",
        ),
        (["--test_fold", "1"], "--test_fold needs --folds"),
    ],
)
def test_combinations_that_cannot_work_are_refused(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(ROOT)
    where = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    words = ["--config", "configs/sample.yaml", "--n_users", "30", *where, *argv]
    with pytest.raises(InputError, match=message):
        load_script("data_processing/sample.py").main(words)
    assert not (tmp_path / "users.run.json").exists()


def test_another_number_of_processes_than_asked_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_MSR_PROCESSES", "2")
    assert "asks for 2 processes and accelerate started 1" in error_of(tmp_path, "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(tmp_path, "").limit == 0


def test_a_new_stage_script_brings_its_section(tmp_path, monkeypatch):
    folder = tmp_path / options_module.STAGE_FOLDERS[-1] / "train"
    folder.mkdir(parents=True)
    (folder / "retrieve.py").write_text('"""SECTION = "no"."""\n\nSECTION = "retrieve"\n')
    monkeypatch.setattr(options_module, "ROOT", tmp_path)
    known_sections.cache_clear()
    try:
        assert known_sections() == ("common", "retrieve")
        text = "retrieve: {rate: 0.3}"
        assert parse(tmp_path, text, section="retrieve").rate == 0.3
        message = error_of(tmp_path, "retreive: {rate: 0.3}", section="retrieve")
        assert "unknown section 'retreive'; did you mean retrieve?" in message
        assert "unknown section 'train'" in error_of(tmp_path, "train: {rate: 0.3}")
    finally:
        known_sections.cache_clear()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {rate: 0.1, rate: 0.2}", "the key 'rate' is there twice"),
        ("train: {rate: 0.1}\ntrain: {rate: 0.2}", "the key 'train' is there twice"),
        ("train: {rate: }", "option 'rate' in section 'train' has no value"),
        ("train: " + "[" * 5000, "is not valid YAML"),
    ],
)
def test_a_config_says_each_thing_once(tmp_path, text, message):
    assert message in error_of(tmp_path, text)
