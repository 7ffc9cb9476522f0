"""Preference pairs of the demos, as rows of a parquet file."""

from __future__ import annotations

from collections.abc import Sequence

from fastinvdpo.errors import invalid


def check_preference(preference: str, known: Sequence[str]) -> None:
    """Raise InvalidInput unless ``preference`` is one of the demo's."""
    if preference not in known:
        raise invalid("preference", preference, "is not a preference of the demo", f"choose one of {', '.join(known)}")


def score_range(rows: Sequence[dict]) -> float:
    """Largest minus smallest score of a set of pairs: the kappa that SmPO divides score differences by."""
    values = [row[key] for row in rows for key in ("score_0", "score_1")]
    return max(values) - min(values)


def pair_row(images: Sequence[bytes], scores: Sequence[float], caption: str) -> dict:
    """One row of the schema jpg_0, jpg_1, label_0, label_1, caption, score_0, score_1; the higher score wins."""
    return {
        "jpg_0": images[0],
        "jpg_1": images[1],
        "label_0": float(scores[0] > scores[1]),
        "label_1": float(scores[1] > scores[0]),
        "caption": caption,
        "score_0": float(scores[0]),
        "score_1": float(scores[1]),
    }
