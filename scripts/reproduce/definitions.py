"""The tables of configs/tables/: which rows each has, and what is run for a row.

configs/tables/rows.yaml says what a row holds, and has the rows that several tables share.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mllmrec.stage.errors import InputError
from mllmrec.stage.options import ROOT, nearest
from mllmrec.stage.schema import problem

FOLDER = ROOT / "configs/tables"
SHARED = "rows.yaml"
KNOWN_KEYS = ConfigDict(extra="forbid")
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=KNOWN_KEYS)
class TableRow:
    """A row of a table; configs/tables/rows.yaml describes its keys. stage_1: of its world."""

    label: Text
    scores: Text
    steps: list[Text]
    stage_1: str
    world: Text = "main"
    against: str = ""
    preferences: str = ""


@dataclass(frozen=True, config=KNOWN_KEYS)
class Table:
    """A table.

    about: what it shows; retrieved: its lists are a retriever's, and may lack the target; costs:
    also tokens and seconds per user; statistics: names of stats.json, for a table that has a row
    for each config and no others.
    """

    about: Text
    rows: dict[str, TableRow] = field(default_factory=dict)
    retrieved: bool = False
    costs: bool = False
    statistics: list[Text] = field(default_factory=list)


_GIVEN = TypeAdapter(dict[str, dict[str, Any] | None])
_TABLE = TypeAdapter(Table)


def table_names() -> list[str]:
    """Names of all tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != SHARED)


def read_table(name: str, folder: Path = FOLDER) -> Table:
    """The table of NAME.yaml in `folder`.

    Raises InputError for an unknown key, row or world, and for a row that is compared with one that
    is not there or has other data.
    """
    path, shared = folder / f"{name}.yaml", _read_yaml(folder / SHARED)
    content = _read_yaml(path)
    try:
        given = _GIVEN.validate_python(content.get("rows", {}))
        rows = {key: _complete(f"{path}: {key}", key, own, shared) for key, own in given.items()}
        table = _TABLE.validate_python(content | {"rows": rows})
    except ValidationError as error:
        raise InputError(f"{path}: {problem(error)}; correct the file") from None
    for key, row in table.rows.items():
        other = table.rows.get(row.against)
        if row.against and (other is None or other.world != row.world):
            raise InputError(f"{path}: {key}: {row.against!r} is no row of the same table and data")
    return table


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(table_names())
        raise InputError(f"there is no table {path.stem!r}; choose one of: {known}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold 'key: value' lines")
    return content


def _complete(
    where: str, key: str, own: dict[str, Any] | None, shared: dict[str, Any]
) -> dict[str, Any]:
    """A row with what it takes from rows.yaml. own: as in the table's file, None for `key:`."""

    def known(kind: str, name: str) -> Any:
        if name not in shared[kind]:
            raise InputError(f"{where}: {SHARED} has no {name!r}{nearest(name, [*shared[kind]])}")
        return shared[kind][name]

    row = dict(own) if own else {"like": key}
    if "like" in row:
        row = known("rows", row.pop("like")) | row
    return row | {"stage_1": known("worlds", row.get("world", "main"))}
