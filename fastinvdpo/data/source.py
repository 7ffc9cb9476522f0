"""Where pairs come from: what every format offers.

A source is a numbered list of rows. Labels, captions and scores of all rows are in memory, since they are small; the
encoded bytes of an image are read when they are needed. ``PairDataset`` does the rest: which side won, what is broken,
decoding and cropping.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class PairSource(ABC):
    """Rows of pairs, addressed by number.

    Attributes:
        path: what the user named; format: one of :data:`fastinvdpo.data.sources.FORMATS`; names: data.columns.
        split: the part of a ``datasets`` repository; None for formats whose files tell the part.
        streaming: images are not looked at before they are used, and the order of an epoch follows :meth:`groups`.
        remote: rows are read from another machine.
        groups_per_window: how many groups are mixed with one another.
    """

    path: str
    format: str
    names: Mapping[str, str]
    split: str | None = None
    streaming: bool = False
    remote: bool = False
    groups_per_window: int = 1

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def resolve(self, required: Sequence[str]) -> set[str]:
        """Names of the schema that are stored. Raises ``InvalidInput`` where a required one is not.

        ``label_0`` stands for every way to name the winner.
        """

    @abstractmethod
    def record(self, row: int) -> Mapping[str, Any]:
        """Labels, caption and scores as they are stored, by the names of the schema. After :meth:`resolve`.

        Raises ``BrokenRow`` where the row could not even be read.
        """

    @abstractmethod
    def image(self, row: int, side: int) -> memoryview:
        """The encoded bytes of image 0 or 1. Raises ``BrokenRow`` where there are none."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every local file that the pairs follow from. Raises ``InvalidInput`` where they are not all local."""

    def shown(self, name: str) -> str:
        """The name under which a part of the schema is stored, for messages."""
        return self.names.get(name, name)

    def place(self, row: int) -> str:
        """File and line of a row, for the list of broken rows."""
        return f"row {row}"

    def where(self, row: int, *names: str) -> str:
        """Row and columns, as errors name them."""
        shown = " and ".join(repr(self.shown(name)) for name in names)
        return f"{self.place(row)}, column{'s' if len(names) > 1 else ''} {shown}"

    def groups(self) -> list[int] | None:
        """Sizes of consecutive groups of rows that are read together; None where rows are read one by one."""
        return None

    def column_names(self) -> list[str]:
        """All stored columns, those that are no part of the schema too; empty where rows are no table.

        Raises ``InvalidInput`` where the files of a table have different ones.
        """
        return []

    def tables(self, columns: list[str] | None = None) -> Iterator[Any]:
        """All rows, with all columns or some, as pieces of a ``pyarrow.Table``; nothing where rows are no table."""
        return iter(())

    def footers(self) -> list[Mapping[bytes, bytes]]:
        """The metadata of every parquet file; empty for other formats."""
        return []
