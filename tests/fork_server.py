"""Runs scripts as `python SCRIPT ...` does, each in a process of its own, but imports only once.

A server process imports the named modules and then forks for each script, so a script that needs
torch starts at once instead of after ten seconds. A line of its stdin is a list of jobs that start
together; a line of its stdout is their exit codes.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# What scripts may import before they answer --help, and what they need for their work.
LIGHT = ("aiohttp", "filelock", "jinja2", "pandas", "PIL.Image", "duckdb")
LIGHT += ("pydantic", "scipy.stats", "sklearn.metrics", "tenacity", "tqdm", "yaml")
HEAVY = (*LIGHT, "torch", "transformers", "peft", "accelerate", "datasets", "transformers.trainer")
HEAVY += ("transformers.models.llava_next.modeling_llava_next",)
HEAVY += ("transformers.models.llama.modeling_llama",)
LIMIT = 300  # seconds until a script is killed


class ForkServer:
    """The side of the tests. folder: for the outputs of the scripts; modules: imported before."""

    def __init__(self, folder, modules, root, **environment):
        self.folder, self.n_jobs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            cwd=root,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words, kill_after=0, **environment):
        """One script; words: its path and command line, from the root of the repository.

        kill_after: kill -9 in the middle of a row, after so many rows. Returns returncode
        (negative: of a signal), stdout, stderr and modules (names of all that were imported).
        """
        job = {"words": words, "environment": environment, "kill_after": kill_after}
        return self.run_together(job)[0]

    def run_together(self, *jobs):
        """Several scripts at the same time; jobs: dicts of words, environment and kill_after."""
        files = []
        for _ in jobs:
            self.n_jobs += 1
            names = ("stdout", "stderr", "modules")
            files.append({name: str(self.folder / f"{self.n_jobs}.{name}") for name in names})
        line = json.dumps([{**job, **names} for job, names in zip(jobs, files, strict=True)])
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        found = []
        for returncode, names in zip(ended, files, strict=True):
            texts = {k: Path(v).read_text() if Path(v).exists() else "" for k, v in names.items()}
            found.append(SimpleNamespace(returncode=returncode, **texts))
        return found

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(modules):
    """The side of the server."""
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # else each fork walks through all that was imported when it ends
    for line in sys.stdin:
        jobs, pids = json.loads(line), []
        for job in jobs:
            pids.append(os.fork())
            if pids[-1] == 0:
                run_job(job)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def run_job(job):
    """What a forked process does; it never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    signal.alarm(LIMIT)
    os.environ.update(job["environment"])
    sys.argv = job["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent.absolute())
    atexit.register(lambda: Path(job["modules"]).write_text(" ".join(sys.modules)))
    if job["kill_after"]:
        kill_after(job["kill_after"])
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def kill_after(n_rows):
    """Make this process kill itself after `n_rows` rows, in the middle of the next one."""
    from mllmrec.stage.output import RowOutput

    write_row, left = RowOutput.write, n_rows

    def write(self, row):
        nonlocal left
        write_row(self, row)
        left -= 1
        if left == 0:
            os.write(self._files[self.path].fileno(), b'{"half a li')  # what is in a buffer is lost
            os.kill(os.getpid(), signal.SIGKILL)

    RowOutput.write = write


if __name__ == "__main__":
    serve(sys.argv[1:])
