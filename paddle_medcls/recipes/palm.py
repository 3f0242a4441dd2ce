"""Recipes of the PALM myopia tutorial: pathologic myopia or not, ResNet-50 with one sigmoid output.

Published course runs with this network report a validation accuracy of 0.93 to 0.95 on 400 images.

    python tools/train.py --dataset palm --recipe palm_tutorial
    python tools/train.py --dataset palm

- `palm_tutorial` is the tutorial's: BGR, 224 x 224 pixels, x / 255 * 2 - 1, batches of 10, 10 epochs, momentum 0.9.
  The learning rate falls linearly from 0.005 to 0.001 over the first 2.5 epochs (100 steps; the tutorial counts 41
  batches per epoch and so takes 102.5).
- `palm_constant` has the default of the course's text: a constant learning rate of 0.001.
- `palm` is this project's own: the same network from random weights at 128 x 128 pixels, with flips, rotation, zoom
  and intensity changes, more epochs, a cosine schedule, a moving average of the weights, and logits averaged over
  flips at evaluation. The validation images choose nothing: it keeps the last epoch, and its temperature and
  threshold fit the out-of-fold predictions of `tools/train.py --dataset palm --folds 5 --precision bf16` on the
  training images (`results/palm-palm-resnet50/folds/`).
- `palm_three` tells normal, high myopia and pathologic myopia apart; no results are published for it.
"""

from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes.recipe import Recipe

PALM_TUTORIAL = Recipe(
    name="palm_tutorial",
    source="PALM myopia tutorial: ResNet-50, learning rate 0.005 to 0.001, linear",
    dataset="palm",
    model="resnet50",
    loss="sigmoid",
    preprocessing=Preprocessing(channels="bgr"),
    epochs=10,
    batch_size=10,
    optimizer="momentum",
    lr=0.005,
    schedule="polynomial",
    decay_epochs=(2.5,),
    end_lr=0.001,
    monitor="accuracy",
    targets=(("val/accuracy", 0.94),),
)

PALM_CONSTANT = PALM_TUTORIAL.replace(
    name="palm_constant",
    source="PALM myopia tutorial: ResNet-50, constant learning rate 0.001",
    lr=0.001,
    schedule="constant",
    decay_epochs=(),
    end_lr=0.0,
)

PALM = PALM_TUTORIAL.replace(
    name="palm",
    source="paddle_medcls: PALM myopia tutorial with augmentation, cosine and weight averaging",
    size_px=128,  # as good as 224 in trials, at a third of the cost
    interpolation="area",
    epochs=40,
    batch_size=16,
    lr=0.01,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_epochs=3,
    decay_epochs=(),
    end_lr=0.0,
    flip=0.5,
    flip_vertical=0.5,
    rotate_degrees=180,
    zoom=0.12,
    brightness=0.2,
    contrast=0.2,
    color=0.1,
    ema_decay=0.995,
    test_flips=True,
    monitor="last",
    temperature=1.3111,
    threshold=0.4263,
)

PALM_THREE = PALM.unfitted().replace(
    name="palm_three",
    source="paddle_medcls: normal, high myopia and pathologic, on PALM's 400 training images",
    labels="three",
    loss="softmax",
    class_weights="balanced",
    targets=(),
)
