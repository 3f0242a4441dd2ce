"""How a run is carried out: its options, the device, and this process's place among several."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddle_medcls.core.errors import RunError, SetupError
from paddle_medcls.core.hardware import has_bfloat16
from paddle_medcls.core.paddle_setup import configure_gpu, require_gpu, select_device
from paddle_medcls.training.distributed import join


@dataclass(frozen=True)
class Options:
    """How a run is carried out; what is trained is the recipe's. A resumed run keeps the settings it began with.

    Attributes:
        device: "auto" (a GPU where Paddle sees one), "cpu" or "gpu".
        workers: threads that read images.
        amp: mixed precision, on a GPU; None: as the run began, for a new one no.
        deterministic: deterministic algorithms, on a GPU; None as for `amp`.
        visualdl: also log for VisualDL.
        image_cache: folder of decoded, scaled images; None: `images` beside the run directory; "off": none, so
            each epoch decodes them again.
        force: resume although code, data or settings have changed.
        kernels: CPU kernels: "paddle", "onednn", or "auto": oneDNN's where they are available.
        precision: of oneDNN's kernels, "f32" or "bf16".
        deadline: of time.monotonic(): the run stops then, its state saved.
        say: takes a line for the user.
    """

    device: str = "auto"
    workers: int = 2
    amp: bool | None = None
    deterministic: bool | None = None
    visualdl: bool = False
    image_cache: str | Path | None = None
    force: bool = False
    kernels: str = "auto"
    precision: str = "f32"
    deadline: float = math.inf
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)

    def cache_folder(self, run_dir: Path) -> Path | None:
        """Where the decoded images of a run are kept; None: nowhere."""
        if self.image_cache == "off":
            return None
        return run_dir.parent / "images" if self.image_cache is None else Path(self.image_cache)


@dataclass(frozen=True)
class Session:
    """This process: what every stage of a training needs to know besides the run.

    Attributes:
        device: in Paddle's words, "cpu" or "gpu:0".
        rank, world: this process's number and the number of all that share the run.
        options: without "as the run began": those are filled in.
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


def start_session(options: Options, began: dict | None = None) -> Session:
    """Checks the options against this machine, prepares the device, and meets the other processes.

    Args:
        began: of a resumed run, its `environment.json`.

    Raises:
        SetupError: the machine lacks what is asked for, or what the run began with.
        RunError: other settings than those that the run began with.
    """
    options = _settings(options, began)
    if options.visualdl:
        _require_visualdl()
    device = select_device(options.device)
    if options.amp:
        require_gpu(device, "--amp")
    configure_gpu(bool(options.deterministic), bool(options.amp))
    rank, world = join()
    return Session(device, rank, world, options, options.say if rank == 0 else lambda line: None)


def _settings(options: Options, began: dict | None) -> Options:
    """The options with the settings of a resumed run; other ones that were asked for need `force`."""
    wanted: dict[str, Any] = {"device": options.device, "amp": options.amp, "deterministic": options.deterministic}
    wanted["kernels"] = None if (options.kernels, options.precision) == ("auto", "f32") else options.kernels
    wanted["precision"] = None if wanted["kernels"] is None else options.precision
    chosen: dict[str, Any] = {"amp": False, "deterministic": False, "kernels": "auto", "precision": "f32"}
    chosen |= {name: value for name, value in wanted.items() if value is not None}
    before = began_with(began) if began else {}
    changes = []
    for name, then in before.items():
        if wanted[name] in (None, "auto"):
            chosen[name] = then
        elif wanted[name] != then:
            changes.append(f"{name}: {then} then, {wanted[name]} now")
    if changes and not options.force:
        raise RunError(
            "the run cannot be resumed with other settings",
            items=changes,
            fix="leave these options out, or pass --force",
        )
    options = replace(options, **chosen)
    if options.precision != "f32" and options.kernels == "paddle":
        raise SetupError(f"--precision {options.precision} needs --kernels onednn; Paddle's own compute in float32")
    if options.precision == "bf16" and not has_bfloat16():
        if not (began and options.force):
            raise SetupError("--precision bf16: this processor has no instructions for bfloat16", fix="leave it out")
        options = replace(options, kernels="auto", precision="f32")
    return options


def began_with(environment: dict) -> dict:
    """The settings of a run, from its `environment.json`; version 0.1 did not write all of them."""
    kernels, _, precision = environment.get("kernels", "paddle").partition(" ")
    found = {"device": environment["device"].partition(":")[0], "kernels": kernels, "precision": precision or "f32"}
    return found | {name: environment[name] for name in ("amp", "deterministic") if name in environment}


def _require_visualdl() -> None:
    try:
        import visualdl  # noqa: F401
    except ImportError as error:
        raise RunError(f"--visualdl needs VisualDL: {error}", fix="pip install visualdl") from None
