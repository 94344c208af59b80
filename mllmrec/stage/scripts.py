"""Loading a stage script as a module, for tests and benchmarks.

Stage scripts are leaves: nothing imports them by name, and `MLLM-MSR` could not be.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mllmrec.stage.options import ROOT


def load_script(path: str | Path) -> ModuleType:
    """The script at `path`, relative to the root of the repository, as a module of its own.

    As when it is run, it can import the modules beside it.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
