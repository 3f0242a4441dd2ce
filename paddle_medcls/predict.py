"""The place of `Predictor` in version 0.1, which the model cards of that version name."""

import warnings

from paddle_medcls.deployment.predictor import Predictor as Predictor

warnings.warn(
    "paddle_medcls.predict is now paddle_medcls.deployment.predictor; use paddle_medcls.load_predictor(weights)",
    DeprecationWarning,
    stacklevel=2,
)
