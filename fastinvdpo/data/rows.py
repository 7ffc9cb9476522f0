"""Where images come from, and what a stored row says of winner, caption and scores, or whether an image was liked: read
by value, or refused as broken.

A source is a numbered list of rows. Labels, captions and scores of all rows are in memory, since they are small; the
encoded bytes of an image are read when they are needed.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinvdpo.data.broken import BrokenRow, broken
from fastinvdpo.errors import InvalidInput, invalid

LABELS, SCORES, IMAGES = ("label_0", "label_1"), ("score_0", "score_1"), ("jpg_0", "jpg_1")
MASKS = ("mask", "mask_0", "mask_1")  # one for both images, or one for each
# What each image was generated from: its initial latent as the bytes of a .npy file, or the seed of that.
NOISES, SEEDS = ("noise_0", "noise_1"), ("seed_0", "seed_1")
SOURCE = "source"  # the image that both images of a pair were edited from
SCHEMA = (*IMAGES, *LABELS, "caption", *SCORES, *MASKS, SOURCE, *NOISES, *SEEDS)
# Other ways to say which of two images won: the number, name or path of one of them. In a row there may be "members"
# besides, 0 where the images themselves are named winner and loser.
CHOICES = ("winner", "loser", "label")
TIE = -1
DAMAGED = "is damaged text: it holds NUL or ESC, or half of a character"
_DAMAGE = re.compile("[\0\x1b\ud800-\udfff]")
_ALIASES = {
    **{"jpg_0": ("jpg_0", "image_0"), "jpg_1": ("jpg_1", "image_1"), "image": ("image", "jpg")},
    "caption": ("caption", "prompt"),
}
_SIDES: dict[Any, int] = {0: 0, 1: 1, 0.5: TIE, "0": 0, "1": 1, "tie": TIE}
_SUM_TOLERANCE = 1e-6
_LABEL_REMEDY = "store 1/0 or 0/1 for a winner, 0.5/0.5 for a tie"
_LIKED: dict[Any, bool] = {
    **dict.fromkeys((0, "0", "false", "dislike", "disliked"), False),
    **dict.fromkeys((1, "1", "true", "like", "liked"), True),
}


@dataclass(frozen=True)
class Form:
    """What a row holds: the names of its ``images``, of all its parts (``schema``) and of those among them that say
    which image is preferred (``labels``); ``choices``: other keys that may say so; ``listing``: the file that lists the
    rows of a folder; ``remedy``: what to do about a row that does not say it.
    """

    images: tuple[str, ...]
    schema: tuple[str, ...]
    labels: tuple[str, ...]
    choices: tuple[str, ...]
    listing: str
    remedy: str


_PAIR_REMEDY = f"store the winner in label_0, label_1 or one of {', '.join(CHOICES)}"
PAIRS = Form(IMAGES, SCHEMA, LABELS, CHOICES, "pairs.jsonl", _PAIR_REMEDY)
_LIKE = ("image", "liked", "caption")
LIKES = Form(_LIKE[:1], _LIKE, _LIKE[1:2], ("label",), "likes.jsonl", "store 1 or 0 in liked or label")
CAPTIONED = Form(_LIKE[:1], ("image", "caption"), (), (), "images.jsonl", "store an image and its caption")
FORMS = {"pairs": PAIRS, "likes": LIKES, "images": CAPTIONED}
"""By their names in the configuration: two images that were compared, one that was liked or disliked, or one with its
caption.
"""


class WrongForm(InvalidInput):
    """The data have rows of another form."""


class PairSource(ABC):
    """Rows of pairs, or of the images of another form, addressed by number.

    Attributes:
        path: what the user named; form: what a row is; format: one of :data:`fastinvdpo.data.sources.FORMATS`;
            names: data.columns.
        split: the part of a ``datasets`` repository; None for other formats.
        streaming: images are not looked at before they are used, and the order of an epoch follows :meth:`groups`.
        remote: rows are read from another machine.
        groups_per_window: how many groups are mixed with one another.
        stored: what :meth:`resolve` returned last.
        frames: how many of a video are read, the first; None: images.
        sources: whether source images are demanded, or refused; None where it does not matter.
        masks: whether masks are read; mask_names: then those of image 0 and of image 1, after :meth:`resolve`.
    """

    path: str
    format: str
    names: Mapping[str, str]
    form: Form = PAIRS
    split: str | None = None
    streaming: bool = False
    remote: bool = False
    groups_per_window: int = 1
    frames: int | None = None
    sources: bool | None = None
    masks: bool = False
    mask_names: tuple[str, str] | None = None
    stored: Set[str] = frozenset()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def resolve(self, required: Sequence[str]) -> set[str]:
        """Names of the schema that are stored. Raises ``InvalidInput`` where a required one is not.

        The first label of the form stands for every way to say what is preferred.
        """

    @abstractmethod
    def values(self, row: int) -> Mapping[str, Any]:
        """Labels, caption and scores as they are stored, by the names of the schema. After :meth:`resolve`.

        Raises ``BrokenRow`` where the row could not even be read.
        """

    @abstractmethod
    def _bytes(self, row: int, name: str) -> memoryview: ...

    @abstractmethod
    def files(self) -> list[Path]:
        """Every local file that the pairs follow from. Raises ``InvalidInput`` where they are not all local."""

    def record(self, row: int) -> Row:
        """What :meth:`values` of a row mean."""
        return Row(self, row, self.values(row))

    def encoded(self, row: int, name: str) -> memoryview:
        """The bytes of one of ``form.images``, :data:`MASKS`, :data:`NOISES` or :data:`SOURCE`. Raises ``BrokenRow``
        where a row has none.
        """
        try:
            return self._bytes(row, name)
        except BrokenRow as error:
            raise BrokenRow("malformed noise", str(error)) if name in NOISES else error from None

    def image(self, row: int, side: int) -> memoryview:
        """The encoded bytes of image 0 or 1."""
        return self.encoded(row, self.form.images[side])

    def mask(self, row: int, side: int) -> memoryview | None:
        """The encoded bytes of the mask of image 0 or 1, None where masks are not read."""
        return None if self.mask_names is None else self.encoded(row, self.mask_names[side])

    @property
    def stored_beside(self) -> tuple[str, ...]:
        """Images that :meth:`resolve` found beside those of a pair: masks, and the source."""
        return (*self.stored_masks, *((SOURCE,) if SOURCE in self.stored else ()))

    @property
    def stored_masks(self) -> tuple[str, ...]:
        """Those of :data:`MASKS` that :meth:`resolve` found."""
        return tuple(name for name in MASKS if name in self.stored)

    def with_masks(self, read: bool = True) -> PairSource:
        """The source itself, which reads masks from the next :meth:`resolve` on: ``mask`` for both images of a row, or
        ``mask_0`` and ``mask_1``.
        """
        self.masks = read
        return self

    def with_frames(self, frames: int | None) -> PairSource:
        """The source itself, which reads so many frames of a video in the place of an image."""
        if frames is not None and (type(frames) is not int or frames < 1):
            raise invalid("data.frames", frames, "is no number of frames", "give a whole number, such as 17, or null")
        self.frames = frames
        return self

    def with_sources(self, read: bool | None = True) -> PairSource:
        """The source itself, which from the next :meth:`resolve` on demands a source image of every row, or with False
        refuses data that have any.
        """
        self.sources = read
        return self

    def choose_masks(self, stored: set[str]) -> set[str]:
        """``stored``, which :meth:`resolve` is to return; its masks are those that count from now on. Raises
        ``InvalidInput`` where masks are to be read, and there are none, or not one for each image, and where source
        images are not as :meth:`with_sources` said.
        """
        self.stored, self.mask_names = stored, None
        if self.sources is not None and self.sources != (SOURCE in stored):
            problem = f"has source images in {self.shown(SOURCE)!r}, and model.family is of models that take none"
            remedy = "choose a family that edits, or remove the column"
            if self.sources:
                problem = (
                    f"has no {self.shown(SOURCE)!r}, the image that a pair was edited from, and model.family edits"
                )
                remedy = f"store one in every row, or name yours with data.columns, as in {{{SOURCE}: YOUR_COLUMN}}"
            raise invalid("data.path", self.path, problem, remedy)
        if self.masks and self.form is not PAIRS:
            raise invalid("data.masks", True, "is read of pairs alone", "set it to false")
        if self.masks:
            self.mask_names = {MASKS[:1]: (MASKS[0], MASKS[0]), MASKS[1:]: MASKS[1:]}.get(self.stored_masks)
            if self.mask_names is None:
                found = " and ".join(map(self.shown, self.stored_masks)) or "no masks"
                remedy = "store mask, or mask_0 and mask_1; name yours in data.columns; or set data.masks to false"
                raise invalid("data.masks", True, f"{self.path} has {found}", remedy)
        return stored

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


@dataclass(frozen=True, slots=True)
class Row:
    """The ``values`` of a row; every reading raises ``BrokenRow`` for what is not there or means nothing."""

    source: PairSource
    number: int
    values: Mapping[str, Any]

    def winner(self) -> int:
        """0 or 1, the side that won, or :data:`TIE`. One of the two labels is enough; everything that is there must
        agree.
        """
        claims = {"labels": self._by_labels()} if self.values.keys() & set(LABELS) else {}
        for key in (*CHOICES, "members"):
            if key in self.values:
                side = self._by_choice(key)
                claims[key] = 1 - side if key == "loser" and side != TIE else side
        return int(self._agreed(claims))

    def liked(self) -> bool:
        """Whether the image was liked; everything that is there must agree."""
        claims = dict[str, bool]()
        for key in (*LIKES.labels, *LIKES.choices):
            if key in self.values:
                value = self.values[key].lower() if isinstance(self.values[key], str) else self.values[key]
                if not isinstance(value, int | float | str) or value not in _LIKED:
                    problem = "says neither that the image was liked nor that it was not"
                    raise self._broken("malformed label", key, problem, "store 1 or 0, true or false")
                claims[key] = _LIKED[value]
        return bool(self._agreed(claims))

    def scores(self) -> tuple[float, float]:
        """The scores of image 0 and 1, finite numbers."""
        first, second = (number(self.values.get(name)) for name in SCORES)
        if first is None or second is None:
            name = SCORES[0 if first is None else 1]
            raise self._broken("malformed score", name, "is not a finite number", "store a number in every row")
        return first, second

    def seeds(self) -> tuple[int, int]:
        """The seeds of image 0 and 1, whole numbers from 0 to 2⁶³ − 1."""
        for name in SEEDS:
            if not is_seed(self.values.get(name)):
                raise self._broken("malformed noise", name, "is not the seed of a generator", "store a whole number")
        return self.values[SEEDS[0]], self.values[SEEDS[1]]

    def caption(self) -> str:
        """The caption, without a byte order mark."""
        caption = self.values.get("caption")
        if not isinstance(caption, str):
            raise self._broken("missing caption", "caption", "is not a string", "store text; '' means no prompt")
        if is_damaged(caption):
            raise self._broken("malformed caption", "caption", DAMAGED, "write it again as UTF-8")
        return caption.removeprefix("\ufeff")

    def labels(self) -> tuple[float | None, float | None]:
        """Both labels as numbers, the one that is not stored from the other; None for what is no number."""
        first, second = (number(self.values.get(name)) for name in LABELS)
        if "label_0" not in self.values and second is not None:
            first = 1.0 - second
        if "label_1" not in self.values and first is not None:
            second = 1.0 - first
        return first, second

    def _by_labels(self) -> int:
        first, second = found = self.labels()
        for name, value in zip(LABELS, found, strict=True):
            if name in self.values and (value is None or not 0.0 <= value <= 1.0):
                problem = "is not a finite number" if value is None else "is not in [0, 1]"
                raise self._broken("malformed label", name, problem, _LABEL_REMEDY)
        assert first is not None and second is not None  # looked at above
        if abs(first + second - 1.0) > _SUM_TOLERANCE:
            where = self.source.where(self.number, *LABELS)
            raise broken("malformed label", where, found, "do not sum to 1", _LABEL_REMEDY)
        return TIE if abs(first - second) <= _SUM_TOLERANCE else int(second > first)

    def _by_choice(self, key: str) -> int:
        value, meant = self.values[key], set[int]()
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            meant = {_SIDES[value]} if value in _SIDES else set()
            images = [self.values.get(name) for name in IMAGES]
            for side, name in enumerate(IMAGES):
                if value in stored_under(name, self.source.names) or (value == images[side] != images[1 - side]):
                    meant.add(side)
        if len(meant) == 1:
            return meant.pop()
        problem = f"names {'both images' if meant else 'neither image'}"
        remedy = "name the image by 0 or 1, by its key or path, or write 'tie'"
        raise self._broken("malformed label", key, problem, remedy)

    def _agreed(self, claims: Mapping[str, int]) -> int:
        """What all fields say of the preference."""
        if len(set(claims.values())) == 1:
            return next(iter(claims.values()))
        form, where = self.source.form, self.source.where(self.number, *self.source.form.labels)
        if not claims:
            raise broken("malformed label", where, None, "nothing says which image is preferred", form.remedy)
        shown = {key: self.values[key] for key in (*form.labels, *form.choices, "members") if key in self.values}
        remedy = "correct the row, or name what counts with data.columns"
        raise broken("malformed label", where, shown, "contradict one another", remedy)

    def _broken(self, cause: str, name: str, problem: str, remedy: str) -> BrokenRow:
        return broken(cause, self.source.where(self.number, name), self.values.get(name), problem, remedy)


def stored_under(name: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """Under which keys a part of the schema may be stored; ``names`` (data.columns) leaves one."""
    return (names[name],) if name in names else _ALIASES.get(name, (name,))


def choices(names: Mapping[str, str], form: Form = PAIRS) -> tuple[str, ...]:
    """The further keys that say who won. Labels that data.columns names count alone."""
    return () if set(names) & set(form.labels) else form.choices


def is_damaged(text: str) -> bool:
    """Whether text holds what only a wrong encoding puts there."""
    return _DAMAGE.search(text) is not None


def is_seed(value: Any) -> bool:
    """Whether a generator takes it: a whole number from 0 to 2⁶³ − 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None
