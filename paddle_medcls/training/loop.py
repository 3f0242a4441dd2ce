"""The training loop.

`train` reads from top to bottom: session, data, run, loop over epochs, report. Everything random is a
function of (seed, epoch, row) or (seed, step), so a run that was interrupted, anywhere, and resumed
ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.core.progress import progress
from paddle_medcls.data.image_list import ImageList
from paddle_medcls.evaluation import metrics, model_card, model_facts, outputs
from paddle_medcls.evaluation.evaluate import evaluate_split
from paddle_medcls.models.novelty import novelty_path
from paddle_medcls.models.onednn.network import Accelerated
from paddle_medcls.models.onednn.speed import bf16_speedup
from paddle_medcls.models.output_head import check_finite
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.preprocessing.loader import Batch, ImageDataset, load_batches
from paddle_medcls.recipes import get_recipe
from paddle_medcls.recipes.recipe import Recipe
from paddle_medcls.training import run_directory
from paddle_medcls.training.distributed import exchange_gradients, from_first, pieces, sum_over_processes, synchronise
from paddle_medcls.training.frozen_features import FeatureDataset, head_logits, start_training
from paddle_medcls.training.interruption import Interrupt, interrupted
from paddle_medcls.training.novelty import fit_novelty
from paddle_medcls.training.resume import locked, read_environment
from paddle_medcls.training.run import Training, open_run
from paddle_medcls.training.run_directory import HISTORY, State
from paddle_medcls.training.session import Options, Session, start_session
from paddle_medcls.training.setup import amp_type, check_network, check_recipe, place_images, read_data
from paddle_medcls.training.watch import shared_failure

CURVE_SECONDS = 30  # the curves are drawn at most this often
HINT_STEPS = 10  # after which the length of a run is estimated
LONG_MINUTES = 10  # a run of this length is told what bfloat16 would gain
SAVE_MINUTES = 10  # inside a long epoch, the state is saved this often


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        directory: of the run.
        weights: file of the best weights.
        metrics: of the validation split with the best weights, as in `metrics.json`; empty in all processes but
            the first.
        history: one row an epoch, as in `history.csv`.
    """

    directory: Path
    weights: Path
    metrics: dict
    history: list[dict]

    def show(self):
        """A matplotlib figure of loss and accuracy by epoch, which a notebook displays."""
        from paddle_medcls.evaluation.overview import history_figure  # matplotlib takes half a second to import

        return history_figure(self.history)


@shared_failure()
def train(
    recipe: Recipe | str,
    data_root: str | Path | ImageList | None = None,
    output: str | Path | None = None,
    options: Options = Options(),  # noqa: B008  it is frozen
    resume: bool = False,
) -> Run:
    """Trains a recipe, or resumes an interrupted run.

    Args:
        recipe: what to train, or its name; with `resume`, the run's own: `Recipe.from_file(output / "recipe.json")`.
        data_root: folder of the data set's images; None: the data set's default. Own images: their folder, the
            `images.csv` of another run, or what `own_images` gives.
        output: run directory, which everything is written to; without `resume` it must not hold a run. None: a new
            one below `runs/`, named after the recipe and the time.
        resume: continue from `output/last`.

    Raises:
        MedclsError: unusable data, recipe, weights or device; a run directory that is in use or that cannot be
            resumed; a loss that is not finite; interrupted (`Stopped`).
    """
    if isinstance(recipe, str):
        recipe = get_recipe(recipe, data_root if isinstance(data_root, ImageList) else None)
    check_recipe(recipe)
    if resume and output is None:
        raise RunError("a run is resumed in its directory, but none is named", fix="pass output=RUN_DIRECTORY")
    session = start_session(options, read_environment(Path(output)) if resume and output else None)
    new = run_directory.new_run_directory
    run_dir = Path(from_first(lambda: str(output or new(recipe)), session.rank, session.world))
    # Paddle numbers parameter names with a global counter; without the guard a second run in one process
    # could not read the first one's optimizer state.
    with locked(run_dir, resume, session.first), paddle.utils.unique_name.guard():
        check_network(recipe, session, resume)
        root = place_images(recipe, data_root, run_dir, session, resume)
        data = read_data(recipe, root, options.cache_folder(run_dir), session)
        training = open_run(run_dir, recipe, data, session, resume)
        with Interrupt(session.say, options.deadline) as interrupt:
            while not training.finished:
                train_epoch(training, session, interrupt)
                keep_epoch(training, session, validate(training, session))
                if from_first(interrupt.due, session.rank, session.world) and training.state.epoch < recipe.epochs:
                    raise interrupted(run_dir)
        return finish(training, session)


# --- an epoch ------------------------------------------------------------------------------------


def train_epoch(training: Training, session: Session, interrupt: Interrupt) -> None:
    """Trains on the batches of an epoch that are not done yet.

    Raises:
        Stopped: the user or the deadline interrupted the run; its state is saved.
    """
    recipe, state, learner = training.recipe, training.state, training.learner
    batches = training.batches
    batch_pieces = [pieces(rows, session.rank, session.world, recipe.accumulate) for rows in batches[state.batch :]]
    piece_rows = [rows for parts in batch_pieces for rows, _ in parts]
    loader = load_batches(_dataset(training), piece_rows, session.options.workers)
    bar = progress(None, f"epoch {state.epoch + 1}/{recipe.epochs}", len(training.data.train), "image", session.first)
    unlogged: list[tuple] = []  # steps whose loss is not read yet
    training.epoch_started_at = saved_at = time.monotonic()
    start_training(learner.model, recipe.freeze)
    with bar, contextlib.closing(loader):
        bar.update(sum(len(rows) for rows in batches[: state.batch]))
        batch_source = _TimedBatches(loader)
        for rows, parts in zip(batches[state.batch :], batch_pieces):
            paddle.seed(_step_seed(recipe.seed, state.step, session.rank))
            step_metrics = train_step(training, session, batch_source, [share for _, share in parts])
            step_metrics = sum_over_processes(step_metrics, interrupt.due(), session.world)
            unlogged.append((state.step, learner.schedule.get_lr(), step_metrics, rows))
            learner.schedule.step()
            if learner.average is not None:
                _update_average(learner.parts["average"], learner.parts["model"], recipe.ema_decay, state.step)
            state.step += 1
            state.batch += 1
            bar.update(len(rows))
            if training.suggest_bf16 and state.batch >= min(HINT_STEPS, len(batches)):
                training.suggest_bf16 = False
                _suggest_bf16(training, session, state.batch / (time.monotonic() - training.epoch_started_at))
            # On a GPU reading a loss waits for the device, so losses are read in groups. All processes
            # read at the same step, so they also stop at the same one.
            stop_requested = session.world == 1 and interrupt.due()
            if stop_requested or session.device == "cpu" or len(unlogged) == 20 or state.batch == len(batches):
                stop_requested = _log_steps(unlogged, state) or stop_requested
                bar.set_postfix(loss=f"{state.steps[-1][2]:.4f}", refresh=False)
                if session.first and (stop_requested or time.monotonic() - saved_at > SAVE_MINUTES * 60):
                    run_directory.save(training.directory, learner.parts, state)
                    saved_at = time.monotonic()
            if stop_requested:
                from_first(lambda: None, session.rank, session.world)  # waits until process 0 has saved
                raise interrupted(training.directory)
    training.seconds, training.loading_seconds = time.monotonic() - training.epoch_started_at, batch_source.seconds


def train_step(training: Training, session: Session, batches: Iterator[Batch], shares: Sequence[float]):
    """One step: forward, loss, backward, update. The gradients of a batch's pieces add up.

    Args:
        batches: yields this process's pieces of the batch, x (N, C, S, S) and labels (N,) or (N, L).
        shares: of each piece in the batch.

    Returns:
        (2,) loss and accuracy, each times this process's share of the batch.
    """
    learner, piece_metrics = training.learner, []
    for number, share in enumerate(shares, 1):
        batch = next(batches)
        x, labels = paddle.to_tensor(batch.x), paddle.to_tensor(batch.labels)
        with exchange_gradients(training.network, session.world, last=number == len(shares)):
            with paddle.amp.auto_cast(enable=bool(session.options.amp), dtype=amp_type()):
                logits = training.network(x)  # (N, outputs)
                loss = learner.loss(logits.astype("float32"), labels)
            # The share makes the sum over pieces the mean over the batch's images; DataParallel averages.
            learner.scaler.scale(loss * share * session.world).backward()
        piece_metrics.append(paddle.stack([loss.detach(), _accuracy(logits, labels, learner.sidecar)]) * share)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.clear_grad()
    return sum(piece_metrics)


def validate(training: Training, session: Session, flips: tuple[str, ...] | None = None) -> np.ndarray:
    """Logits (N, outputs) of the validation split; without `flips` from cached features where there are any."""
    network, data, recipe = training.validated, training.data, training.recipe
    synchronise(network, session.world)
    if flips is None and training.learner.val_features is not None:
        return check_finite(head_logits(network, training.learner.val_features), data.val.ids)
    if training.inference_kernels is not None:
        network = Accelerated(network, training.inference_kernels)  # in float32, as every reader of the weights does
    images = ImageDataset(data.val, training.learner.sidecar.preprocessing, cached_pixels=data.decoded["val"])
    process = session.rank, session.world
    return evaluate_split(network, images, recipe.batch_size, session.options.workers, flips or (), process)


def keep_epoch(training: Training, session: Session, logits: np.ndarray) -> None:
    """Scores an epoch and writes its files; the state last, so that a resume repeats whatever is missing."""
    recipe, state, data, sidecar = training.recipe, training.state, training.data, training.learner.sidecar
    result = metrics.evaluate_logits(logits, data.val.labels, sidecar.head, intervals=False)
    row = run_directory.history_row(state, [len(rows) for rows in training.batches], result)
    state.history.append(row)
    score = {**result, "loss": -result["loss"], "last": state.epoch}[recipe.monitor]
    if not math.isfinite(score):
        raise RunError(
            f"{recipe.monitor} is not defined on the validation split after epoch {state.epoch + 1}: {score}",
            expected="a number to choose the best epoch by; an AUC needs images of two classes",
            fix="choose another metric (--set monitor=accuracy), or check the split",
        )
    improved = score > state.best
    if improved:
        state.best, state.best_epoch = score, state.epoch + 1
    state.epoch, state.batch = state.epoch + 1, 0
    if session.first:
        if improved:
            run_directory.keep_weights(training.validated, training.weights, sidecar, {"split": "val", **result})
        picture = training.finished or time.monotonic() - training.drawn_at > CURVE_SECONDS
        run_directory.write_history(training.directory, state, data.note, picture)
        training.drawn_at = time.monotonic() if picture else training.drawn_at
        run_directory.write_timing(training.directory, _timing(training))
        run_directory.save(training.directory, training.learner.parts, state)
    session.say(_epoch_line(row, recipe, improved, training.seconds))


def finish(training: Training, session: Session) -> Run:
    """Scores the best weights once more, with intervals, and writes metrics, predictions, pictures and model card."""
    state, recipe, data, learner = training.state, training.recipe, training.data, training.learner
    if training.stopped_early and state.epoch < recipe.epochs:
        session.say(f"stopped early: no better {recipe.monitor} in {recipe.patience} epochs")
    weights = training.weights
    if session.first:  # which gives them to the others before they validate
        load_strict(training.validated, read_weights(weights), weights)
    logits = validate(training, session, recipe.evaluation_flips)
    if not session.first:
        return Run(training.directory, weights, {}, state.history)
    result = outputs.score_split(logits, data.val, learner.sidecar.head)
    result |= {"epoch": state.best_epoch, "monitor": recipe.monitor, "drawn": data.train.synthetic}
    result |= {"fold": recipe.fold} if recipe.fold else {}
    novelty = fit_novelty(training, session)
    outputs.write_outputs(training.directory, logits, data.val, learner.sidecar, result)
    sidecar = run_directory.write_sidecar(weights, replace(learner.sidecar, novelty=novelty), result)
    files = [weights.name, *[novelty_path(weights).name] * bool(novelty)]
    facts = model_facts.run_facts(weights, sidecar, _count_parameters(learner.model))
    model_card.write_card(training.directory, sidecar, "weights", files, facts)
    return Run(training.directory, weights, result, state.history)


# --- details of a step ---------------------------------------------------------------------------


class _TimedBatches:
    """Iterates over loaded batches and adds up the seconds spent waiting for them."""

    def __init__(self, batches: Generator[Batch, None, None]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> _TimedBatches:
        return self

    def __next__(self) -> Batch:
        started = time.monotonic()
        batch = next(self.batches)
        self.seconds += time.monotonic() - started
        return batch


def _dataset(training: Training) -> ImageDataset | FeatureDataset:
    """The training images of an epoch, augmented, or the cached features of one version of them."""
    data, recipe, epoch = training.data, training.recipe, training.state.epoch
    views = training.learner.views
    if views:
        return FeatureDataset(views[epoch % len(views)], data.train.labels)
    spec = training.learner.sidecar.preprocessing
    return ImageDataset(data.train, spec, recipe.augmentation, recipe.seed, epoch, data.decoded["train"])


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step: dropout differs between processes; a single process draws what process 0 does."""
    entropy = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] & 0x7FFFFFFF)


def _accuracy(logits, labels, sidecar: Sidecar):
    """Accuracy of a batch, as a tensor, so that the host need not wait for a GPU."""
    if sidecar.task == "multi-label":
        guesses = (logits > 0).astype("int64")
    elif sidecar.loss == "sigmoid":
        guesses = (logits[:, 0] > 0).astype("int64")
    else:
        guesses = logits.argmax(axis=1)
    return (guesses == labels).astype("float32").mean()


def _suggest_bf16(training: Training, session: Session, steps_per_second: float) -> None:
    """Tells the user once what `--precision bf16` would gain, if the run takes long and convolutions gain by it."""
    steps = len(training.batches) * training.recipe.epochs - training.state.step
    minutes = steps / steps_per_second / 60
    if minutes < LONG_MINUTES:
        return
    speedup = bf16_speedup()
    if speedup >= 1.2:
        session.say(
            f"this takes about {minutes / 60:.1f} hours; --precision bf16 computes convolutions {speedup:.1f} times as "
            "fast on this processor (measured now, on one); docs/speed.md tells what it changes"
        )


def _log_steps(unlogged: list[tuple], state: State) -> bool:
    """Reads and logs the metrics of these steps; returns whether any process is to stop."""
    stop_requested = 0.0
    for step, lr, step_metrics, rows in unlogged:
        loss, accuracy, stop_requested = step_metrics.numpy().tolist()
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {step}, epoch {state.epoch + 1}",
                path=f"rows {', '.join(str(row) for row in rows[:8])}, … of the training split",
                fix="lower --lr, or lengthen the warm-up (--set warmup_epochs=…)",
            )
        state.steps.append([float(step), float(lr), loss, accuracy])
    unlogged.clear()
    return stop_requested > 0


def _update_average(average, model, decay: float, step: int) -> None:
    """average = d * average + (1 - d) * weights; d grows from 0.1 so that the start is forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    with paddle.no_grad():
        for old, new in zip(average.state_dict().values(), model.state_dict().values()):
            old.scale_(d)
            old.add_(new * (1 - d))


def _timing(training: Training) -> list[float]:
    """The row of `timing.csv` of an epoch, see `run_directory.TIMING`."""
    seconds = max(training.seconds, 1e-9)
    speed, waiting = len(training.data.train) / seconds, training.loading_seconds / seconds
    return [training.state.epoch, seconds, speed, waiting, time.monotonic() - training.epoch_started_at]


def _epoch_line(row: dict, recipe: Recipe, improved: bool, seconds: float) -> str:
    values = "  ".join(f"{name} {row[name]:.4f}" for name in HISTORY[3:])
    took = f"  {seconds:.0f} s" if seconds >= 30 else ""  # of a trial run it tells nothing
    return f"epoch {row['epoch']:>3}/{recipe.epochs}  {values}{took}{'  *' if improved else ''}"


def _count_parameters(model) -> int:
    """The number of parameters, frozen ones included; without the running statistics of batch norm."""
    statistics = ("._mean", "._variance")
    return sum(int(value.size) for name, value in model.named_parameters() if not name.endswith(statistics))
