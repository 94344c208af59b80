"""The output of a long stage: finished rows are appended, skipped when resumed, joined at the end.

    output = ResumableOutput(path, "item_id", items, job)
    if not output.is_up_to_date():
        output.write_results(results, "image summaries", "item")    # (id, row, reason) each

While a stage runs, rows are in `X.jsonl.parts/`, one file per process (`accelerate launch` sets
RANK and WORLD_SIZE; process r of n takes every n-th id). A row is complete or absent: after kill -9
a truncated last line is dropped and the row computed again. When all ids are done, the process that
finishes last joins the parts in the order of `ids`, so the bytes of X.jsonl depend on neither
interruptions nor the number of processes, as far as a row does not depend on its batch (texts and
scores in float32). Rejected rows go to `X.rejected.jsonl`.

Joining removes the old record first, and the parts last, when the new record stands: a process that
is killed in between leaves the parts, from which the next start joins again.
"""

import logging
import os
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    PathLike,
    encode,
    encode_checked,
    naming,
    parse_line,
    rejected_path,
    write_rejected,
    write_rows,
)
from mllmrec.stage.progress import Progress, progress_bar
from mllmrec.stage.record import (
    Job,
    check_described,
    process_rank,
    read_record,
    read_state,
    record_path,
    report_up_to_date,
    world_size,
    write_record,
    write_state,
)
from mllmrec.stage.schema import FileSchema, Row, problem, schema_of
from mllmrec.stage.transaction import (
    delete_output,
    finish_deletion,
    output_lock,
    remove_file,
    remove_folder,
    remove_temporary,
)

logger = logging.getLogger(__name__)

# Counters that rows may carry, with their meaning: printed at the end and kept in the run record.
SHORTENED = {"shortened": "prompts were shortened to fit the model"}

RowId = Hashable
# Parts keep the order of a row's keys; the schema is applied when a row is written.
_PART_ROW = FileSchema(TypeAdapter(Row), "the same command with --overwrite true")
Result = tuple[RowId, Row | None, str | None]


class ResumableOutput:
    """One output file in progress.

    path: X.jsonl; key: name of the id in each row, or a tuple of names; ids: all ids of the full
    job in output order (tuples if `key` is one); job: a change since the rows were written is
    refused with an InputError, because a file with rows of two kinds would be worthless, unless
    `overwrite` deletes the old rows; job.limit > 0 asks for the first ids only, and a later run
    resumes; retry_rejected: try rejected rows again; counters: see SHORTENED.
    """

    def __init__(
        self,
        path: PathLike,
        key: str | tuple[str, ...],
        ids: Iterable[RowId],
        job: Job,
        retry_rejected: bool = False,
        counters: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.key, self.job = Path(path), key, job
        self.keys = key if isinstance(key, tuple) else (key,)
        self.ids = list(ids)
        if len(set(self.ids)) < len(self.ids):
            raise InputError(f"{path} would hold an id twice; the input names one id in two lines")
        self._known = set(self.ids)
        self.wanted = self.ids[: job.limit or None]
        self.rank, self.world = process_rank(), world_size()
        self.parts = self.path.with_name(self.path.name + ".parts")
        self.rejected_path = rejected_path(self.path)
        self.retry_rejected = retry_rejected
        self.counters = dict(counters or {})
        self.counts: dict[str, int] = {}  # further counts for the run record
        # Computed from all rows for the run record, e.g. the quality of their texts.
        self.measure: Callable[[list[Row]], dict[str, Any]] | None = None
        self.measured: dict[str, Any] = {}
        self.rows_written = self.rows_rejected = 0
        with output_lock(self.path, wait=True):
            remove_temporary(self.parts)  # of a process that was killed while it removed them
            self._check_same_job()
            done = self._read_done()
        self.left = {i for i in self.wanted if i not in done}  # by any process
        self.todo = [
            i for n, i in enumerate(self.wanted) if i in self.left and n % self.world == self.rank
        ]
        self.is_complete = not self.left

    def is_up_to_date(self) -> bool:
        """True, with a message, if nothing is left to do and the joined file exists."""
        finished = self.is_complete and not self.parts.exists() and self.path.exists()
        if finished:
            report_up_to_date(self.path)
        return finished

    def __enter__(self) -> "ResumableOutput":
        with output_lock(self.path, wait=True):
            self._check_no_other_job()  # one may have begun while the model was loaded
            self.parts.mkdir(parents=True, exist_ok=True)
            self.lock = self._acquired(self.parts / f"rank-{self.rank}.lock")
            if self.rank == 0:
                for path in (self.path, self.rejected_path, record_path(self.path)):
                    remove_temporary(path)
                remove_temporary(self.parts / "state.json")
            if not (self.parts / "state.json").exists():  # else it is of this job: checked
                write_state(self.parts / "state.json", self.job)
        self._rows = self._open_part(f"rank-{self.rank}.jsonl")
        self._rejected = self._open_part(f"rank-{self.rank}.rejected.jsonl")
        self.rows_written = self.rows_rejected = 0
        self.started = time.monotonic()
        return self

    def write(self, row: Row) -> None:
        """Append one finished row; from here on it survives the death of this process."""
        line = encode_checked(self.path, row)
        with naming(self.path):
            self._rows.write(line)
            self._rows.flush()
        self.rows_written += 1

    def reject(self, row_id: RowId, reason: str) -> None:
        """Append one rejected row with its reason."""
        with naming(self.rejected_path):
            self._rejected.write(encode({**self._id_fields(row_id), "reason": reason}))
            self._rejected.flush()
        self.rows_rejected += 1

    def write_results(
        self,
        results: Generator[Result, None, None],
        description: str,
        unit: str,
        progress: Progress | None = None,
    ) -> None:
        """Write or reject each (id, row, reason) of `results` (reason None: write), with progress.

        progress: counted by `results` itself, in units smaller than a row; None: counts rows.
        After a pilot (--limit) it also prints how long all rows would take.
        """
        shown = progress or progress_bar(len(self.todo), description, unit)
        # closing: whatever computes ahead must stop when a row cannot be written
        with self, closing(results), shown:
            for row_id, row, reason in results:
                if row is None:
                    self.reject(row_id, reason or "no result")
                else:
                    self.write(row)
                if progress is None:
                    shown.update()
        self.log_summary()
        done = self.rows_written + self.rows_rejected
        if done and len(self.wanted) < len(self.ids):
            per_second = done * self.world / self.seconds
            processes = f" with its {self.world} processes" if self.world > 1 else ""
            logger.info(
                f"at {per_second:.3g} {unit}s a second all {len(self.ids):,} would take "
                f"{duration(len(self.ids) / per_second)} on this machine{processes}, "
                "loading the model not counted"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._rows, self._rejected):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.lock.release()
        self.seconds = time.monotonic() - self.started
        if kind is None:
            self._join_if_complete()

    def log_summary(self) -> None:
        """Say how many rows were written, and where."""
        logger.info(self.summary())

    def summary(self) -> str:
        """One line: how many rows were written, and where."""
        if not self.is_complete:
            return (
                f"this process wrote {self.rows_written:,} rows; {self.path} is joined when the "
                f"other "
                "processes are done"
            )
        rejected = (
            f"; {self.n_rejected:,} were rejected, each with its reason in {self.rejected_path}"
            if self.n_rejected
            else ""
        )
        counts = "".join(
            f"; {self.counts[key]:,} {text}"
            for key, text in self.counters.items()
            if self.counts[key]
        )
        return (
            f"wrote {self.path}: {self.n_rows:,} rows, {self.rows_written:,} of them now, "
            f"in {self.seconds:.1f} s{rejected}{counts}"
        )

    def _row_id(self, row: Row) -> RowId:
        return tuple(row[k] for k in self.keys) if isinstance(self.key, tuple) else row[self.key]

    def _id_fields(self, row_id: RowId) -> Row:
        if isinstance(self.key, tuple):
            assert isinstance(row_id, tuple)
            return dict(zip(self.key, row_id, strict=True))
        return {self.key: row_id}

    def _acquired(self, path: Path) -> FileLock:
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"{self.path} is being written by another process; wait for it or stop it"
            ) from None
        return lock

    def _check_same_job(self) -> None:
        belonging = (record_path(self.path), self.parts, self.rejected_path, self.path)
        finish_deletion(self.path, belonging)
        overwrite = self.job.options.overwrite
        if overwrite and self.world > 1 and (self.path.exists() or self.parts.exists()):
            raise InputError(
                f"--overwrite cannot be used with several processes; delete {self.path} and "
                f"{self.parts} first"
            )
        if overwrite:
            for path in sorted(self.parts.glob("rank-*.lock")):
                self._acquired(path).release()
            delete_output(self.path, belonging)
            return
        self._check_no_other_job()

    def _check_no_other_job(self) -> None:
        record = read_record(self.path) if self.path.exists() else None
        state = read_state(self.parts / "state.json")
        self.job.check_same(self.path, (record, state))
        if record is not None:
            check_described(self.path, record)
        if state is None and any(p.stat().st_size for p in self.parts.glob("rank-*.jsonl")):
            raise InputError(
                f"{self.parts} has rows, but no state.json that says how they were made; delete "
                "the folder, or start again with --overwrite true"
            )
        if record is None and self.path.exists() and state is None:
            raise InputError(
                f"{self.path} has no run record beside it, so it is unknown how it was made; move "
                "it away, or delete it with --overwrite true"
            )

    def _part_files(self, ending: str) -> list[Path]:
        dots = ending.count(".")
        return sorted(p for p in self.parts.glob(f"rank-*{ending}") if p.name.count(".") == dots)

    def _read(self, joined: Path, ending: str) -> dict[RowId, Row]:
        """Rows of the joined file and all parts; a truncated last line of a part is left out."""
        rows: dict[RowId, Row] = {}
        for path in ([joined] if joined.exists() else []) + self._part_files(ending):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                where = f"{path}, line {number}"
                row = parse_line(line, _PART_ROW, where, (self.keys, ""))
                rows[self._checked_id(row, ending, where)] = row
        return rows

    def _checked_id(self, row: Row, ending: str, where: str) -> RowId:
        """The id of a row that an earlier run wrote. Raises InputError if the row is damaged."""
        schema, fault = schema_of(f"{self.path.stem}{ending}"), None
        try:
            if schema is not None:
                schema.row.validate_python(row)
            row_id = self._row_id(row)
            # Without inputs (images of a growing list) an id may be one of an earlier list.
            if self.job.inputs and row_id not in self._known:
                fault = f"{row_id!r} is not in the input"
        except ValidationError as error:
            fault = problem(error)
        except TypeError:  # a list cannot be an id
            fault = "the id must be a string"
        if fault:
            raise InputError(f"{where}: {fault}; remove the line, or start with --overwrite true")
        return row_id

    def _read_done(self) -> set[RowId]:
        done = set(self._read(self.path, ".jsonl"))
        if self.retry_rejected:
            return done
        return done | set(self._read(self.rejected_path, ".rejected.jsonl"))

    def _open_part(self, name: str) -> BinaryIO:
        path = self.parts / name
        if path.exists():
            content = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        return open(path, "ab")

    def _join_if_complete(self) -> None:
        with output_lock(self.path, wait=True):
            if self.parts.exists():
                rows = self._read(self.path, ".jsonl")
                rejected = self._read(self.rejected_path, ".rejected.jsonl")
                rejected = {i: row for i, row in rejected.items() if i not in rows}
                if all(i in rows or i in rejected for i in self.wanted):
                    self._join(rows, rejected)

    def _join(self, rows: dict[RowId, Row], rejected: dict[RowId, Row]) -> None:
        rows = {i: rows[i] for i in self.ids if i in rows}
        rejected = {i: rejected[i] for i in self.ids if i in rejected}
        remove_file(record_path(self.path))
        write_rows(self.path, rows.values())
        write_rejected(self.rejected_path, list(rejected.values()))
        self.counts |= {key: sum(r.get(key, 0) for r in rows.values()) for key in self.counters}
        counts = {
            "asked": len(self.wanted),
            "out": len(rows),
            "rejected": len(rejected),
            "written_by_this_run": self.rows_written,
        }
        outputs = [self.path, self.rejected_path]
        self.measured = self.measure(list(rows.values())) if self.measure else {}
        more = self.counts | self.measured
        write_record(self.path, self.job, self.seconds, counts, outputs, **more)
        remove_folder(self.parts)
        self.is_complete, self.n_rows, self.n_rejected = True, len(rows), len(rejected)


def duration(seconds: float) -> str:
    """Seconds in readable units: 42 s, 7 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
