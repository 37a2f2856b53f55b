"""Results that print as a table, iterate over their rows and turn into plain dicts."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..optim.description import NamedRow, Rows, text_table


class Table(Rows[NamedRow]):
    """Rows that are dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [{field: value}]}: numbers, strings, lists and None alone, so that any format can hold it."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}  # type: ignore[call-overload]

    def _cells(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        raise NotImplementedError

    def __str__(self) -> str:
        columns, cells = self._cells()
        return text_table(columns, cells)

    def __repr__(self) -> str:
        return str(self)


def shown(x: float) -> str:
    """Four digits; nothing where there is no number."""
    return "" if math.isnan(x) else f"{x:.4g}"


def check_names(asked: Iterable[str], known: Sequence[str], what: str) -> list[str]:
    """The names as a list; ValueError with the near ones where one is not known."""
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, not {type(name).__name__}")
        if name not in known:
            inside = [other for other in known if name and name.split(".")[-1] in other.split(".")]
            near = list(dict.fromkeys([*difflib.get_close_matches(name, known, n=5), *inside[:5]]))[:5]
            near = near or [other for other in known if other][:5]
            raise ValueError(f"{what} {name!r} is not in the model; near names: {', '.join(map(repr, near)) or 'none'}")
    return names
