"""The networks of paddle.vision: the same logits as there, what they refuse, ImageNet weights, a whole run."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest

import paddle_medcls as medcls
from paddle_medcls.cli import train as train_command
from paddle_medcls.core.errors import DataError, SetupError, WeightsError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.deployment.export import export
from paddle_medcls.deployment.opening import open_trained
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.models import pretrained
from paddle_medcls.models.architectures.vision import refuse_size
from paddle_medcls.models.network import MODELS, PARAMETERS, Network
from paddle_medcls.models.weights import load_pretrained, save_weights
from paddle_medcls.training.loop import Options, train

SMALLEST = "shufflenet_v2_x0_25"
QUIET = Options(device="cpu", workers=0, say=lambda line: None)


def theirs(name: str, outputs: int = 1000) -> paddle.nn.Layer:
    """paddle.vision's own network, after a batch that changed its batch-norm statistics from 0 and 1."""
    paddle.seed(3)
    model = getattr(paddle.vision.models, name)(num_classes=outputs)
    model(paddle.randn([2, 3, 224 if name == "googlenet" else 64, 224 if name == "googlenet" else 64]))
    model.eval()
    return model


def batch(size: int, channels: int = 3) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).normal(size=(2, channels, size, size)).astype(np.float32))


@pytest.mark.parametrize(("name", "size"), [(SMALLEST, 64), ("mobilenet_v3_small", 64), ("googlenet", 224)])
def test_logits_equal_paddles_own_network(name: str, size: int, tmp_path: Path) -> None:
    source = theirs(name)
    save_weights(source, tmp_path / "a.pdparams")
    network = Network(name, 1000)
    model = network.build()
    line = load_pretrained(model, network, tmp_path / "a.pdparams")
    assert "paddle.vision names" in line and line.endswith("with its head")
    model.eval()
    with paddle.no_grad():
        expected = source(batch(size))
        expected = expected[0] if isinstance(expected, (tuple, list)) else expected
        np.testing.assert_allclose(model(batch(size)).numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model.head(model.embed(batch(size))).numpy(), model(batch(size)).numpy())
    gray = Network(name, 1000, in_channels=1).build()
    load_pretrained(gray, Network(name, 1000, in_channels=1), tmp_path / "a.pdparams")
    gray.eval()
    with paddle.no_grad():
        one = batch(size, 1)
        np.testing.assert_array_equal(gray(one).numpy(), model(paddle.concat([one] * 3, axis=1)).numpy())


def test_squeezenet_has_no_relu_behind_its_logits(tmp_path: Path) -> None:
    """Its last layer is a convolution of 1 x 1; the mean over its cells is that of the mean over the features."""
    source, model = theirs("squeezenet1_1"), Network("squeezenet1_1", 1000).build()
    save_weights(source, tmp_path / "a.pdparams")
    line = load_pretrained(model, Network("squeezenet1_1", 1000), tmp_path / "a.pdparams")
    assert "without its head (1000 outputs" in line
    last = source._conv9
    model.fc.weight.set_value(last.weight.reshape([1000, 512]).transpose([1, 0]))
    model.fc.bias.set_value(last.bias)
    source._conv9.register_forward_post_hook(lambda layer, inputs, output: maps.append(output))
    maps: list = []
    model.eval()
    with paddle.no_grad():
        source(batch(64))
        np.testing.assert_allclose(model(batch(64)).numpy(), maps[0].mean([2, 3]).numpy(), rtol=1e-4, atol=1e-5)
        assert float(model(batch(64)).min()) < 0 <= float(source(batch(64)).min())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_weights(theirs("squeezenet1_1"), tmp_path / "a.pdparams")
    network = Network(SMALLEST, 2)
    with pytest.raises(WeightsError, match=r"does not fit the network: .* entries differ"):
        load_pretrained(network.build(), network, tmp_path / "a.pdparams")


# --- what is refused before any image is read ------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg16", "densenet121"])
def test_only_a_resnet_has_a_small_stem(name: str) -> None:
    with pytest.raises(WeightsError, match=f"stem: 'small'; expected imagenet for {name}: only a ResNet"):
        Network(name, 2, stem="small")


@pytest.mark.parametrize(("name", "fewest"), [("squeezenet1_1", 29), (SMALLEST, 1)])
def test_sizes_are_refused_as_long_as_a_kernel_is_larger_than_its_input(name: str, fewest: int) -> None:
    network = Network(name, 2)
    model = network.build()
    refuse_size(model, network, fewest, "")
    if fewest > 1:
        with pytest.raises(SetupError, match=f"cannot take images of {fewest - 1} x {fewest - 1} pixels") as caught:
            refuse_size(model, network, fewest - 1, "another")
        assert "of the usual ones 32, 48, 64, 96, 128, 192, 224, 299" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"size_px": 16}, {}, "squeezenet1_1 cannot take images of 16 x 16 pixels"),
        ({"model": "vgg11", "pretrained": "imagenet"}, {}, "no ImageNet weights are published for vgg11"),
        ({}, {"kernels": "onednn"}, "they support complete ResNets only, not VisionNetwork"),
        ({"freeze": True, "cache_views": 1}, {"kernels": "onednn"}, "complete ResNets only, not Linear"),
    ],
)
def test_refused_before_data_are_looked_for(changes: dict, options: dict, message: str, tmp_path: Path) -> None:
    recipe = fakes.recipe(**{"model": "squeezenet1_1", "size_px": 32, **changes})
    with pytest.raises((SetupError, WeightsError), match=message):
        train(recipe, tmp_path / "nothing", tmp_path / "run", Options(**{**vars(QUIET), **options}))
    with pytest.raises(DataError):
        train(fakes.recipe(model="squeezenet1_1"), tmp_path / "nothing", tmp_path / "run", QUIET)


# --- ImageNet weights --------------------------------------------------------------------------------


def test_the_tables_of_paddle_vision_name_the_weights_of_all_networks_but_two() -> None:
    missing = []
    for name in PARAMETERS:
        try:
            url, md5 = pretrained.published(name)
        except WeightsError:
            missing.append(name)
            continue
        assert url.startswith("https://") and url.endswith(".pdparams") and len(bytes.fromhex(md5)) == 16
    assert missing == ["vgg11", "vgg13"]
    assert pretrained.published("mobilenet_v3_large")[0].endswith("/mobilenet_v3_large_x1.0.pdparams")


def test_imagenet_weights_come_from_paddles_cache_after_their_md5_was_checked(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "published.pdparams"
    source = theirs(SMALLEST)
    save_weights(source, file)
    table = sys.modules["paddle.vision.models.shufflenetv2"].model_urls
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(table, SMALLEST, ("https://127.0.0.1:9/x/published.pdparams", digest))
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    model = medcls.create_model(SMALLEST, 3, pretrained=True)
    expected = source._conv1[0].weight.numpy()
    np.testing.assert_array_equal(model.backbone._conv1[0].weight.numpy(), expected)
    assert list(model.fc.weight.shape) == [512, 3]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="another md5"):
        medcls.create_model(SMALLEST, 3, pretrained=True)


# --- a whole run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    root = fakes.palm_tree(tmp_path_factory.mktemp("palm"))
    recipe = fakes.recipe(model=SMALLEST, freeze=True, cache_views=1, epochs=1, ema_decay=0.9)
    return train(recipe, root, root.parent / "vision-run", QUIET)


def test_a_trained_network_predicts_explains_and_exports(run, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    predictor = medcls.load_predictor(run.weights)
    assert json.loads(run.weights.with_suffix(".json").read_text())["network"]["model"] == SMALLEST
    images = [fakes.pixels(number) for number in range(5)]
    assert predictor.heatmaps(images[:1], 1)[0].shape == (32, 32)
    agreement = export(run.weights, "openvino", tmp_path / "openvino", images)
    assert agreement.difference < 1e-5 and agreement.same_labels == 1
    served = Predictor.from_weights(tmp_path / "openvino")
    np.testing.assert_allclose(served.logits(images), predictor.logits(images), atol=1e-4)


def test_a_sidecar_with_a_size_that_the_network_cannot_take_is_refused(tmp_path: Path, run) -> None:
    network = Network("squeezenet1_1", 1)
    save_weights(network.build(), tmp_path / "a.pdparams")
    sidecar = json.loads(run.weights.with_suffix(".json").read_text())
    sidecar["network"]["model"], sidecar["preprocessing"]["size_px"] = "squeezenet1_1", 16
    sidecar["sha256"] = hashlib.sha256((tmp_path / "a.pdparams").read_bytes()).hexdigest()
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    with pytest.raises(SetupError, match="cannot take images of 16 x 16 pixels"):
        open_trained(tmp_path / "a.pdparams", None, ("paddle", "f32"), lambda line: None, False)


def test_the_list_of_networks_has_their_sizes(capsys) -> None:
    with pytest.raises(SystemExit):
        train_command.main(["--model", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.split()[0] in PARAMETERS]) == len(PARAMETERS) == len(lines)
    assert any(line.split()[:3] == ["densenet121", "8.0", "million"] for line in lines)
    assert sum("this package" in line for line in lines) == sum(MODELS[name] != "vision" for name in PARAMETERS) == 6
