"""Options of a training, its device, and the rank of this process."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddle_medcls.core.errors import RunError, SetupError, did_you_mean
from paddle_medcls.core.hardware import has_bfloat16
from paddle_medcls.core.paddle_setup import configure_gpu, require_gpu, select_device
from paddle_medcls.core.progress import say_line
from paddle_medcls.training.distributed import join

_CHOICES = {
    "device": ("auto", "cpu", "gpu"),
    "kernels": ("auto", "paddle", "onednn"),
    "precision": ("f32", "bf16", "auto"),
}


@dataclass(frozen=True)
class Options:
    """Settings of a training that are not part of the recipe. A resumed run keeps its device, kernels and precision.

    Attributes:
        device: "auto" (a GPU where Paddle sees one), "cpu" or "gpu".
        workers: threads that read images.
        amp: mixed precision, on a GPU; None: off for a new run, unchanged for a resumed one.
        deterministic: deterministic algorithms, on a GPU; None as for `amp`.
        image_cache: folder of decoded, scaled images; None: `images` beside the run directory; "off": none, so
            each epoch decodes them again.
        force: resume although code, data or settings have changed.
        kernels: CPU kernels: "paddle", "onednn", or "auto": oneDNN's where they are available.
        precision: of oneDNN's kernels: "f32", "bf16", or "auto": bf16 where they and the processor have it.
        deadline: value of time.monotonic() at which the run stops, with its state saved.
        say: takes a line for the user.
    """

    device: str = "auto"
    workers: int = 2
    amp: bool | None = None
    deterministic: bool | None = None
    image_cache: str | Path | None = None
    force: bool = False
    kernels: str = "auto"
    precision: str = "f32"
    deadline: float = math.inf
    say: Callable[[str], None] = say_line

    def cache_folder(self, run_dir: Path) -> Path | None:
        """Where the decoded images of a run are kept; None: nowhere."""
        if self.image_cache == "off":
            return None
        return run_dir.parent / "images" if self.image_cache is None else Path(self.image_cache)


@dataclass(frozen=True)
class Session:
    """What every stage of a training needs besides the run itself.

    Attributes:
        device: Paddle's name of it, "cpu" or "gpu:0".
        rank, world: number of this process, and how many train together.
        options: complete: unset ones are filled in, from the resumed run where there is one.
        say: takes a line for the user; silent in all processes but the first.
    """

    device: str
    rank: int
    world: int
    options: Options
    say: Callable[[str], None]

    @property
    def first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def node_first(self) -> int:
        """Number of the first process on this machine, which reads the images for all of them here."""
        return self.rank - int(os.environ.get("PADDLE_LOCAL_RANK", "0"))


def start_session(options: Options, environment: dict | None = None) -> Session:
    """Checks the options against this machine, prepares the device, and joins the other processes.

    Args:
        environment: of a resumed run, its `environment.json`.

    Raises:
        SetupError: this machine lacks a device, library or instruction that the options or the resumed run need.
        RunError: other settings than those of the resumed run.
    """
    for name, choices in _CHOICES.items():
        value = getattr(options, name)
        if value not in choices:
            near = did_you_mean(str(value), choices)
            raise SetupError(f"unknown {name} {value!r}{near}", expected=", ".join(choices))
    options = _settings(options, environment)
    device = select_device(options.device)
    if options.amp:
        require_gpu(device, "--amp")
    configure_gpu(bool(options.deterministic), bool(options.amp))
    rank, world = join()
    return Session(device, rank, world, options, options.say if rank == 0 else lambda line: None)


def _settings(options: Options, environment: dict | None) -> Options:
    """The options with the settings of a resumed run; contradicting ones are an error without `force`."""
    requested: dict[str, Any] = {"device": options.device, "amp": options.amp, "deterministic": options.deterministic}
    requested["kernels"] = None if (options.kernels, options.precision) == ("auto", "f32") else options.kernels
    requested["precision"] = None if requested["kernels"] is None else options.precision
    settings: dict[str, Any] = {"amp": False, "deterministic": False, "kernels": "auto", "precision": "f32"}
    settings |= {name: value for name, value in requested.items() if value is not None}
    run = run_settings(environment) if environment else {}
    changes = []
    for name, earlier in run.items():
        if requested[name] in (None, "auto"):
            settings[name] = earlier
        elif requested[name] != earlier:
            changes.append(f"{name}: {earlier} then, {requested[name]} now")
    if changes and not options.force:
        raise RunError(
            "the run cannot be resumed with other settings",
            items=changes,
            fix="leave these options out, or pass --force",
        )
    options = replace(options, **settings)
    if options.precision == "bf16" and options.kernels == "paddle":
        raise SetupError("--precision bf16 needs --kernels onednn; Paddle's own compute in float32")
    if options.precision == "bf16" and not has_bfloat16():
        if not (environment and options.force):
            raise SetupError("--precision bf16: this processor has no instructions for bfloat16", fix="leave it out")
        options = replace(options, kernels="auto", precision="f32")
    return options


def run_settings(environment: dict) -> dict:
    """The settings of a run, from its `environment.json`; version 0.1 did not write all of them."""
    kernels, _, precision = environment.get("kernels", "paddle").partition(" ")
    settings = {"device": environment["device"].partition(":")[0], "kernels": kernels, "precision": precision or "f32"}
    return settings | {name: environment[name] for name in ("amp", "deterministic") if name in environment}
