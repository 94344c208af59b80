"""What the README and the configs say is true: paths exist, commands and configs parse."""

import re
import subprocess

import pytest
import yaml
from conftest import ROOT, script

from data_processing.config import SECTIONS, parse_args

README = (ROOT / "README.md").read_text()
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
STAGE_OF = {
    "image_summary": "Inference/image_summary.py",
    "preference": "Inference/preference_recurrent.py",
    "train": "MLLM-MSR/train/train_llava_sft.py",
    "score": "MLLM-MSR/test/test_with_llava_sft.py",
    "metrics": "MLLM-MSR/test/compute_metrics.py",
    "report": "MLLM-MSR/test/report.py",
}


def tracked():
    """Files of the repository, as git knows them or, in an archive, as they lie there."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return (
        done.stdout.split()
        if done.returncode == 0
        else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    )


def test_every_path_in_the_readme_exists():
    text = README + "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    named = set(
        re.findall(
            r"\b((?:scripts|configs|data_processing|Inference|MLLM-MSR|tests|docs)/[\w./-]+\.(?:sh|py|yaml|md))",
            text,
        )
    )
    named |= {line.split()[1] for line in re.findall(r"^ +(?:bash|python) \S+", README, re.M)}
    named = {name for name in named if "$" not in name and "*" not in name}
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_file_of_the_tree_is_where_the_tree_says():
    tree = README.split("## What is where")[1].split("## ")[0]
    folder, missing = "", []
    for line in tree.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split("  ")
        names = [
            name.strip(",")
            for name in line.split()
            if re.fullmatch(r"[\w./-]+(\.(py|sh|yaml|md)|/),?", name)
        ]
        if indent == 4 and names and names[0].endswith("/"):
            folder, names = names[0], names[:1]
            missing += [folder] if not (ROOT / folder).is_dir() else []
        elif indent == 6 and words:
            inner = names[0] if names and names[0].endswith("/") else ""
            missing += [
                f"{folder}{inner}{n}"
                for n in names[bool(inner) :]
                if not (ROOT / folder / inner / n).exists()
            ]
            missing += (
                [f"{folder}{inner}"] if inner and not (ROOT / folder / inner).is_dir() else []
            )
    assert missing == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_in_every_stage(name):
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert set(config) <= {"dataset", *SECTIONS}
    for section, path in {**STAGE_OF, "data": f"data_processing/{config['dataset']}.py"}.items():
        stage = script(path)
        args = parse_args(
            getattr(stage, "Args", None) or stage.SplitArgs,
            section,
            ["--config", str(ROOT / "configs" / name)],
        )
        for key, value in (config.get(section) or {}).items():
            assert getattr(args, key) == value, f"{section}.{key}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_opens_with_what_a_reader_needs(name):
    head = (ROOT / "configs" / name).read_text().split("\ndataset:")[0]
    for word in ("Prerequisites:", "Command:", "Hardware:", "Numbers:"):
        assert word in head


def test_no_absolute_path_token_or_large_file_is_in_the_repository():
    forbidden = re.compile(
        r"(?<![\w.])/(?:home|root|work|mnt|data|Users)/|hf_[A-Za-z0-9]{20,}|cuda:\d|CUDA_VISIBLE_DEVICES=\d"
    )
    found = []
    for name in tracked():
        path = ROOT / name
        if not path.is_file() or name == ".gitignore":  # there a slash anchors a pattern
            continue
        if path.suffix == ".safetensors":
            assert name.startswith("Inference/tiny_models/")
            assert path.stat().st_size < 3_000_000
            continue
        assert path.stat().st_size < 1_000_000, name
        found += [
            f"{name}: {line}"
            for line in path.read_text(errors="replace").splitlines()
            if forbidden.search(line)
        ]
    assert [line for line in found if not line.startswith("tests/test_readme.py")] == []


def test_every_dependency_is_pinned_and_used():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[-1] == "-e ."
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines[:-1])
    code = "".join((ROOT / name).read_text() for name in tracked() if name.endswith(".py"))
    imported_as = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
    indirectly = {
        "psutil",
        "tensorboard",
    }  # by transformers: continuous batching on a CPU, --tensorboard
    for line in lines[:-1]:
        name = line.split("==")[0]
        module = imported_as.get(name, name)
        assert name in indirectly or re.search(rf"^\s*(import|from) {module}\b", code, re.M), name


def test_no_layer_imports_a_layer_above_it():
    below = {"data_processing": ("Inference", "torch", "peft"), "Inference": ("MLLM",)}
    for folder, forbidden in below.items():
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                assert not re.match(rf"\s*(import|from) ({'|'.join(forbidden)})", line), (
                    f"{path}: {line}"
                )
