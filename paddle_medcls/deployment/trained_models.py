"""The trained models in a folder of runs."""

from __future__ import annotations

from pathlib import Path

from paddle_medcls.core.errors import WeightsError, command
from paddle_medcls.models.sidecar import Sidecar, find_model, find_models, sidecar_of


def trained_models(runs: Path) -> list[Path]:
    """Weight files with a sidecar in the folders of runs, and one level deeper (`reproduce`), the newest first.

    A finished cross-validation is its folder: the average of its models.
    """
    files = [path for pattern in ("*/*.pdparams", "*/*/*.pdparams") for path in runs.glob(pattern)]
    files = [path for path in files if path.with_suffix(".json").is_file()]
    finished = {path.parent.parent for path in files if (path.parent.parent / "fold1").is_dir()}
    finished = {folder for folder in finished if (folder / "metrics.json").is_file()}
    files = [path for path in files if path.parent.parent not in finished] + list(finished)
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_weights(runs: Path) -> Path:
    """The newest of `trained_models`; models of several data sets are an error that lists them."""
    files = trained_models(runs)
    if not files:
        raise WeightsError(
            "no trained model yet",
            path=f"{runs}/*/*.pdparams",
            fix=f"train one ({command('train')}), or give --weights",
        )
    newest: dict[str, Path] = {}  # of each data set; two sets of own images have one name, and other classes
    for path in files:
        try:
            sidecar = Sidecar.read(sidecar_of(find_model(find_models(path)[0])))
            name = f"{sidecar.dataset} ({', '.join(sidecar.classes)})"
        except WeightsError:
            name = "unknown"  # its error is told where it is opened
        newest.setdefault(name, path)
    if len(newest) > 1:
        raise WeightsError(
            f"there are trained models of {len(newest)} data sets",
            items=[f"{name}: {path}" for name, path in newest.items()],
            path=runs,
            fix="give --weights FILE; these are the newest of each data set",
        )
    return files[0]
