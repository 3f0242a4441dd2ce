"""What all tests share: the thread count, the markers, tiny data sets."""

from __future__ import annotations

import os
import zlib  # noqa: F401  before Paddle: 2.6.2 exports its own inflate and crashes any later use
from collections.abc import Iterator
from pathlib import Path

# One thread: sums are then the same on every machine, and images of 32 pixels gain nothing from two.
os.environ["OMP_NUM_THREADS"] = "1"

import fakes  # noqa: E402
import pytest  # noqa: E402
import toynet  # noqa: E402, F401  its networks are the recipes' here

from paddle_medcls.deployment import graph  # noqa: E402
from paddle_medcls.evaluation import plots  # noqa: E402
from paddle_medcls.models.network import Network  # noqa: E402

DRAWN = {name: getattr(plots, name) for name in ("curves", "confusion", "roc", "risk_coverage")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--update-docs", action="store_true", help="write generated pages and outputs of notebooks again")


LONGEST_FIRST = ("test_processes", "test_export", "test_train", "test_app", "test_onednn", "test_weights")


def pytest_configure(config: pytest.Config) -> None:
    """Of two workers none begins a long file when the other has nothing left to do."""
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the file of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST_FIRST)
    skips = {
        "slow": None if config.getoption("--slow") else "slow: give --slow",
        "data": None if os.environ.get("MEDCLS_TEST_DATA") else "no real images: MEDCLS_TEST_DATA is not set",
    }
    for item in items:
        for name, reason in skips.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu"):
            from paddle_medcls.core.paddle_setup import paddle

            if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
                item.add_marker(pytest.mark.skip(reason="Paddle sees no GPU"))


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing takes most of a small run's time: the tests marked `pictures` alone draw those of a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(plots, name, lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What a test writes need not survive a power failure; `test_files` looks at the calls themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("pictures"):
        for name, draw in DRAWN.items():
            monkeypatch.setattr(plots, name, draw)


@pytest.fixture
def narrow_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG-16 has 32 hidden units in place of 4096, whose weights are nine tenths of the network."""
    from paddle_medcls.core.paddle_setup import paddle

    linear, layers_of = paddle.nn.Linear, graph.layers_of

    def narrow(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(32 if size == 4096 else size for size in sizes)

    def narrow_layers(network: Network) -> list[graph.Layer]:
        return [layer._replace(shape=narrow(layer.shape)) for layer in layers_of(network)]

    monkeypatch.setattr(paddle.nn, "Linear", lambda *sizes, **options: linear(*narrow(sizes), **options))
    monkeypatch.setattr(graph, "layers_of", narrow_layers)


@pytest.fixture
def palm_root(tmp_path: Path) -> Path:
    """A PALM folder: 12 training and 7 validation images of 32 px."""
    return fakes.palm_tree(tmp_path / "palm")


@pytest.fixture
def covid_root(tmp_path: Path) -> Path:
    """A COVID folder in the tutorial's layout with split files: 8, 4 and 4 images of 32 px."""
    return fakes.covid_tree(tmp_path / "covid")


@pytest.fixture
def real_data() -> Path:
    """The folder of real images; it has palm/, covid19_radiography/, medmnist/ and oct2017/."""
    return Path(os.environ["MEDCLS_TEST_DATA"])
