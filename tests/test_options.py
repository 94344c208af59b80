"""Options: default < `base:` configs < section `common` < the stage's own section < command line.

A mistake is one sentence that names the option.
"""

import os
import re
import shlex
import sys
from typing import Literal

import pytest
from conftest import ROOT, options_class
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mllmrec.stage.errors import InputError
from mllmrec.stage.options import (
    CONFIG_VARIABLE,
    PART,
    SECTIONS,
    CommonOptions,
    load_config,
    nearest,
    option,
    parse_options,
    print_next,
    print_options,
)
from mllmrec.stage.scripts import load_script


@dataclass
class Options(CommonOptions):
    rate: float = option(0.1, "100% of it", gt=0, le=1)
    loss: Literal["answer", "sequence"] = option("answer", "what is trained on")
    layers: list[str] = option([], "names")
    deep: bool = option(True, "or not")


def parse(folder, text, *argv):
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_options(Options, "train", ["--config", str(path), *argv], "doc")


def error_of(folder, text, *argv):
    """The message of the InputError; it is one sentence."""
    with pytest.raises(InputError) as caught:
        parse(folder, text, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_configs(folder, **texts):
    (folder / "sub").mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_order_of_sources_and_types_of_the_dataclass(tmp_path):
    text = "common: {seed: 1, output_dir: a}\nscore: {anything: 1}\n"
    text += "train: {seed: 2, rate: 1, layers: [q_proj, v_proj], deep: false}"
    options = parse(tmp_path, text)
    found = (options.seed, options.output_dir, options.domain, options.layers, options.deep)
    assert found == (2, "a", "video", ["q_proj", "v_proj"], False)
    assert isinstance(options.rate, float)
    options = parse(tmp_path, text, "--seed", "3", "--deep", "true")
    assert (options.seed, options.deep) == (3, True)


UNKNOWN = "unknown option"
RATE = "c.yaml: rate (section 'train'): Input should be "
HELP = "; --help lists all options"
NOT_YAML = "c.yaml is not valid YAML: "
IN_CONFIG = {
    "train: {rat: 1}": f"{UNKNOWN} 'rat' in section 'train'; did you mean rate?",
    "common: {rate: 1}": f"{UNKNOWN} 'rate' in section 'common'; known are: data_dir, domain, im",
    "common: {config: a}": f"{UNKNOWN} 'config' in section 'common'; known are: data_dir",
    "common: {5: 1}": f"{UNKNOWN} '5' in section 'common'",
    "trian: {rate: 1}": "c.yaml: unknown section 'trian'; did you mean train?",
    "train: {rate: fast}": f"{RATE}a valid number, unable to parse string as a number, not 'fast'",
    "train: {rate: nan}": f"{RATE}a finite number, not 'nan'{HELP}",
    "train: {loss: all}": "loss (section 'train'): Input should be 'answer' or 'sequence', not",
    "common: {seed: true}": "c.yaml: seed (section 'train'): Input should be a valid integer, ",
    f"common: {{seed: {10**30}}}": "seed (section 'train'): Input should be ",
    f"common: {{seed: {'9' * 6000}}}": "as an integer, exceeded maximum size, not '99999",
    "common: {seed: 1:30}": "seed (section 'train'): Input should be a valid integer",
    "common: {domain: 2020-99-99}": "should be 'video', 'movie' or 'product', not ",
    "common: {system: ~}": "option 'system' in section 'common' has no value",
    "common: {system: ../x}": "system (section 'train'): String should match pattern",
    "train: {rate: {a: 1}}": "option 'rate' in section 'train' must be one value or a list",
    "train: {rate: }": "option 'rate' in section 'train' has no value; write one, or remove the li",
    "train: 3": "c.yaml: section 'train' must hold 'option: value' lines, one per option",
    "- a": "c.yaml must hold one section per stage, each with 'option: value' lines",
    "train: {rate: [}": NOT_YAML,
    "train:\n\trate: 1": NOT_YAML,
    "train: " + "[" * 5000: NOT_YAML,
    "train: !!python/object:os.system {a: 1}": f"{UNKNOWN} 'a' in section 'train'",
    "train: {rate: 0.1, rate: 0.2}": "the key 'rate' is there twice",
    "train: {rate: 0.1}\ntrain: {rate: 0.2}": "the key 'train' is there twice",
    b"common: {data_dir: \xff}": NOT_YAML,
    "base: nowhere.yaml": "nowhere.yaml; the shipped ones are in configs/",
    "base: typo.yaml": "typo.yaml: unknown section 'trian'; did you mean train?",
    "base: fast.yaml": f"{RATE}a valid number",
    "base: list.yaml": "list.yaml must hold one section per stage",
    "base: 3": "3; the shipped ones are in configs/",
    "base: {a: b}": "`base:` must be a path or a list of paths, not {'a': 'b'}",
    "base: [fast.yaml, []]": "`base:` must be a path or a list of paths, not ['fast.yaml', []]",
    "base: pipe.yaml": "pipe.yaml is no file; name a config",
    "base: chain0.yaml": "c.yaml: `base:` leads through more than 10 configs; let it name",
    "base: c.yaml": "`base: c.yaml` leads back to the file itself; remove it",
    "base: sub/../c.yaml": "`base: sub/../c.yaml` leads back to the file itself; remove it",
    "base: [one.yaml]": "`base: c.yaml` leads back to the file itself; remove it",
}


@pytest.mark.parametrize("text", IN_CONFIG)
def test_a_mistake_in_a_config_is_one_sentence(tmp_path, text):
    write_configs(tmp_path, typo="trian: {rate: 1}", fast="train: {rate: fast}", list="- a")
    write_configs(tmp_path, one="base: two.yaml", two="base: c.yaml")
    write_configs(tmp_path, **{f"chain{n}": f"base: chain{n + 1}.yaml" for n in range(20)})
    os.mkfifo(tmp_path / "pipe.yaml")
    message = error_of(tmp_path, text)
    assert IN_CONFIG[text] in message
    assert len(message) < 500, "long values are shortened"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rate fast", "--rate: Input should be a valid number"),
        ("--rate nan", f"--rate: Input should be a finite number, not 'nan'{HELP}"),
        ("--rate 0", f"--rate: Input should be greater than 0, not '0'{HELP}"),
        ("--limit -1", f"--limit: Input should be greater than or equal to 0, not '-1'{HELP}"),
        ("--loss all", "--loss: Input should be 'answer' or 'sequence', not 'all'"),
        ("--deep perhaps", "--deep: Input should be a valid boolean"),
        ("--system a/b", "--system: String should match pattern"),
        ("--output_dir=", "--output_dir: String should have at least 1 character"),
        ("--rate", f"argument --rate: expected one argument{HELP}"),
        ("--ratee 1", f"{UNKNOWN} '--ratee'; did you mean --rate?"),
        ("--rat 1", f"{UNKNOWN} '--rat'; did you mean --rate?"),
        ("more", f"{UNKNOWN} 'more'; "),
        (
            "--config nowhere.yaml",
            "there is no config nowhere.yaml; the shipped ones are",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, words, message):
    assert error_of(tmp_path, "", *words.split()).startswith(message)


@pytest.mark.parametrize("word", ["--overwrit", "--overwritee", "--over_write"])
def test_overwrite_is_never_suggested(tmp_path, word):
    in_config = f"common: {{{word.strip('-')}: true}}"
    for message in (error_of(tmp_path, "", word, "true"), error_of(tmp_path, in_config)):
        assert UNKNOWN in message
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
    base = "common: {seed: 1, output_dir: a}\ntrain: {rate: 0.5, loss: sequence}\ndataset: x"
    write_configs(tmp_path, base=base, own="train: {seed: 3}")
    text = "base: base.yaml\ncommon: {seed: 2}\ntrain: {rate: 0.7}"
    options = parse(tmp_path, text)
    found = (options.seed, options.output_dir, options.rate, options.loss)
    assert found == (2, "a", 0.7, "sequence")
    assert parse(tmp_path, text, "--loss", "answer").loss == "answer"
    assert load_config(tmp_path / "c.yaml")["dataset"] == "x"
    assert "base" not in load_config(tmp_path / "c.yaml")
    assert parse(tmp_path, "base: base.yaml\ntrain:").rate == 0.5, "an empty section"
    # Files are merged before sections are read.
    assert parse(tmp_path, "base: own.yaml\ncommon: {seed: 2}").seed == 3


def test_of_several_bases_the_later_one_wins_and_bases_have_bases(tmp_path):
    """Two bases may have one base."""
    (tmp_path / "sub").mkdir()
    write_configs(tmp_path / "sub", system="base: ../root.yaml\ntrain: {rate: 0.2, seed: 2}")
    root = "train: {rate: 0.1, seed: 1, loss: sequence, layers: [q_proj]}"
    data = "base: root.yaml\ntrain: {rate: 0.3, layers: [v_proj, k_proj]}"
    write_configs(tmp_path, root=root, data=data)
    options = parse(tmp_path, "base: [data.yaml, sub/system.yaml]")
    assert (options.rate, options.seed, options.loss) == (0.2, 2, "sequence")
    options = parse(tmp_path, "base: [sub/system.yaml, data.yaml]")
    assert (options.rate, options.layers) == (0.3, ["v_proj", "k_proj"]), "a list replaces a list"


def test_a_value_of_a_config_is_what_is_written(tmp_path):
    """YAML has other words for False, and takes 010 for 8 and 1.10 for 1.1."""
    text = "common: {system: no, seed: 010, data_dir: 1.10}\ntrain: {deep: off, layers: [yes, 1_0]}"
    options = parse(tmp_path, text)
    found = (options.system, options.seed, options.data_dir, options.deep, options.layers)
    assert found == ("no", 10, "1.10", False, ["yes", "1_0"])


def test_every_shipped_config_can_be_loaded_and_has_known_sections():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        sections = set(load_config(path)) - {"dataset"}
        assert {"common", "image_summary", "preference", "train", "score"} <= sections, path.name
        assert sections <= set(SECTIONS)


STAGE_FOLDERS = ("data_processing", "Inference", "MLLM-MSR", "MLLM4Rec")


def stages():
    """The scripts of all stages, loaded."""
    paths = [path for folder in STAGE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    scripts = [path for path in paths if '\nSECTION = "' in path.read_text()]
    return [load_script(path.relative_to(ROOT)) for path in scripts]


def test_the_sections_are_those_of_the_stage_scripts():
    assert {"common", *(stage.SECTION for stage in stages())} == set(SECTIONS)


def stage_options():
    """[(script, its options class)] of all stages."""
    return [(stage.__name__, options_class(stage)) for stage in stages()]


def test_every_number_has_a_range_and_every_name_stays_in_its_folder():
    """Lower and upper limit of whole numbers; a lower limit of the others, and no infinity."""
    checked = 0
    for script, kind in stage_options():
        for name, field in kind.__pydantic_fields__.items():
            limits = set(re.findall(r"(\w+)=", str(field.metadata)))
            if field.annotation in (int, float):
                upper = {"le", "lt"} if field.annotation is int else {"allow_inf_nan"}
                assert limits & {"ge", "gt"}, f"{script}: {name} has no lower limit"
                assert limits & upper, f"{script}: {name} has no upper limit"
                checked += 1
            if name in ("system", "variant", "name", "category"):
                options = {"config": "c", name: "../../escape"}
                with pytest.raises(ValidationError, match="pattern"):
                    TypeAdapter(kind).validate_python(options)
                checked += 1
    assert checked > 100


COMBINATIONS = {
    "--min_length 9 --max_length 8": "must rise in this order",
    "--train_fraction 0.9 --validation_fraction 0.1": "must leave users",
    "--folds 5 --test_fold 5": "--folds must be 0 or at least 2, and --test_fold one of them",
    "--train_fraction 1e-9": "none is in the train split",
    "--n_users 3 --folds 5 --test_fold 4": "--folds 5 are more than the 3 users",
    "--test_fold 1": "--test_fold needs --folds",
}


@pytest.mark.parametrize("words", COMBINATIONS)
def test_combinations_that_cannot_work_are_refused(tmp_path, monkeypatch, words):
    monkeypatch.chdir(ROOT)
    argv = ["--config", "configs/sample.yaml", "--data_dir", str(tmp_path), "--n_users", "30"]
    argv += ["--output_dir", str(tmp_path), *words.split()]
    with pytest.raises(InputError, match=COMBINATIONS[words]):
        load_script("data_processing/sample.py").main(argv)
    assert not (tmp_path / "users.run.json").exists()


def test_another_number_of_processes_than_asked_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_MSR_PROCESSES", "2")
    assert "asks for 2 processes and accelerate started 1; add --multi" in error_of(tmp_path, "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(tmp_path, "").limit == 0


@pytest.mark.parametrize(("size", "rank"), [("abc", "0"), ("", "0"), ("2", "x"), ("2", "2")])
def test_a_number_of_processes_that_is_none_is_refused(tmp_path, monkeypatch, size, rank):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    message = f"WORLD_SIZE={size} and RANK={rank} are no number of processes"
    assert message in error_of(tmp_path, "")


def test_the_heading_names_what_was_given_and_what_is_no_default(tmp_path, capsys):
    """On stderr, with the other messages; also a given value that equals the default."""
    text = "common: {seed: 1, domain: video}\ntrain: {rate: 0.5}"
    options = parse(tmp_path, text, "--rate", "0.1", "--layers=q", "--output_dir", "o")
    print_options(options, "stage 5")
    values = "output_dir=o seed=1 rate=0.1 layers=q"
    assert capsys.readouterr() == ("", f"stage 5 (config {tmp_path}/c.yaml; {values})\n")


def test_the_next_command_has_the_options_that_it_needs_too(tmp_path, capsys, monkeypatch):
    words = ["--data_dir", "a b", "--rate", "0.1", "--output_dir=o", "--system", "s"]
    options = parse(tmp_path, "", *words)
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    for script in ("scripts/07_report.sh", "MLLM-MSR/test/report.py"):
        print_next(script, options.config, options.words)
    for name, value in ((PART, "true"), ("RANK", "1")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            print_next("scripts/07_report.sh", options.config, options.words)
    out, err = capsys.readouterr()
    given = ["--data_dir", "a b", "--output_dir", "o", "--system", "s"]
    python = [".venv/bin/python", "MLLM-MSR/test/report.py", "--config", options.config]
    assert out == "" and [shlex.split(line) for line in err.splitlines()] == [
        ["next:", "bash", "scripts/07_report.sh", options.config, *given],
        ["next:", *python, *given],
    ]
