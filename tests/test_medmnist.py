"""MedMNIST: files, batches, augmentation, recipes, training on the four tasks, its own evaluator."""

import importlib.util
import json
import os
import sys
import time
import types
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddle_medcls.cli import eval as eval_command
from paddle_medcls.cli import reproduce as reproduce_command
from paddle_medcls.cli import train as train_command
from paddle_medcls.core import files
from paddle_medcls.core.errors import DataError, Stopped
from paddle_medcls.data.datasets import dataset_module, dataset_names, default_root, load_index, weights_name
from paddle_medcls.data.datasets.medmnist import card_of
from paddle_medcls.data.datasets.medmnist_cards import ALIASES, CARDS
from paddle_medcls.data.index import SYNTHETIC_MARK
from paddle_medcls.data.sample import draw_npz
from paddle_medcls.evaluation import metrics
from paddle_medcls.evaluation.medmnist_scores import write_scores
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.preprocessing.augmentation import Augmentation, augment_batch, draw_epoch
from paddle_medcls.preprocessing.loader import ImageDataset, cut, epoch_order, load_batches
from paddle_medcls.preprocessing.statistics import image_statistics
from paddle_medcls.preprocessing.transforms import fit, preprocess
from paddle_medcls.recipes import all_recipes, get_recipe, published_results
from paddle_medcls.training.loop import Options, train
from paddle_medcls.training.setup import network_for

RECIPES = [name for name in all_recipes() if name.startswith("medmnist")]
TASKS = {"breastmnist": "binary", "retinamnist": "ordinal", "bloodmnist": "multi-class", "chestmnist": "multi-label"}
REAL = Path(os.environ.get("MEDCLS_TEST_DATA", "")) / "medmnist"


def synthetic_set(root, name, counts=(24, 24, 24)):
    root.mkdir(parents=True, exist_ok=True)
    (root / SYNTHETIC_MARK).touch()
    draw_npz(name, root, counts=counts)
    return root


def arrays_of(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """MedMNIST's own info and evaluator, without its package's import of torch."""
    found = importlib.util.find_spec("medmnist")
    if found is None or importlib.util.find_spec("sklearn") is None:
        pytest.skip("the packages medmnist and scikit-learn are not installed (pip install --no-deps medmnist)")
    package = types.ModuleType("medmnist")
    package.__path__ = list(found.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # its import makes a folder there
        for name in ("medmnist", "medmnist.info", "medmnist.evaluator"):
            patch.setitem(sys.modules, name, package)
        del sys.modules["medmnist.info"], sys.modules["medmnist.evaluator"]
        yield importlib.import_module("medmnist.info"), importlib.import_module("medmnist.evaluator")


@pytest.fixture(autouse=True)
def no_large_leftovers(tmp_path):
    yield
    for state in tmp_path.rglob("state.safetensors"):  # 130 MB each
        state.unlink()


# --- names, cards, recipes -----------------------------------------------------------------------


def test_cards_agree_with_medmnist(official):
    tasks = {"binary-class": "binary", "ordinal-regression": "ordinal", "multi-label, binary-class": "multi-label"}
    flat = {flag: facts for flag, facts in official[0].INFO.items() if not flag.endswith("3d")}
    assert set(CARDS) == set(flat)
    for flag, facts in flat.items():
        card = CARDS[flag]
        assert card.classes == tuple(facts["label"].values())
        assert card.counts == tuple(facts["n_samples"][split] for split in ("train", "val", "test"))
        assert (card.channels, card.licence) == (facts["n_channels"], facts["license"])
        assert card.task == tasks.get(facts["task"], facts["task"])
        assert card.md5 == {28: facts["MD5"], **{side: facts[f"MD5_{side}"] for side in (64, 128, 224)}}


def test_every_name_is_a_data_set():
    assert len(CARDS) == 12
    assert {*CARDS, *ALIASES, "pathmnist_64", "tissuemnist_224"} <= set(dataset_names())
    assert "medmnist" not in dataset_names()
    assert weights_name("breastmnist") == "breastmnist" and weights_name("palm") == "PALM"
    assert default_root("breastmnist_64") == Path("datasets/medmnist") and default_root("covid") == Path(
        "datasets/covid"
    )
    assert card_of("organmnist_axial") == (CARDS["organamnist"], 28)
    with pytest.raises(DataError, match="did you mean 'breastmnist'"):
        dataset_module("breastmnits")


@pytest.mark.parametrize("flag", CARDS)
def test_every_recipe_fits_every_set(flag):
    card = CARDS[flag]
    for name in RECIPES:
        recipe = get_recipe(name, flag)
        network = network_for(recipe, len(card.classes), card.task)
        assert (recipe.dataset, network.in_channels, network.num_outputs) == (flag, card.channels, len(card.classes))
        assert recipe.name == name
    best = get_recipe("medmnist_best", flag)
    flips = {name for name in ("flip", "flip_vertical") if getattr(best.augmentation, name)}
    assert flips == set(card.flips) == set(best.evaluation_flips)
    assert get_recipe(flag) == get_recipe("medmnist", flag)


def test_published_results_follow_set_network_and_size():
    assert get_recipe("breastmnist").targets == (("test/auc", 0.901), ("test/accuracy", 0.863))
    assert dict(get_recipe("medmnist", "retinamnist", "resnet50").targets)["test/accuracy"] == 0.528
    assert dict(get_recipe("medmnist_28_to_224", "breastmnist").targets)["test/auc"] == 0.891
    assert dict(get_recipe("medmnist_study", "pneumoniamnist", "resnet50").targets)["test/accuracy"] == 0.897
    assert get_recipe("breastmnist_224").targets == () == get_recipe("breastmnist", model="resnet34").targets
    assert get_recipe("medmnist", "organmnist_axial").targets == get_recipe("organamnist").targets
    assert set(published_results.PAPER) == set(CARDS)


def test_sizes_and_lengths_of_the_recipes():
    plus, enlarged = get_recipe("breastmnist_224"), get_recipe("medmnist_28_to_224", "breastmnist")
    assert (plus.dataset, plus.preprocessing.size_px, plus.stem) == ("breastmnist_224", 224, "imagenet")
    spec = enlarged.preprocessing
    assert (enlarged.dataset, spec.size_px, spec.interpolation) == ("breastmnist", 224, "nearest")
    study = [get_recipe("medmnist_study", "breastmnist", model).epochs for model in ("resnet18", "resnet50")]
    assert study == [50, 20]
    paper = get_recipe("medmnist", "breastmnist")
    assert (paper.optimizer, paper.lr, paper.decay_epochs, paper.epochs) == ("adam", 0.001, (50, 75), 100)
    assert (paper.batch_size, paper.monitor, paper.stem, paper.preprocessing.mean) == (128, "auc", "small", (127.5,))


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "task"), TASKS.items())
def test_a_set_is_read(tmp_path, flag, task):
    index = load_index(flag, synthetic_set(tmp_path, flag), "val")
    stored = arrays_of(tmp_path / f"{flag}.npz")
    assert (index.task, index.synthetic, len(index)) == (task, True, 24)
    assert np.array_equal(index.images, stored["val_images"])
    assert np.array_equal(index.labels.reshape(24, -1), stored["val_labels"])
    assert index.ids[:2] == ("val0", "val1") and index.labels.dtype == np.int64


def test_a_file_with_another_checksum_is_used_and_reported(tmp_path):
    draw_npz("breastmnist", tmp_path, counts=CARDS["breastmnist"].counts)
    index = load_index("breastmnist", tmp_path, "test")
    assert len(index) == 156
    assert "differs from the official file" in index.note and CARDS["breastmnist"].md5[28] in index.note


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def broken(name, good, tmp_path):
    """Bytes of a broken file, and what the message must name."""
    arrays = dict(good)
    if name == "missing key":
        del arrays["val_labels"]
        return arrays, "val_labels: missing"
    if name == "wrong side":
        arrays["train_images"] = np.zeros((24, 32, 32), np.uint8)
        return arrays, "train_images: 24 x 32 x 32"
    if name == "colour":
        arrays["test_images"] = np.zeros((24, 28, 28, 3), np.uint8)
        return arrays, "test_images: 24 x 28 x 28 x 3"
    if name == "float images":
        arrays["val_images"] = arrays["val_images"] / 255
        return arrays, "val_images: 24 x 28 x 28, float64"
    if name == "label out of range":
        arrays["val_labels"] = arrays["val_labels"] + np.uint8(1)
        return arrays, "val_labels: a label of 2"
    if name == "flat labels":
        arrays["val_labels"] = arrays["val_labels"][:, 0]
        return arrays, "val_labels: 24, uint8"
    if name == "labels of others":
        arrays["val_labels"] = arrays["val_labels"][:20]
        return arrays, "20 labels"
    if name == "too many":
        arrays["train_images"] = np.zeros((547, 28, 28), np.uint8)
        return arrays, "train_images: 547 x 28 x 28"
    if name == "pickle":
        arrays["val_images"] = np.array([Touch(tmp_path / "ran")], dtype=object)
        return arrays, "val_images: pickled objects"
    raise AssertionError(name)


KINDS = ["missing key", "wrong side", "colour", "float images", "label out of range", "flat labels"]
KINDS += ["labels of others", "too many", "pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_faulty_arrays_are_refused(tmp_path, kind):
    path = synthetic_set(tmp_path, "breastmnist") / "breastmnist.npz"
    arrays, words = broken(kind, arrays_of(path), tmp_path)
    np.savez_compressed(path, **arrays)
    with pytest.raises(DataError) as caught:
        load_index("breastmnist", tmp_path, "val")
    message = str(caught.value)
    assert "breastmnist.npz: " in message and words in message and "expected" in message
    assert not (tmp_path / "ran").exists()


def test_counts_are_checked_against_the_card(tmp_path):
    draw_npz("breastmnist", tmp_path, counts=(24, 24, 24))
    with pytest.raises(DataError, match="train_images: 24 x 28 x 28, uint8") as caught:
        load_index("breastmnist", tmp_path, "val")
    assert "546 x 28 x 28, uint8" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 3000, -30])
def test_truncated_files_are_refused(tmp_path, keep):
    path = synthetic_set(tmp_path, "breastmnist") / "breastmnist.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"breastmnist.npz: the file: it cannot be read"):
        load_index("breastmnist", tmp_path, "val")


def test_a_flipped_bit_is_found(tmp_path):
    path = synthetic_set(tmp_path, "breastmnist") / "breastmnist.npz"
    with zipfile.ZipFile(path) as file:
        start = file.getinfo("val_images.npy").header_offset + 2000
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="val_images: it cannot be read"):
        load_index("breastmnist", tmp_path, "val")


@pytest.mark.parametrize("claimed", ["(10**12, 28, 28)", "(24, 28, 28)", "(24, 28, 28", "[(" * 4000])
def test_what_a_header_claims_is_checked_before_memory_is_taken(tmp_path, claimed):
    path = synthetic_set(tmp_path, "breastmnist") / "breastmnist.npz"
    claimed = claimed.replace("10**12", "1000000000000")
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {claimed}, }}".encode()
    with zipfile.ZipFile(path) as file:
        kept = {name: file.read(name) for name in file.namelist()}
    # ten megabytes of zeros behind a header of our choice
    kept["val_images.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(10**7)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in kept.items():
            file.writestr(name, data)
    assert path.stat().st_size < 10**6
    with pytest.raises(DataError, match=r"breastmnist.npz: val_images: "):
        load_index("breastmnist", tmp_path, "val")


def test_a_missing_file_tells_how_to_get_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_index("retinamnist", tmp_path, "val")
    message = str(caught.value)
    assert "https://zenodo.org/records/10519652/files/retinamnist.npz" in message
    assert CARDS["retinamnist"].md5[28] in message and "--download" in message


# --- batches and augmentation --------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "name"), [("breastmnist", "medmnist"), ("bloodmnist", "medmnist_28_to_224")])
def test_batches_equal_images_one_by_one(tmp_path, flag, name):
    index = load_index(flag, synthetic_set(tmp_path, flag, (8, 8, 8)), "train")
    spec = get_recipe(name, flag).preprocessing
    dataset = ImageDataset(index, spec)
    assert dataset.enlarge == spec.size_px // 28
    for batch in load_batches(dataset, cut(range(8), 3), workers=2):
        singles = [dataset[row] for row in batch.rows]
        assert np.array_equal(batch.x, np.stack([x for x, _ in singles]))
        assert np.array_equal(batch.labels, [label for _, label in singles])
        assert batch.x.dtype == np.float32


def test_enlarging_is_the_nearest_pixel():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    spec = get_recipe("medmnist_28_to_224", "bloodmnist").preprocessing
    assert np.array_equal(fit(image, spec), np.kron(image, np.ones((8, 8, 1), np.uint8)))
    assert preprocess(image, spec).shape == (3, 224, 224)


def test_augmented_batches_depend_on_seed_epoch_and_batch_alone(tmp_path):
    recipe = get_recipe("medmnist_best", "bloodmnist")
    index = load_index("bloodmnist", synthetic_set(tmp_path, "bloodmnist"), "train")
    spec = recipe.preprocessing
    batches = cut(epoch_order(24, 5, 1), 8)

    def xs(first, workers, epoch=1):
        dataset = ImageDataset(index, spec, recipe.augmentation, 5, epoch)
        return np.concatenate([batch.x for batch in load_batches(dataset, batches[first:], workers)])

    whole = xs(0, 0)
    assert np.array_equal(whole, xs(0, 3))
    assert np.array_equal(whole[8:], xs(1, 2))  # as after a resume inside the epoch
    assert not np.array_equal(whole, xs(0, 0, epoch=2))


def test_flips_of_a_batch():
    images = np.random.default_rng(1).integers(0, 256, (64, 28, 28, 3), dtype=np.uint8)
    draws = draw_epoch(64, 0, 0)
    assert np.array_equal(augment_batch(images, Augmentation(flip=1.0), draws), images[:, :, ::-1])
    assert np.array_equal(augment_batch(images, Augmentation(flip_vertical=1.0), draws), images[:, ::-1])
    half = augment_batch(images, Augmentation(flip=0.5), draws)
    turned = [not np.array_equal(a, b) for a, b in zip(half, images)]
    assert 16 < sum(turned) < 48


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_warps_of_a_batch_agree_with_opencv(dtype):
    rng = np.random.default_rng(2)
    images = np.stack([cv2.GaussianBlur(rng.uniform(0, 255, (28, 28, 1)), (0, 0), 2) for _ in range(6)])
    images = images.reshape(6, 28, 28, 1).astype(dtype)
    augmentation = Augmentation(rotate_degrees=30.0, zoom=0.3, shift=0.2)
    draws = draw_epoch(6, 3, 0)
    warped = augment_batch(images, augmentation, draws)
    even = 2 * draws.T - 1
    angle = 30 * even[2]
    scale = np.exp(even[3] * np.log1p(0.3))
    shift = 0.2 * even[4:6] * 28
    for k in range(6):
        matrix = cv2.getRotationMatrix2D((13.5, 13.5), angle[k], scale[k])
        matrix[:, 2] += shift[:, k]
        expected = cv2.warpAffine(images[k], matrix, (28, 28), flags=cv2.INTER_LINEAR)
        assert np.abs(warped[k, :, :, 0].astype(float) - expected).max() < 6  # OpenCV rounds to 1/32 pixel
    assert warped.dtype == dtype


def test_intensities_of_a_batch():
    images = np.full((500, 4, 4, 1), 100, np.uint8)
    images[:, 0] = 140
    changed = augment_batch(images, Augmentation(brightness=0.2, contrast=0.2), draw_epoch(500, 4, 0))
    factors = changed.mean(axis=(1, 2, 3)) / images.mean(axis=(1, 2, 3))
    assert 0.8 <= factors.min() < 0.82 and 1.18 < factors.max() <= 1.2
    spread = np.ptp(changed, axis=(1, 2, 3)) / 40
    assert 0.8 <= spread.min() < 0.82 and 1.18 < spread.max() <= 1.201


def test_statistics_of_images_in_memory(tmp_path):
    index = load_index("bloodmnist", synthetic_set(tmp_path, "bloodmnist"), "train")
    found = image_statistics(index, 1, "rgb")
    single = index.images.reshape(24, -1, 3).astype(float)
    assert np.allclose(found["per_image"]["mean"], single.mean(1).mean(0))
    assert np.allclose(found["per_image"]["std"], single.std(1).mean(0))
    assert np.allclose(found["per_pixel"]["std"], single.reshape(-1, 3).std(0))
    assert found["sizes"] == [[28, 28, 24]] and found["modes"] == {"RGB": 24}


# --- the evaluator -------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", TASKS)
def test_metrics_agree_with_medmnist(official, flag):
    task, classes, labels, probs = random_scores(flag)
    name = official[0].INFO[flag]["task"]
    truth = labels if labels.ndim == 2 else labels[:, None]
    guesses = OutputHead(task, "softmax", classes).decide(probs)
    assert abs(metrics.auc(probs, labels, task) - official[1].getAUC(truth, probs, name)) < 1e-9
    assert abs((guesses == labels).mean() - official[1].getACC(truth, probs, name)) < 1e-9


def random_scores(flag, count=300):
    card, rng = CARDS[flag], np.random.default_rng(7)
    width = len(card.classes)
    if card.task == "multi-label":
        labels, logits = (rng.random((count, width)) < 0.3).astype(np.int64), rng.normal(size=(count, width))
        return card.task, card.classes, labels, OutputHead(card.task, "sigmoid", card.classes).probabilities(logits)
    labels, logits = rng.integers(0, width, count), np.round(rng.normal(size=(count, width)), 1)  # with ties
    return card.task, card.classes, labels, OutputHead(card.task, "softmax", card.classes).probabilities(logits)


@pytest.mark.parametrize("name", [*TASKS, "breastmnist_64"])
def test_medmnist_reads_our_predictions(official, tmp_path, name):
    index = load_index(name, synthetic_set(tmp_path, name), "test")
    logits = np.random.default_rng(8).normal(size=(24, len(index.classes)))
    loss = "sigmoid" if index.task == "multi-label" else "softmax"
    probs = OutputHead(index.task, loss, index.classes).probabilities(logits)
    path = write_scores(tmp_path, index, probs, run="medmnist-resnet18")
    assert path.name.startswith(f"{name}_test_[AUC]") and path.name.endswith("@medmnist-resnet18.csv")
    evaluator = official[1].Evaluator
    before = evaluator.__init__.__defaults__
    evaluator.__init__.__defaults__ = (*before[:-1], str(tmp_path))  # its data root
    try:
        read = evaluator.parse_and_evaluate(str(path))
    finally:
        evaluator.__init__.__defaults__ = before
    assert abs(read.AUC - metrics.auc(probs, index.labels, index.task)) < 1e-9
    assert path.exists()  # it writes its own file under the same name: names agree to the last digit
    assert [file.name for file in tmp_path.glob("*.csv")] == [path.name]


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", TASKS)
def test_training_and_evaluation_of_each_task(tmp_path, capsys, flag):
    model = "toy_resnet" if flag == "breastmnist" else "toy"
    root, run = synthetic_set(tmp_path / "data", flag), tmp_path / "out" / flag
    words = [
        "--data_name",
        flag,
        "--input_root",
        str(root),
        "--output_root",
        str(tmp_path / "out"),
    ]  # as in the MedMNIST baseline
    words += ["--model", model, "--num_epoch", "1", "--batch-size", "24", "--device", "cpu"]
    assert train_command.main(words) == 0
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["dataset"], recipe["epochs"], recipe["size_px"]) == (flag, 1, 28)
    weights = run / f"{flag}.pdparams"
    assert eval_command.main(["--weights", str(weights), "--output", str(tmp_path / "test"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "test/metrics.json").read_text())
    assert result["split"] == "test" and ("confusion" in result) == (TASKS[flag] != "multi-label")
    assert ("quadratic_kappa" in result) == ("mean_absolute_error" in result) == (TASKS[flag] == "ordinal")
    name = f"{flag}_test_[AUC]{result['auc']:.3f}_[ACC]{result['accuracy']:.3f}@medmnist-{model}.csv"
    assert (tmp_path / "test" / name).is_file()
    header, first = (tmp_path / "test/predictions_test.csv").read_text().splitlines()[:2]
    assert header.startswith("id,label,predicted,") and first.startswith("test0,")
    assert "published" not in capsys.readouterr().out  # the files are synthetic


@pytest.mark.parametrize(
    ("dataset", "recipe"), [("breastmnist_224", "medmnist"), ("breastmnist", "medmnist_28_to_224")]
)
def test_training_at_224_pixels(tmp_path, dataset, recipe):
    root = synthetic_set(tmp_path / "data", dataset, (4, 4, 4))
    words = ["--dataset", dataset, "--recipe", recipe, "--data-root", str(root), "--epochs", "1", "--batch-size", "4"]
    words += ["--model", "toy_resnet"]
    assert train_command.main([*words, "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    card = json.loads((tmp_path / f"run/{dataset}.json").read_text())
    assert card["preprocessing"]["size_px"] == 224 and card["network"]["stem"] == "imagenet"


def test_a_run_stopped_by_its_deadline_resumes_to_the_same_bits(tmp_path):
    root = synthetic_set(tmp_path / "data", "breastmnist", (8, 4, 4))
    recipe = get_recipe("medmnist_best", "breastmnist").with_epochs(2).replace(batch_size=4, model="toy")
    quiet = {"device": "cpu", "say": lambda line: None}
    train(recipe, root, tmp_path / "whole", Options(**quiet))
    with pytest.raises(Stopped, match="--resume"):
        train(recipe, root, tmp_path / "parts", Options(**quiet, deadline=time.monotonic()))
    assert not (tmp_path / "parts/history.csv").exists()  # inside the first epoch
    train(recipe, root, tmp_path / "parts", Options(**quiet), resume=True)
    for name in ("history.csv", "breastmnist.pdparams"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_unofficial_files_are_named_in_output_and_run_directory(tmp_path):
    draw_npz("breastmnist", tmp_path, counts=CARDS["breastmnist"].counts)
    lines = []
    recipe = get_recipe("breastmnist").with_epochs(1).replace(batch_size=8, model="toy")
    with pytest.raises(Stopped):
        train(recipe, tmp_path, tmp_path / "run", Options("cpu", say=lines.append, deadline=time.monotonic()))
    assert any("differs from the official file" in line for line in lines)
    assert "differs from the official file" in json.loads((tmp_path / "run/data.json").read_text())["note"]


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "breastmnist.npz").is_file(), reason="MEDCLS_TEST_DATA has no medmnist/")
def test_the_real_files():
    for flag, official in (("breastmnist", True), ("retinamnist", True), ("pneumoniamnist", False)):
        index = load_index(flag, REAL, "train")
        assert len(index) == CARDS[flag].counts[0]
        assert bool(index.note) != official
    assert load_index("breastmnist", REAL, "test").counts() == {"malignant": 42, "normal, benign": 114}


@pytest.fixture(scope="module")
def npz_bytes(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    synthetic_set(root, "breastmnist")
    return (root / "breastmnist.npz").read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.none() | st.floats(0, 1),
)
def test_fuzzed_npz_files(npz_bytes, tmp_path_factory, changes, cut):
    """Bytes changed anywhere, the end cut off: read as it stands, or refused with our error; nothing else."""
    root = tmp_path_factory.getbasetemp() / "fuzzed-npz"
    root.mkdir(exist_ok=True)
    (root / SYNTHETIC_MARK).write_text("")
    data = bytearray(npz_bytes)
    for place, value in changes:
        data[int(place * len(data))] = value
    (root / "breastmnist.npz").write_bytes(data[: None if cut is None else int(cut * len(data))])
    try:
        index = load_index("breastmnist", root, "test")
    except DataError:
        return
    assert index.labels.min() >= 0 and index.labels.max() <= 1


def test_a_file_is_hashed_once_a_process(tmp_path, monkeypatch):
    hashed = []
    digest = files.md5
    monkeypatch.setattr(files, "md5", lambda path: (hashed.append(path), digest(path))[1])
    draw_npz("breastmnist", tmp_path, counts=CARDS["breastmnist"].counts)
    notes = {load_index("breastmnist", tmp_path, split).note for split in ("train", "val", "test")}
    assert len(notes) == len(hashed) == 1 and "differs from the official file" in notes.pop()
    draw_npz("breastmnist", tmp_path, seed=1, counts=CARDS["breastmnist"].counts)
    assert load_index("breastmnist", tmp_path, "test").note and len(hashed) == 2


def test_the_grid_runs_the_sets_that_are_there_and_says_which_are_not(tmp_path, capsys):
    words = ["--suite", "medmnist", "--recipe", "medmnist_study", "--data-root", str(tmp_path / "data"), "--seeds", "1"]
    words += ["--models", "toy", "--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "grid")]
    (tmp_path / "data").mkdir()
    assert reproduce_command.main(words) == 1
    shown = capsys.readouterr().err
    assert "no file of 12 MedMNIST set(s)" in shown and "breastmnist.npz" in shown and "add --download" in shown
    synthetic_set(tmp_path / "data", "breastmnist", (8, 4, 4))
    assert reproduce_command.main(words) == 0
    shown = capsys.readouterr()
    assert "not run, no file: pathmnist, chestmnist" in shown.err and "1 of 1 runs are done" in shown.out
    assert reproduce_command.main([*words, "--sets", "breast,retina"]) == 1  # a set that was asked for
    assert "retinamnist: no file retinamnist.npz" in capsys.readouterr().err
