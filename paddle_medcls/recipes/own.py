"""The recipe for a user's own images, of some hundred to some thousand; it is adapted to them, see `for_images`.

    python tools/train.py --dataset folder --data-root DIR

Its parts are those of `palm` and `medmnist_best`: momentum, a cosine schedule after three epochs of warm-up, a moving
average of the weights. The changes of the images are small and keep left, right, top and bottom apart.

What was tried, on images that no published result here is measured on:

- PALM's 400 training images, a fifth held out, 64 pixels: AUC 0.998 and loss 0.055 after 14 of 40 epochs. The best AUC
  was that of epoch 11, the lowest loss that of epoch 14: on 80 images the AUC of a good network is near 1 and no longer
  tells epochs apart. So the loss chooses the epoch.
- Other optimizers, learning rates, sizes and lengths were not compared.
"""

from __future__ import annotations

from paddle_medcls.data.index import Index
from paddle_medcls.preprocessing.augmentation import Augmentation
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe

STEPS = 1500
"""Of the optimizer, in all epochs together; with 15 epochs at least and 60 at most."""
UNEVEN = 3
"""Classes weigh the same in the loss where the largest has more than so many times the images of the smallest."""

ADAPTED = ("epochs", "warmup_epochs", "batch_size", "patience", "loss", "class_weights")
"""Fields that `for_images` sets."""

OWN = Recipe(
    name="own",
    source="paddle_medcls: own images, adapted to their number, classes and task",
    dataset="folder",
    model="resnet18",
    preprocessing=Preprocessing(
        channels="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD, size_px=128, interpolation="area"
    ),
    augmentation=Augmentation(rotate_degrees=15, zoom=0.12, shift=0.05, brightness=0.2, contrast=0.2),
    epochs=60,
    batch_size=16,
    lr=0.01,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_epochs=3,
    ema_decay=0.995,
    monitor="loss",
)


def for_images(recipe: Recipe, train: Index) -> Recipe:
    """The recipe for these training images; every value may be changed afterwards."""
    counts = [count for count in train.counts().values() if count]
    batch = 16 if len(train) < 800 else 32 if len(train) < 5000 else 64
    epochs = min(60, max(15, round(STEPS * batch / len(train))))
    uneven = train.task != "multi-label" and max(counts) > UNEVEN * min(counts)
    return recipe.with_epochs(epochs).replace(
        batch_size=batch,
        patience=epochs // 3,
        loss="sigmoid" if train.task == "multi-label" else "softmax",
        class_weights="balanced" if uneven else "none",
    )
