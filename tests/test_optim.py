"""Learning rates step by step, the optimizer's arithmetic, and the losses against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fakes import recipe

from paddle_medcls.core.errors import RecipeError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training.optimization import (
    build_loss,
    build_optimizer,
    build_schedule,
    class_weights,
)


def learning_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step of a run."""
    schedule = build_schedule(recipe, steps_per_epoch)
    rates = []
    for _ in range(recipe.epochs * steps_per_epoch):
        rates.append(float(schedule()))
        schedule.step()
    assert all(math.isfinite(rate) for rate in rates)
    return rates


# --- learning rates --------------------------------------------------------------------------------


def test_warm_up_and_cosine_golden() -> None:
    """LinearWarmup(CosineAnnealingDecay(0.01, T_max=8), 4, 0, 0.01), recorded from Paddle 3.3.1 and 2.6.2."""
    golden = [
        0,
        0.0025,
        0.005,
        0.0075,
        0.01,
        0.0096194,
        0.00853553,
        0.00691342,
        0.005,
        0.00308658,
        0.00146447,
        0.0003806,
    ]
    toy = recipe(epochs=3, lr=0.01, schedule="cosine", warmup_epochs=1)
    np.testing.assert_allclose(learning_rates(toy, 4), golden, atol=1e-8)


def test_the_cosine_would_reach_zero_one_step_after_the_last() -> None:
    toy = recipe(epochs=3, lr=0.01, schedule="cosine", warmup_epochs=1)
    schedule = build_schedule(toy, 4)
    for _ in range(12):
        assert schedule() < 0.0100001
        schedule.step()
    assert schedule() == pytest.approx(0, abs=1e-12)


def test_covid_schedule_against_the_closed_form() -> None:
    """The COVID-19 tutorial on the full set: 14,814 images in batches of 50 are 297 steps, 5 + 45 epochs."""
    rates = learning_rates(get_recipe("covid"), 297)
    warmup, rest = 5 * 297, 45 * 297
    expected = [0.01 * step / warmup for step in range(warmup)]
    expected += [0.005 * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]
    assert len(rates) == 14850 and rates[0] == 0 and max(rates) == pytest.approx(0.01)
    np.testing.assert_allclose(rates, expected, atol=1e-9)


def test_palm_schedule_is_the_documents_polynomial() -> None:
    """The PALM myopia tutorial: from 0.005 to 0.001 over 2.5 epochs of 40 steps, linearly, then held."""
    rates = learning_rates(get_recipe("palm_tutorial"), 40)
    expected = [0.001 + 0.004 * max(0.0, 1 - step / 100) for step in range(400)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_polynomial_golden() -> None:
    """PolynomialDecay(0.005, 12, end_lr=0.001), recorded from Paddle 3.3.1 and 2.6.2."""
    golden = [0.005, 0.00466667, 0.00433333, 0.004, 0.00366667, 0.00333333, 0.003]
    golden += [0.00266667, 0.00233333, 0.002, 0.00166667, 0.00133333, 0.001, 0.001]
    toy = recipe(epochs=7, lr=0.005, schedule="polynomial", decay_epochs=(6.0,), end_lr=0.001)
    np.testing.assert_allclose(learning_rates(toy, 2), golden, atol=1e-8)


def test_steps_and_constant() -> None:
    steps = recipe(epochs=4, lr=0.1, schedule="step", decay_epochs=(1.0, 3.0))
    np.testing.assert_allclose(learning_rates(steps, 2), [0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001])
    assert learning_rates(get_recipe("palm_constant"), 40) == [0.001] * 400


@pytest.mark.parametrize("schedule", ["constant", "step", "polynomial"])
def test_warm_up_rises_linearly_before_every_schedule(schedule: str) -> None:
    decay = () if schedule == "constant" else (2.0,)
    rates = learning_rates(recipe(epochs=3, lr=0.1, schedule=schedule, warmup_epochs=0.5, decay_epochs=decay), 8)
    np.testing.assert_allclose(rates[:5], [0, 0.025, 0.05, 0.075, 0.1])


def test_the_warm_up_does_not_move_the_decay() -> None:
    """By hand: 4 epochs of 2 steps, one epoch of warm-up; every rate from the first step to the last."""
    common = {"epochs": 4, "lr": 0.1, "warmup_epochs": 1.0}
    steps = recipe(schedule="step", decay_epochs=(2.0, 3.5), **common)
    np.testing.assert_allclose(learning_rates(steps, 2), [0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])
    line = recipe(schedule="polynomial", decay_epochs=(3.0,), end_lr=0.02, **common)
    np.testing.assert_allclose(learning_rates(line, 2), [0, 0.05, 0.1, 0.08, 0.06, 0.04, 0.02, 0.02])
    assert learning_rates(recipe(schedule="constant", **common), 2) == [0, 0.05] + [0.1] * 6
    cosine = [0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    np.testing.assert_allclose(learning_rates(recipe(schedule="cosine", **common), 2), [0, 0.05, *cosine], atol=1e-12)


def test_no_decay_before_the_end_of_the_warm_up() -> None:
    for schedule in ("step", "polynomial"):
        with pytest.raises(RecipeError, match=r"decay_epochs: \(0.5,\); expected .*after the warm-up of 1.0 epochs"):
            recipe(epochs=4, warmup_epochs=1.0, schedule=schedule, decay_epochs=(0.5,))


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 7])
def test_short_runs_have_finite_rates(steps_per_epoch: int) -> None:
    for name in ("palm", "covid", "palm_tutorial"):
        rates = learning_rates(get_recipe(name).with_epochs(1), steps_per_epoch)
        assert len(rates) == steps_per_epoch and all(0 <= rate <= 0.01 for rate in rates)


@pytest.mark.filterwarnings("ignore:There are some unused values in state_dict")  # see `resume.restore`
def test_a_schedule_goes_on_from_its_state() -> None:
    toy = recipe(epochs=3, lr=0.01, schedule="cosine", warmup_epochs=1)
    first = build_schedule(toy, 4)
    for _ in range(6):
        first.step()
    second = build_schedule(toy, 4)
    second.set_state_dict(first.state_dict())
    rates = []
    for _ in range(6):
        rates.append(second())
        second.step()
    np.testing.assert_allclose(rates, learning_rates(toy, 4)[6:], rtol=1e-12)


# --- the optimizer ---------------------------------------------------------------------------------


class Two(paddle.nn.Layer):
    """A parameter of two dimensions and one of one, both 1, whose loss has gradient 2 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        one = paddle.nn.initializer.Constant(1.0)
        self.matrix = self.create_parameter([1, 1], default_initializer=one)
        self.vector = self.create_parameter([1], default_initializer=one)

    def forward(self) -> object:
        return 2 * self.matrix.sum() + 2 * self.vector.sum()


def run_steps(count: int, **changes: object) -> list[tuple[float, float]]:
    toy = recipe(lr=0.1, schedule="constant", **changes)
    model = Two()
    optimizer = build_optimizer(toy, build_schedule(toy, 1), model)
    values = []
    for _ in range(count):
        model().backward()
        optimizer.step()
        optimizer.clear_grad()
        values.append((model.matrix.item(), model.vector.item()))
    return values


def test_momentum_golden() -> None:
    """w = 1, gradient 2, lr 0.1, momentum 0.9, L2 0.5: 0.75, 0.2875, -0.343125, -1.093531.

    The same as PyTorch's SGD(momentum=0.9, weight_decay=0.5); by hand v = 0.9 v + 2 + 0.5 w, w -= 0.1 v.
    """
    found = run_steps(4, weight_decay=0.5)
    np.testing.assert_allclose([w for w, _ in found], [0.75, 0.2875, -0.343125, -1.093531], atol=1e-6)


def test_weight_decay_spares_parameters_of_one_dimension() -> None:
    """v = 2, 3.8, 5.42: w = 0.8, 0.42, -0.122, with or without decay."""
    for decay in (0.0, 0.5):
        np.testing.assert_allclose([v for _, v in run_steps(3, weight_decay=decay)], [0.8, 0.42, -0.122], atol=1e-6)
    np.testing.assert_allclose([w for w, _ in run_steps(3)], [0.8, 0.42, -0.122], atol=1e-6)


def slow_adam(count: int, decay: float) -> list[float]:
    w, m, v = 1.0, 0.0, 0.0
    values = []
    for step in range(1, count + 1):
        gradient = 2 + decay * w
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        values.append(w)
    return values


def test_adam_with_l2_against_a_loop() -> None:
    found = run_steps(5, optimizer="adam", weight_decay=0.5)
    np.testing.assert_allclose([w for w, _ in found], slow_adam(5, 0.5), atol=1e-5)
    np.testing.assert_allclose([v for _, v in found], slow_adam(5, 0.0), atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_trainable_parameter_is_optimised_and_no_statistic(decay: float) -> None:
    from paddle_medcls.models.network import Network

    model = Network("resnet18", 2).build()
    toy = recipe(weight_decay=decay)
    optimizer = build_optimizer(toy, build_schedule(toy, 1), model)
    listed = [p.name for group in optimizer._param_groups for p in (group["params"] if decay else [group])]
    assert sorted(listed) == sorted(p.name for p in model.parameters() if not p.stop_gradient)
    assert len(listed) == 62  # 20 convolutions, 20 batch norms of 2, weight and bias of the last layer


# --- class weights and losses ----------------------------------------------------------------------


def test_balanced_weights_by_hand() -> None:
    """Of 8 images 5, 2 and 1: 8/(3*5), 8/(3*2), 8/(3*1); the classes then weigh the same."""
    labels = np.array([0] * 5 + [1] * 2 + [2])
    toy = recipe("covid", class_weights="balanced")
    np.testing.assert_allclose(class_weights(toy, labels, 3), [8 / 15, 8 / 6, 8 / 3], rtol=1e-6)
    sigmoid = recipe(class_weights="balanced")
    np.testing.assert_allclose(class_weights(sigmoid, np.array([0, 0, 0, 1]), 2), [3.0])
    many = np.array([[1, 0], [0, 0], [0, 0], [1, 1]])
    np.testing.assert_allclose(class_weights(sigmoid, many, 2), [1.0, 3.0])
    assert class_weights(recipe(), labels, 3) is None


def test_balanced_weights_of_an_absent_class_are_finite() -> None:
    weights = class_weights(recipe("covid", class_weights="balanced"), np.array([0, 0, 2]), 3)
    assert np.isfinite(weights).all()


def slow_softmax_loss(z: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, smoothing: float) -> float:
    total = 0.0
    for row, label in zip(z, labels):
        p = np.exp(row) / np.exp(row).sum()
        for k in range(len(row)):
            target = (1 - smoothing) * (k == label) + smoothing / len(row)
            total -= target * math.log(p[k]) * (1 if weights is None else weights[label])
    return total / len(z)


def slow_sigmoid_loss(z: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, smoothing: float) -> float:
    total = 0.0
    for row, truth in zip(z, labels.reshape(len(z), -1)):
        for k in range(len(row)):
            p = 1 / (1 + math.exp(-row[k]))
            target = (1 - smoothing) * truth[k] + smoothing / 2
            positive = 1.0 if weights is None else float(weights[k])
            total -= positive * target * math.log(p) + (1 - target) * math.log(1 - p)
    return total / z.size


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "multi-label"])
def test_losses_against_loops(kind: str, weighted: bool, smoothing: float) -> None:
    rng = np.random.default_rng(0)
    outputs = {"softmax": 4, "sigmoid": 1, "multi-label": 3}[kind]
    z = rng.normal(size=(9, outputs)).astype(np.float32)
    labels = rng.integers(0, 4, 9) if kind == "softmax" else rng.integers(0, 2, (9, outputs)).squeeze()
    weights = rng.uniform(0.5, 2, outputs).astype(np.float32) if weighted else None
    toy = recipe(loss="softmax" if kind == "softmax" else "sigmoid", label_smoothing=smoothing)
    found = build_loss(toy, weights)(paddle.to_tensor(z), paddle.to_tensor(labels.astype(np.int64)))
    slow = slow_softmax_loss if kind == "softmax" else slow_sigmoid_loss
    assert found.shape == []
    assert found.item() == pytest.approx(slow(z.astype(float), labels, weights, smoothing), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_halves_of_a_batch_add_up_to_the_whole(kind: str) -> None:
    """Several processes rely on it: weighted or not, the loss is a plain mean over images."""
    rng = np.random.default_rng(1)
    outputs = 3 if kind == "softmax" else 1
    z = paddle.to_tensor(rng.normal(size=(8, outputs)).astype(np.float32))
    labels = paddle.to_tensor(rng.integers(0, outputs if kind == "softmax" else 2, 8))
    weights = rng.uniform(0.5, 2, outputs).astype(np.float32)
    loss = build_loss(recipe(loss=kind), weights)
    halves = (3 * loss(z[:3], labels[:3]) + 5 * loss(z[3:], labels[3:])) / 8
    assert halves.item() == pytest.approx(loss(z, labels).item(), rel=1e-6)
