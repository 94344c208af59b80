"""Rules of style that no linter checks: sizes of functions, annotations and docstrings, words."""

import ast
import io
import re
import tokenize

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
    "docs/files.md": ("The picture is the",),
    "docs/tour.md": ("The picture is the", "`␣picture`"),
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


def split_strings(path):
    """(line, texts of the pieces, columns that one line would take) of strings in several lines."""
    pieces = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.STRING and '"""' not in token.string:
            pieces.append(token)
        elif token.type != tokenize.NL:
            if len({piece.start[0] for piece in pieces}) > 1:
                texts = [piece.string.lstrip("f").strip('"') for piece in pieces]
                whole = pieces[0].start[1] + sum(map(len, texts)) + len('f"",')
                yield pieces[0].start[0], texts, whole
            pieces = []


def test_no_string_is_split_that_fits_one_line_and_no_piece_is_a_word_or_two():
    found = []
    for path in CODE:
        for line, texts, whole in split_strings(path):
            name = f"{path.relative_to(ROOT)}:{line}"
            if whole <= 100 and not any("\\n" in text for text in texts):
                found.append(f"{name}: fits one line")
            short = [text for text in texts[:-1] if len(text.split()) <= 2 and len(text) < 40]
            found += [f"{name}: the piece {text!r}" for text in short]
    assert found == []


def first_sentences(path):
    """(line, first line of the text that ends in the second, words on the second) of docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        lines = (text or "").split("\n")
        if len(lines) > 1 and lines[1]:
            sentence_ends = re.match(r"^(\S+(?: \S+)?[.:])(?:$| )", lines[1])
            if sentence_ends and len(lines[1].split()) <= 2:
                yield node.body[0].lineno, lines[0]


def test_first_sentences_do_not_spill_a_word_or_two_onto_the_next_line():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in CODE
        for line, text in first_sentences(path)
    ]
    assert found == []


def test_file_names_are_unique():
    """But for packages, and for the published launchers in Inference/microlens/."""
    paths = [path for path in CODE if path.parent != ROOT / "Inference/microlens"]
    names = [path.name for path in paths if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# Packages of the library, each with those that it may import.
LAYERS = ("stage", "prompts", "data", "evaluation", "models", "sequential", "generation", "ranking")


def test_no_package_of_the_library_imports_one_above_it():
    found = []
    for path in LIBRARY:
        package = path.relative_to(ROOT / "mllmrec").parts[0]
        for imported in re.findall(r"^ *(?:from|import) mllmrec\.(\w+)", path.read_text(), re.M):
            if package in LAYERS and imported in LAYERS[LAYERS.index(package) + 1 :]:
                found.append(f"{path.relative_to(ROOT)} imports mllmrec.{imported}")
    assert found == []
