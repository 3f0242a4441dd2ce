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

from paddle_medcls import metrics, modelcard, rundir
from paddle_medcls.assemble import amp_type, build_learner, choose_kernels, read_data
from paddle_medcls.data import weights_name
from paddle_medcls.data.loader import ImageDataset, cut, epoch_order, load_batches
from paddle_medcls.distributed import exchange, from_first, join, over_processes, pieces, synchronise
from paddle_medcls.errors import RunError
from paddle_medcls.evaluate import evaluate_split
from paddle_medcls.frozen import FeatureDataset, head_logits, start_training
from paddle_medcls.graph import flips_of
from paddle_medcls.interrupt import Interrupt, stopped
from paddle_medcls.models.accelerate import Accelerated
from paddle_medcls.models.onednn import Operators
from paddle_medcls.models.weights import load_strict, read_weights
from paddle_medcls.output_head import check_finite
from paddle_medcls.progress import progress
from paddle_medcls.recipe import Recipe
from paddle_medcls.rundir import HISTORY, STEP_LOG, State
from paddle_medcls.runtime import environment, paddle, require_gpu, select_device, set_deterministic, set_fast
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
    image_cache: str = ""  # folder of decoded, scaled images; "": each epoch decodes them again
    force: bool = False  # resume although code or data have changed
    kernels: str = "paddle"  # whose operators: "paddle", "onednn", or "auto": oneDNN's where they can be had
    precision: str = "f32"  # of oneDNN's operators, or "bf16"
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

    data = read_data(recipe, data_root, options.workers, options.image_cache, say, rank, world)
    if recipe.statistics == "train" and not resume:
        recipe = recipe.replace(**{name: tuple(of) for name, of in data.facts["train"]["per_image"].items()})
    spec = recipe.preprocessing
    say(f"{recipe.name}: {len(data.train)} training and {len(data.val)} validation images, {recipe.model}, {device}")
    for line in filter(None, (data.note, data.train.note)):
        say(line)

    learner = build_learner(
        recipe, data, run_dir.parent / "features", options.workers, options.amp, resume, say, rank, world
    )
    model, average = learner.model, learner.average
    schedule, optimizer, scaler = learner.schedule, learner.optimizer, learner.scaler
    began_with = rundir.kernels_of(run_dir) if resume else None
    kernels = choose_kernels(options.kernels, options.precision, began_with, options.force, learner.fed, device, say)
    fed, judging = learner.fed, None
    if kernels != "paddle":
        fed, judging = Accelerated(model, Operators(bf16=kernels == "onednn bf16")), Operators()
    parallel = paddle.DataParallel(fed) if world > 1 else fed

    state = State()
    if resume:
        rundir.refuse_changes(run_dir, data.facts, world, options.force)
        state = rundir.restore(run_dir, learner.parts)
        say(f"resumed after {state.epoch} of {recipe.epochs} epochs and {state.batch} batches")
    elif rank == 0:
        rundir.describe(run_dir, recipe, data.facts, environment(device) | {"processes": world, "kernels": kernels})

    weights = run_dir / f"{weights_name(recipe.dataset)}.pdparams"
    board = _open_board(run_dir, options, rank)

    def judge(judged, flips: tuple[str, ...] | None = None) -> np.ndarray:
        """Validation logits; without `flips` the quick way, with cached features where there are any."""
        synchronise(judged, world)
        if flips is None and learner.val_features is not None:
            return check_finite(head_logits(judged, learner.val_features), data.val.ids)
        flips = flips or ()
        if judging is not None:
            judged = Accelerated(judged, judging)  # in float32, as whoever uses the weights will do
        size, threads = recipe.batch_size, options.workers
        return evaluate_split(judged, data.val, spec, size, threads, flips, rank, world, data.fitted["val"])

    drawn_at = -math.inf
    with Interrupt(say, options.deadline) as interrupt:
        while state.epoch < recipe.epochs and not _stale(recipe, state):
            started = time.perf_counter()
            waited = 0.0

            # One epoch of training.
            if learner.views:
                features = learner.views[state.epoch % len(learner.views)]
                dataset = FeatureDataset(features, data.train.labels)
            else:
                fitted = data.fitted["train"]
                dataset = ImageDataset(data.train, spec, recipe.augmentation, recipe.seed, state.epoch, fitted)
            batches = cut(epoch_order(len(data.train), recipe.seed, state.epoch), recipe.batch_size)
            work = [pieces(rows, rank, world, recipe.accumulate) for rows in batches]
            mine = [piece for parts in work[state.batch :] for piece, _ in parts]
            loaded = load_batches(dataset, mine, options.workers)
            bar = progress(None, f"epoch {state.epoch + 1}/{recipe.epochs}", len(data.train), "image", show=rank == 0)
            bar.update(sum(len(rows) for rows in batches[: state.batch]))
            pending: list[tuple] = []
            saved_at = time.monotonic()
            start_training(model, recipe.freeze)
            for rows, parts in zip(batches[state.batch :], work[state.batch :]):
                paddle.seed(_step_seed(recipe.seed, state.step, rank))
                figures: list = []  # of each piece: loss and accuracy
                for _, part in parts:
                    mark = time.perf_counter()
                    batch = next(loaded)
                    waited += time.perf_counter() - mark
                    x, labels = paddle.to_tensor(batch.x), paddle.to_tensor(batch.labels)
                    with exchange(parallel, world, last=len(figures) + 1 == len(parts)):
                        with paddle.amp.auto_cast(enable=options.amp, dtype=amp_type()):
                            logits = parallel(x)  # (N, outputs)
                            loss = learner.loss(logits.astype("float32"), labels)
                        # The part makes the sum over pieces the mean over the batch's images; DataParallel averages.
                        scaler.scale(loss * part * world).backward()
                    figures.append(paddle.stack([loss.detach(), _correct(logits, labels, learner.card)]) * part)
                scaler.step(optimizer)
                scaler.update()
                optimizer.clear_grad()
                whole = over_processes(sum(figures), interrupt.due(), world)
                pending.append((state.step, schedule.get_lr(), whole, rows))
                schedule.step()
                if average is not None:
                    _update_average(learner.parts["average"], learner.parts["model"], recipe.ema_decay, state.step)
                state.step += 1
                state.batch += 1
                bar.update(len(rows))
                # On a GPU reading a figure waits for the card, so figures are read in groups, by every
                # process at the same step: that is where they agree to stop.
                asked = world == 1 and interrupt.due()
                if asked or device == "cpu" or len(pending) == 20 or state.batch == len(batches):
                    asked = _log_steps(pending, state, board) or asked
                    bar.set_postfix(loss=f"{state.steps[-1][2]:.4f}", refresh=False)
                    if rank == 0 and (asked or time.monotonic() - saved_at > SAVE_MINUTES * 60):
                        rundir.save(run_dir, learner.parts, state)
                        saved_at = time.monotonic()
                if asked:
                    from_first(lambda: None, rank, world)  # it has saved
                    raise stopped(run_dir)
            bar.close()
            loaded.close()
            trained = time.perf_counter() - started

            # Validation, with the averaged weights where the recipe keeps them; flips wait for the end.
            judged = model if average is None else average
            logits = judge(judged)
            result = metrics.evaluate_logits(logits, data.val.labels, learner.card.head, intervals=False)
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
            if from_first(interrupt.due, rank, world) and state.epoch < recipe.epochs:
                raise stopped(run_dir)
    if _stale(recipe, state) and state.epoch < recipe.epochs:
        say(f"stopped early: no better {recipe.monitor} in {recipe.patience} epochs")

    # The best weights, scored once more with intervals.
    load_strict(model, read_weights(weights), weights)
    logits = judge(model, flips_of(recipe))
    if rank > 0:
        return {}
    result = rundir.score_split(logits, data.val, learner.card.head)
    result |= {"epoch": state.best_epoch, "drawn": data.train.drawn}
    card = rundir.keep_weights(model, weights, learner.card, result)
    rundir.write_outputs(run_dir, logits, data.val, card, result)
    modelcard.write_card(run_dir, card, "weights", [weights.name], modelcard.run_facts(weights, card))
    return result


# --- set-up --------------------------------------------------------------------------------------


def _start_device(options: Options) -> str:
    device = select_device(options.device)
    if options.amp:
        require_gpu(device, "--amp")
    if options.deterministic:
        set_deterministic()
    elif device.startswith("gpu"):
        set_fast(options.amp)
    return device


# --- one step ------------------------------------------------------------------------------------


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Processes draw different dropouts; one alone draws what process 0 does."""
    own = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(own).generate_state(1)[0] & 0x7FFFFFFF)


def _correct(logits, labels, card: Sidecar):
    """Accuracy in a batch, as a tensor, so that a GPU need not be waited for."""
    if card.task == "multi-label":
        guesses = (logits > 0).astype("int64")
    elif card.loss == "sigmoid":
        guesses = (logits[:, 0] > 0).astype("int64")
    else:
        guesses = logits.argmax(axis=1)
    return (guesses == labels).astype("float32").mean()


def _log_steps(pending: list[tuple], state: State, board) -> bool:
    """Reads the figures of the steps since the last time; whether any process was asked to stop."""
    asked = 0.0
    for step, lr, figures, rows in pending:
        loss, accuracy, asked = figures.numpy().tolist()
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
    return asked > 0


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
