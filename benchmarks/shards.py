"""The row `shards`: the rate of predicting many images, over that of the network alone: ResNet-50, 224 pixels, bf16.

Both are measured in turn in one process, so that other work on the machine slows both down.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.cell import Job

KINDS = {"PNG 299x299": (".png", "exact"), "JPEG 2124x2056": (".jpg", "exact"), "JPEG, reduced": (".jpg", "reduced")}
"""Images of the size of real ones: suffix, and `Preprocessing.decode`."""
ROUNDS = 3
BATCH = 16  # as in `predict.py`


def to_network(job: Job, kind: str, whole: bool) -> float:
    """Images a second from files to shards, with one reading thread a core, over those of the network alone.

    Args:
        kind: one of KINDS.
        whole: False: without the network, which is reading, scaling, batching and writing.
    """
    import cv2
    import numpy as np

    from paddle_medcls.data.synthetic import fundus, radiograph
    from paddle_medcls.deployment.inference_engines import InferenceBackend
    from paddle_medcls.deployment.predictor import Predictor
    from paddle_medcls.deployment.sharded_prediction import ShardOptions, predict_shards

    suffix, decode = KINDS[kind]
    opened = Predictor.from_weights(Path(job.folder) / "NET.pdparams", engine="auto", precision="auto")
    spec, rng = replace(opened.sidecar.preprocessing, decode=decode, interpolation="area"), np.random.default_rng(0)
    x = np.zeros((BATCH, 3, spec.size_px, spec.size_px), np.float32)
    logits = opened.backend.logits(x)
    nothing = InferenceBackend(lambda x: {"logits": logits[: len(x)]}, "none", "f32", logits.shape[1])
    sidecar = replace(opened.sidecar, preprocessing=spec)
    predictor = Predictor(sidecar, opened.backend if whole else nothing, path=opened.path)
    image, side = (radiograph(rng, "Normal"), (299, 299)) if suffix == ".png" else (fundus(rng, True), (2124, 2056))
    batches = max(1, 8 // job.divide)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"synthetic{suffix}"
        cv2.imwrite(str(path), cv2.resize(image, side, interpolation=cv2.INTER_CUBIC))
        folders, options = (Path(folder) / str(number) for number in itertools.count()), ShardOptions(format="csv")

        def network() -> None:
            for _ in range(batches):
                opened.backend.logits(x)

        def shards() -> None:
            predict_shards(predictor, [str(path)] * (batches * BATCH), next(folders), options)

        shards()  # not counted
        return median(_seconds(network) / _seconds(shards) for _ in range(ROUNDS))


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
