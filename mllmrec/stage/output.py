"""Outputs of a stage: one writer, and a run record that describes exactly what stands beside it.

`WholeOutput`: files, or one folder, that a stage writes as a whole.

    with WholeOutput(job, [path]) as output:
        if output.is_needed:
            rows = ...
            output.begin()
            write_rows(path, rows)
            output.finish({"rows": 3})

`RowOutput`: rows that take long, appended one by one, skipped when resumed, joined at the end.

    sources = {item_id: job.source(...) for item_id in items}
    output = RowOutput(path, "item_id", sources, job)
    if not output.is_up_to_date():
        output.write_results(results, "image summaries", "item")    # (id, row, reason) each

The protocol of both. A lock file says who writes; the operating system frees it when its process
ends. A `Job` (settings, digests of the inputs) says what is asked for; the run record says of which
job the output is, and holds its digest. The record is removed before a file that it describes is
replaced, and written when all of them stand: a process that is killed in between leaves files
without a record, never a record beside other files. What is unfinished lies in a folder of its own
(`X.jsonl.parts/`, `checkpoints/`) with a state.json that names its job. With --overwrite the old
output is deleted last: when the new one begins, which is when its first row or step is there.
An output of another stage is never replaced.
"""

import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from filelock import FileLock, Timeout

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    TEMPORARY,
    PathLike,
    atomic_file,
    encode,
    encode_checked,
    naming,
    rejected_path,
    write_json,
    write_rejected,
    write_rows,
)
from mllmrec.stage.progress import Progress, progress_bar
from mllmrec.stage.provenance import describing_records
from mllmrec.stage.record import (
    Job,
    check_described,
    process_rank,
    read_record,
    read_state,
    record_path,
    world_size,
    write_record,
)
from mllmrec.stage.schema import Row, schema_of

logger = logging.getLogger(__name__)

RESERVED = ("adapter", "checkpoints", "export", "merged")  # folders of a system
STATE = "state.json"  # of an unfinished output: its job
DELETED = ".deleted"  # end of the name of a folder that is being removed
# Counters that rows may carry, with their meaning: printed at the end and kept in the run record.
SHORTENED = {"shortened": "prompts were shortened to fit the model"}

RowId = Hashable
Result = tuple[RowId, Row | None, str | None]


class WholeOutput:
    """Files, or one folder, that are written together; the record is the first one's.

    job: a change since the output was written is reason to write it again; optional: further files,
    not always written; checkpoints: folder that an interrupted run resumes from. With it the output
    takes long, so a change is refused with an InputError unless `overwrite` is set, and of several
    processes the first one holds the lock; without it, each waits for the others. takes_long: a
    change is refused without checkpoints, too.
    """

    def __init__(
        self,
        job: Job,
        outputs: Sequence[PathLike],
        optional: Sequence[PathLike] = (),
        checkpoints: Path | None = None,
        takes_long: bool = False,
    ) -> None:
        self.job, self.outputs = job, [Path(path) for path in outputs]
        self.optional, self.checkpoints = [Path(path) for path in optional], checkpoints
        self.path, self.takes_long = self.outputs[0], takes_long
        self.is_needed = True
        self.started = time.monotonic()
        if checkpoints is not None and job.options.overwrite:
            refuse_overwrite_of_several((self.path, checkpoints))

    def __enter__(self) -> "WholeOutput":
        self._lock = None
        if self.checkpoints is None or process_rank() == 0:
            wait = self.checkpoints is None and world_size() > 1
            self._lock = acquired(lock_path(self.path), self.path, wait)
        try:
            if self._lock is not None:
                for path in (*self.outputs, *self.optional, record_path(self.path)):
                    remove_leftovers(path)
            refuse_output_of_another_stage((*self.outputs, *self.optional), self.job)
            if self.checkpoints is None:
                self.is_needed = not self._is_of_job()
            elif not self.job.options.overwrite:
                # Another number of processes would read the remaining rows in another order.
                processes = self.job.settings | {"processes": world_size()}
                unfinished = Job(self.job.options, processes, self.job.inputs)
                record = matching_record(self.path, self.job, self.checkpoints, unfinished)
                self.is_needed = record is None
        except BaseException:
            self.__exit__()
            raise
        if not self.is_needed:
            report_up_to_date(self.path)
        return self

    def _is_of_job(self) -> bool:
        record = read_record(self.path)
        if record is None or self.job.options.overwrite:
            return False
        if difference := self.job.difference(record):
            if self.takes_long:
                raise InputError(
                    f"{self.path} was made with other {difference}; choose another --variant, or "
                    "replace it with --overwrite true"
                )
            return False
        if not all(path.exists() for path in self.outputs):
            return False
        check_described(self.path, record)
        return True

    def begin(self) -> None:
        """Call this before anything is written, when the new content is there or can be made.

        The record of what is there is removed. Of an output with checkpoints: what is overwritten
        is deleted, and the job noted beside the checkpoints; for the first of several processes.
        """
        if self.checkpoints is None:
            record_path(self.path).unlink(missing_ok=True)
            return
        if self.job.options.overwrite:
            delete((record_path(self.path), *self.outputs, *self.optional, self.checkpoints))
        remove_leftovers(self.checkpoints)
        # Of a state that was being written, of checkpoints that were being deleted.
        delete(list(self.checkpoints.glob(".*")))
        write_state(self.checkpoints, self.job, processes=world_size())

    def finish(
        self, rows: Mapping[str, int], folder: PathLike | None = None, **more: Any
    ) -> dict[str, Any]:
        """Write the record, when all outputs are written, and return it.

        rows: counts; folder: of a folder that gets its name later (`new_folder`), where it is now;
        more: for the record.
        """
        outputs = [folder] if folder else [*self.outputs, *self.optional]
        assert folder or not record_path(self.path).exists(), "begin() was not called"
        seconds = time.monotonic() - self.started
        return write_record(outputs[0], self.job, seconds, rows, outputs, **more)

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()


class RowOutput:
    """One JSONL file in progress, row by row.

    While a stage runs, rows are in `X.jsonl.parts/`, one file per process (`accelerate launch` sets
    RANK and WORLD_SIZE; process r of n takes every n-th id). A row is complete or absent: after
    kill -9 a truncated last line is dropped and the row computed again. When all ids are done, the
    process that finishes last joins the parts in the order of `ids`, so the bytes of X.jsonl depend
    on neither interruptions nor the number of processes, as far as a row does not depend on its
    batch (texts and scores in float32). Rejected rows go to `X.rejected.jsonl`.

    path: X.jsonl; key: name of the id in each row, or a tuple of names; ids: all ids of the full
    job in output order (tuples if `key` is one), as a mapping with the `source` of each line, which
    the row gets (see `provenance`); job: a change since the rows were written is refused with an
    InputError unless `overwrite` is set; job.limit > 0 asks for the first ids only, job.wanted
    for some, and a later run resumes; retry_rejected: try rejected rows again; counters: see
    SHORTENED.

    Lines whose `source` is another one are computed again, those whose id is gone are left out;
    both are kept in X.unused.jsonl, and taken from there when they hold again. If no line holds,
    they are of another data set, and an InputError says so.
    """

    def __init__(
        self,
        path: PathLike,
        key: str | tuple[str, ...],
        ids: Iterable[RowId] | Mapping[RowId, str],
        job: Job,
        retry_rejected: bool = False,
        counters: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.key, self.job = Path(path), key, job
        self.ids = list(ids)
        self._sources = ids if isinstance(ids, Mapping) else dict.fromkeys(self.ids)
        if len(set(self.ids)) < len(self.ids):
            raise InputError(f"{path} would hold an id twice; the input names one id in two lines")
        if job.wanted is None:
            self.wanted = self.ids[: job.limit or None]
        else:
            self.wanted = [row_id for row_id in self.ids if row_id in job.wanted]
        self.rank, self.world = process_rank(), world_size()
        self.parts = self.path.with_name(self.path.name + ".parts")
        self.rejected_path = rejected_path(self.path)
        self.unused_path = self.path.with_suffix(".unused.jsonl")
        self.counters = dict(counters or {})
        self.counts: dict[str, int] = {}  # further counts for the run record
        # Computed from all rows for the run record, e.g. the quality of their texts.
        self.measure: Callable[[list[Row]], dict[str, Any]] | None = None
        self.measured: dict[str, Any] = {}
        self.rows_written = self.rows_rejected = 0
        done: set[RowId] = set()
        self._is_joined = False  # X.jsonl holds what it would hold if it was joined again
        with locked(self.path):
            remove_leftovers(self.parts)  # of a process that was killed while it removed them
            refuse_output_of_another_stage([self.path], job)
            if job.options.overwrite:
                refuse_overwrite_of_several((self.path, self.parts))
            else:
                self._check_same_job()
                done = self._done(retry_rejected)
        self.left = {i for i in self.wanted if i not in done}  # by any process
        self.todo = [
            i for n, i in enumerate(self.wanted) if i in self.left and n % self.world == self.rank
        ]
        self.is_complete = not self.left

    def is_up_to_date(self) -> bool:
        """True, with a message, if nothing is left to do and the joined file exists."""
        finished = self.is_complete and self._is_joined and not self.parts.exists()
        if finished:
            report_up_to_date(self.path)
        return finished

    def __enter__(self) -> "RowOutput":
        overwrite = self.job.options.overwrite
        with locked(self.path):
            if overwrite:
                for path in self.parts.glob("*.lock"):
                    acquired(path, self.path).release()
            else:
                self._check_same_job()  # another may have begun while the model was loaded
            self._lock = self._rank_lock()
            for path in (self.path, self.rejected_path, record_path(self.path)):
                remove_leftovers(path)
            self._files: dict[Path, BinaryIO] = {}
            self._reasons: list[bytes] = []  # of rejected rows, until there is another one
            if not overwrite:
                self._begin()
        self.rows_written = self.rows_rejected = 0
        self.started = time.monotonic()
        return self

    def _rank_lock(self) -> FileLock:
        self.parts.mkdir(parents=True, exist_ok=True)
        return acquired(self.parts / f"rank-{self.rank}.lock", self.path)

    def _begin(self) -> None:
        if not (self.parts / STATE).exists():  # else it is of this job: checked
            write_state(self.parts, self.job)
        rows, rejected = self._open_part("rank"), self._open_part("rejected")
        self._files = {self.path: rows, self.rejected_path: rejected}

    def _overwrite_once(self) -> None:
        """Before the first row of this process: delete what --overwrite replaces."""
        if not self._files:
            with locked(self.path):
                self._lock.release()
                # Rejected rows first: alone they would be taken for those of the next job.
                record = record_path(self.path)
                delete((record, self.rejected_path, self.unused_path, self.path, self.parts))
                self._lock = self._rank_lock()
                self._begin()
            self._write_reasons()

    def write(self, row: Row) -> None:
        """Append one finished row; from here on it survives the death of this process."""
        row = row | self._source(self._row_id(row))
        line = encode_checked(row, schema_of(self.path.name), self.path)
        self._overwrite_once()
        with naming(self.path):
            self._files[self.path].write(line)
            self._files[self.path].flush()
        self.rows_written += 1

    def reject(self, row_id: RowId, reason: str) -> None:
        """Append one rejected row with its reason."""
        names, values = self.key, cast(Any, row_id)
        pairs = [(names, values)] if isinstance(names, str) else zip(names, values, strict=True)
        self._reasons.append(encode(dict(pairs) | {"reason": reason} | self._source(row_id)))
        if self._files:
            self._write_reasons()
        self.rows_rejected += 1

    def _write_reasons(self) -> None:
        with naming(self.rejected_path):
            self._files[self.rejected_path].writelines(self._reasons)
            self._files[self.rejected_path].flush()
        self._reasons.clear()

    def _source(self, row_id: RowId) -> Row:
        source = self._sources[row_id]
        return {} if source is None else {"source": source}

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
                f"{duration(len(self.ids) / per_second)} on this machine{processes}, loading the "
                "model not counted"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        nothing = bool(self._reasons) and self.rows_rejected == len(self.wanted)
        if kind is None and not nothing and (not self.left or self._reasons):
            self._overwrite_once()  # there was no row to write
        for path, file in self._files.items():
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        self._lock.release()
        self.seconds = time.monotonic() - self.started
        if not self._files and not (self.parts / STATE).exists():
            remove_folder(self.parts)  # nothing was overwritten
        if kind is None and self._reasons:
            raise InputError(
                f"none of the {len(self.wanted):,} rows could be made, the first: "
                f"{json.loads(self._reasons[0])['reason']}; {self.path} is as it was"
            )
        if kind is None:
            self._join_if_complete()

    def log_summary(self) -> None:
        """Say how many rows were written, and where."""
        if not self.is_complete:
            logger.info(
                f"this process wrote {self.rows_written:,} rows; {self.path} is joined when the "
                "other processes are done"
            )
            return
        text = f"wrote {self.path}: {self.n_rows:,} rows, {self.rows_written:,} of them now, "
        text += f"in {self.seconds:.1f} s"
        if self.n_rejected:
            text += f"; {self.n_rejected:,} were rejected, each with its reason in "
            text += str(self.rejected_path)
        for key, meaning in self.counters.items():
            text += f"; {self.counts[key]:,} {meaning}" if self.counts[key] else ""
        logger.info(text)

    def _row_id(self, row: Row) -> RowId:
        return tuple(row[k] for k in self.key) if isinstance(self.key, tuple) else row[self.key]

    def _check_same_job(self) -> None:
        record = matching_record(self.path, self.job, self.parts)
        unknown = record is None and not (self.parts / STATE).exists()
        if unknown and any(part.stat().st_size for part in self.parts.glob("*-*.jsonl")):
            raise InputError(
                f"{self.parts} has rows, but no {STATE} that says how they were made; delete the "
                "folder, or start again with --overwrite true"
            )

    def _done(self, retry_rejected: bool) -> set[RowId]:
        """Ids whose lines are there and are kept; counts and says which are not kept."""
        paths = (self.path, self.rejected_path)
        joined = [list(self._file_lines(path)) for path in paths]
        rows, rejected = joined[0] + self._parts("rank"), joined[1] + self._parts("rejected")
        kept = set(self._kept([*self._file_lines(self.unused_path), *rows]))
        stale = {i for i, _ in rows} - kept
        gone = sum(i not in self._sources for i in stale)
        if stale and not kept:
            raise InputError(
                f"none of the {len(stale):,} lines of {self.path} was made from today's inputs; "
                "choose another --output_dir, or delete it with --overwrite true"
            )
        if stale:
            logger.info(
                f"{self.path}: {len(kept):,} lines are kept, {len(stale) - gone:,} are computed "
                f"again because what they were made from changed, {gone:,} have an id that is "
                f"gone; lines that are not used stay in {self.unused_path.name}"
            )
        unknown = sum(
            "source" not in row and self._sources[i] is not None for i, row in rows if i in kept
        )
        if unknown:
            logger.warning(
                f"{self.path}: {unknown:,} lines have no `source`, so it is unknown what they were "
                "made from; they are kept"
            )
        done = [kept, set(self._kept(rejected)) - kept]
        self._is_joined = self.path.exists() and all(
            [i if self._is_kept(i, row) else None for i, row in lines]
            == [i for i in self.ids if i in part]
            for lines, part in zip(joined, done, strict=True)
        )
        return kept if retry_rejected else kept | done[1]

    def _is_kept(self, row_id: RowId, row: Row) -> bool:
        """Whether a line is of an id that is wanted, and made from what it would be made from."""
        if row_id not in self._sources:
            return False
        source = self._sources[row_id]
        return source is None or row.get("source", source) == source

    def _kept(self, lines: Iterable[tuple[RowId, Row]]) -> dict[RowId, Row]:
        return {i: row for i, row in lines if self._is_kept(i, row)}

    def _parts(self, name: str) -> list[tuple[RowId, Row]]:
        """(id, row) of all parts."""
        paths = sorted(self.parts.glob(f"{name}-*.jsonl"))
        return [line for path in paths for line in self._file_lines(path)]

    def _file_lines(self, path: Path) -> Iterator[tuple[RowId, Row]]:
        """(id, row) of a file; a truncated last line of a part is left out."""
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield self._row_id(row), row
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: no row of this stage; remove the line, or start "
                    "with --overwrite true"
                ) from None

    def _open_part(self, name: str) -> BinaryIO:
        path = self.parts / f"{name}-{self.rank}.jsonl"
        if path.exists():
            content = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        return open(path, "ab")

    def _join_if_complete(self) -> None:
        with locked(self.path):
            if self.parts.exists():
                earlier = [*self._file_lines(self.unused_path), *self._file_lines(self.path)]
                every = earlier + self._parts("rank")
                rows = self._kept(every)
                reasons = [*self._file_lines(self.rejected_path), *self._parts("rejected")]
                rejected = {i: row for i, row in self._kept(reasons).items() if i not in rows}
                if all(i in rows or i in rejected for i in self.wanted):
                    left = (encode(row) for i, row in every if not self._is_kept(i, row))
                    unused = dict.fromkeys(left)
                    if unused or self.unused_path.exists():  # before they leave X.jsonl
                        with atomic_file(self.unused_path) as file:
                            file.writelines(unused)
                    self._join(rows, rejected)

    def _join(self, rows: dict[RowId, Row], rejected: dict[RowId, Row]) -> None:
        rows = {i: rows[i] for i in self.ids if i in rows}
        rejected = {i: rejected[i] for i in self.ids if i in rejected}
        record_path(self.path).unlink(missing_ok=True)
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


def matching_record(
    output: Path, job: Job, unfinished: Path, unfinished_job: Job | None = None
) -> dict[str, Any] | None:
    """The run record of `output`, None if it is not finished: is this output of this job?

    unfinished: folder of an interrupted run; unfinished_job: what its state.json must be of, if not
    of `job`. Raises InputError for an output or an interrupted run of another job, for a file that
    was changed after it was written, and where nothing says how it was made.
    """
    record = read_record(output) if output.exists() else None
    state = read_state(unfinished / STATE)
    for found, wanted in ((record, job), (state, unfinished_job or job)):
        difference = wanted.difference(found) if found is not None else None
        if difference:
            raise InputError(
                f"{output} was made with other {difference}; choose another --output_dir, or "
                "delete it with --overwrite true"
            )
    if record is not None:
        check_described(output, record)
    elif output.exists() and state is None:
        raise InputError(
            f"{output} has no run record ({record_path(output).name}), so it is unknown how it was "
            "made; move it away, or delete it with --overwrite true"
        )
    return record


def refuse_output_of_another_stage(outputs: Sequence[Path], job: Job) -> None:
    """Raise InputError if a file would be replaced that another stage wrote.

    So the folder of an adapter, of checkpoints or of another baseline's scores keeps its content.
    """
    for output in outputs:
        folder = output.parent
        if folder.name in RESERVED and output.name == "scores.jsonl":
            raise InputError(f"{folder} is for another stage; choose another --variant")
        # The folder may be an output itself: an adapter, a model, checkpoints.
        others = [path for path in (folder / "run.json", folder / STATE) if path.exists()]
        records = dict(describing_records(output))
        if record_path(output).parent == output:  # a folder
            records[record_path(output)] = read_record(output) or {}
        others += [p for p, found in records.items() if found.get("stage", job.stage) != job.stage]
        if others:
            raise InputError(
                f"{output} would replace what another stage wrote ({others[0]}); choose another "
                "--variant, --system or --output_dir"
            )


def report_up_to_date(output: PathLike) -> None:
    """Say that there is nothing to do."""
    logger.info(f"{output} is up to date, nothing to do")


def write_state(folder: Path, job: Job, **more: Any) -> None:
    """Note beside unfinished work of which job it is; more: further settings."""
    write_json(folder / STATE, {"settings": job.settings | more, "inputs": job.inputs})


def refuse_overwrite_of_several(paths: Sequence[Path]) -> None:
    """Raise InputError if several processes are to delete one of these."""
    if world_size() > 1 and any(path.exists() for path in paths):
        raise InputError(
            "--overwrite cannot be used with several processes; delete "
            f"{' and '.join(map(str, paths))} first"
        )


def lock_path(output: Path) -> Path:
    """The lock file of an output. It stays; it holds nothing."""
    return output.with_name(f".{output.name}.lock")


def acquired(lock: Path, output: Path, wait: bool = False) -> FileLock:
    """The lock, held. Raises InputError if another process writes the output, unless `wait`."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=-1 if wait else 0)
    try:
        held.acquire()
    except Timeout:
        raise InputError(
            f"{output} is being written by another process; wait for it or stop it"
        ) from None
    return held


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Wait for the lock of an output, and hold it."""
    lock = acquired(lock_path(output), output, wait=True)
    try:
        yield
    finally:
        lock.release()


def delete(paths: Iterable[Path]) -> None:
    """Delete files and folders, in this order: a record before what it describes."""
    for path in paths:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that it is there whole or not at all."""
    if folder.is_dir():
        deleted = folder.with_name(f".{folder.name}{DELETED}")
        shutil.rmtree(deleted, ignore_errors=True)  # of a process that was killed
        os.replace(folder, deleted)
        shutil.rmtree(deleted)


def remove_leftovers(output: Path) -> None:
    """Remove what killed processes left of an output; only for the holder of its lock."""
    shutil.rmtree(output.with_name(f".{output.name}{DELETED}"), ignore_errors=True)
    for path in output.parent.glob(f".{glob.escape(output.name)}{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when everything is written."""
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}folder")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        remove_folder(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def duration(seconds: float) -> str:
    """Seconds in readable units: 42 s, 7 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
