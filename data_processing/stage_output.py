"""The output of a long stage: rows are appended as they are done, skipped when done already, joined at the end.

    ids = list(items)
    with StageOutput(path, "item_id", ids, args, settings, inputs) as output:
        for item_id in output.todo:
            output.write({"item_id": item_id, "summary": …})      # or output.reject(item_id, "why")

or, where every result comes with its id, `output.fill(results, "image summaries", "item")` in place of the whole block.

While a stage runs, rows are in `X.jsonl.parts/`, one file per process (`accelerate launch` sets RANK and WORLD_SIZE;
process r of n is dealt every n-th id). A row is complete or absent: after kill -9, half a line is cut off and the row
done again. When all ids are done, whoever finishes last joins the parts, in the order of `ids`, so the bytes of
X.jsonl depend on neither interruptions nor the number of processes, as far as a row does not depend on what was computed
beside it (texts and scores in float32). Refused rows go to `X.rejected.jsonl`.
"""

import json
import os
import shutil
import time
from contextlib import closing
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from data_processing.errors import InputError
from data_processing.jsonl import dump, read_lines, write_json, write_rejected, write_rows
from data_processing.run_record import check_same_job, read_record, read_state, record_path, world_size, write_record

# Counts that rows may carry, and what a count says: printed at the end and kept in the run record.
SHORTENED = {"shortened": "prompts were shortened to fit the model"}


class StageOutput:
    """One output file under work.

    path: X.jsonl; key: name of the id in each row, or a tuple of names; ids: all ids of the full job, in output order
    (tuples where key is one); settings, inputs: see `run_record`; a change of either since the rows were made is
    refused with an InputError, because rows of two kinds in one file would be worth nothing; with args.overwrite the
    old rows are thrown away. limit (default: args.limit) > 0 asks for the first ids only; a later run goes on from there.
    counted: see SHORTENED.
    """

    def __init__(self, path, key, ids, args, settings, inputs, retry_rejected=False, limit=None, counted=None):
        self.path, self.args, self.settings, self.inputs = Path(path), args, settings, inputs
        self.key = key
        self.ids = list(ids)
        if len(set(self.ids)) != len(self.ids):
            raise InputError(f"{path} would hold an id twice; the input names one id in two lines")
        self.wanted = self.ids[: (args.limit if limit is None else limit) or None]
        self.rank, self.world = int(os.environ.get("RANK", "0")), world_size()
        self.parts = self.path.with_name(self.path.name + ".parts")
        self.rejected_path = self.path.with_suffix(".rejected.jsonl")
        self.retry_rejected = retry_rejected
        self.counted = counted or {}
        self.counts = {}  # what else a stage wants in its record
        self._check_same_job()
        done = self._read_done()
        self.left = {i for i in self.wanted if i not in done}  # by any process
        self.todo = [i for n, i in enumerate(self.wanted) if i in self.left and n % self.world == self.rank]
        self.is_complete = not self.left

    @property
    def finished(self):
        """True if there is nothing left to do and the joined file stands."""
        return self.is_complete and not self.parts.exists() and self.path.exists()

    def __enter__(self):
        self.parts.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.parts / f"rank-{self.rank}.lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise InputError(f"{self.path} is being written by another process right now; wait for it or stop it") from None
        write_json(self.parts / "state.json", {"settings": self.settings, "inputs": self.inputs})  # read by `read_state`
        self.rows = self._open_part(f"rank-{self.rank}.jsonl")
        self.refused = self._open_part(f"rank-{self.rank}.rejected.jsonl")
        self.written = self.rejected = 0
        self.started = time.monotonic()
        return self

    def write(self, row):
        """Appends one finished row; it survives the death of this process from here on."""
        self.rows.write(dump(row))
        self.rows.flush()
        self.written += 1

    def reject(self, row_id, reason):
        """Sets one row aside with the reason."""
        self.refused.write(dump({**self._id_fields(row_id), "reason": reason}))
        self.refused.flush()
        self.rejected += 1

    def fill(self, results, what, unit):
        """Writes or sets aside each (id, row, reason) of `results`, a generator (reason None: write), with a progress bar.

        After a pilot (--limit) it also says what all rows would take.
        """
        # closing: what computes ahead must stop when a row cannot be written
        with self, closing(results), tqdm(total=len(self.todo), desc=what, unit=unit) as progress:
            for row_id, row, reason in results:
                if reason:
                    self.reject(row_id, reason)
                else:
                    self.write(row)
                progress.update()
        print(self.summary())
        done = self.written + self.rejected
        if done and len(self.wanted) < len(self.ids):
            per_second = done * self.world / self.seconds
            print(
                f"at {per_second:.3g} {unit}s a second all {len(self.ids):,} would take {duration(len(self.ids) / per_second)} on this "
                f"machine{f' with its {self.world} processes' if self.world > 1 else ''}, loading the model not counted"
            )

    def __exit__(self, kind, error, trace):
        for file in (self.rows, self.refused):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.lock.release()
        self.seconds = time.monotonic() - self.started
        if kind is None:
            self._join_if_complete()

    def summary(self):
        """One line to print at the end: what was done and where it is."""
        if not self.is_complete:
            return f"this process wrote {self.written:,} rows; {self.path} is joined when the other processes are done"
        refused = f"; {self.n_rejected:,} were set aside, each with its reason in {self.rejected_path}" if self.n_rejected else ""
        counts = "".join(f"; {self.counts[key]:,} {words}" for key, words in self.counted.items() if self.counts[key])
        return f"wrote {self.path}: {self.n_rows:,} rows, {self.written:,} of them now, in {self.seconds:.1f} s{refused}{counts}"

    # ------------------------------------------------------------------------------------------ inside
    def _row_id(self, row):
        return tuple(row[k] for k in self.key) if isinstance(self.key, tuple) else row[self.key]

    def _id_fields(self, row_id):
        return dict(zip(self.key, row_id, strict=True)) if isinstance(self.key, tuple) else {self.key: row_id}

    def _check_same_job(self):
        if self.args.overwrite and self.world > 1 and (self.path.exists() or self.parts.exists()):
            raise InputError(f"--overwrite cannot be used with several processes; delete {self.path} and {self.parts} first")
        if self.args.overwrite:
            shutil.rmtree(self.parts, ignore_errors=True)
            for path in (self.path, self.rejected_path, record_path(self.path)):
                path.unlink(missing_ok=True)
            return
        record = read_record(self.path) if self.path.exists() else None
        state = self.parts / "state.json"
        check_same_job(self.path, (record, read_state(state)), self.settings, self.inputs, "made", "the old rows")
        if self.path.exists() and record is None:
            raise InputError(f"{self.path} has no run record beside it, so nobody knows how it was made; move it away")

    def _part_files(self, ending):
        return sorted(p for p in self.parts.glob(f"rank-*{ending}") if p.name.count(".") == ending.count("."))

    def _read(self, joined, ending):
        """dict id -> row of the joined file and all parts; half a last line of a part is left out."""
        rows = {}
        if joined.exists():
            rows.update((self._row_id(row), row) for _, row in read_lines(joined, keys=()))
        for part in self._part_files(ending):
            for line in part.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    rows[self._row_id(row)] = row
        return rows

    def _read_done(self):
        done = set(self._read(self.path, ".jsonl"))
        return done if self.retry_rejected else done | set(self._read(self.rejected_path, ".rejected.jsonl"))

    def _open_part(self, name):
        path = self.parts / name
        if path.exists():
            whole = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(whole.rfind(b"\n") + 1)
        return open(path, "ab")

    def _join_if_complete(self):
        with FileLock(self.path.with_name(f".{self.path.name}.lock")) as lock:
            if self.parts.exists():
                rows = self._read(self.path, ".jsonl")
                refused = {i: row for i, row in self._read(self.rejected_path, ".rejected.jsonl").items() if i not in rows}
                if all(i in rows or i in refused for i in self.wanted):
                    self._join(rows, refused)
            Path(lock.lock_file).unlink(missing_ok=True)

    def _join(self, rows, refused):
        rows, refused = ({i: found[i] for i in self.ids if i in found} for found in (rows, refused))
        write_rows(self.path, rows.values())
        write_rejected(self.rejected_path, refused.values())
        self.counts |= {key: sum(row.get(key, 0) for row in rows.values()) for key in self.counted}
        counts = {"asked": len(self.wanted), "out": len(rows), "rejected": len(refused), "written_by_this_run": self.written}
        write_record(self.path, self.args, self.settings, self.inputs, self.seconds, counts, **self.counts)
        shutil.rmtree(self.parts)
        self.is_complete, self.n_rows, self.n_rejected = True, len(rows), len(refused)


def duration(seconds):
    """Seconds as a person says them: 42 s, 7 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
