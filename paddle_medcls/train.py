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
from typing import Any

import numpy as np

from paddle_medcls import __version__, metrics, report, rundir
from paddle_medcls.data import load_index, weights_name
from paddle_medcls.data.index import Index
from paddle_medcls.data.loader import ImageDataset, cut, epoch_order, load_batches
from paddle_medcls.data.statistics import scan
from paddle_medcls.errors import RunError, SetupError
from paddle_medcls.evaluate import evaluate_split, flips_of
from paddle_medcls.frozen import FeatureDataset, cached_features, freeze, frozen_hash, head_logits, start_training
from paddle_medcls.images import Preprocessing
from paddle_medcls.interrupt import Interrupt
from paddle_medcls.models import Network, network_for
from paddle_medcls.models.accelerate import Accelerated, obstacle
from paddle_medcls.models.onednn import Operators, has_bf16
from paddle_medcls.models.pretrained import pretrained_file
from paddle_medcls.models.weights import load_pretrained, load_strict, read_weights
from paddle_medcls.optim import build_loss, build_optimizer, build_schedule, class_weights
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
    device, rank, world = _start_device(options)
    say = options.say if rank == 0 else lambda line: None

    # Data: listed, then every image decoded once, so that a damaged one stops the run here.
    train_index = load_index(recipe.dataset, data_root, "train", recipe.labels)
    val_index = load_index(recipe.dataset, data_root, "val", recipe.labels)
    facts = _data_facts(recipe, data_root, train_index, val_index, options.workers)
    if recipe.statistics == "train" and not resume:
        recipe = recipe.replace(**facts["train"]["per_image"])
    note = report.DRAWN_NOTICE if train_index.drawn else ""
    spec = Preprocessing.of(recipe)
    say(f"{recipe.name}: {len(train_index)} training and {len(val_index)} validation images, {recipe.model}, {device}")
    for line in filter(None, (note, train_index.note)):
        say(line)

    # Network, optimizer, loss.
    paddle.seed(recipe.seed)
    network = network_for(recipe, len(train_index.classes), train_index.task)
    model = network.build()
    if recipe.pretrained and (recipe.freeze or not resume):  # a resume has all but what is frozen
        say(load_pretrained(model, network, pretrained_file(recipe.pretrained, recipe.model)))
    average = _average_of(model, network) if recipe.ema_decay else None
    views: list[np.ndarray] = []  # with cached features: one array a version of the training images
    val_features = None
    if recipe.freeze:
        freeze(model)
        facts["frozen_weights"] = frozen_hash(model)

        def features(index: Index, view: int | None) -> np.ndarray:
            folder = run_dir.parent / "features"
            return cached_features(model, facts["frozen_weights"], index, recipe, view, folder, options.workers)

        views = [features(train_index, view) for view in range(recipe.cache_views)]
        val_features = features(val_index, None)
    batches_per_epoch = math.ceil(len(train_index) / recipe.batch_size)
    schedule = build_schedule(recipe, batches_per_epoch)
    optimizer = build_optimizer(recipe, schedule, model)
    loss_function = build_loss(recipe, class_weights(recipe, train_index.labels, len(train_index.classes)))
    fed = model.head if views else model  # what a batch goes through
    kernels = _choose_kernels(options, fed, device, run_dir if resume else None, say)
    if kernels != "paddle":
        fed, judging = Accelerated(model, Operators(bf16=kernels == "onednn bf16")), Operators()
    parallel = paddle.DataParallel(fed) if world > 1 else fed
    scaler = paddle.amp.GradScaler(enable=options.amp and _amp_type() == "float16")
    kept = [whole.head if whole is not None and recipe.freeze else whole for whole in (model, average)]
    parts = {"model": kept[0], "average": kept[1], "optimizer": optimizer, "scaler": scaler}

    state = State()
    if resume:
        rundir.refuse_changes(run_dir, facts, options.force)
        state = rundir.restore(run_dir, parts)
        say(f"resumed after {state.epoch} of {recipe.epochs} epochs and {state.batch} batches")
    elif rank == 0:
        rundir.describe(run_dir, recipe, facts, {**environment(device), "kernels": kernels})

    weights = run_dir / f"{weights_name(recipe.dataset)}.pdparams"
    card = Sidecar(
        dataset=recipe.dataset,
        recipe=recipe.name,
        classes=train_index.classes,
        task=train_index.task,
        loss=recipe.loss,
        network=network,
        preprocessing=spec,
        flips=flips_of(recipe),
        labels=recipe.labels,
        drawn=train_index.drawn,
        versions={"paddle_medcls": __version__, "paddle": paddle.__version__},
    )
    board = _open_board(run_dir, options, rank)

    def judge(judged, flips: tuple[str, ...] | None = None) -> np.ndarray:
        """Validation logits; without `flips` the quick way, with cached features where there are any."""
        _synchronise(judged, world)
        if flips is None and val_features is not None:
            return head_logits(judged, val_features)
        flips = flips or ()
        if kernels != "paddle":
            judged = Accelerated(judged, judging)  # in float32, as whoever uses the weights will do
        return evaluate_split(judged, val_index, spec, recipe.batch_size, options.workers, flips, rank, world)

    drawn_at = -math.inf
    with Interrupt(say, options.deadline, enabled=world == 1) as interrupt:
        while state.epoch < recipe.epochs and not _stale(recipe, state):
            started = time.perf_counter()
            waited = 0.0

            # One epoch of training.
            if views:
                dataset = FeatureDataset(views[state.epoch % len(views)], train_index.labels)
            else:
                dataset = ImageDataset(train_index, spec, recipe, recipe.seed, state.epoch)
            batches = cut(epoch_order(len(train_index), recipe.seed, state.epoch), recipe.batch_size)
            shares = [_share(rows, rank, world) for rows in batches]
            loaded = load_batches(dataset, [rows for rows, _ in shares[state.batch :]], options.workers)
            bar = progress(None, f"epoch {state.epoch + 1}/{recipe.epochs}", len(train_index), "image", show=rank == 0)
            bar.update(sum(len(rows) for rows in batches[: state.batch]))
            pending: list[tuple] = []
            saved_at = time.monotonic()
            start_training(model, recipe.freeze)
            for rows, (_, share) in zip(batches[state.batch :], shares[state.batch :]):
                mark = time.perf_counter()
                batch = next(loaded)
                waited += time.perf_counter() - mark
                paddle.seed(_step_seed(recipe.seed, state.step))
                x, labels = paddle.to_tensor(batch.x), paddle.to_tensor(batch.labels)
                with paddle.amp.auto_cast(enable=options.amp, dtype=_amp_type()):
                    logits = parallel(x)  # (N, outputs)
                    loss = loss_function(logits.astype("float32"), labels)
                # DataParallel averages over processes; the share makes it the mean over the batch's images.
                scaler.scale(loss * share * world).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.clear_grad()
                figures = _over_processes(loss.detach() * share, _correct(logits, labels, card) * share, world)
                pending.append((state.step, schedule.get_lr(), figures, rows))
                schedule.step()
                if average is not None:
                    _update_average(parts["average"], parts["model"], recipe.ema_decay, state.step)
                state.step += 1
                state.batch += 1
                bar.update(len(rows))
                # On a GPU reading a figure waits for the card, so figures are read in groups.
                late = interrupt.due() or time.monotonic() - saved_at > SAVE_MINUTES * 60
                if device == "cpu" or len(pending) == 20 or state.batch == len(batches) or late:
                    _log_steps(pending, state, board)
                    bar.set_postfix(loss=f"{state.steps[-1][2]:.4f}", refresh=False)
                if late and rank == 0:
                    rundir.save(run_dir, parts, state)
                    saved_at = time.monotonic()
                    interrupt.stop_if_requested(run_dir)
            bar.close()
            loaded.close()
            trained = time.perf_counter() - started

            # Validation, with the averaged weights where the recipe keeps them; flips wait for the end.
            judged = model if average is None else average
            logits = judge(judged)
            result = metrics.evaluate_logits(
                logits, val_index.labels, val_index.classes, val_index.task, recipe.loss, intervals=False
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
                    rundir.keep_weights(judged, weights, card, {"split": "val", **result})
                ends = state.epoch == recipe.epochs or _stale(recipe, state)
                picture = ends or time.monotonic() - drawn_at > CURVE_SECONDS
                rundir.write_history(run_dir, state, note, picture)
                drawn_at = time.monotonic() if picture else drawn_at
                rundir.append_timing(run_dir, state.epoch, trained, waited, len(train_index), started)
                if board is not None:
                    for name in HISTORY[2:]:
                        board.add_scalar(f"epoch/{name}", row[name], state.epoch)
                rundir.save(run_dir, parts, state)
            say(_epoch_line(row, recipe, improved, trained))
            if state.epoch < recipe.epochs:
                interrupt.stop_if_requested(run_dir)
    if _stale(recipe, state) and state.epoch < recipe.epochs:
        say(f"stopped early: no better {recipe.monitor} in {recipe.patience} epochs")

    # The best weights, scored once more with intervals.
    if world > 1:
        paddle.distributed.barrier()  # process 0 has written them
    load_strict(model, read_weights(weights), weights)
    logits = judge(model, flips_of(recipe))
    if rank > 0:
        return {}
    result = rundir.score_split(logits, val_index, recipe.loss)
    result |= {"epoch": state.best_epoch, "drawn": train_index.drawn}
    rundir.keep_weights(model, weights, card, result)
    rundir.write_outputs(run_dir, logits, val_index, card, result)
    return result


# --- set-up --------------------------------------------------------------------------------------


def _start_device(options: Options) -> tuple[str, int, int]:
    device = select_device(options.device)
    if options.amp:
        require_gpu(device, "--amp")
    if options.deterministic:
        set_deterministic()
    import paddle.distributed as dist

    world = dist.get_world_size()
    if world > 1:
        dist.init_parallel_env()
    return device, dist.get_rank(), world


def _choose_kernels(options: Options, fed, device: str, resumed: Path | None, say: Callable[[str], None]) -> str:
    """ "paddle", "onednn f32" or "onednn bf16"; a resumed run keeps its own, since others round differently.

    Args:
        fed: the layer that batches go through.
        resumed: the run directory of a run that goes on.

    Raises:
        SetupError: what was asked for, or what the run began with, cannot be had here.
    """
    kernels, precision = rundir.kernels_of(resumed) if resumed else (options.kernels, options.precision)
    if kernels == "paddle":
        if precision != "f32":
            raise SetupError(f"--precision {precision} needs --kernels onednn; Paddle's own compute in float32")
        return "paddle"
    fault = obstacle(fed, device)
    if not fault and precision == "bf16" and not has_bf16():
        fault = "this processor has no instructions for bfloat16"
    if not fault:
        say(f"operators: oneDNN's, in {'float32' if precision == 'f32' else 'bfloat16; validation in float32'}")
        return f"onednn {precision}"
    if (kernels == "onednn" or precision == "bf16") and not (resumed and options.force):
        asked = f"the run began with oneDNN's operators, {precision}" if resumed else f"oneDNN's operators, {precision}"
        do = "go on where it began, or with --force" if resumed else "leave --kernels and --precision out"
        raise SetupError(f"{asked}: {fault}", do=do)
    if device == "cpu":
        say(f"operators: Paddle's own, not oneDNN's, which are faster: {fault}")
    return "paddle"


def _amp_type() -> str:
    """bfloat16 where the card has it (no scaler needed), else float16."""
    if not paddle.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        return "bfloat16"
    return "bfloat16" if paddle.device.cuda.get_device_capability()[0] >= 8 else "float16"


def _data_facts(recipe: Recipe, data_root: Path, train_index: Index, val_index: Index, workers: int) -> dict:
    """Counts, figures and fingerprints of both lists; reading them proves every image readable."""
    facts: dict[str, Any] = {"data_root": str(Path(data_root).resolve()), "drawn": train_index.drawn}
    facts["note"] = train_index.note
    for index in (train_index, val_index):
        found = scan(index, max(1, workers), recipe.channels)
        facts[index.split] = {
            "images": len(index),
            "fingerprint": index.fingerprint(),
            "classes": found["classes"],
            # float32 is what the network computes in; rounding here keeps JSON and run the same
            "per_image": {name: tuple(found["per_image"][name]) for name in ("mean", "std")},
        }
    return facts


# --- one step ------------------------------------------------------------------------------------


def _share(rows: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, float]:
    """This process's rows of a batch, and the part of the batch that they are.

    A process that would have none computes the first image, for nothing: all must take part in the
    exchange of gradients.
    """
    mine = rows[rank::world]
    return (mine, len(mine) / len(rows)) if len(mine) else (rows[:1], 0.0)


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


def _synchronise(network, world: int) -> None:
    """Gives every process the batch-norm statistics of process 0, so that all judge the same network."""
    if world > 1:
        for tensor in network.state_dict().values():
            paddle.distributed.broadcast(tensor, src=0)


def _over_processes(loss, correct, world: int):
    """(loss, accuracy) of the whole batch as a tensor (2,), from each process's share of it."""
    figures = paddle.stack([loss, correct])
    if world > 1:
        paddle.distributed.all_reduce(figures)
    return figures


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


def _average_of(model, network: Network):
    average = network.build()
    average.set_state_dict(model.state_dict())
    average.eval()
    return average


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
