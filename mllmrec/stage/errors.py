"""The one error that a user of this repository is meant to see, and faults of the machine."""

import errno
import os

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EROFS: "make it writable, or name another folder",
    errno.EACCES: "make it accessible, or name another folder",
    errno.EPERM: "make it accessible, or name another folder",
    errno.EISDIR: "a folder is where a file belongs; move it away",
    errno.ENOTDIR: "a file is where a folder belongs; move it away",
    errno.EEXIST: "a file is where a folder belongs; move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "DataLoader worker",  # that was killed: by the kernel, for its memory
)
# "unexpected pos": torch.save, closing an archive of which a part could not be written
CANNOT_WRITE = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos")


class InputError(Exception):
    """Bad input or a bad option. The message is one sentence that names file, line and remedy."""


class UsageError(InputError):
    """A command line that cannot be right, whatever the files hold. Exit code 2."""


def machine_fault(error: Exception) -> str | None:
    """What the machine lacks, in one sentence with the remedy; None for an error of another kind.

    Libraries that are not written in Python say so by the text of an error of their own.
    """
    if isinstance(error, OSError):
        return _file_fault(error)
    text = str(error)
    out_of_memory = any(part in text for part in OUT_OF_MEMORY)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        out_of_memory = True
    if out_of_memory:
        return f"out of memory ({_first_line(error)}); free some, or lower the batch size"
    if any(part in text for part in CANNOT_WRITE):
        return f"a file cannot be written ({_first_line(error)}); free some space"
    return None


def _file_fault(error: OSError) -> str:
    name = error.filename2 or error.filename
    where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    remedy = REMEDIES.get(error.errno or 0)
    reason = error.strerror or _first_line(error) or type(error).__name__
    return f"{where}{reason}" + (f"; {remedy}" if remedy else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
