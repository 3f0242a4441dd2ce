"""Recipes for MedMNIST v2: one recipe serves all data sets and both networks, see `for_dataset`.

Published (paper, Table 3; test AUC and accuracy of ResNet-18 at 28 pixels): Breast .901/.863, Pneumonia
.944/.854, Retina .717/.524; the whole table is in `recipes/published_results.py`. Between seeds these results vary
by about .01 AUC and .01 to .05 accuracy on the small data sets.

    python tools/prepare.py --dataset breastmnist --download
    python tools/train.py --dataset breastmnist
    python tools/train.py --dataset breastmnist --recipe medmnist_best --model resnet50
    python tools/reproduce.py --suite medmnist --sets breast,retina,pneumonia --models resnet18 --seeds 3

- `medmnist` is the paper's: Adam with learning rate 0.001, x 0.1 at epochs 50 and 75 of 100, batches of 128, the
  epoch with the best validation AUC. The paper does not describe the initial weights; Paddle's default is used.
- `medmnist_28_to_224` is the same with the 28-pixel image enlarged to 224 (nearest) and the ImageNet
  stem: the paper's columns "(224)". It is not MedMNIST+: the real 224-pixel files are the data sets
  `breastmnist_224` and so on, which every recipe uses at their own size.
- `medmnist_sgd` is the MedMNIST baseline tutorial. It gives batches of 128 and 100 epochs, and no optimizer;
  momentum 0.9 and learning rate 0.001 are those of the MedMNIST v1 baseline, whose code it explains.
- `medmnist_study` is the MedMNIST study (ResNet-18 and ResNet-50): Adam, changes of brightness and contrast,
  left-right flips, 50 epochs for ResNet-18 and 20 for ResNet-50. It gives no strength of the changes; 0.2 is ours.
- `medmnist_best` is this project's own: augmentation that keeps an image anatomically possible (each data set's card
  names the flips that are allowed), a cosine schedule, a moving average of the weights, test-time flips. In three-fold
  cross-validation on BreastMNIST's training and validation images stronger augmentation, mixup, erasing, label
  smoothing and 24 epochs were no better; on one or two of the folds neither were SGD, other learning rates,
  smaller batches and 100 epochs. It keeps the epoch with the lowest validation loss: on 120 images the best AUC
  was once that of epoch 1 (RetinaMNIST, seed 1).

The tutorials' titles and links: `docs/tutorials.md`.
"""

from paddle_medcls.data.datasets.medmnist import card_of
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes import published_results
from paddle_medcls.recipes.recipe import Recipe

MEDMNIST = Recipe(
    name="medmnist",
    source="Yang et al. 2023, MedMNIST v2: ResNet, Adam, two steps",
    dataset="pathmnist",
    model="resnet18",
    stem="small",
    preprocessing=Preprocessing(size_px=28),
    epochs=100,
    batch_size=128,
    optimizer="adam",
    lr=0.001,
    schedule="step",
    decay_epochs=(50, 75),
    monitor="auc",
)

MEDMNIST_28_TO_224 = MEDMNIST.replace(
    name="medmnist_28_to_224",
    source="Yang et al. 2023, MedMNIST v2, columns (224): the 28-pixel image enlarged",
    stem="imagenet",
    size_px=224,
    interpolation="nearest",
)

MEDMNIST_SGD = MEDMNIST.replace(
    name="medmnist_sgd",
    source="MedMNIST baseline: ResNet-18, SGD with momentum",
    optimizer="momentum",
    schedule="constant",
    decay_epochs=(),
)

MEDMNIST_STUDY = MEDMNIST.replace(
    name="medmnist_study",
    source="MedMNIST study (ResNet-18 and ResNet-50): Adam, brightness, contrast and flips",
    epochs=50,
    schedule="constant",
    decay_epochs=(),
    flip=0.5,
    brightness=0.2,
    contrast=0.2,
)

MEDMNIST_BEST = MEDMNIST.replace(
    name="medmnist_best",
    source="paddle_medcls: anatomical augmentation, cosine, weight averaging, test-time flips",
    epochs=40,
    batch_size=64,
    schedule="cosine",
    decay_epochs=(),
    warmup_epochs=2,
    weight_decay=1e-4,
    flip=0.5,
    flip_vertical=0.5,
    rotate_degrees=10,
    zoom=0.1,
    shift=0.08,
    brightness=0.15,
    contrast=0.15,
    ema_decay=0.99,
    monitor="loss",
    test_flips=True,
)


def for_dataset(recipe: Recipe, name: str, model: str) -> Recipe:
    """A recipe of this module for one data set and network.

    Channels, loss and size follow the data set's card, the targets the published tables. `medmnist_best`
    keeps only the flips that the card allows; `medmnist_study` trains ResNet-50 for 20 epochs.
    """
    card, side = card_of(name)
    gray = card.channels == 1
    changes: dict = {
        "dataset": name,
        "model": model,
        "channels": "gray" if gray else "rgb",
        "mean": (127.5,) if gray else (127.5,) * 3,
        "std": (127.5,) if gray else (127.5,) * 3,
        "loss": "sigmoid" if card.task == "multi-label" else "softmax",
        "targets": _targets(recipe.name, card.flag, model, side),
    }
    if side > 28:
        changes |= {"size_px": side, "stem": "imagenet"}
    if recipe.name == MEDMNIST_BEST.name:
        changes |= {
            flip: getattr(recipe.augmentation, flip) if flip in card.flips else 0.0
            for flip in ("flip", "flip_vertical")
        }
    if recipe.name == MEDMNIST_STUDY.name and model == "resnet50":
        changes["epochs"] = 20
    return recipe.replace(**changes)


def _targets(recipe: str, flag: str, model: str, side: int) -> tuple[tuple[str, float], ...]:
    """Published test AUC and accuracy; none are known here for MedMNIST+'s larger images."""
    if side > 28:
        return ()
    if recipe == MEDMNIST_STUDY.name:
        scores = published_results.MEDMNIST_STUDY.get((flag, model))
    else:
        scores = published_results.paper(flag, model, 224 if recipe == MEDMNIST_28_TO_224.name else 28)
    return () if scores is None else (("test/auc", scores[0]), ("test/accuracy", scores[1]))
