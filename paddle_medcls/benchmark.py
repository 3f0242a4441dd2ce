"""How fast is it, side by side: each figure in a fresh process, rounds interleaved, medians, ratios.

Rows:

- `training`: steps of ResNet-50 at 224 pixels, batch 16: Paddle as installed, and as `cpu` sets it up.
- `inference`: ResNet-50 at 224 pixels, batch 16, likewise.
- `head`: an epoch of VGG-16's head on drawn OCT scans: through the frozen network, and on cached features.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from paddle_medcls.errors import RunError
from paddle_medcls.progress import progress

VARIANTS = {
    "training": ("as installed", "paddle_medcls"),
    "inference": ("as installed", "paddle_medcls"),
    "head": ("uncached", "cached"),
}
"""The variants of each row; the first is the one that the others are compared with."""

BATCH, SIDE = 16, 224


def run_rows(rows: list[str], rounds: int) -> list[dict]:
    """Measures rows.

    Returns:
        One dict a row and variant: `row`, `variant`, `images_per_second` (median), `rounds` (each), `ratio` to the
        row's first variant.
    """
    cells = [(row, variant) for row in rows for variant in VARIANTS[row]]
    found: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}
    for _ in progress(range(rounds), "rounds", rounds, "round"):
        for cell in cells:
            found[cell].append(_fresh_process(*cell))
    return [
        {
            "row": row,
            "variant": variant,
            "images_per_second": median(found[row, variant]),
            "rounds": found[row, variant],
            "ratio": median(found[row, variant]) / median(found[row, VARIANTS[row][0]]),
        }
        for row, variant in cells
    ]


def _fresh_process(row: str, variant: str) -> float:
    command = [sys.executable, "-m", "paddle_medcls.benchmark", row, variant]
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **here})
    try:
        return float(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RunError(f"benchmark {row}, {variant}: exit code {done.returncode}: {last[0]}") from None


def _rate(step: Callable[[], object], images: int, seconds: float) -> float:
    """Images a second of `step`, after one call that warms up, for at least this long and two calls."""
    step()
    count, start = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - start < seconds:
        step()
        count += 1
    return count * images / (time.perf_counter() - start)


def _resnet50(training: bool) -> float:
    from paddle_medcls.models import Network
    from paddle_medcls.runtime import paddle

    paddle.seed(0)
    model = Network("resnet50", 4).build()
    x, labels = paddle.randn([BATCH, 3, SIDE, SIDE]), paddle.arange(BATCH) % 4
    if not training:
        model.eval()
        with paddle.no_grad():
            return _rate(lambda: model(x).numpy(), BATCH, 8.0)
    optimizer = paddle.optimizer.Momentum(0.001, parameters=model.parameters())

    def step() -> None:
        loss = paddle.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        loss.item()

    return _rate(step, BATCH, 12.0)


def _head(cached: bool) -> float:
    """Images a second of training VGG-16's head, from `timing.csv` of a run; the cache's making is not counted."""
    import csv

    from paddle_medcls.data.sample import draw
    from paddle_medcls.recipes import get_recipe
    from paddle_medcls.train import Options, train

    recipe = get_recipe("oct").replace(pretrained="", epochs=2, patience=0, batch_size=32, cache_views=int(cached))
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder) / "data", Path(folder) / "runs" / "run"
        draw("oct", root, 0)
        train(recipe, root, run, Options(device="cpu", say=lambda line: None))
        with open(run / "timing.csv", encoding="utf-8") as file:
            return float(list(csv.DictReader(file))[-1]["images_per_second"])


def _measure(row: str, variant: str) -> float:
    if variant == "as installed":
        importlib.import_module("zlib")  # before Paddle 2.6.2, whatever the variant
        importlib.import_module("paddle")  # not through `runtime`, so that nothing is set up
    measures = {
        "training": lambda: _resnet50(training=True),
        "inference": lambda: _resnet50(training=False),
        "head": lambda: _head(cached=variant == "cached"),
    }
    return measures[row]()


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
