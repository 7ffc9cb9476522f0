"""Images described by their structure (objects, attributes, boxes, relations) and scored by name: schema, validator.

One JSON object a line::

    {"prompt_id": "cube-cat", "image": "images/0.png",
     "objects": [{"id": "a", "name": "cube", "attributes": ["red"], "box": [0.1, 0.4, 0.4, 0.9]},
                 {"id": "b", "name": "cat"}],
     "relations": [{"subject": "a", "predicate": "left of", "object": "b"}],
     "scores": {"objects": 0.9, "relations": 0.7}}

Images with the same ``prompt_id`` compete. Their prompt is composed from the structure, unless ``prompt`` gives one;
``mask`` names an image that says what counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from fastinvdpo._extras import require
from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.records import json_lines
from fastinvdpo.errors import InvalidInput, invalid

require("pydantic", extra="train", purpose="reading structured images")

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator  # noqa: E402

Text: TypeAlias = Annotated[str, Field(min_length=1)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_MOST_SHOWN = 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ObjectPart(_Part):
    """One object. ``box``: left, top, right, bottom as shares of the image's width and height."""

    id: Text
    name: Text
    attributes: list[Text] = []
    box: Annotated[list[Share], Field(min_length=4, max_length=4)] | None = None

    @field_validator("box")
    @classmethod
    def _corners_in_order(cls, box: list[float] | None) -> list[float] | None:
        if box is not None and not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError("is not left < right and top < bottom")
        return box

    @property
    def phrase(self) -> str:
        """``a small red cube``."""
        words = " ".join([*self.attributes, self.name])
        return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


class RelationPart(_Part):
    """``subject`` and ``object`` are ids of objects, ``predicate`` the words between them."""

    subject: Text
    predicate: Text
    object: Text


class StructuredImage(_Part):
    """One image; the module's docstring has an example. ``noise`` (the path of a .npy file) or ``seed``: what it was
    generated from.
    """

    prompt_id: Text
    image: Text
    objects: Annotated[list[ObjectPart], Field(min_length=1)]
    relations: list[RelationPart] = []
    scores: Annotated[dict[Text, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
    prompt: Text | None = None
    mask: Text | None = None
    noise: Text | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> StructuredImage:
        ids = Counter(part.id for part in self.objects)
        for name, count in ids.items():
            if count > 1:
                raise ValueError(f"has several objects with the id {name!r}")
        for name in (name for relation in self.relations for name in (relation.subject, relation.object)):
            if name not in ids:
                raise ValueError(f"has a relation with {name!r}, which is the id of no object ({', '.join(ids)})")
        return self

    @property
    def predicates(self) -> tuple[str, ...]:
        """The distinct predicates, sorted."""
        return tuple(sorted({relation.predicate for relation in self.relations}))

    def compose(self) -> str:
        """The prompt: relations first, then the objects that stand in none; "a red cube left of a cat, and a tree"."""
        if self.prompt is not None:
            return self.prompt
        by_id = {part.id: part for part in self.objects}
        clauses = [f"{by_id[r.subject].phrase} {r.predicate} {by_id[r.object].phrase}" for r in self.relations]
        related = {name for r in self.relations for name in (r.subject, r.object)}
        clauses += [part.phrase for part in self.objects if part.id not in related]
        return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"


def read_structured(path: str | Path) -> list[tuple[int, StructuredImage]]:
    """``(line, image)`` of a JSON Lines file.

    Raises:
        InvalidInput: naming line, field, value and remedy of every mistake (the first twenty); among them images of one
            prompt with different prompts, and images without a score or a mask that others have.
    """
    found: list[tuple[int, StructuredImage]] = []
    mistakes: list[str] = []
    for line, record in json_lines(Path(path)):
        try:
            if isinstance(record, BrokenRow):
                mistakes.append(str(record))
            else:
                found.append((line, StructuredImage.model_validate(record)))
        except ValidationError as error:
            mistakes += [_explained(line, dict(mistake)) for mistake in error.errors(include_url=False)]
    mistakes += _disagreements(found)
    if len(mistakes) > _MOST_SHOWN:
        mistakes = [*mistakes[:_MOST_SHOWN], f"… and {len(mistakes) - _MOST_SHOWN} more mistakes."]
    if mistakes:
        raise InvalidInput("\n".join(mistakes))
    if not found:
        raise invalid("STRUCTURED.jsonl", str(path), "holds no images", "write one object a line")
    return found


def _disagreements(images: list[tuple[int, StructuredImage]]) -> Iterator[str]:
    first: dict[str, tuple[int, str]] = {}
    names = sorted({name for _, image in images for name in image.scores})
    having = {
        field: next((line for line, image in images if getattr(image, field) is not None), None)
        for field in ("mask", "noise", "seed")
    }
    for line, image in images:
        prompt = image.compose()
        known_line, known = first.setdefault(image.prompt_id, (line, prompt))
        if prompt != known:
            problem = f"differs from {known!r} of line {known_line}, which has the same prompt_id"
            remedy = "describe the same prompt in both, or use another prompt_id"
            yield str(invalid(f"line {line}, prompt", prompt, problem, remedy))
        for field, other in having.items():
            if other is not None and getattr(image, field) is None:
                problem = f"is missing, and line {other} has one"
                yield str(invalid(f"line {line}, {field}", None, problem, "give it to every image, or to none"))
        absent = [name for name in names if name not in image.scores]
        if absent:
            problem = f"lacks {absent}, which other images have"
            yield str(invalid(f"line {line}, scores", sorted(image.scores), problem, "give every image every score"))


_REMEDIES = {
    "missing": "add it",
    "extra_forbidden": "remove it, or correct its name",
    "too_short": "give at least one",
    "string_too_short": "write some text",
}


def _explained(line: int, mistake: dict[str, Any]) -> str:
    field = f", {'.'.join(map(str, mistake['loc']))}" if mistake["loc"] else ""
    value = None if mistake["type"] == "missing" else mistake["input"]
    message = mistake["msg"].removeprefix("Value error, ")
    remedy = _REMEDIES.get(mistake["type"], "see the schema in docs/guides/data.md")
    return str(invalid(f"line {line}{field}", value, message[:1].lower() + message[1:].rstrip("."), remedy))
