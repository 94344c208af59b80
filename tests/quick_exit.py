"""Runs a script for `bad_inputs.py` and leaves without taking the interpreter apart.

In a forked process that imported torch the interpreter's own end takes most of a second.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

code = 0
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent.absolute())
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
