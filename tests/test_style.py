"""Rules of style that no linter checks: sizes of functions, annotations and docstrings, words."""

import ast
import re

import pytest
from conftest import ROOT

LIBRARY = sorted((ROOT / "mllmrec").rglob("*.py"))
FOLDERS = ("mllmrec", "data_processing", "Inference", "MLLM-MSR", "MLLM4Rec", "scripts")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_PARAMETERS = 60, 6
# Words for which the field has another one (CONTRIBUTING.md).
WORDS = re.compile(
    r"\b(eyes|films?|pictures?|set aside|torn|stood already|goes on where|chance draws|told|dealt|"
    r"deals?|under way|under work|read in portions|reads? in portions|twins?|finds no partner|"
    r"looked at|put together|in place of|not told|died|dies|half a line|what a stage makes|"
    r"state of chance|nobody knows|every so many)\b",
    re.IGNORECASE,
)
# Prompts may speak of a picture; results depend on their wording.
ALLOWED = {
    "mllmrec/prompts/mllm_msr.py": ("The picture is the",),
    "scripts/benchmarks/tools.py": ("told in a calm voice", "in the middle of the picture"),
}


def functions(path):
    """(function, is public) of a file; public: neither it nor what holds it starts with _."""
    tree = ast.parse(path.read_text())

    def walk(node, public):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = public and not (named and child.name.startswith("_"))
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, inner
                yield from walk(child, False)
            else:
                yield from walk(child, inner)

    yield from walk(tree, True)


def parameters(function):
    names = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [arg for arg in names if arg.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_take_few_parameters(path):
    for function, _ in functions(path):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= MOST_LINES, f"{function.name} has {lines} lines"
        count = len(parameters(function))
        assert count <= MOST_PARAMETERS, f"{function.name} has {count} parameters"


def test_every_public_function_of_the_library_is_annotated_and_described():
    seen, bare, undescribed = 0, [], []
    for path in LIBRARY:
        for function, public in functions(path):
            if not public:
                continue
            name = f"{path.relative_to(ROOT)}: {function.name}"
            seen += len(parameters(function))
            bare += [f"{name}({p.arg})" for p in parameters(function) if p.annotation is None]
            bare += [f"{name} -> ?"] if function.returns is None else []
            if not ast.get_docstring(function) and not function.name.startswith("__"):
                undescribed.append(name)
    assert seen > 250
    assert bare == []
    assert undescribed == []


def test_no_file_is_excluded_from_the_formatter():
    found = [str(path) for path in CODE if "fmt: " + "skip" in path.read_text()]
    assert found == []


def test_texts_use_the_words_of_the_field():
    found = []
    texts = [*CODE, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts += [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "scripts").glob("*.sh")]
    texts += [ROOT / "mllmrec/evaluation/report.html.j2", ROOT / "CONTRIBUTING.md"]
    for path in texts:
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if WORDS.search(line) and not any(ok in line for ok in ALLOWED.get(name, ())):
                found.append(f"{name}:{number}: {line.strip()[:90]}")
    assert found == []


def test_private_parts_of_other_libraries_are_used_in_one_module_only():
    private = re.compile(
        r"\b(processor|model\.config|arguments|args|cache|layer|config)\._[a-z]\w+|_n_gpu|"
        r"_get_num_multimodal_tokens|_get_train_sampler|_attn_implementation\b"
    )
    found = []
    for path in CODE:
        if path.name == "compat.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if private.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
