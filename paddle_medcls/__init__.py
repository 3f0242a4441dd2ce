"""Medical image classification in PaddlePaddle: five published tutorials, reproduced.

Reading order: data (`data/`), preprocessing (`images`, `augmentation`), networks (`models/`),
optimisation (`optim`, `train`), evaluation (`evaluate`, `metrics`, `report`), the published
systems (`recipes/`), use (`predict`).

For research and teaching. Not a medical device; not for diagnosis.
"""

__version__ = "0.2.0.dev0"
