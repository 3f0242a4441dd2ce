"""How fast is it, side by side: each figure in a fresh process, rounds interleaved, medians, ratios.

    python tools/benchmark.py --rows training --quick

| row | what is measured |
|---|---|
| `training`, `training28` | steps of ResNet-50 (224 pixels, batch 16) and ResNet-18 (28 pixels, batch 128) |
| `inference1`, `inference32` | ResNet-50 at 224 pixels, batches of 1 and 32, in every engine |
| `head` | an epoch of VGG-16's head on synthetic scans: through the frozen network, and on cached features |
| `start`, `help` | wall time of `predict.py` on one image, in a plain installation; of every command's --help |
| `reading`, `waiting` | an image from its bytes to 224 pixels; the share of training that waits for images |
| `memory` | statistics and evaluation of a growing number of images |
| `limit` | a matrix product: about the most that a network can reach (oneDNN's direct convolutions pass it a little) |
| `batch`, `side`, `processes` | how the cost of training ResNet-50 grows |

What is not installed is named, not left out. Images are synthetic, and weights are random. From top to bottom:
`command` (options, table), `pictures`, `runner` (processes, medians, comparisons), `measure` (the fresh process),
`rows` (what is measured), `networks` and `system` (how), `cell` (timing), `pytorch` (run by another interpreter).
"""
