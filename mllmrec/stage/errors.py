"""The one error that a user of this repository is meant to see, and how a script reports it."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input or a bad option. The message is one sentence that names file, line and remedy."""


def run_main(main: Callable[[], object]) -> None:
    """Call `main()`; an InputError becomes one line on stderr and exit code 1, never a
    traceback.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
