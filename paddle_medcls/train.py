"""The training loop.

`train` reads from top to bottom: data, network, loop over epochs, report. Everything random is a
function of (seed, epoch, row) or (seed, step), so a run that was interrupted, anywhere, and resumed
ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_medcls import metrics, rundir
from paddle_medcls.assemble import amp_type, build_learner, read_data
from paddle_medcls.data import weights_name
from paddle_medcls.data.loader import ImageDataset, cut, epoch_order, load_batches
from paddle_medcls.distributed import join, over_processes, share, synchronise, wait_for_all
from paddle_medcls.errors import RunError
from paddle_medcls.evaluate import evaluate_split, flips_of
from paddle_medcls.frozen import FeatureDataset, head_logits, start_training
from paddle_medcls.images import Preprocessing
from paddle_medcls.interrupt import Interrupt
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.progress import progress
from paddle_medcls.recipe import Recipe
from paddle_medcls.rundir import HISTORY, STEP_LOG, State
from paddle_medcls.runtime import environment, paddle, require_gpu, select_device, set_deterministic
from paddle_medcls.sidecar import Sidecar

CURVE_SECONDS = 30  # the curves are drawn at most this often
SAVE_MINUTES = 10  # inside a long epoch, the state is saved this often


@dataclass(frozen=True)
class Options:
    """How a run is carried out; what it computes is the recipe's."""

    device: str = "auto"
    workers: int = 2
    amp: bool = False
    deterministic: bool = False
    visualdl: bool = False
    force: bool = False  # resume although code or data have changed
    deadline: float = math.inf  # of time.monotonic(): the run stops then, its state saved
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


def train(recipe: Recipe, data_root: Path, run_dir: Path, options: Options, resume: bool = False) -> dict:
    """Trains a recipe, or goes on with an interrupted run.

    Args:
        recipe: what to train; with `resume`, the run's own.
        data_root: folder of the data set's images.
        run_dir: folder that everything is written to.
        options: device, workers and the like.
        resume: go on from `run_dir/last`.

    Returns:
        The metrics of the validation split with the best weights, as in `metrics.json`.

    Raises:
        MedclsError: unusable data, recipe, weights or device; a loss that is not finite; interrupted.
    """
    # Paddle counts parameter names up in a global; without the guard a second run in one process
    # could not read the first one's optimizer state.
    with paddle.utils.unique_name.guard():
        return _train(recipe, data_root, run_dir, options, resume)


def _train(recipe: Recipe, data_root: Path, run_dir: Path, options: Options, resume: bool) -> dict:
    device = _start_device(options)
    rank, world = join()
    say = options.say if rank == 0 else lambda line: None

    data = read_data(recipe, data_root, options.workers)
    if recipe.statistics == "train" and not resume:
        recipe = recipe.replace(**data.facts["train"]["per_image"])
    spec = Preprocessing.of(recipe)
    say(f"{recipe.name}: {len(data.train)} training and {len(data.val)} validation images, {recipe.model}, {device}")
    for line in filter(None, (data.note, data.train.note)):
        say(line)

    learner = build_learner(recipe, data, run_dir.parent / "features", options.workers, options.amp, resume, say)
    model, average = learner.model, learner.average
    schedule, optimizer, scaler = learner.schedule, learner.optimizer, learner.scaler
    parallel = paddle.DataParallel(learner.fed) if world > 1 else learner.fed

    state = State()
    if resume:
        rundir.refuse_changes(run_dir, data.facts, options.force)
        state = rundir.restore(run_dir, learner.parts)
        say(f"resumed after {state.epoch} of {recipe.epochs} epochs and {state.batch} batches")
    elif rank == 0:
        rundir.describe(run_dir, recipe, data.facts, environment(device))

    weights = run_dir / f"{weights_name(recipe.dataset)}.pdparams"
    board = _open_board(run_dir, options, rank)

    def judge(judged, flips: tuple[str, ...] | None = None) -> np.ndarray:
        """Validation logits; without `flips` the quick way, with cached features where there are any."""
        synchronise(judged, world)
        if flips is None and learner.val_features is not None:
            return head_logits(judged, learner.val_features)
        flips = flips or ()
        return evaluate_split(judged, data.val, spec, recipe.batch_size, options.workers, flips, rank, world)

    drawn_at = -math.inf
    with Interrupt(say, options.deadline, enabled=world == 1) as interrupt:
        while state.epoch < recipe.epochs and not _stale(recipe, state):
            started = time.perf_counter()
            waited = 0.0

            # One epoch of training.
            if learner.views:
                features = learner.views[state.epoch % len(learner.views)]
                dataset = FeatureDataset(features, data.train.labels)
            else:
                dataset = ImageDataset(data.train, spec, recipe, recipe.seed, state.epoch)
            batches = cut(epoch_order(len(data.train), recipe.seed, state.epoch), recipe.batch_size)
            shares = [share(rows, rank, world) for rows in batches]
            loaded = load_batches(dataset, [rows for rows, _ in shares[state.batch :]], options.workers)
            bar = progress(None, f"epoch {state.epoch + 1}/{recipe.epochs}", len(data.train), "image", show=rank == 0)
            bar.update(sum(len(rows) for rows in batches[: state.batch]))
            pending: list[tuple] = []
            saved_at = time.monotonic()
            start_training(model, recipe.freeze)
            for rows, (_, part) in zip(batches[state.batch :], shares[state.batch :]):
                mark = time.perf_counter()
                batch = next(loaded)
                waited += time.perf_counter() - mark
                paddle.seed(_step_seed(recipe.seed, state.step))
                x, labels = paddle.to_tensor(batch.x), paddle.to_tensor(batch.labels)
                with paddle.amp.auto_cast(enable=options.amp, dtype=amp_type()):
                    logits = parallel(x)  # (N, outputs)
                    loss = learner.loss(logits.astype("float32"), labels)
                # DataParallel averages over processes; the part makes it the mean over the batch's images.
                scaler.scale(loss * part * world).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.clear_grad()
                figures = over_processes(loss.detach() * part, _correct(logits, labels, learner.card) * part, world)
                pending.append((state.step, schedule.get_lr(), figures, rows))
                schedule.step()
                if average is not None:
                    _update_average(learner.parts["average"], learner.parts["model"], recipe.ema_decay, state.step)
                state.step += 1
                state.batch += 1
                bar.update(len(rows))
                # On a GPU reading a figure waits for the card, so figures are read in groups.
                late = interrupt.due() or time.monotonic() - saved_at > SAVE_MINUTES * 60
                if device == "cpu" or len(pending) == 20 or state.batch == len(batches) or late:
                    _log_steps(pending, state, board)
                    bar.set_postfix(loss=f"{state.steps[-1][2]:.4f}", refresh=False)
                if late and rank == 0:
                    rundir.save(run_dir, learner.parts, state)
                    saved_at = time.monotonic()
                    interrupt.stop_if_requested(run_dir)
            bar.close()
            loaded.close()
            trained = time.perf_counter() - started

            # Validation, with the averaged weights where the recipe keeps them; flips wait for the end.
            judged = model if average is None else average
            logits = judge(judged)
            result = metrics.evaluate_logits(
                logits, data.val.labels, data.val.classes, data.val.task, recipe.loss, intervals=False
            )
            row = rundir.history_row(state, len(batches), result)
            state.history.append(row)
            score = -result["loss"] if recipe.monitor == "loss" else result[recipe.monitor]
            if not math.isfinite(score):
                raise RunError(
                    f"{recipe.monitor} is not defined on the validation list after epoch {state.epoch + 1}: {score}",
                    expected="a number to choose the best epoch by; an AUC needs images of two classes",
                    do="choose another figure (--set monitor=accuracy), or check the list",
                )
            improved = score > state.best
            if improved:
                state.best, state.best_epoch = score, state.epoch + 1
            state.epoch, state.batch = state.epoch + 1, 0

            # What is kept of this epoch; the state last, so that a resume repeats whatever is missing.
            if rank == 0:
                if improved:
                    rundir.keep_weights(judged, weights, learner.card, {"split": "val", **result})
                ends = state.epoch == recipe.epochs or _stale(recipe, state)
                picture = ends or time.monotonic() - drawn_at > CURVE_SECONDS
                rundir.write_history(run_dir, state, data.note, picture)
                drawn_at = time.monotonic() if picture else drawn_at
                rundir.append_timing(run_dir, state.epoch, trained, waited, len(data.train), started)
                if board is not None:
                    for name in HISTORY[2:]:
                        board.add_scalar(f"epoch/{name}", row[name], state.epoch)
                rundir.save(run_dir, learner.parts, state)
            say(_epoch_line(row, recipe, improved, trained))
            if state.epoch < recipe.epochs:
                interrupt.stop_if_requested(run_dir)
    if _stale(recipe, state) and state.epoch < recipe.epochs:
        say(f"stopped early: no better {recipe.monitor} in {recipe.patience} epochs")

    # The best weights, scored once more with intervals.
    wait_for_all(world)  # process 0 has written them
    load_strict(model, read_weights(weights), weights)
    logits = judge(model, flips_of(recipe))
    if rank > 0:
        return {}
    result = rundir.score_split(logits, data.val, recipe.loss)
    result |= {"epoch": state.best_epoch, "drawn": data.train.drawn}
    rundir.keep_weights(model, weights, learner.card, result)
    rundir.write_outputs(run_dir, logits, data.val, learner.card, result)
    return result


# --- set-up --------------------------------------------------------------------------------------


def _start_device(options: Options) -> str:
    device = select_device(options.device)
    if options.amp:
        require_gpu(device, "--amp")
    if options.deterministic:
        set_deterministic()
    return device


# --- one step ------------------------------------------------------------------------------------


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0] & 0x7FFFFFFF)


def _correct(logits, labels, card: Sidecar):
    """Accuracy in a batch, as a tensor, so that a GPU need not be waited for."""
    if card.task == "multi-label":
        guesses = (logits > 0).astype("int64")
    elif card.loss == "sigmoid":
        guesses = (logits[:, 0] > 0).astype("int64")
    else:
        guesses = logits.argmax(axis=1)
    return (guesses == labels).astype("float32").mean()


def _log_steps(pending: list[tuple], state: State, board) -> None:
    for step, lr, figures, rows in pending:
        loss, accuracy = figures.numpy().tolist()
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {step}, epoch {state.epoch + 1}",
                where=f"rows {', '.join(str(row) for row in rows[:8])}, … of the training list",
                do="lower --lr, or lengthen the warm-up (--set warmup_epochs=…)",
            )
        state.steps.append([float(step), float(lr), loss, accuracy])
        if board is not None:
            for name, figure in zip(STEP_LOG[1:], state.steps[-1][1:]):
                board.add_scalar(f"step/{name}", figure, step)
    pending.clear()


def _update_average(average, model, decay: float, step: int) -> None:
    """average = d * average + (1 - d) * weights; d grows from 0.1 so that the start is forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    with paddle.no_grad():
        for old, new in zip(average.state_dict().values(), model.state_dict().values()):
            old.scale_(d)
            old.add_(new * (1 - d))


# --- ends --------------------------------------------------------------------------------


def _stale(recipe: Recipe, state: State) -> bool:
    return bool(recipe.patience) and state.epoch - state.best_epoch >= recipe.patience and state.batch == 0


def _epoch_line(row: dict, recipe: Recipe, improved: bool, seconds: float) -> str:
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in HISTORY[3:])
    return f"epoch {row['epoch']:>3}/{recipe.epochs}  {figures}  {seconds:.0f} s{'  *' if improved else ''}"


def _open_board(run_dir: Path, options: Options, rank: int):
    if not options.visualdl or rank > 0:
        return None
    try:
        from visualdl import LogWriter
    except ImportError as error:
        raise RunError(f"--visualdl needs VisualDL: {error}", do="pip install visualdl") from None
    return LogWriter(logdir=str(run_dir / "visualdl"))
