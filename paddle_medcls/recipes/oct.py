"""Recipes of the OCT transfer-learning tutorial: a new head on an ImageNet VGG-16 whose features stay frozen.

Published: accuracy 0.966 with InceptionV3 on 1,000 test scans (Kermany et al., Cell 2018); the tutorial
shows about 0.79 while it trains the head. 135,310,404 parameters, 1,049,860 of them trained.

    python tools/prepare.py --dataset oct --stats --check
    python tools/train.py --dataset oct
    python tools/train.py --dataset oct --recipe oct_shipped

`oct` differs from the tutorial in two points. Its validation split is a part of the `train` folder, split by patient;
the `val` folder of the data set has only 8 scans per class (`oct_shipped` uses it). And the frozen features are
computed once, for 4 augmented versions of each scan. The tutorial's ColorJitter has strengths of 0 and so changes
nothing; it is left out. Computing the features of one version of 84,000 scans takes 3 to 4 hours on 2 CPU cores, and
minutes on a GPU.
"""

from paddle_medcls.preprocessing.augmentation import Augmentation
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe

OCT = Recipe(
    name="oct",
    source="OCT transfer-learning tutorial: a frozen ImageNet VGG-16 with a new head",
    dataset="oct",
    model="vgg16",
    pretrained="imagenet",
    freeze=True,
    cache_views=4,
    preprocessing=Preprocessing(
        size_px=224, resize_px=256, fit="crop", channels="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
    augmentation=Augmentation(crop_scale=0.8, flip=0.5, rotate_degrees=15),
    epochs=30,
    batch_size=128,
    optimizer="adam",
    lr=0.001,
    schedule="constant",
    monitor="loss",
    patience=5,
    targets=(("test/accuracy", 0.966),),
)

OCT_SHIPPED = OCT.replace(name="oct_shipped", labels="shipped")
