"""The demo's judge of generated images: their digit, reward under a preference, and distance to real scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastinvdpo._examples.digits import digits
from fastinvdpo._examples.judging import frechet_distance
from fastinvdpo._extras import require


@dataclass(frozen=True)
class Verdict:
    """What the judge found in ``n`` images: rewards ``(n,)``, share of prompted digits, distance to real scans."""

    rewards: np.ndarray
    accuracy: float
    frechet: float

    def as_dict(self) -> dict[str, float]:
        """The entries of summary.json."""
        return {"accuracy": self.accuracy, "reward": float(self.rewards.mean()), "frechet": self.frechet}


class Judge:
    """A support-vector classifier of real training scans, and the statistics of the same scans.

    It never sees a generated image, and ``held_out_accuracy`` says how well it reads real scans that it was not
    trained on.
    """

    def __init__(self) -> None:
        svm = require("sklearn.svm", extra="train", purpose="the demo's digit classifier")
        train, held_out = digits.load_splits()
        self._reference = _features(train.images)
        self._classifier: Any = svm.SVC(gamma=0.5, C=10.0).fit(self._reference, train.labels)
        self.held_out_accuracy = float((self.read(held_out.images) == held_out.labels).mean())

    def read(self, images: np.ndarray) -> np.ndarray:
        """The digit in each image: int64 ``(n,)`` for uint8 ``(n, 8, 8)``."""
        return np.asarray(self._classifier.predict(_features(images)), dtype=np.int64)

    def judge(self, preference: str, images: np.ndarray, prompted: Sequence[int] | np.ndarray) -> Verdict:
        """Reward of every image under the preference, and the two measures of quality.

        ``slant`` and ``bold`` are measured on the image itself; ``digit`` is 1 where the classifier reads the
        prompted digit, else 0.
        """
        prompted = np.asarray(prompted)
        found = self.read(images)
        rewards = digits.scores(preference, images, found, prompted)
        distance = frechet_distance(_features(images), self._reference)
        return Verdict(rewards, float((found == prompted).mean()), distance)


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
