"""The benchmark: speed and memory of the variants of each row, as medians and ratios.

    python tools/benchmark.py --rows training --quick

Each measurement runs in a fresh process, and rounds of the variants are interleaved.

| row | measurement |
|---|---|
| `training`, `training28` | steps of ResNet-50 (224 pixels, batch 16) and ResNet-18 (28 pixels, batch 128) |
| `inference1`, `inference32` | ResNet-50 at 224 pixels, batches of 1 and 32, in every inference backend |
| `novelty` | predictions of ResNet-50 at 224 pixels with and without the novelty score |
| `head` | an epoch of VGG-16's head on synthetic scans: through the frozen network, and on cached features |
| `start`, `help` | seconds of `predict.py` on one image, as requirements.txt installs it; of every command's --help |
| `reading`, `waiting` | reading an image; the share of training time that is spent waiting for images |
| `memory` | statistics and evaluation of more and more images |
| `limit` | a matrix product: about the speed limit of a network (oneDNN's direct convolutions are slightly faster) |
| `batch`, `side`, `processes` | how the cost of training ResNet-50 grows |

`python -m benchmarks.serving` measures the HTTP service, `python -m benchmarks.novelty` compares scores of novelty, and
`python -m benchmarks.image_size` tells whether a model uses the size of the stored images.

A library that is not installed is named in the table. Images are synthetic and weights are random. The modules:
`command` (options, table), `pictures`, `runner` (processes, medians, comparisons), `measure` (the fresh process),
`rows` (the table of measurements), `networks` and `system` (their functions), `cell` (timing), `pytorch` (run by
another interpreter).
"""
