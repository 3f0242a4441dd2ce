"""The networks: known parameter counts, strides, gradients, and comparison with Paddle's own ResNet."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest
from fakes import pixels
from toynet import constant_values, without_values

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.models import architectures
from paddle_medcls.models.network import MODELS, PARAMETERS, Network, model_names
from paddle_medcls.models.weights import load_strict, recognise

# Trainable parameters at 1000 outputs: torchvision's published num_params.
COUNTS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "alexnet": 61_100_840,
    "densenet121": 7_978_856,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_small": 2_542_856,
    "resnext50_32x4d": 25_028_904,
    "shufflenet_v2_x1_0": 2_278_604,
    "squeezenet1_1": 1_235_496,
    "wide_resnet50_2": 68_883_240,
}


def trainable(model: paddle.nn.Layer) -> int:
    return sum(int(np.prod(p.shape)) for p in model.parameters() if p.trainable)


@pytest.mark.parametrize("name", PARAMETERS)
def test_trainable_parameters(name: str) -> None:
    assert name in model_names()
    assert trainable(without_values(Network(name, 1000))) == PARAMETERS[name] == COUNTS.get(name, PARAMETERS[name])


def test_covid_network_has_the_tutorials_size() -> None:
    """COVID-19 radiography tutorial: 23,569,348 with batch-norm statistics, of which there are 53,120."""
    model = without_values(Network("resnet50", 4))
    assert sum(int(np.prod(p.shape)) for p in model.parameters()) == 23_569_348
    assert trainable(model) == 23_516_228


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_177_538), ("resnet50", 23_512_130)])
def test_parameters_at_two_outputs(name: str, count: int) -> None:
    assert trainable(without_values(Network(name, 2))) == count


def test_paddleclas_projection_adds_one_layer() -> None:
    """64 x 64 weights and 2 x 64 of batch norm: 4,224 more."""
    assert trainable(without_values(Network("resnet18", 1000, project_first=True))) == COUNTS["resnet18"] + 4224


def test_unknown_model_suggests() -> None:
    with pytest.raises(WeightsError, match="network model: 'resnet51'; expected .*; did you mean 'resnet50'"):
        Network("resnet51", 2)


def test_the_list_of_names_is_what_the_architectures_offer() -> None:
    offered = {}
    for info in pkgutil.iter_modules(architectures.__path__):
        module = importlib.import_module(f"paddle_medcls.models.architectures.{info.name}")
        offered |= {name: info.name for name in getattr(module, "__all__", ())}
    theirs = [name for name in paddle.vision.models.__all__ if name.islower()]  # the rest are classes
    assert {**dict.fromkeys(theirs, "vision"), **offered} == MODELS
    assert PARAMETERS.keys() == {name for name in MODELS if not name.startswith("toy")}
    assert all(without_values(Network(name, 2)).head_name for name in ("resnet18", "vgg16"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_shape(name: str, stem: str, channels: int) -> None:
    with constant_values():
        model = Network(name, 5, channels, stem).build()
    model.eval()
    with paddle.no_grad():
        assert list(model(paddle.zeros([2, channels, 28, 28])).shape) == [2, 5]


def test_small_stem_keeps_the_size() -> None:
    model = Network("resnet18", 5, stem="small").build()
    sizes = shapes_of(model, 28)
    assert sizes["conv"][2:] == [28, 28] and sizes["max_pool"][2:] == [28, 28] and sizes["block.7"][2:] == [4, 4]
    assert list(model.conv[0].weight.shape) == [64, 3, 3, 3]


def test_imagenet_stem_quarters_the_size() -> None:
    sizes = shapes_of(Network("resnet18", 5).build(), 64)
    assert [sizes[name][1:] for name in ("conv", "max_pool", "block.1", "block.3", "block.5", "block.7")] == [
        [64, 32, 32],
        [64, 16, 16],
        [64, 16, 16],
        [128, 8, 8],
        [256, 4, 4],
        [512, 2, 2],
    ]


def shapes_of(model: paddle.nn.Layer, size: int) -> dict[str, list[int]]:
    """Output shape of every layer for one image."""
    shapes: dict[str, list[int]] = {}

    def keep(name: str) -> object:
        return lambda layer, inputs, output: shapes.update({name: list(output.shape)})

    hooks = [layer.register_forward_post_hook(keep(name)) for name, layer in model.named_sublayers()]
    model.eval()
    with paddle.no_grad():
        model(paddle.zeros([1, 3, size, size]))
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_stride_is_in_the_3x3_convolution(name: str) -> None:
    model = without_values(Network(name, 2))
    strided = {
        path: layer._kernel_size[0]
        for path, layer in model.named_sublayers()
        if isinstance(layer, paddle.nn.Conv2D) and layer._stride[0] == 2 and path.startswith("block")
    }
    inside = {path: kernel for path, kernel in strided.items() if "shortcut" not in path}
    assert len(inside) == 3 and set(inside.values()) == {3}
    assert len(strided) == 6 and all(kernel == 1 for path, kernel in strided.items() if "shortcut" in path)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    paddle.seed(0)
    model = Network(name, 3).build()
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32))
    paddle.nn.functional.cross_entropy(model(x), paddle.to_tensor([0, 1, 2, 0])).backward()
    for path, parameter in model.named_parameters():
        if parameter.trainable:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, path


def test_last_layer_starts_in_the_tutorials_range() -> None:
    """PALM myopia tutorial: Uniform(-1/sqrt(2048), 1/sqrt(2048)); the largest of 2048 draws is near the bound."""
    weight = Network("resnet50", 1).build().fc.weight.numpy()
    bound = 1 / np.sqrt(2048)
    assert 0.98 * bound < np.abs(weight).max() <= bound and abs(weight.mean()) < 0.1 * bound


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits_equal_paddles_own_network(name: str) -> None:
    """The same weights, after batches that changed the batch-norm statistics from 0 and 1."""
    theirs = getattr(paddle.vision.models, name)(num_classes=7)
    rng = np.random.default_rng(0)
    for _ in range(2):
        theirs(paddle.to_tensor(rng.normal(0.5, 2, (4, 3, 32, 32)).astype(np.float32)))
    theirs.eval()
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert abs(state["layer1.0.bn1._mean"]).max() > 0.01
    network, renamed, layout = recognise(state, "theirs")
    assert (network, layout) == (Network(name, 7), "paddle.vision")
    ours = network.build()
    load_strict(ours, renamed, "theirs")
    ours.eval()
    x = paddle.to_tensor(
        (np.stack([pixels(k, size=48) for k in range(2)]).transpose(0, 3, 1, 2) / 64 - 2).astype(np.float32)
    )
    with paddle.no_grad():
        mine, expected = ours(x).numpy(), theirs(x).numpy()
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


def test_a_network_survives_json() -> None:
    network = Network("resnet34", 5, 1, "small", True)
    assert Network(**network.to_json()) == network
