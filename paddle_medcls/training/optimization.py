"""Optimizer, learning-rate schedule and loss of a recipe."""

from __future__ import annotations

import numpy as np

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.recipes.recipe import Recipe

F = paddle.nn.functional


def build_schedule(recipe: Recipe, steps_per_epoch: int):
    """The learning rate of each step, as one of Paddle's schedulers; step it after each batch.

    As in the COVID-19 radiography tutorial: LinearWarmup from 0, then CosineAnnealing, per batch. The warm-up's
    first step has learning rate 0. The cosine runs over the steps after the warm-up and reaches 0 one step after
    the last (the tutorial counts full batches alone, so its own stops short by half a percent).
    The decay points of the other schedules count from the first step, with or without a warm-up.
    """
    lr = paddle.optimizer.lr
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)  # the schedule inside counts from its end
    if recipe.schedule == "cosine":
        schedule = lr.CosineAnnealingDecay(recipe.lr, T_max=max(total - warmup, 1))
    elif recipe.schedule == "polynomial":  # PALM myopia tutorial: linear from lr to end_lr
        steps = max(1, round(recipe.decay_epochs[0] * steps_per_epoch) - warmup)
        schedule = lr.PolynomialDecay(recipe.lr, decay_steps=steps, end_lr=recipe.end_lr)
    elif recipe.schedule == "step":
        # in a run of a few steps two points can fall together, which Paddle refuses
        milestones = sorted({round(epoch * steps_per_epoch) - warmup for epoch in recipe.decay_epochs})
        schedule = lr.MultiStepDecay(recipe.lr, milestones, 0.1)
    else:
        schedule = lr.LambdaDecay(recipe.lr, lambda step: 1.0)
    if warmup:
        schedule = lr.LinearWarmup(schedule, warmup, start_lr=0.0, end_lr=recipe.lr)
    return schedule


def build_optimizer(recipe: Recipe, schedule, model):
    """Momentum or Adam over the trainable parameters; L2 spares biases and batch-norm parameters."""
    trainable = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    groups: list = trainable
    if recipe.weight_decay:
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if recipe.optimizer == "momentum":
        return paddle.optimizer.Momentum(schedule, momentum=recipe.momentum, parameters=groups)
    return paddle.optimizer.Adam(schedule, parameters=groups)


def class_weights(recipe: Recipe, labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    """Weights that let each class count the same: n / (classes * n of the class); None if not wanted.

    For one sigmoid an output (labels (N, L), or two classes on one output) they are the weights of
    the positives, negatives / positives.
    """
    if recipe.class_weights == "none":
        return None
    if recipe.loss == "sigmoid":
        positives = np.atleast_1d(labels.sum(axis=0)).astype(np.float64)
        return ((len(labels) - positives) / np.maximum(positives, 1)).astype(np.float32)
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)


def build_loss(recipe: Recipe, weights: np.ndarray | None):
    """The loss: logits (N, C) and labels -> scalar, averaged over the batch.

    softmax: cross-entropy, labels (N,) int64. sigmoid: binary cross-entropy, labels (N,) or (N, L)
    of 0 and 1 against as many outputs. Class weights scale each image's loss and the mean stays a
    plain mean, so that halves of a batch add up to the whole. Label smoothing moves that share of
    the target to the uniform distribution (to 1/2 for a sigmoid).
    """
    weight = None if weights is None else paddle.to_tensor(weights)
    smoothing = recipe.label_smoothing

    def softmax_loss(logits, labels):
        if smoothing:
            target = F.label_smooth(F.one_hot(labels, logits.shape[1]), epsilon=smoothing)
            losses = F.cross_entropy(logits, target, soft_label=True, reduction="none").reshape([-1])
        else:
            losses = F.cross_entropy(logits, labels, reduction="none").reshape([-1])
        if weight is not None:
            losses = losses * paddle.gather(weight, labels)
        return losses.mean()

    def sigmoid_loss(logits, labels):
        target = labels.reshape([logits.shape[0], -1]).astype("float32")
        target = target * (1 - smoothing) + 0.5 * smoothing
        if weight is None:
            return F.binary_cross_entropy_with_logits(logits, target)
        # Written out: the function's own pos_weight is wrong for negative logits in Paddle 2.6.2.
        return (weight * target * F.softplus(-logits) + (1 - target) * F.softplus(logits)).mean()

    return softmax_loss if recipe.loss == "softmax" else sigmoid_loss
