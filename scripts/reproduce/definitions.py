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
from mllmrec.stage.options import ROOT
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

    about: what it shows; retrieved: its lists are a retriever's, and may lack the target; cold: the
    users with a new and with a known target stand side by side; costs: also tokens and seconds per
    user; statistics: names of stats.json, for a table that has a row for each config and no others.
    """

    about: Text
    rows: dict[str, TableRow] = field(default_factory=dict)
    retrieved: bool = False
    cold: bool = False
    costs: bool = False
    statistics: list[Text] = field(default_factory=list)


_CONTENT = TypeAdapter(dict[str, Any])
_ROWS = TypeAdapter(dict[str, dict[str, Any] | None])
_TABLE = TypeAdapter(Table)


def table_names() -> list[str]:
    """Names of all tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != SHARED)


def read_table(name: str, folder: Path = FOLDER) -> Table:
    """The table of NAME.yaml in `folder`.

    Raises InputError for an unknown table, key, row or world, and for a row that is compared with
    one that is not there or has other data.
    """
    path = folder / f"{name}.yaml"
    if not path.exists() or path.name == SHARED:
        known = ", ".join(table_names())
        raise InputError(f"there is no table {name!r}; choose one of: {known}")
    try:
        shared, content = (
            _CONTENT.validate_python(yaml.safe_load(own.read_text(encoding="utf-8")))
            for own in (folder / SHARED, path)
        )
        given = _ROWS.validate_python(content.get("rows", {}))
        rows = {key: _complete(own or {"like": key}, shared) for key, own in given.items()}
        table = _TABLE.validate_python(content | {"rows": rows})
    except ValidationError as error:
        raise InputError(f"{path}: {problem(error)}; correct the file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except KeyError as error:
        raise InputError(f"{path}: {SHARED} has no {error}; correct the file") from None
    for key, row in table.rows.items():
        other = table.rows.get(row.against)
        if row.against and (other is None or other.world != row.world):
            raise InputError(f"{path}: {key}: {row.against!r} is no row of the same table and data")
    return table


def _complete(own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """A row with what it takes from rows.yaml."""
    row = own
    if "like" in own:
        row = shared["rows"][own["like"]] | own
        del row["like"]
    return row | {"stage_1": shared["worlds"][row.get("world", "main")]}
