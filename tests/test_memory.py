"""The memory of statistics and evaluation does not grow with the number of images."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fakes import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CODE = """
import resource, sys, tempfile
from pathlib import Path
import numpy as np, cv2, toynet
from paddle_medcls.data.index import Index
from paddle_medcls.preprocessing.statistics import image_statistics
from paddle_medcls.preprocessing.loader import ImageDataset
from paddle_medcls.evaluation.evaluate import evaluate_split
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.models.network import Network

count = int(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    png = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))[1].tobytes()
    paths = [Path(folder) / f"{number}.png" for number in range(count)]
    for path in paths:
        path.write_bytes(png)
    names = tuple(path.name for path in paths)
    index = Index("drawn", "val", names, paths, np.arange(count) % 2, ("a", "b"), "binary")
    image_statistics(index, 1, "rgb")
    logits = evaluate_split(Network("toy", 1).build(), ImageDataset(index, Preprocessing(64)), 50, 1)
    assert logits.shape == (count, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kB
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """3,000 images more are 147 MB decoded, and some 1 kB each as path, name and logit."""

    def peak_mb(count: int) -> float:
        command = [sys.executable, "-c", CODE, str(count)]
        done = subprocess.run(command, cwd=ROOT / "tests", env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) / 1024

    few, many = peak_mb(1000), peak_mb(4000)
    print(f"peak memory: {few:.0f} MB at 1,000 images, {many:.0f} MB at 4,000")
    assert many - few < 30
