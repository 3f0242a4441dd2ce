"""Networks of a few hundred parameters, added to the library's, so that runs take a moment.

As a program it trains one: `python toynet.py RECIPE.json DATA_ROOT RUN_DIR [resume]`, for the tests
that kill a process or start several. TOY_KILL, such as "step 3", is when it kills itself, see `kill_at`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.deployment import graph
from paddle_medcls.models.architectures import resnet
from paddle_medcls.models.network import MODELS, Network

nn = paddle.nn

ON_STEP: list[Callable[[], None]] = []
"""Called in every forward pass of training; tests put their interruptions here."""


class Toy(nn.Layer):
    """Convolution, batch norm and dropout: all that a resume must restore or repeat."""

    def __init__(self, network: Network, plain: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2D(network.in_channels, 6, 5, 4)
        self.norm = nn.Sequential() if plain else nn.BatchNorm2D(6)
        self.dropout = nn.Sequential() if plain else nn.Dropout(0.3)
        self.fc = nn.Linear(6 * 4, network.num_outputs)

    head_name = "fc"

    @property
    def head(self):
        return self.fc

    def embed(self, x):  # (N, C, H, W)
        x = nn.functional.relu(self.norm(self.conv(x)))
        return self.dropout(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))  # (N, 24)

    def forward(self, x):
        if self.training:
            for call in ON_STEP:
                call()
        return self.head(self.embed(x))


def toy(network: Network) -> Toy:
    """A convolution, batch norm, dropout and a linear layer."""
    return Toy(network)


def toy_plain(network: Network) -> Toy:
    """Without batch norm and dropout: several processes then compute what one does."""
    return Toy(network, plain=True)


def toy_resnet(network: Network) -> resnet.ResNet:
    """Three residual blocks of 64, 128 and 256 channels: a tenth of ResNet-18's parameters."""
    return resnet.ResNet((1, 1, 1), resnet.BasicBlock, network)


def toy_bottleneck(network: Network) -> resnet.ResNet:
    """Two of ResNet-50's blocks, of 256 and 512 channels."""
    return resnet.ResNet((1, 1), resnet.BottleneckBlock, network)


graph.RESNETS |= {"toy_resnet": ((1, 1, 1), 1), "toy_bottleneck": ((1, 1), 4)}
graph.KNOWN += ["toy_resnet", "toy_bottleneck"]

for _builder in (toy, toy_plain, toy_resnet, toy_bottleneck):
    if _builder.__name__ not in MODELS:  # how a model is added: see models/__init__.py
        MODELS[_builder.__name__] = "resnet"
        setattr(resnet, _builder.__name__, _builder)
        resnet.__all__.append(_builder.__name__)


def without_values(network: Network) -> nn.Layer:
    """The network for tests of names and shapes: its parameters have no memory, building it takes no time."""
    with paddle.LazyGuard():
        return network.build()


@contextmanager
def constant_values() -> Iterator[None]:
    """Networks that are built here begin with constants: drawing millions of random numbers takes a second."""
    constant = nn.initializer.Constant
    nn.initializer.set_global_initializer(constant(0.01), constant(0.0))
    try:
        yield
    finally:
        nn.initializer.set_global_initializer(None)


def kill_at(moment: str, number: int) -> None:
    """Lets this process be killed the `number`th time that a moment comes.

    Args:
        moment: "step": before a step of training; of a file that is written: "half" or "whole", as much of its
            temporary has been written, or "renamed", the temporary has just become the file.
    """
    count, rename = itertools.count(1), os.replace

    def strike() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(source: str, target: str) -> None:
        if moment == "half":
            whole = Path(source).read_bytes()
            Path(source).write_bytes(whole[: len(whole) // 2])
            strike()
            Path(source).write_bytes(whole)
        elif moment == "whole":
            strike()
        rename(source, target)
        if moment == "renamed":
            strike()

    if moment == "step":
        ON_STEP.append(strike)
    else:
        os.replace = replace


if __name__ == "__main__":
    if "TOY_KILL" in os.environ:
        when, times = os.environ["TOY_KILL"].split()
        kill_at(when, int(times))
    from paddle_medcls.recipes.recipe import Recipe
    from paddle_medcls.training.loop import Options, train

    ON_STEP.append(lambda: time.sleep(float(os.environ.get("TOY_SECONDS_PER_STEP", "0"))))
    recipe_file, data_root, run_dir, *resume = sys.argv[1:]
    options = Options(device="cpu", workers=int(os.environ.get("TOY_WORKERS", "1")))
    train(Recipe.from_file(recipe_file), Path(data_root), Path(run_dir), options, resume=bool(resume))
