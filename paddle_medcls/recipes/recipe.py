"""A recipe: everything that a run depends on, in one frozen record.

Published systems are modules in `recipes/`; each holds one or more `Recipe(...)`. A recipe is written
to the run directory as JSON, and that file alone describes the run again.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from paddle_medcls.core.errors import RecipeError, did_you_mean
from paddle_medcls.core.files import NAME, NAME_RULE, read_json
from paddle_medcls.models.network import STEMS
from paddle_medcls.models.sidecar_checks import MONITORS
from paddle_medcls.preprocessing.augmentation import FLIPS, Augmentation
from paddle_medcls.preprocessing.transforms import CHOICES as PREPROCESSING_CHOICES
from paddle_medcls.preprocessing.transforms import MAX_SIDE_PX, MEAN_RANGE, STD_RANGE, Preprocessing

CHOICES = {
    **PREPROCESSING_CHOICES,
    "loss": ("softmax", "sigmoid"),
    "stem": STEMS,
    "statistics": ("fixed", "train"),
    "optimizer": ("momentum", "adam"),
    "schedule": ("cosine", "polynomial", "step", "constant"),
    "class_weights": ("none", "balanced"),
    "monitor": MONITORS,
}
"""Allowed values of the fields that are words."""

MAX_FOLDS = 100

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, pixel values; 0.485, 0.456, 0.406 of 255
IMAGENET_STD = (58.395, 57.12, 57.375)  # 0.229, 0.224, 0.225 of 255
IMAGENET: dict[str, object] = {"channels": "rgb", "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "statistics": "fixed"}
"""What ImageNet weights were trained with; `pretrained=imagenet` sets these fields."""


@dataclass(frozen=True)
class Recipe:
    """One training run. Values are checked when it is made; all faults are reported at once.

    Its JSON file, `--set`, `replace` and `override` name the fields of `preprocessing` and `augmentation` as if they
    were the recipe's own: `recipe.replace(size_px=128, flip=0.5)`.

    Losses: "softmax" is cross-entropy over the classes; "sigmoid" is binary cross-entropy, on one
    output for a two-class task and on one output a label for a multi-label task.
    """

    name: str
    source: str  # tutorial or paper that the numbers come from
    dataset: str  # palm, covid, oct or a MedMNIST flag

    # data and network
    labels: str = "default"  # reading of the labels, where a data set offers several (palm: "three")
    model: str = "resnet50"
    stem: str = "imagenet"  # "small": 3x3 stride 1 without max-pool, for 28-pixel images
    loss: str = "softmax"
    pretrained: str = ""  # "imagenet", a weight file, or "" for random initial weights
    freeze: bool = False  # train the head alone
    cache_views: int = 0  # with freeze: train on the cached features of this many augmented versions of each image

    # images
    preprocessing: Preprocessing = Preprocessing()
    statistics: str = "fixed"  # "train": mean and std are computed from the training list
    augmentation: Augmentation = Augmentation()

    # optimisation
    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1  # pieces that a batch is computed in, one after the other, to fit a small GPU
    optimizer: str = "momentum"
    lr: float = 0.01  # peak, after warm-up
    momentum: float = 0.9
    weight_decay: float = 0.0  # L2; not on biases and batch-norm parameters
    schedule: str = "cosine"  # to 0 at the last step
    warmup_epochs: float = 0.0  # linear from 0
    decay_epochs: tuple[float, ...] = ()  # "step": x 0.1 at each; "polynomial": the one where it ends
    end_lr: float = 0.0  # "polynomial": the value held from there on
    class_weights: str = "none"  # "balanced": each class weighs the same in the loss
    label_smoothing: float = 0.0
    ema_decay: float = 0.0  # > 0: an exponential moving average of the weights is evaluated and kept
    seed: int = 0

    # cross-validation, of the training images alone
    folds: int = 0  # number of folds; 0: the data set's own validation images
    fold: int = 0  # 1 to folds: the one for validation

    # selection and evaluation
    monitor: str = "accuracy"  # on validation; picks the epoch whose weights are kept; "last": the last epoch's
    patience: int = 0  # epochs without improvement before stopping; 0: never stop early
    temperature: float = 1.0  # of the finished model: logits are divided by it; see `train_folds` for its choice
    threshold: float = 0.5  # of the finished model: of class 1 of two, or of each label
    test_flips: bool = False  # average the logits of the image and its flips (those of the augmentation)
    targets: tuple[tuple[str, float], ...] = ()  # published figures: ("test/accuracy", 0.9651)

    def __post_init__(self) -> None:
        _refuse_faults(self.to_json())

    def override(self, assignments: Iterable[str]) -> Recipe:
        """A copy with `key=value` strings applied, each parsed by its field's type."""
        return self.replace(**dict(_parse(text) for text in assignments))

    def replace(self, **changes: object) -> Recipe:
        """A copy with other values; an unknown field is an error with the nearest names.

        `pretrained="imagenet"` also sets channels, mean and standard deviation to ImageNet's; other
        values for these in the same call are an error.
        """
        for field in changes:
            _check_field(field)
        if changes.get("pretrained") == "imagenet":
            faults = [
                f"{field}: {changes[field]!r}"
                for field in IMAGENET
                if changes.get(field, IMAGENET[field]) != IMAGENET[field]
            ]
            if faults:
                raise RecipeError(
                    f"recipe {self.name}: pretrained=imagenet contradicts {len(faults)} field(s)",
                    items=faults,
                    expected=", ".join(f"{field}={value}" for field, value in IMAGENET.items()),
                    fix="leave these fields out, or give a weight file in place of imagenet",
                )
            changes = {**changes, **IMAGENET}
        return _from_values({**self.to_json(), **changes})

    def with_epochs(self, epochs: int) -> Recipe:
        """A shorter or longer version: warm-up and decay points keep their share of the run."""
        share = epochs / self.epochs
        decay = tuple(round(epoch * share, 4) for epoch in self.decay_epochs)
        return self.replace(epochs=epochs, warmup_epochs=round(self.warmup_epochs * share, 4), decay_epochs=decay)

    def unfitted(self) -> Recipe:
        """A copy with temperature 1 and threshold 0.5: fitted ones belong to one network and its images."""
        return self.replace(temperature=1.0, threshold=0.5)

    def to_json(self) -> dict:
        """All fields, those of `preprocessing` and `augmentation` among them, in one flat dictionary."""
        values: dict = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            values |= dataclasses.asdict(value) if name in _RECORDS else {name: value}
        return values

    @staticmethod
    def from_json(fields: object, where: object = None) -> Recipe:
        """The inverse of `to_json`; a mistyped or missing field is an error."""
        if not isinstance(fields, dict) or not {"name", "source", "dataset"} <= fields.keys():
            raise RecipeError("not a recipe", path=where, expected="a JSON object with name, source, dataset, …")
        for field in fields:
            _check_field(field, where)
        return _from_values({name: _to_tuple(value) for name, value in fields.items()})

    @staticmethod
    def from_file(path: str | Path) -> Recipe:
        """Reads a recipe's JSON file; a run directory's `recipe.json` is one."""
        try:
            fields = read_json(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"the recipe cannot be read: {error}", path=path) from None
        return Recipe.from_json(fields, path)

    @property
    def evaluation_flips(self) -> tuple[str, ...]:
        """Names of the flips averaged at evaluation: with `test_flips` those of the augmentation."""
        return tuple(name for name in FLIPS if self.test_flips and getattr(self.augmentation, name))

    def differences(self, other: Recipe) -> list[str]:
        """One line for each setting that differs: "lr: 0.01 -> 0.02".

        `source` and `targets` describe where a recipe comes from, not how it trains: they are not compared.
        """
        old, new = self.to_json(), other.to_json()
        settings = [name for name in old if name not in ("source", "targets")]
        return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in settings if old[name] != new[name]]


_RECORDS = {"preprocessing": Preprocessing, "augmentation": Augmentation}
_TYPES = {
    name: kind
    for record in (Recipe, *_RECORDS.values())
    for name, kind in typing.get_type_hints(record).items()
    if name not in _RECORDS
}
"""Every field by its name, as `to_json` has them, with its type."""


def _from_values(values: dict) -> Recipe:
    """The recipe of flat fields; those that are left out have their defaults."""
    defaults = {
        field.name: field.default for kind in (Recipe, *_RECORDS.values()) for field in dataclasses.fields(kind)
    }
    _refuse_faults({name: values.get(name, defaults[name]) for name in _TYPES})
    recipe_fields = {name: value for name, value in values.items() if name in Recipe.__dataclass_fields__}
    for name, record in _RECORDS.items():
        names = [field.name for field in dataclasses.fields(record) if field.name in values]
        recipe_fields[name] = record(**{field: values[field] for field in names})
    return Recipe(**recipe_fields)


def _check_field(field: str, where: object = None) -> None:
    if field not in _TYPES:
        hint = did_you_mean(field, _TYPES)
        raise RecipeError(f"unknown recipe field {field!r}{hint}", path=where, expected=", ".join(sorted(_TYPES)))


def _to_tuple(value: object) -> object:
    return tuple(_to_tuple(item) for item in value) if isinstance(value, list) else value


def _parse(text: str) -> tuple[str, object]:
    field, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"cannot read {text!r}", expected="key=value, as in lr=0.01 or mean=127.5,127.5,127.5")
    _check_field(field)
    kind = _TYPES[field]
    try:
        if kind is bool:
            return field, {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind in (int, float, str):
            return field, kind(value)
        if field == "targets":
            pairs = (item.split(":") for item in value.split(",") if item)
            return field, tuple((name, float(figure)) for name, figure in pairs)
        return field, tuple(float(item) for item in value.split(",") if item)
    except (ValueError, KeyError):
        expected = "numbers with commas between" if typing.get_origin(kind) else kind.__name__
        raise RecipeError(f"recipe field {field}: cannot read {value!r}", expected=expected) from None


def _is_of(value: object, kind: typing.Any) -> bool:
    """Whether a value is of a field's type, down to the items of a tuple; numbers must be finite."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if typing.get_origin(kind) is None:  # tuple[float, ...] is a type for isinstance before Python 3.11
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    kinds = typing.get_args(kind)  # of tuple[x, ...] or tuple[x, y]
    if not isinstance(value, tuple):
        return False
    kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
    return len(value) == len(kinds) and all(map(_is_of, value, kinds))


def _refuse_faults(values: dict) -> None:
    faults = _faults(values)
    if faults:
        raise RecipeError(f"recipe {values['name']}: {len(faults)} faulty field(s)", items=faults)


def _faults(values: dict) -> list[str]:
    recipe = SimpleNamespace(**values)
    faults = []
    for field, kind in _TYPES.items():
        value = getattr(recipe, field)
        if not _is_of(value, kind):
            faults.append(f"{field}: {value!r} is of the wrong type")
    if faults:
        return faults
    for field, allowed in CHOICES.items():
        value = getattr(recipe, field)
        if value not in allowed:
            faults.append(f"{field}: {value!r} is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}")

    def check(ok: object, field: str, expected: str) -> None:
        if not ok:
            faults.append(f"{field}: {getattr(recipe, field)!r}; expected {expected}")

    for field in ("name", "dataset", "labels"):  # a sidecar with another one is not read
        check(NAME.fullmatch(getattr(recipe, field)), field, NAME_RULE)
    check(recipe.crop_scale == 0 or recipe.fit == "crop", "crop_scale", "0 unless fit is crop")
    smooth = recipe.interpolation == "area" and not recipe.crop_scale
    check(recipe.decode == "exact" or smooth, "decode", "exact, unless interpolation is area and crop_scale 0")
    check(recipe.cache_views == 0 or recipe.freeze, "cache_views", "0 unless freeze is true")
    channels = 1 if recipe.channels == "gray" else 3
    for field in ("epochs", "batch_size", "accumulate", "size_px", "resize_px"):
        check(getattr(recipe, field) >= 1, field, "at least 1")
    for field in ("size_px", "resize_px"):
        check(getattr(recipe, field) <= MAX_SIDE_PX, field, f"at most {MAX_SIDE_PX}")
    check(recipe.fit == "stretch" or recipe.resize_px >= recipe.size_px, "resize_px", "at least size_px")
    check(0 < recipe.lr < float("inf"), "lr", "a number above 0")
    check(0 <= recipe.end_lr <= recipe.lr, "end_lr", "between 0 and lr")
    check(0 <= recipe.warmup_epochs < recipe.epochs, "warmup_epochs", "at least 0 and less than epochs")
    for field in ("momentum", "label_smoothing", "ema_decay", "crop_scale", "shift", "brightness", "contrast", "color"):
        check(0 <= getattr(recipe, field) < 1, field, "at least 0 and less than 1")
    for field in ("flip", "flip_vertical"):
        check(0 <= getattr(recipe, field) <= 1, field, "a probability, 0 to 1")
    for field in ("weight_decay", "rotate_degrees", "zoom", "patience", "cache_views"):
        check(getattr(recipe, field) >= 0, field, "0 or more")
    check(0.001 <= recipe.temperature <= 1000, "temperature", "0.001 to 1000")
    check(0 <= recipe.threshold <= 1, "threshold", "0 to 1")
    check(recipe.monitor != "last" or not recipe.patience, "patience", "0 with monitor=last")
    check(recipe.folds == 0 or 2 <= recipe.folds <= MAX_FOLDS, "folds", f"0, or 2 to {MAX_FOLDS}")
    check(min(1, recipe.folds) <= recipe.fold <= recipe.folds, "fold", f"{min(1, recipe.folds)} to {recipe.folds}")
    check(0 <= recipe.seed < 2**64, "seed", "0 to 2**64 - 1")
    for field in ("mean", "std"):
        check(len(getattr(recipe, field)) == channels, field, f"{channels} number(s), as channels={recipe.channels}")
    for field, (low, high) in (("mean", MEAN_RANGE), ("std", STD_RANGE)):
        check(all(low <= value <= high for value in getattr(recipe, field)), field, f"{low} to {high}, pixel values")
    check(recipe.schedule != "polynomial" or len(recipe.decay_epochs) == 1, "decay_epochs", "one number")
    least = recipe.warmup_epochs if recipe.schedule in ("polynomial", "step") else 0
    expected = f"numbers above 0, after the warm-up of {least} epochs" if least else "numbers above 0"
    check(all(value > 0 and value >= least for value in recipe.decay_epochs), "decay_epochs", expected)
    return faults
