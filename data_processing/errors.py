"""The one error a user of this repository is meant to see: one sentence with what is wrong, where, and what to do."""

import sys


class InputError(Exception):
    """Bad input or a bad option. The message is one sentence that names file, line and remedy."""


def run(main):
    """Calls `main()`; an InputError becomes one line on stderr and exit code 1, never a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
