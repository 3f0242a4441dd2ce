"""Predicts very many images into files of bounded size, shards, and continues after any interruption.

The output folder holds, for each block of images of the list:

    predictions-000000.parquet   a row for each image, in the order of the list
    errors-000000.parquet        a row for each image that cannot be read; only if there are any

and the manifest, see `shard_manifest`. Memory holds one block of the list. In a Ray cluster each block is one task: the
files and the order of the list are the same as here, which Ray Data would leave to itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from paddle_medcls import __version__
from paddle_medcls.core.cluster import connect, gpus_of, working_nodes
from paddle_medcls.core.errors import DataError, MedclsError, RunError, SetupError, Stopped, WeightsError
from paddle_medcls.core.files import atomic_write, locked_folder, remove_abandoned, sha256, write_csv
from paddle_medcls.core.hardware import installed_version, usable_cores
from paddle_medcls.core.progress import progress
from paddle_medcls.deployment.prediction import check_options, table_columns, table_row
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.deployment.shard_manifest import plan_shards, read_shards, shard_names, unfinished, write_manifest

FORMATS = ("parquet", "csv")
ERRORS: list[tuple[str, type]] = [("image", str), ("error", str)]
Block = tuple[int, list[str]]
"""Number of a shard, and the paths of its images."""


@dataclass(frozen=True)
class ShardOptions:
    """How very many images are predicted.

    Attributes:
        rows: images of a shard.
        format: one of FORMATS; "": Parquet where pyarrow is installed, else CSV.
        coverage, refuse: see `prediction.check_options`.
        batch_size: images at a time.
        workers: threads that read images; 0: one a core.
    """

    rows: int = 100_000
    format: str = ""
    coverage: float | None = None
    refuse: bool = False
    batch_size: int = 16
    workers: int = 0


class Totals(NamedTuple):
    """Images of all shards: those that were predicted, and those that cannot be read."""

    predicted: int
    unreadable: int


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that predicts shards; all its nodes read the images and write the output folder.

    Attributes:
        address: see `core.cluster.connect`.
        open_model: opens the model on a node; it can be pickled.
        device: "auto" (a GPU for each task if the nodes have some), "cpu" or "gpu".
    """

    address: str
    open_model: Callable[[], Predictor]
    device: str = "auto"


def predict_shards(
    predictor: Predictor,
    images: Iterable[str],
    output: str | Path,
    options: ShardOptions = ShardOptions(),  # noqa: B008  it is frozen
    cluster: Cluster | None = None,
) -> Totals:
    """Predicts the images of a list into the shards of a folder; those that are finished there are not repeated.

    Args:
        images: paths, in the same order whenever they are iterated: once to count them, once to predict.
        output: a new folder, or that of an interrupted call with the same arguments.
        cluster: None: this process predicts.

    Raises:
        RunError: the folder holds something else, or predictions of another model, other options or another list.
        Stopped: Ctrl-C.
        MedclsError: see `Predictor.predict` and `core.cluster.connect`; a list that cannot be read.
    """
    output = Path(output)
    check_options(predictor, options.coverage, options.refuse)
    if not options.format:
        options = replace(options, format="parquet" if installed_version("pyarrow") else "csv")
    if options.format not in FORMATS or options.rows < 1:
        raise RunError(f"shards of {options.rows} rows in the format {options.format!r}", expected=" or ".join(FORMATS))
    settings = _settings(predictor, options)
    column, count = Counter(settings["columns"]).most_common(1)[0]
    if options.format == "parquet" and count > 1:
        raise RunError(f"two columns have the name {column!r}: Parquet files cannot", fix="give --format csv")
    with locked_folder(output, "predicts into this folder"):
        remove_abandoned(output)
        shards = read_shards(output, settings, plan_shards(images, options.rows))
        blocks = unfinished(images, options.rows, shards)
        to_do = sum(shard["images"] for shard in shards if "sha256" not in shard)
        if finished := _finished(shards):
            print(f"{finished} of {len(shards)} shards are finished", file=sys.stderr)
        with progress(None, "predicting", to_do, "image") as bar:
            results: Generator[tuple[int, dict], None, None]
            if cluster is None:
                results = ((block[0], predict_shard(predictor, block, output, options, bar.update)) for block in blocks)
            else:
                results = _in_cluster(cluster, blocks, settings, output, options)
            try:
                with contextlib.closing(results):
                    for number, result in results:
                        shards[number] |= result
                        write_manifest(output, settings, shards)
                        bar.update(0 if cluster is None else shards[number]["images"])
            except KeyboardInterrupt:
                text = f"interrupted: {_finished(shards)} of {len(shards)} shards are finished"
                raise Stopped(text, fix="run the same command again") from None
    return Totals(sum(shard["predictions"] for shard in shards), sum(shard["errors"] for shard in shards))


def _finished(shards: Sequence[dict]) -> int:
    return sum("sha256" in shard for shard in shards)


def predict_shard(
    predictor: Predictor,
    block: Block,
    output: Path,
    options: ShardOptions,
    update: Callable[[], object] = lambda: None,
) -> dict:
    """Predicts one block of the list and writes its files.

    Args:
        update: called after each image.

    Returns:
        Rows of both files, and `sha256`: name -> digest.
    """
    number, paths = block
    rows, errors = [], []
    workers = options.workers or usable_cores()
    for path, _, found in predictor.predict_decoded(paths, options.batch_size, workers, keep_images=False):
        if isinstance(found, DataError):
            errors.append([path, found.what])
        else:
            found = predictor.with_prediction_set(found, options.coverage)
            rows.append(table_row(path, found, options.refuse))
        update()
    names = shard_names(number, options.format)
    tables = [(names[0], table_columns(predictor, options.coverage is not None), rows), (names[1], ERRORS, errors)]
    for name, columns, lines in tables:
        if name == names[0] or lines:
            _write_table(output / name, columns, lines)
        else:
            (output / name).unlink(missing_ok=True)  # of an interrupted attempt that could not read a file
    digests = {name: sha256(output / name) for name, _, lines in tables if name == names[0] or lines}
    return {"predictions": len(rows), "errors": len(errors), "sha256": digests}


# --- in a cluster ---------------------------------------------------------------------------------------


def _in_cluster(
    cluster: Cluster, blocks: Iterator[Block], settings: dict, output: Path, options: ShardOptions
) -> Generator[tuple[int, dict], None, None]:
    """Yields the numbers and results of blocks as they are finished: a task has a GPU, or else a node."""
    first = next(blocks, None)
    if first is None:
        return
    blocks = itertools.chain([first], blocks)
    ray = connect(cluster.address, [output], [Path(first[1][0]).parent])
    try:
        nodes = working_nodes(ray)
        gpus = gpus_of(nodes, cluster.device)
        cores = min(int(node["Resources"].get("CPU", 1)) for node in nodes) // max(1, *gpus)
        task = ray.remote(num_cpus=cores, num_gpus=min(1, max(gpus)))(_on_node)
        arguments = cluster.open_model, settings, output.absolute(), options, os.getcwd()
        running: dict = {}
        while True:
            for block in itertools.islice(blocks, 2 * max(len(nodes), sum(gpus)) - len(running)):  # one waits for each
                running[task.remote(block, *arguments)] = block[0]
            if not running:
                return
            while not (ready := ray.wait(list(running), timeout=20)[0]):
                if not working_nodes(ray):
                    raise SetupError("no node of the Ray cluster is left", fix="repeat the command when there are some")
            number = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                raise RunError(f"shard {number}: {str(error).strip().splitlines()[-1]}") from None
            if isinstance(result, str):
                what, *lines = result.splitlines()
                raise RunError(what, items=[line.strip() for line in lines])
            yield number, result
    finally:
        ray.shutdown()


def _on_node(
    block: Block, open_model: Callable[[], Predictor], settings: dict, output: Path, options: ShardOptions, folder: str
) -> dict | str:
    """The result of `predict_shard`, or the message of an error; `folder`: that relative paths begin at."""
    os.chdir(folder)
    try:
        predictor = open_model()
        if _settings(predictor, options) != settings:
            raise RunError("a node of the cluster opens another model, or with another engine")
        remove_abandoned(output)
        return predict_shard(predictor, block, output, options)
    except MedclsError as error:
        return str(error)


# --- model, options and files --------------------------------------------------------------------------


def _settings(predictor: Predictor, options: ShardOptions) -> dict:
    """Model and options as in the manifest: shards of one folder have the same."""
    sidecar = predictor.sidecar
    weights = sorted([*sidecar.members, *sidecar.files.values()]) or [sidecar.sha256]
    if not weights[0]:
        if predictor.path is None:
            raise WeightsError("a network in memory cannot be told from others", fix="open its weight file")
        weights = [sha256(predictor.path)]
    sidecars = [asdict(one.sidecar) for one in (predictor, *predictor.members)]
    return {
        "paddle_medcls": __version__,
        "weights": weights,
        "sidecar": hashlib.sha256(json.dumps(sidecars, sort_keys=True, default=str).encode()).hexdigest(),
        "engine": predictor.engine,
        "precision": predictor.precision,
        "columns": [name for name, _ in table_columns(predictor, options.coverage is not None)],
        "shard_rows": options.rows,
        **{name: getattr(options, name) for name in ("format", "coverage", "refuse", "batch_size")},
    }


def _write_table(path: Path, columns: Sequence[tuple[str, type]], rows: Sequence[Sequence]) -> None:
    """Writes the rows in the format of the path's suffix; bytes of names that are not UTF-8 become escapes."""
    if path.suffix == ".csv":
        write_csv(path, [name for name, _ in columns], rows)
        return
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SetupError("Parquet files need pyarrow", fix="pip install pyarrow, or --format csv") from None
    types = {str: pyarrow.string(), float: pyarrow.float32(), int: pyarrow.int32(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns])
    values = [[_utf8(row[k]) for row in rows] for k in range(len(columns))]
    table = pyarrow.table([pyarrow.array(*pair) for pair in zip(values, schema.types)], schema=schema)
    atomic_write(path, lambda temporary: parquet.write_table(table, temporary, compression="zstd"))


def _utf8(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
