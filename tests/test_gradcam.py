"""Grad-CAM by its values: CAM where the two must agree, a slow second implementation, and no traces left."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from paddle_medcls.core.errors import RecipeError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.explanation.gradcam import default_layer, gradcam, layer_shapes
from paddle_medcls.models.network import Network
from paddle_medcls.training.frozen_features import freeze, start_training


def batch(count: int = 3, size: int = 64, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 1, (count, channels, size, size)).astype(np.float32)


def network(name: str = "toy_resnet", outputs: int = 4, stem: str = "imagenet", channels: int = 3):
    """Random weights; the batch-norm statistics are those of a few batches."""
    paddle.seed(3)
    model = Network(name, outputs, channels, stem).build()
    if "resnet" in name:
        for _ in range(2):
            model(paddle.to_tensor(batch(4, 64, channels)))
    model.eval()
    return model


def scaled(maps: np.ndarray, size: int) -> np.ndarray:
    """(N, h, w) -> (N, size, size) in [0, 1], by OpenCV."""
    large = np.stack([cv2.resize(np.maximum(one, 0), (size, size), interpolation=cv2.INTER_LINEAR) for one in maps])
    largest = large.max(axis=(1, 2), keepdims=True)
    return large / np.where(largest > 0, largest, 1)


def features_of(model, x: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        return model.block(model.max_pool(model.conv(paddle.to_tensor(x)))).numpy()


def centred(model, x: np.ndarray):
    """Last weights without their part along the mean feature, so that every map has both signs."""
    mean = features_of(model, x).mean(axis=(0, 2, 3))
    weight = model.fc.weight.numpy()
    model.fc.weight.set_value(weight - np.outer(mean, mean @ weight) / (mean @ mean))
    return model


# --- the value -------------------------------------------------------------------------------------


def test_equals_cam_on_pool_and_linear() -> None:
    """CAM: the features weighted by the last layer's weights; 4 x 4 cells at 128 pixels."""
    x = batch(2, 128)
    model = centred(network("resnet50"), x)
    features, weights = features_of(model, x), model.fc.weight.numpy()
    for k in range(4):
        cam = np.einsum("nchw,c->nhw", features, weights[:, k])
        assert (cam > 0).any(axis=(1, 2)).all()
        np.testing.assert_allclose(gradcam(model, x, None, k), scaled(cam, 128), atol=1e-5)


@pytest.mark.parametrize("k", [0, 1])
def test_one_output_has_two_classes(k: int) -> None:
    """Class 1 is the logit, class 0 its negative, as in the probabilities."""
    x = batch(3, 128)
    model = centred(network(outputs=1), x)
    cam = np.einsum("nchw,c->nhw", features_of(model, x), model.fc.weight.numpy()[:, 0]) * (1 if k else -1)
    np.testing.assert_allclose(gradcam(model, x, "block.2", k), scaled(cam, 128), atol=1e-5)


@pytest.mark.parametrize("layer", ["block.1", "block.1.conv1.2", "conv.0", "max_pool"])
def test_equals_finite_differences(layer: str) -> None:
    """A second implementation: a channel's mean gradient is the logit's change when all its cells rise."""
    model, x, k, step = network(), batch(1), 2, 1e-2
    inner = dict(model.named_sublayers())[layer]
    state: dict = {}

    def nudge(_, __, output):
        state["output"] = output.numpy()
        return output + paddle.to_tensor(state["change"])

    handle = inner.register_forward_post_hook(nudge)
    try:
        with paddle.no_grad():
            state["change"] = np.float32(0)
            model(paddle.to_tensor(x))
            features = state["output"][0].astype(np.float64)  # (C, h, w)
            slopes = []
            for channel in range(len(features)):
                sides = []
                for sign in (1, -1):
                    state["change"] = np.zeros((1, *features.shape), np.float32)
                    state["change"][0, channel] = sign * step
                    sides.append(float(model(paddle.to_tensor(x))[0, k]))
                slopes.append((sides[0] - sides[1]) / (2 * step) / features[0].size)
    finally:
        handle.remove()
    slow = scaled(np.einsum("chw,c->hw", features, slopes)[None], 64)[0]
    fast = gradcam(model, x, layer, k)[0]
    assert (
        fast.max() == 1 and np.abs(fast - slow).max() < 0.05 and np.corrcoef(fast.ravel(), slow.ravel())[0, 1] > 0.999
    )


def test_vgg_equals_autograd_image_by_image(narrow_vgg: None) -> None:
    """Hidden layers behind the features: no CAM there, so the gradient is taken the long way."""
    model, x = network("vgg16", 3), batch(2, 64)
    maps = []
    for one in x:
        features = model.features[:23](paddle.to_tensor(one[None])).detach()
        features.stop_gradient = False
        top = model.avgpool(model.features[23:](features)).flatten(1)
        model.classifier(top)[0, 1].backward()
        maps.append((features.grad.mean(axis=[2, 3], keepdim=True) * features).sum(axis=1)[0].numpy())
        model.clear_gradients()
    np.testing.assert_allclose(gradcam(model, x, "features.22", 1), scaled(np.stack(maps), 64), atol=1e-5)


# --- Grad-CAM++ ------------------------------------------------------------------------------------


class Given(paddle.nn.Layer):
    """Its image is the layer's output; the logits are sums of it, weighted cell by cell."""

    def __init__(self, slopes: list) -> None:
        super().__init__()
        self.layer = paddle.nn.ReLU()
        self.slopes = paddle.to_tensor(np.array(slopes, np.float32))  # (outputs, C, h, w)

    def forward(self, x):
        return (self.layer(x).unsqueeze(1) * self.slopes).sum(axis=[2, 3, 4])


def test_gradcam_plus_plus_solved_by_hand() -> None:
    """Channel 0: sum 4, slopes .5, 0, 0, -1: .5 / (2 + 4 x .5) = 1/8. Channel 1: sum 2, slopes 1, 1: 1/4 + 1/4."""
    x = np.array([[[[1, 0], [0, 3]], [[0, 2], [0, 0]]]], np.float32)
    model = Given([[[[0.5, 0], [0, -1]], [[1, 1], [0, 0]]], np.zeros((2, 2, 2))])
    found = gradcam(model, x, "layer", 0, "gradcam++")[0]
    np.testing.assert_allclose(found, [[1 / 8, 1], [0, 3 / 8]], atol=1e-6)
    np.testing.assert_allclose(gradcam(model, x, "layer", 0)[0], [[0, 1], [0, 0]], atol=1e-6)  # mean slopes -1/8, 1/2
    assert not gradcam(model, x, "layer", 1, "gradcam++").any()


def test_gradcam_plus_plus_equals_the_papers_formula() -> None:
    """Derivatives of exp(logit) by finite differences in a pool-and-linear head, the formula cell by cell."""
    x, k, h = batch(2, 128), 1, 0.05
    model = network()
    weight, bias = model.fc.weight.numpy().astype(np.float64)[:, k] * 40, float(model.fc.bias.numpy()[k])
    model.fc.weight.set_value((model.fc.weight.numpy() * 40).astype(np.float32))  # so that the 2 is not all there is
    slow = []
    for features in features_of(model, x).astype(np.float64):
        logit = features.mean(axis=(1, 2)) @ weight + bias
        channels, height, width = features.shape
        weights = np.zeros(channels)
        for c in range(channels):
            steps = np.arange(-2, 3) * h * height * width / abs(weight[c])  # of one cell; the logit moves by h
            y = np.exp(steps * weight[c] / (height * width))  # exp(logit) after each, over exp(logit) before
            step = steps[3]
            first, second = (y[3] - y[1]) / (2 * step), (y[3] - 2 * y[2] + y[1]) / step**2
            third = (y[4] - 2 * y[3] + 2 * y[1] - y[0]) / (2 * step**3)
            for _ in range(height * width):
                weights[c] += second / (2 * second + features[c].sum() * third) * max(first, 0)
        slow.append(np.einsum("c,chw->hw", weights * np.exp(logit), features))
    fast = gradcam(model, x, "block.2", k, "gradcam++")
    np.testing.assert_allclose(fast, scaled(np.stack(slow), 128), atol=2e-3)
    assert np.abs(fast - gradcam(model, x, "block.2", k)).max() > 0.1  # another map than Grad-CAM's


def test_gradcam_plus_plus_needs_a_layer_after_its_relu() -> None:
    with pytest.raises(RecipeError, match=r"layer 'conv.0' has negative outputs"):
        gradcam(network(), batch(1), "conv.0", 0, "gradcam++")


def test_a_class_for_each_image() -> None:
    model, x = network(), batch(3)
    alone = [gradcam(model, x[n : n + 1], "block.1", k)[0] for n, k in enumerate((2, 0, 3))]
    np.testing.assert_allclose(gradcam(model, x, "block.1", [2, 0, 3]), alone, atol=1e-5)


def test_nothing_for_the_class_is_a_map_of_zeros() -> None:
    model, x = network(), batch(2)
    model.fc.weight.set_value(-paddle.ones_like(model.fc.weight))
    heat = gradcam(model, x, "block.2", 0)
    assert heat.shape == (2, 64, 64) and not heat.any()


# --- who calls, and what is left behind ------------------------------------------------------------


@pytest.mark.parametrize("caller", ["plain", "no_grad", "frozen"])
def test_callers_make_no_difference_and_nothing_remains(caller: str) -> None:
    model, x = network(), batch(2)
    expected = gradcam(model, x, "block.1", 1)
    freeze(model) if caller == "frozen" else None
    start_training(model, frozen=caller == "frozen")
    model.fc.weight.stop_gradient = False
    modes = [layer.training for layer in model.sublayers(include_self=True)]
    frozen = [parameter.stop_gradient for parameter in model.parameters()]
    assert any(modes)
    model.fc(paddle.ones([1, 256])).sum().backward()
    gradient = model.fc.weight.grad.numpy().copy()
    values = {name: value.numpy().copy() for name, value in model.state_dict().items()}

    def work() -> np.ndarray:
        found = gradcam(model, x, "block.1", 1)
        with pytest.raises(RecipeError):
            gradcam(model, x, "fc", 1)
        with pytest.raises(RecipeError):
            gradcam(model, x, "block.1", 4)
        return found

    if caller == "no_grad":
        with paddle.no_grad():
            found = work()
            assert not paddle.is_grad_enabled()
    else:
        found = work()
    assert paddle.is_grad_enabled() and (found == expected).all()
    assert [layer.training for layer in model.sublayers(include_self=True)] == modes
    assert [parameter.stop_gradient for parameter in model.parameters()] == frozen
    assert not any(layer._forward_post_hooks for layer in model.sublayers(include_self=True))
    assert (model.fc.weight.grad.numpy() == gradient).all() and model.conv[0].weight.grad is None
    assert all((value.numpy() == values[name]).all() for name, value in model.state_dict().items())


def test_outputs_are_bit_equal_before_and_after() -> None:
    model, x = network(), batch(2)
    with paddle.no_grad():
        before = model(paddle.to_tensor(x)).numpy()
        gradcam(model, x, None, 0)
        assert (model(paddle.to_tensor(x)).numpy() == before).all()


def test_an_interruption_in_the_network_leaves_no_trace() -> None:
    model, x = network(), batch(1)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.fc.register_forward_pre_hook(stop)
    with paddle.no_grad(), pytest.raises(KeyboardInterrupt):
        gradcam(model, x, "block.1", 0)
    handle.remove()
    model.train()
    assert paddle.is_grad_enabled() and not model.block[1]._forward_post_hooks


def test_memory_does_not_grow_over_40_calls() -> None:
    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    try:
        resident()
    except OSError:
        pytest.skip("no /proc")
    model, x = network(), batch(2)
    for _ in range(10):
        gradcam(model, x, "block.0", 1)
    before = resident()
    for _ in range(40):
        gradcam(model, x, "block.0", 1)
    assert resident() - before < 10  # MB; keeping one call's features and gradients would take 40 times 0.5


# --- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stem", "channels", "size", "layer"),
    [
        ("resnet18", "imagenet", 3, 224, "block.7"),
        ("resnet50", "imagenet", 3, 128, "block.15"),
        ("resnet18", "small", 1, 28, "block.7"),
        ("resnet18", "imagenet", 3, 28, "block.3"),  # 1 x 1 in the last stage, 2 x 2 before
        ("vgg16", "imagenet", 3, 64, "features.29"),
        ("shufflenet_v2_x0_25", "imagenet", 3, 64, "backbone.3_8"),  # `4_1` halves the maps: its inside does not count
        ("squeezenet1_1", "imagenet", 1, 96, "backbone._conv8"),  # not the Identity or dropout that follow
        ("mobilenet_v3_small", "imagenet", 3, 128, "backbone.lastconv.2"),
        ("googlenet", "imagenet", 3, 64, "backbone._ince3b"),  # a block's outputs together, not one branch
    ],
)
def test_default_layer(name: str, stem: str, channels: int, size: int, layer: str, narrow_vgg: None) -> None:
    model, x = Network(name, 2, channels, stem).build(), np.zeros((1, channels, size, size), np.float32)
    model.eval()
    assert default_layer(model, x) == layer
    assert gradcam(model, x, None, 1).shape == (1, size, size)


def test_layers_to_choose_from() -> None:
    shapes = layer_shapes(network(), batch(1))
    assert shapes["block.1"] == (128, 8, 8) and shapes["conv.0"] == (64, 32, 32)
    assert "fc" not in shapes and "avg_pool" not in shapes
    names = list(shapes)
    assert names.index("conv.0") < names.index("block.0.conv1.0") < names.index("block.2")


def test_unknown_layer_is_one_clear_error() -> None:
    with pytest.raises(RecipeError, match="unknown layer 'block.16'; did you mean 'block.") as error:
        gradcam(network(), batch(1), "block.16", 0)
    assert "--list-layers" in str(error.value)
    with pytest.raises(RecipeError, match=r"layer 'fc' gives the shape \(1, 4\)"):
        gradcam(network(), batch(1), "fc", 0)


def test_a_network_without_maps_of_four_cells_asks_for_a_layer() -> None:
    with pytest.raises(RecipeError, match="no layer of this ResNet suits a heat map of 6 x 6"):
        gradcam(network(), batch(1)[:, :, :6, :6], None, 0)
