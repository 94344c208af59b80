"""Options: default < common section < the stage's section < command line, and mistakes that are told at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from data_processing.config import CONFIG_VARIABLE, CommonArgs, parse_args
from data_processing.errors import InputError

ROOT = Path(__file__).parent.parent


@dataclass
class Args(CommonArgs):
    rate: float = field(default=0.1, metadata={"help": "100% of it"})
    loss: Literal["answer", "sequence"] = "answer"
    layers: list[str] = field(default_factory=list)
    deep: bool = True


def parse(tmp_path, text, *argv):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return parse_args(Args, "train", ["--config", str(path), *argv], "doc")


def test_order_of_sources(tmp_path):
    text = "common: {seed: 1, output_dir: a}\ntrain: {seed: 2, rate: 2e-5}"
    args = parse(tmp_path, text)
    assert (args.seed, args.output_dir, args.rate, args.domain) == (2, "a", 2e-5, "video")
    assert parse(tmp_path, text, "--seed", "3").seed == 3


def test_types_come_from_the_dataclass(tmp_path):
    args = parse(
        tmp_path, "train: {layers: [q_proj, v_proj], deep: false, rate: 1, loss: sequence}"
    )
    assert (args.layers, args.deep, args.rate, args.loss) == (
        ["q_proj", "v_proj"],
        False,
        1.0,
        "sequence",
    )
    assert parse(tmp_path, "train:", "--deep", "false").deep is False


def test_a_section_of_another_stage_is_left_alone(tmp_path):
    assert parse(tmp_path, "score: {anything: 1}").seed == 42


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("train: {rat: 1}", [], "unknown option 'rat' in section 'train'; did you mean rate?"),
        ("common: {rate: 1}", [], "unknown option 'rate' in section 'common'"),
        ("trian: {rate: 1}", [], "unknown section 'trian'; did you mean train?"),
        ("train: {rate: fast}", [], "argument --rate: invalid float value: 'fast'"),
        ("train: {loss: all}", [], "argument --loss: invalid choice"),
        ("train: 3", [], "section 'train' must hold"),
        ("- a", [], "must hold one section per stage"),
        ("train: {rate: [}", [], "is not valid YAML"),
        ("", ["--ratee", "1"], "unknown option '--ratee'; did you mean --rate?"),
        ("", ["--rat", "1"], "unknown option '--rat'"),
        ("", ["--config", "nowhere.yaml"], "there is no config nowhere.yaml"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, argv, message):
    with pytest.raises(InputError) as caught:
        parse(tmp_path, text, *argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_config_is_microlens_or_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse_args(CommonArgs, "popularity", []).output_dir == "outputs/microlens"
    monkeypatch.setenv(CONFIG_VARIABLE, "configs/sample.yaml")
    assert parse_args(CommonArgs, "popularity", []).output_dir == "outputs/sample"
