"""What travels with a weight file: `<NAME>.json` beside `<NAME>.pdparams`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from paddle_medcls.errors import WeightsError
from paddle_medcls.files import sha256, write_json
from paddle_medcls.images import Preprocessing
from paddle_medcls.models import Network

KIND = "paddle_medcls weights"


@dataclass(frozen=True)
class Sidecar:
    """Everything needed to use a weight file as it was trained.

    Attributes:
        dataset, recipe: names.
        classes: in the order of the probability columns.
        task, loss: see `data.index.Index` and `recipe.Recipe`.
        network, preprocessing: how to build the network and its input.
        flips: axes averaged at evaluation, see `evaluate.predict_logits`.
        temperature: logits are divided by it.
        threshold: of class 1 in a binary task.
        metrics: of the validation split.
        labels: reading of the data set's labels, as in the recipe.
        drawn: trained on images that the project drew.
        sha256: of the weight file; empty where it is not known.
        versions: of the libraries that trained it.
    """

    dataset: str
    recipe: str
    classes: tuple[str, ...]
    task: str
    loss: str
    network: Network
    preprocessing: Preprocessing
    flips: tuple[str, ...] = ()
    temperature: float = 1.0
    threshold: float = 0.5
    metrics: dict = field(default_factory=dict)
    labels: str = "default"
    drawn: bool = False
    sha256: str = ""
    versions: dict = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the JSON file, with `kind` first."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"network": self.network.to_json(), "preprocessing": self.preprocessing.to_json()}
        write_json(path, {"kind": KIND, **values})

    @staticmethod
    def read(path: Path) -> Sidecar:
        """Reads a sidecar; a file of another kind or with faulty fields is an error."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop("kind", None) != KIND:
                raise ValueError(f"not a sidecar: no 'kind': {KIND!r}")
            for name in ("classes", "flips"):
                values[name] = tuple(str(item) for item in values[name])
            values["network"] = Network(**values["network"])
            values["preprocessing"] = Preprocessing.from_json(values["preprocessing"])
            card = Sidecar(**values)
            if not card.classes or not float(card.temperature) > 0 or not 0 <= float(card.threshold) <= 1:
                raise ValueError("classes, temperature or threshold out of range")
            return card
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise WeightsError(
                f"the sidecar cannot be read: {reason}", where=path, do="restore it from the run that made the weights"
            ) from None

    def check(self, weights: Path) -> None:
        """Refuses a weight file that is not the one this sidecar was written for."""
        if self.sha256 and sha256(weights) != self.sha256:
            raise WeightsError(
                f"{weights} is not the file that {weights.with_suffix('.json').name} describes (sha256 differs)",
                do="copy both files again from one run; an interrupted training is resumed with --resume",
            )
