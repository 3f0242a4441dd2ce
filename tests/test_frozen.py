"""Transfer learning: frozen layers do not change, cached features equal computed ones, ImageNet weights are checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cv2
import fakes
import numpy as np
import pytest
from toynet import without_values

from paddle_medcls.core.errors import DataError, RecipeError, WeightsError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.datasets import load_index
from paddle_medcls.evaluation.evaluate import evaluate_split
from paddle_medcls.models import pretrained
from paddle_medcls.models.network import Network
from paddle_medcls.models.weights import load_pretrained, recognise, save_weights
from paddle_medcls.preprocessing.augmentation import _random_crop, random_version
from paddle_medcls.preprocessing.loader import ImageDataset
from paddle_medcls.training.frozen_features import cached_features, freeze, frozen_hash, head_logits, start_training
from paddle_medcls.training.loop import Options, train

QUIET = Options(device="cpu", workers=0, say=lambda line: None)


def frozen_recipe(**changes):
    values = {
        "freeze": True,
        "cache_views": 2,
        "flip": 0.5,
        "brightness": 0.2,
        "optimizer": "adam",
        "lr": 0.01,
        "epochs": 4,
    }
    return fakes.recipe(**{**values, **changes})


# --- VGG-16 --------------------------------------------------------------------------------------


def test_parameter_counts_of_the_oct_tutorial() -> None:
    vgg = without_values(Network("vgg16", 4))
    assert sum(parameter.size for parameter in vgg.parameters()) == 135_310_404
    freeze(vgg)
    trained = sum(parameter.size for parameter in vgg.parameters() if not parameter.stop_gradient)
    assert trained == sum(parameter.size for parameter in vgg.head.parameters()) == 1_049_860


def test_features_are_those_of_paddle_vision(narrow_vgg: None, tmp_path: Path) -> None:
    paddle.seed(0)
    vgg, theirs = Network("vgg16", 4).build(), paddle.vision.models.vgg16()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    own = {name: tuple(value.shape) for name, value in vgg.state_dict().items() if not name.startswith("classifier.6")}
    assert own == {name: value.shape for name, value in state.items() if not name.startswith("classifier.6")}
    network, renamed, layout = recognise(state, "vgg")
    assert (network, layout) == (Network("vgg16", 1000), "paddle.vision")
    save_weights(theirs, tmp_path / "vgg16.pdparams")
    message = load_pretrained(vgg, Network("vgg16", 4), tmp_path / "vgg16.pdparams")
    assert "without its head (1000 outputs; expected 4)" in message
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype("float32"))
    for model in (vgg, theirs):
        model.eval()
    with paddle.no_grad():
        expected = theirs.classifier[:6](paddle.flatten(theirs.avgpool(theirs.features(x)), 1))
        np.testing.assert_allclose(vgg.embed(x).numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_torchvision_linear_weights_are_transposed() -> None:
    rng = np.random.default_rng(0)
    state = {f"features.{n}.weight": rng.normal(size=(2, 3, 3, 3)) for n in (0, 28)}
    state["classifier.0.weight"] = np.broadcast_to(np.float32(0), (4096, 25088))  # (out, in): torch
    state["classifier.3.weight"] = rng.normal(size=(5, 7))
    state["classifier.6.weight"] = rng.normal(size=(10, 4096))
    network, renamed, layout = recognise(state, "vgg")
    assert layout == "torchvision" and network.num_outputs == 10
    np.testing.assert_array_equal(renamed["classifier.3.weight"], state["classifier.3.weight"].T)
    np.testing.assert_array_equal(renamed["features.0.weight"], state["features.0.weight"])


# --- frozen --------------------------------------------------------------------------------------


def small_model():
    paddle.seed(1)
    model = Network("toy_resnet", 1).build()
    freeze(model)
    return model


def test_frozen_layers_have_no_gradient_and_do_not_change() -> None:
    model = small_model()
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    optimizer = paddle.optimizer.Adam(0.1, parameters=[p for p in model.parameters() if not p.stop_gradient])
    start_training(model, frozen=True)
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype("float32"))
    model(x).sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("fc."))
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not np.array_equal(value.numpy(), before[name])}
    assert changed == {"fc.weight", "fc.bias"}  # no batch-norm statistics among them


def test_unfrozen_training_does_move_batch_norm() -> None:
    """The check above can fail: without freezing the statistics move."""
    paddle.seed(1)
    model = Network("toy_resnet", 1).build()
    before = model.state_dict()["conv.1._mean"].numpy().copy()
    start_training(model, frozen=False)
    model(paddle.ones([4, 3, 32, 32]))
    assert not np.array_equal(model.state_dict()["conv.1._mean"].numpy(), before)


def test_cached_and_uncached_evaluation_agree(palm_root: Path, tmp_path: Path) -> None:
    model, recipe = small_model(), frozen_recipe()
    index = load_index("palm", palm_root, "val")
    dataset = ImageDataset(index, recipe.preprocessing)
    cached = head_logits(model, np.load(cached_features(model, "w", dataset, tmp_path / "features", 0)))
    direct = evaluate_split(model, dataset, 3, 0)
    np.testing.assert_allclose(cached, direct, atol=1e-5)
    assert np.ptp(direct) > 1e-3


def test_the_cache_is_never_stale(palm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe, folder = small_model(), frozen_recipe(), tmp_path / "features"
    index = load_index("palm", palm_root, "val")

    def features(weights="w", recipe=recipe, view=None):
        augmentation = None if view is None else recipe.augmentation
        dataset = ImageDataset(index, recipe.preprocessing, augmentation, recipe.seed, view or 0)
        return np.load(cached_features(model, weights, dataset, folder, 0))

    features()
    written = [path.stat().st_mtime_ns for path in folder.iterdir()]
    features()
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == written  # read, not made again
    features(weights="other")
    features(recipe=recipe.replace(size_px=40))
    features(view=0)
    features(view=1)
    features(view=0, recipe=recipe.replace(brightness=0.3))
    index.images[0].write_bytes(index.images[1].read_bytes())
    features()
    assert len(list(folder.iterdir())) == 7
    with monkeypatch.context() as patch:
        patch.setattr(paddle, "get_device", lambda: "gpu:0")
        features()
    assert len(list(folder.iterdir())) == 8


def test_features_of_other_pixels_of_the_same_size_and_time_are_not_used(palm_root: Path, tmp_path: Path) -> None:
    model, recipe, folder = small_model(), frozen_recipe(), tmp_path / "features"
    index = load_index("palm", palm_root, "val")
    found = []
    for seed in (0, 100):
        for row, path in enumerate(index.images):
            path.write_bytes(cv2.imencode(".bmp", fakes.pixels(seed + row))[1].tobytes())
            os.utime(path, ns=(0, 0))
        dataset = ImageDataset(index, recipe.preprocessing)
        found.append(np.load(cached_features(model, "w", dataset, folder, 0)))
    assert np.abs(found[0] - found[1]).max() > 1e-3 and len(list(folder.iterdir())) == 2


def test_a_run_without_a_writable_feature_folder_is_the_same_run(palm_root: Path, tmp_path: Path) -> None:
    (tmp_path / "features").write_text("a file, where the folder of the features would be")
    lines: list[str] = []
    train(frozen_recipe(), palm_root, tmp_path / "run", Options(device="cpu", workers=0, say=lines.append))
    assert sum("features are not cached for later runs" in line for line in lines) == 1
    train(frozen_recipe(), palm_root, tmp_path / "elsewhere" / "run", QUIET)
    assert read_run(tmp_path / "run") == read_run(tmp_path / "elsewhere" / "run")


def test_the_hash_covers_all_but_the_head() -> None:
    model = small_model()
    first = frozen_hash(model)
    model.fc.bias.set_value(model.fc.bias + 1)
    assert frozen_hash(model) == first
    model.conv[1]._mean.set_value(model.conv[1]._mean + 1)
    assert frozen_hash(model) != first


def read_run(run: Path) -> tuple:
    return (run / "history.csv").read_bytes(), (run / "steps.csv").read_bytes(), (run / "PALM.pdparams").read_bytes()


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_run_resumed_with_frozen_features_is_the_run(palm_root: Path, tmp_path: Path, ema_decay: float) -> None:
    recipe = frozen_recipe(ema_decay=ema_decay)
    train(recipe, palm_root, tmp_path / "a" / "whole", QUIET)
    stop = Options(device="cpu", workers=0, deadline=-1.0, say=lambda line: None)  # stops after the first step
    for _ in range(2):
        with pytest.raises(Exception, match="interrupted; state saved"):
            train(recipe, palm_root, tmp_path / "b" / "parts", stop, resume=_ > 0)
    train(recipe, palm_root, tmp_path / "b" / "parts", QUIET, resume=True)
    assert read_run(tmp_path / "a" / "whole") == read_run(tmp_path / "b" / "parts")


def test_cached_and_uncached_training_see_the_same_images(palm_root: Path, tmp_path: Path) -> None:
    """With one epoch and one view they are the same run, but for the rounding of batches."""
    with_cache = frozen_recipe(epochs=1, cache_views=1)
    train(with_cache, palm_root, tmp_path / "a" / "run", QUIET)
    train(with_cache.replace(cache_views=0), palm_root, tmp_path / "b" / "run", QUIET)
    losses = [np.loadtxt(tmp_path / k / "run" / "steps.csv", delimiter=",", skiprows=1)[:, 2] for k in "ab"]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_cache_without_freeze_is_refused() -> None:
    with pytest.raises(RecipeError, match="cache_views"):
        frozen_recipe(freeze=False)


# --- augmentation and loss of the OCT transfer-learning tutorial -----------------------------------


def test_random_crops_have_the_area_and_the_aspect_ratio() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, height, width = _random_crop(496, 768, 0.8, rng)
        assert 0 <= top <= 496 - height and 0 <= left <= 768 - width
        assert 0.79 < height * width / (496 * 768) <= 1
        assert height == 496 and width == 768 or 0.74 < width / height < 1.35


def test_random_version_has_the_networks_size_and_is_a_function_of_its_generator() -> None:
    image = fakes.pixels(0, size=96)[:60]
    recipe = fakes.recipe(fit="crop", size_px=32, resize_px=40, crop_scale=0.8, flip=0.5, rotate_degrees=15.0)
    spec = recipe.preprocessing
    versions = [random_version(image, spec, recipe.augmentation, np.random.default_rng([1, k])) for k in (0, 0, 1)]
    assert versions[0].shape == (32, 32, 3)
    np.testing.assert_array_equal(versions[0], versions[1])
    assert not np.array_equal(versions[0], versions[2])


def test_cross_entropy_of_logits_is_nll_of_log_softmax() -> None:
    """The OCT tutorial ends its network in LogSoftmax and uses NLLLoss; here the loss takes logits."""
    F = paddle.nn.functional
    logits = paddle.to_tensor(np.random.default_rng(0).normal(0, 5, (6, 4)).astype("float32"))
    labels = paddle.to_tensor([0, 1, 2, 3, 3, 0])
    theirs = F.nll_loss(F.log_softmax(logits, axis=1), labels)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(theirs.item(), rel=1e-6)


# --- published weights ---------------------------------------------------------------------------


def test_without_a_network_the_error_says_what_to_put_where(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    table = sys.modules["paddle.vision.models.vgg"].model_urls
    monkeypatch.setitem(table, "vgg16", ("https://127.0.0.1:9/vgg16.pdparams", table["vgg16"][1]))  # nobody listens
    with pytest.raises(DataError) as caught:
        pretrained.pretrained_file("imagenet", "vgg16")
    for part in (
        "https://127.0.0.1:9/vgg16.pdparams",
        str(tmp_path / "vgg16.pdparams"),
        "89bbffc0f87d260be9b8cdc169c991c4",
    ):
        assert part in str(caught.value)


def test_a_file_with_another_md5_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    (tmp_path / "resnet50.pdparams").write_bytes(b"not it")
    with pytest.raises(DataError, match="md5"):
        pretrained.pretrained_file("imagenet", "resnet50")


def test_a_path_is_a_path_and_unpublished_networks_are_named(tmp_path: Path) -> None:
    assert pretrained.pretrained_file("mine.pdparams", "resnet18") == Path("mine.pdparams")
    with pytest.raises(WeightsError, match="no ImageNet weights are published for vgg11"):
        pretrained.pretrained_file("imagenet", "vgg11")
