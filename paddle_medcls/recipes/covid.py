"""COVID-19 Radiography in four classes (document 003: ResNet-50, Momentum, CosineWarmup).

Published there: test accuracy 0.9651, loss 0.1825, on 2,119 of 21,165 images.

    python tools/prepare.py --dataset covid --split --stats
    python tools/train.py --dataset covid
    python tools/eval.py --weights runs/<run>/COVID.pdparams

Cost of one epoch of the full set, ResNet-50: about an hour on 2 CPU cores.

`covid` follows the document letter for letter but in two points: mean and std are computed from the
training list (the document used all images, test included), and the cosine ends at the last step.
`covid_notebook` has the document's constants; its weight files are read with them.
"""

from paddle_medcls.images import Preprocessing
from paddle_medcls.recipe import Recipe

COVID = Recipe(
    name="covid",
    source="document 003: COVID-19 Radiography with ResNet-50 and CosineWarmup",
    dataset="covid",
    model="resnet50",
    preprocessing=Preprocessing(channels="bgr", resize_dtype="float32"),  # the notebook resizes after astype("float32")
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
