"""Recipes of the COVID-19 radiography tutorial: four classes, ResNet-50, momentum, warm-up and cosine.

Published: test accuracy 0.9651, loss 0.1825, on 2,119 of 21,165 images.

    python tools/prepare.py --dataset covid --split --stats
    python tools/train.py --dataset covid
    python tools/eval.py --weights runs/<run>/COVID.pdparams

One epoch of the full set with ResNet-50 takes about an hour on 2 CPU cores.

`covid` differs from the tutorial in two points: mean and standard deviation are computed from the training split
(the tutorial used all images, also those of the test split), and the cosine schedule ends at the last step.
`covid_notebook` uses the tutorial's mean and standard deviation; weight files of the tutorial are read with it.
`covid_best` is this project's own: the same network on smaller images, with augmentation that leaves a chest a chest
(small rotations, zooms and shifts, brightness and contrast, no flips) and a moving average of the weights.

The tutorials' titles and links: `docs/tutorials.md`.
"""

from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes.recipe import Recipe

COVID = Recipe(
    name="covid",
    source="COVID-19 radiography tutorial: ResNet-50, warm-up and cosine",
    dataset="covid",
    model="resnet50",
    preprocessing=Preprocessing(channels="bgr", resize_dtype="float32"),  # the tutorial resizes after astype("float32")
    statistics="train",
    epochs=50,
    batch_size=50,
    optimizer="momentum",
    lr=0.01,
    schedule="cosine",
    warmup_epochs=5,
    monitor="accuracy",
    targets=(("test/accuracy", 0.9651),),
)

COVID_NOTEBOOK = COVID.replace(
    name="covid_notebook",
    statistics="fixed",
    mean=(129.90909919,) * 3,
    std=(59.0183735,) * 3,
)

COVID_BEST = COVID.replace(
    name="covid_best",
    source="paddle_medcls: COVID-19 radiography tutorial with augmentation and weight averaging",
    size_px=128,
    interpolation="area",
    resize_dtype="uint8",
    epochs=30,
    batch_size=32,
    weight_decay=5e-4,
    warmup_epochs=1,
    rotate_degrees=8,
    zoom=0.1,
    shift=0.05,
    brightness=0.15,
    contrast=0.15,
    ema_decay=0.998,
)
