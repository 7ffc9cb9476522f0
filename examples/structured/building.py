"""From several scored images per prompt to preference pairs, written as parquet with a data card beside it."""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any, TypeAlias

from fastinvdpo._examples.structured.schema import StructuredImage, read_structured
from fastinvdpo._extras import require
from fastinvdpo.atomic import atomic_file, prepare_folder
from fastinvdpo.data.images import decode, decode_mask, file_below, file_bytes
from fastinvdpo.data.writing import check_parquet_name, write_pairs
from fastinvdpo.errors import invalid

NO_RELATION = "(none)"
_KEY = "fastinvdpo.card"  # metadata of the output: SHA-256 of its card
_Queue: TypeAlias = list[tuple[int, int, bytes, str]]  # pairs given, relations, a hash, prompt


@dataclass(frozen=True)
class PairRule:
    """Which images of a prompt make a pair, and how many.

    Attributes:
        weights: the winner has the higher weighted sum of these scores. Empty: Pareto dominance, the winner is lower in
            no score and higher in at least one.
        margin: least difference of the weighted sums; under Pareto dominance of at least one score. Equal never wins.
        max_pairs: pairs of one prompt, at most.
        balance: about equally many pairs for every relation, see :func:`choose_pairs`.
        seed: which pairs are taken where there are more, and on which side the winner stands.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    margin: float = 0.0
    max_pairs: int = 4
    balance: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise invalid("margin", self.margin, "is not a difference of scores", "use 0 or more")
        if self.max_pairs < 1:
            raise invalid("max_pairs", self.max_pairs, "leaves no pair", "use 1 or more")

    def total(self, scores: Mapping[str, float]) -> float:
        """The weighted sum."""
        return sum(weight * scores[name] for name, weight in self.weights.items())

    def prefers(self, first: Mapping[str, float], second: Mapping[str, float]) -> bool:
        """Whether an image with the scores ``first`` wins over one with ``second``."""
        gains = [first[name] - second[name] for name in first]
        if self.weights:
            gains = [self.total(first) - self.total(second)]
        return min(gains) >= 0 and max(gains) > 0 and max(gains) >= self.margin


@dataclass(frozen=True)
class BuiltPair:
    """A pair as numbers of images in the list; ``relation`` is the one that it was taken for."""

    winner: int
    loser: int
    relation: str


def build_pairs(
    structured: str | Path, output: str | Path, rule: PairRule, *, image_root: str | Path | None = None
) -> list[BuiltPair]:
    """Read structured images, choose pairs, write them to ``output`` (parquet) and a data card beside it (``.md``).

    Args:
        image_root: directory that image paths are relative to; that of ``structured`` when None.

    Raises:
        InvalidInput: mistakes in the file, unknown scores in ``rule.weights``, an unreadable image, no pair, or an
            output that is there already.
    """
    source, target = Path(structured), Path(output)
    card = target.with_suffix(".md")
    check_parquet_name(target)
    prepare_folder(Path(os.path.realpath(target)).parent)
    lines = read_structured(source)
    images = [image for _, image in lines]
    known = sorted(images[0].scores)
    for name in rule.weights:
        if name not in known:
            raise invalid("weights", name, "is the name of no score", f"use names among {', '.join(known)}")
    pairs = choose_pairs(images, rule)
    if not pairs:
        problem = "gives no pair: no image of a prompt wins over another by the margin"
        raise invalid("STRUCTURED.jsonl", str(source), problem, "lower the margin, or add images")
    text = _card(target.name, source, images, pairs, rule)
    key = {_KEY: hashlib.sha256(text.encode()).hexdigest()}
    # Killed before it wrote the card, it left pairs that are complete.
    complete = target.is_file() and not os.path.lexists(card) and _stored_key(target) == key[_KEY]
    for path in (card,) if complete else (target, card):
        if os.path.lexists(path):
            raise invalid("output", str(path), "is there already", "name another output, or delete it")
    root = source.parent if image_root is None else Path(image_root)
    if not complete:
        write_pairs(target, _rows(pairs, lines, root, rule), new=True, metadata=key)
    with atomic_file(card, new=True) as partial:
        partial.write_text(text, "utf-8")
    return pairs


def _stored_key(file: Path) -> str | None:
    parquet = require("pyarrow.parquet", extra="train", purpose="writing preference pairs")
    arrow = require("pyarrow", extra="train", purpose="writing preference pairs")
    try:
        found: dict[bytes, bytes] = parquet.read_metadata(file).metadata or {}
    except (OSError, arrow.ArrowException):  # not parquet
        return None
    return found.get(_KEY.encode(), b"").decode()


def choose_pairs(images: Sequence[StructuredImage], rule: PairRule) -> list[BuiltPair]:
    """The pairs of every prompt, in the order of the prompts.

    With ``rule.balance``, relations take turns: the one with the fewest pairs takes the next, from the prompt that has
    given the fewest. A pair counts for one relation, though its prompt may have several. It ends when the turn is that
    of a relation whose prompts have nothing left, so that no relation gets more than one pair above another; relations
    whose prompts have no pair at all stand aside.
    """
    groups: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.prompt_id, []).append(number)
    offers = {prompt: _candidates(images, members, rule) for prompt, members in groups.items()}
    offers = {prompt: pairs for prompt, pairs in offers.items() if pairs}
    relations = {prompt: images[groups[prompt][0]].predicates or (NO_RELATION,) for prompt in offers}
    sizes = {prompt: len(pairs) for prompt, pairs in offers.items()}
    if rule.balance:
        taken = _balanced(sizes, relations, rule.seed)
    else:
        taken = {prompt: [of[k % len(of)] for k in range(sizes[prompt])] for prompt, of in relations.items()}
    return [
        BuiltPair(winner, loser, relation)
        for prompt, pairs in offers.items()
        for (winner, loser), relation in zip(pairs, taken[prompt], strict=False)
    ]


def _candidates(images: Sequence[StructuredImage], members: Sequence[int], rule: PairRule) -> list[tuple[int, int]]:
    """At most ``max_pairs`` pairs (winner, loser) of one prompt, in an order that follows from the seed."""
    distinct = {
        (images[winner].image, images[loser].image): (winner, loser)
        for winner, loser in permutations(members, 2)
        if images[winner].image != images[loser].image and rule.prefers(images[winner].scores, images[loser].scores)
    }
    return [distinct[names] for names in sorted(distinct, key=lambda names: _hash(rule.seed, *names))][: rule.max_pairs]


def _balanced(sizes: Mapping[str, int], relations: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """For every prompt the relations that its first pairs are taken for."""
    taken: dict[str, list[str]] = {prompt: [] for prompt in sizes}
    queues: dict[str, _Queue] = {}
    for prompt, own in relations.items():
        for relation in own:
            heapq.heappush(queues.setdefault(relation, []), (0, len(own), _hash(seed, prompt), prompt))
    # Rare relations choose first, and every prompt serves first those relations that have fewest others to turn to.
    offered = {relation: sum(sizes[prompt] for *_, prompt in queue) for relation, queue in queues.items()}
    counts = dict.fromkeys(sorted(queues, key=lambda relation: (offered[relation], relation)), 0)
    while counts:
        lowest = min(counts.values())
        turn = [relation for relation, count in counts.items() if count == lowest]
        served = [relation for relation in turn if _take(queues[relation], relation, sizes, taken)]
        counts |= dict.fromkeys(served, lowest + 1)
        if len(served) < len(turn):
            break
    return taken


def _take(queue: _Queue, relation: str, sizes: Mapping[str, int], taken: dict[str, list[str]]) -> bool:
    """Give ``relation`` a pair of the prompt that has given the fewest; False when none is left."""
    while queue:
        given, others, order, prompt = heapq.heappop(queue)
        now = len(taken[prompt])
        if now == sizes[prompt]:
            continue
        if given == now:
            taken[prompt].append(relation)
        heapq.heappush(queue, (len(taken[prompt]), others, order, prompt))
        if given == now:
            return True
    return False


def _rows(
    pairs: Sequence[BuiltPair], lines: Sequence[tuple[int, StructuredImage]], root: Path, rule: PairRule
) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        names = [lines[number][1].image for number in (pair.winner, pair.loser)]
        first_wins = _hash(rule.seed, "side", *names)[0] < 128
        row: dict[str, Any] = {"label_0": float(first_wins), "label_1": float(not first_wins)}
        row["caption"] = lines[pair.winner][1].compose()
        for side, number in enumerate((pair.winner, pair.loser) if first_wins else (pair.loser, pair.winner)):
            line, image = lines[number]
            where = f"line {line}, image {image.image!r}"
            data = file_bytes(file_below([root], image.image, where), where)
            size = decode(data, where).size[::-1]
            row[f"jpg_{side}"] = bytes(data)
            if image.mask is not None:
                where = f"line {line}, mask {image.mask!r}"
                mask = file_bytes(file_below([root], image.mask, where), where)
                decode_mask(mask, where, size)
                row[f"mask_{side}"] = bytes(mask)
            if rule.weights:
                row[f"score_{side}"] = rule.total(image.scores)
            if image.noise is not None:
                where = f"line {line}, noise {image.noise!r}"
                row[f"noise_{side}"] = bytes(file_bytes(file_below([root], image.noise, where), where))
            if image.seed is not None:
                row[f"seed_{side}"] = image.seed
        yield row


def relation_counts(pairs: Sequence[BuiltPair]) -> Counter[str]:
    """How many pairs were taken for every relation."""
    return Counter(pair.relation for pair in pairs)


def parse_weights(options: Sequence[str]) -> dict[str, float]:
    """``["objects=1", "relations=0.5"]`` as numbers by name."""
    weights = {}
    for option in options:
        name, _, number = option.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise invalid("weight", option, "is not NAME=NUMBER", "write, say, relations=0.5") from None
        if not name or not math.isfinite(weights[name]):
            raise invalid("weight", option, "is not a weight", "write, say, relations=0.5")
    return weights


def _card(
    name: str, source: Path, images: Sequence[StructuredImage], pairs: Sequence[BuiltPair], rule: PairRule
) -> str:
    """A data card of the hub: what the pairs were made from, by which rule, and what came out."""
    hub = require("huggingface_hub", extra="train", purpose="writing a data card")
    prompts = len({image.prompt_id for image in images})
    paired = len({images[pair.winner].prompt_id for pair in pairs})
    how = "an image wins that is lower in no score and higher in at least one (Pareto dominance)"
    if rule.weights:
        sums = " + ".join(f"{weight:g} · {name}" for name, weight in rule.weights.items())
        how = f"the image with the higher {sums} wins"
    gains = []
    for score in sorted(images[0].scores):
        won, lost = ([images[getattr(pair, side)].scores[score] for pair in pairs] for side in ("winner", "loser"))
        gain = [a - b for a, b in zip(won, lost, strict=True)]
        gains.append(
            [score, *(f"{x:.4g}" for x in (statistics.fmean(won), statistics.fmean(lost), min(gain), max(gain)))]
        )
    front = hub.DatasetCardData(pretty_name=name, task_categories=["text-to-image"], tags=["preference", "dpo"])
    text = f"""# {name}

{len(pairs)} preference pairs of {paired} prompts, built by `fastinvdpo data build`.

## Source

- `{source.name}`, SHA-256 `{hashlib.sha256(source.read_bytes()).hexdigest()}`
- {len(images)} images of {prompts} prompts; {prompts - paired} prompts gave no pair

## Rule

- {how}
- margin at least {rule.margin:g}, at most {rule.max_pairs} pairs a prompt, relations served \
{"in turns" if rule.balance else "as they come"}, seed {rule.seed}

## Relations

{_table(["relation", "pairs"], sorted(relation_counts(pairs).items()))}

## Scores

{_table(["score", "mean of winners", "mean of losers", "least gain", "greatest gain"], gains)}
"""
    return str(hub.DatasetCard(f"---\n{front.to_yaml()}\n---\n\n{text}"))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _hash(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join(["fastinvdpo.pairs", str(seed), *parts]).encode()).digest()
