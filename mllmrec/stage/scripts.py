"""Loading a stage script as a module, for tests and benchmarks.

Stage scripts are leaves: nothing imports them by name, and `MLLM-MSR` could not be.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from mllmrec.stage.options import ROOT


def load_script(path: str | Path) -> ModuleType:
    """The script at `path`, relative to the root of the repository, as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
