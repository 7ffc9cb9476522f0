"""The demo's judge: reads generated pictures and tells digit, reward under a preference, and distance to real scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastinvdpo._examples.digits import digits
from fastinvdpo._extras import require
from fastinvdpo.evaluation.metrics import accuracy, frechet_distance


@dataclass(frozen=True)
class Verdict:
    """What the judge found in ``n`` pictures: rewards ``(n,)``, share of prompted digits, distance to real scans."""

    rewards: np.ndarray
    accuracy: float
    frechet: float

    def as_dict(self) -> dict[str, float]:
        """The entries of summary.json."""
        return {"accuracy": self.accuracy, "reward": float(self.rewards.mean()), "frechet": self.frechet}


class Judge:
    """A support-vector classifier of real training scans, and the statistics of the same scans.

    It never sees a generated picture, and ``held_out_accuracy`` says how well it reads real scans that it was not
    trained on.
    """

    def __init__(self) -> None:
        svm = require("sklearn.svm", extra="train", purpose="the demo's digit classifier")
        train, held_out = digits.load_splits()
        self._reference = _features(train.images)
        self._classifier: Any = svm.SVC(gamma=0.5, C=10.0).fit(self._reference, train.labels)
        self.held_out_accuracy = accuracy(self.read(held_out.images), held_out.labels)

    def read(self, images: np.ndarray) -> np.ndarray:
        """The digit in each picture: int64 ``(n,)`` for uint8 ``(n, 8, 8)``."""
        return np.asarray(self._classifier.predict(_features(images)), dtype=np.int64)

    def judge(self, preference: str, images: np.ndarray, prompted: Sequence[int] | np.ndarray) -> Verdict:
        """Reward of every picture under the preference, and the two measures of quality.

        ``slant`` and ``bold`` are measured on the picture itself; ``digit`` is 1 where the classifier reads the
        prompted digit, else 0.
        """
        prompted = np.asarray(prompted)
        found = self.read(images)
        rewards = digits.scores(preference, images, found, prompted)
        return Verdict(rewards, accuracy(found, prompted), frechet_distance(_features(images), self._reference))


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
