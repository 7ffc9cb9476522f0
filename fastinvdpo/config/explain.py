"""Turns pydantic's error list into one message in the project's form: key, value, problem, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from fastinvdpo.errors import InvalidInput, invalid

KnownKeys = Callable[[tuple[str, ...]], list[str]]

_TYPE_REMEDIES = {
    "float_type": "write a number, such as 0.5 or 1.0e-8",
    "int_type": "write a whole number",
    "bool_type": "write true or false",
    "string_type": "write text, in quotes if it looks like a number",
    "list_type": "write a list, such as [to_q, to_k]",
}
_MAPPINGS = ("dict_type", "model_type", "model_attributes_type", "dataclass_type")
_TYPE_REMEDIES |= dict.fromkeys(_MAPPINGS, "write a mapping of key: value pairs")


def explain(error: ValidationError, known_keys: KnownKeys, section: tuple[str, ...] = ()) -> InvalidInput:
    """All mistakes that pydantic found in a section, as one :class:`InvalidInput` with one line each."""
    lines = [_line(dict(mistake), known_keys, section) for mistake in error.errors(include_url=False)]
    return InvalidInput("\n".join(dict.fromkeys(lines)))


def under(section: str, error: InvalidInput) -> InvalidInput:
    """The error of a section's own options, with their full keys."""
    return InvalidInput(f"{section}.{error}")


def _line(mistake: dict[str, Any], known_keys: KnownKeys, section: tuple[str, ...]) -> str:
    location = (*section, *(str(part) for part in mistake["loc"]))
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    key = _key(location)
    if isinstance(context.get("error"), InvalidInput):  # of a method's options, of a field, or of the whole
        names = section[:1] if section[:1] == ("method",) else [part for part in location if not part.isdigit()][:-1]
        return ".".join([*names, str(context["error"])])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(location, value, known_keys)
    if kind == "missing":
        return str(invalid(key, None, "is missing and has no default", f"add it, for example {key}=..."))
    if kind == "literal_error":
        return str(invalid(key, value, "is not a possible value", f"choose one of {context['expected']}"))
    problem = mistake["msg"].removeprefix("Value error, ").rstrip(".")
    remedy = _TYPE_REMEDIES.get(kind, "choose a value in that range")
    return str(invalid(key, value, problem[:1].lower() + problem[1:], remedy))


def _key(location: tuple[str, ...]) -> str:
    """The key as the user wrote it; the method's name stands between "method" and the key."""
    return ".".join(("method", *location[2:]) if len(location) > 2 and location[0] == "method" else location)


def _unknown(location: tuple[str, ...], value: Any, known_keys: KnownKeys) -> str:
    *section, name = location
    known = known_keys(tuple(section))
    key = _key(location)
    if section[:1] == ["method"] and name in known_keys(("method",)):
        problem = f"is an option of another method, not of {section[1]!r}"
        return str(invalid(key, value, problem, f"remove it; options here: {', '.join(known)}"))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    prefix = key.rpartition(".")[0]
    elsewhere = [top for top in known_keys(()) if name in known_keys((top,)) and top != prefix]
    if close:
        remedy = f"did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    elif elsewhere:
        remedy = f"did you mean {elsewhere[0]}.{name}?"
    else:
        remedy = f"remove it; known keys here: {', '.join(known)}"
    shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else value
    return str(invalid(key, shown, "is not a known key", remedy)).replace("?.", "?")
