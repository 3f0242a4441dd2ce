"""The `Predictor` of version 0.1, for the code in that version's model cards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import DataError
from paddle_medcls.deployment import predictor
from paddle_medcls.models.sidecar import Sidecar

warnings.warn(
    "paddle_medcls.predict is now paddle_medcls.deployment.predictor; use paddle_medcls.load_predictor(weights)",
    DeprecationWarning,
    stacklevel=2,
)


class Predictor(predictor.Predictor):
    """Today's Predictor with the names that model cards of 0.1 use."""

    @property
    def card(self) -> Sidecar:
        """`sidecar` by its name in version 0.1."""
        return self.sidecar

    def predict_files(self, paths: Sequence[Path]) -> Iterable[tuple[Path, np.ndarray | DataError]]:
        """Yields (path, probabilities (C,)) in order; for an unreadable file (path, its error)."""
        for path, _, found in self.predict_decoded(paths):
            yield path, found if isinstance(found, DataError) else found.probs
