"""`python tools/predict.py img.png …`: predicts files, folders and globs."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from paddle_medcls.cli.common import (
    add_engine_options,
    add_recipe_option,
    add_weights_option,
    images_behind_weights,
    open_predictor,
    parser,
    run,
)
from paddle_medcls.core.hardware import usable_cores

TEXT = """Predicts images with a trained model. Standard output holds the table, or one JSON object a
line, and nothing else; below the table a line for each image that is unlike the training images.
An unreadable file is reported, the others are predicted, and the exit code is 1."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("predict", TEXT)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders (searched below) or globs")
    add_weights_option(p)
    add_recipe_option(p)
    p.add_argument("--topk", type=int, default=1, metavar="K", help="show the K most probable classes")
    p.add_argument(
        "--coverage",
        type=float,
        metavar="C",
        help="also the set of classes that holds the true one in C of images, such as 0.9; needs eval --calibrate",
    )
    p.add_argument("--refuse", action="store_true", help="give images that are unlike the training images no label")
    p.add_argument("--json", action="store_true", help="one JSON object a line: image, label, probability, topk, …")
    p.add_argument("--csv", type=Path, metavar="FILE", help="also write image, label and all probabilities")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="each image beside its probabilities, as a picture")
    p.add_argument("--gradcam", type=Path, metavar="DIR", help="each image with the heat map of its class (Grad-CAM)")
    p.add_argument("--list", type=Path, metavar="FILE", help="also the images of a list, one path a line")
    many = p.add_argument_group("very many images, see docs/several-machines.md")
    many.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write files of rows there, in place of a table; the same command resumes",
    )
    many.add_argument("--shard-rows", type=int, metavar="N", help="images of a file (default: 100,000)")
    many.add_argument(
        "--format", choices=("parquet", "csv"), help="of these files (default: parquet where pyarrow is installed)"
    )
    text = "predict the shards as tasks of this Ray cluster; needs shared storage"
    many.add_argument("--cluster", metavar="auto|HOST:PORT", help=text)
    p.add_argument("--batch-size", type=int, default=16, help="images computed at once (default: 16)")
    p.add_argument("--workers", type=int, metavar="N", help="threads that read images (default: one a core)")
    add_engine_options(p)
    args = p.parse_args(argv)
    args.images = images_behind_weights(args)
    if not args.images and not args.list:
        p.error("the following arguments are required: IMAGE or --list FILE")
    if min(args.topk, args.batch_size, 1 if args.shard_rows is None else args.shard_rows) < 1:
        p.error("--topk, --batch-size and --shard-rows must be at least 1")
    if args.output and (args.json or args.csv or args.pictures or args.gradcam or args.topk > 1):
        p.error("--output: not with --json, --csv, --pictures, --gradcam and --topk")
    if not args.output and (args.shard_rows or args.format or args.cluster):
        p.error("--shard-rows, --format and --cluster need --output")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.errors import printable
    from paddle_medcls.data.image_files import ImageFiles
    from paddle_medcls.deployment.prediction import check_options
    from paddle_medcls.deployment.trained_models import newest_weights
    from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE

    images = ImageFiles(args.images, args.list)
    paths = [] if args.output else [Path(path) for path in images]  # a missing file is found before the model is opened
    weights = args.weights or [newest_weights(Path("runs"))]
    predictor = open_predictor(weights, args)
    sidecar = predictor.sidecar
    check_options(predictor, args.coverage, args.refuse)
    model_text = (
        f"({predictor.engine}, {predictor.precision}); data set {sidecar.dataset}; classes {', '.join(sidecar.classes)}"
    )
    notes = [
        f"weights: {', '.join(map(str, weights))} {model_text}",
        *predictor.notes,
        *([SYNTHETIC_NOTICE] if sidecar.drawn else []),
        NOTICE,
    ]
    print(*map(printable, notes), sep="\n", file=sys.stderr)
    return _write_shards(predictor, images, weights, args) if args.output else _show(predictor, paths, args)


def _write_shards(predictor, images: Iterable[str], weights: list[Path], args: argparse.Namespace) -> int:
    from paddle_medcls.deployment.sharded_prediction import Cluster, ShardOptions, predict_shards

    options = ShardOptions(
        args.shard_rows or ShardOptions.rows,
        args.format or "",
        args.coverage,
        args.refuse,
        args.batch_size,
        args.workers or 0,
    )
    cluster = None
    if args.cluster:
        cluster = Cluster(args.cluster, functools.partial(open_predictor, weights, args), args.device)
    predicted, unreadable = predict_shards(predictor, images, args.output, options, cluster)
    print(f"{predicted:,} image(s) predicted: {args.output / 'predictions-*'}")
    if unreadable:
        print(f"{unreadable:,} file(s) could not be read: {args.output / 'errors-*'}", file=sys.stderr)
    return 1 if unreadable else 0


def _show(predictor, paths: list[Path], args: argparse.Namespace) -> int:
    from paddle_medcls.core.errors import DataError, RecipeError, WeightsError, command
    from paddle_medcls.core.files import picture_names, write_csv
    from paddle_medcls.core.progress import progress
    from paddle_medcls.deployment.prediction import prediction_row, table_columns, table_row

    rows: list[dict] = []
    cells, failed, without_map = [], 0, ""
    pictures, heat_maps = picture_names(paths, "prediction"), picture_names(paths, "gradcam")
    with progress(None, "predicting", len(paths), "image", len(paths) > args.batch_size) as bar:
        for path, image, prediction in predictor.predict_decoded(
            paths, args.batch_size, args.workers or usable_cores()
        ):
            bar.update()
            if isinstance(prediction, DataError):
                bar.write(f"{type(prediction).__name__}: {prediction}", file=sys.stderr)
                failed += 1
                continue
            probs = prediction.probs
            prediction = predictor.with_prediction_set(prediction, args.coverage)
            rows.append(prediction_row(path, prediction, predictor.sidecar, args.topk, args.refuse))
            cells.append(table_row(path, prediction, args.refuse))
            if args.pictures:
                _picture(args.pictures / pictures[path], path, image, rows[-1], predictor.sidecar)
            if args.gradcam and not without_map:
                try:
                    _heat_map(args.gradcam / heat_maps[path], image, probs, predictor)
                except (RecipeError, WeightsError) as error:  # no layer suits: true of every image
                    without_map = error.what
            if args.json:
                bar.write(_json_line(rows[-1]), file=sys.stdout)
                sys.stdout.flush()
    if rows and not args.json:
        print(_table(rows, args.topk))
        print(*_unlike(rows, predictor), sep="", end="")
    if args.csv:
        write_csv(args.csv, [name for name, _ in table_columns(predictor, args.coverage is not None)], cells)
    if failed:
        print(f"{failed} of {len(paths)} file(s) could not be read", file=sys.stderr)
    if without_map:
        print(f"no heat maps: {without_map}; {command('gradcam')} --layer takes another layer", file=sys.stderr)
    return 1 if failed or without_map else 0


def _cell(value: object) -> object:
    """A value of a row for the table: several labels as "a; b", no label as nothing."""
    if isinstance(value, list):
        return "; ".join(value)
    return "" if value is None else value


def _unlike(rows: list[dict], predictor) -> Iterator[str]:
    """A line for each image that is unlike the training images."""
    from paddle_medcls.core.errors import printable

    for row in rows:
        if row.get("in_distribution") is False:
            limit = predictor.sidecar.novelty["limit"]
            score = f"(score {row['novelty']:.4g}, limit {limit:.4g})"
            yield f"{printable(row['image'])}: unlike the training images {score}\n"


def _json_line(row: dict) -> str:
    """One line of JSON; of the names of files no character reaches the terminal that it would act upon."""
    from paddle_medcls.core.errors import printable

    text = json.dumps(row, ensure_ascii=False)
    return "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text)


def _picture(target: Path, path: Path, image, row: dict, sidecar) -> None:
    """Writes the picture; the name of its folder is the true class where it is one of the classes."""
    from paddle_medcls.core.errors import printable
    from paddle_medcls.evaluation import plots
    from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE

    title = printable(path.name)
    if path.parent.name in sidecar.classes:
        title += f"\ntrue class: {path.parent.name}"
    bars = [(item["label"], item["probability"]) for item in row["topk"]]
    title = title.replace("$", r"\$")  # else it begins a formula
    plots.prediction(target, image, bars, title, SYNTHETIC_NOTICE if sidecar.drawn else "")


def _heat_map(target: Path, image, probs, predictor) -> None:
    """Writes the image under the heat map of the class that was decided for."""
    from paddle_medcls.data.decode import to_channels, write_png
    from paddle_medcls.evaluation.plots import overlay

    heat = predictor.heatmaps([image], predictor.head.explained(probs[None]))[0]
    write_png(target, overlay(to_channels(image, "rgb"), heat))


def _table(rows: list[dict], k: int) -> str:
    from prettytable import PrettyTable

    from paddle_medcls.core.errors import printable

    sets, novel = "prediction_set" in rows[0], "novelty" in rows[0]
    more = [*["most probable classes"] * (k > 1), *["possible classes"] * sets, *["like the training images"] * novel]
    more += ["models that agree"] if "disagreement" in rows[0] else []
    table = PrettyTable(["image", "label", "probability", *more], align="l")
    for row in rows:
        label = "refused" if row["label"] is None else _cell(row["label"]) or "none"
        cells = [row["image"], label, f"{row['probability']:.4f}"]
        cells += [", ".join(f"{item['label']} {item['probability']:.4f}" for item in row["topk"])] * (k > 1)
        cells += [", ".join(row["prediction_set"]) or "none"] if sets else []
        cells += ["yes" if row["in_distribution"] else "no"] if novel else []
        if found := row.get("disagreement"):
            cells[2] += f" ± {found['sd']:.4f}"
            cells.append(f"{found['same_label']} of {found['models']}")
        table.add_row([printable(cell) for cell in cells])
    return str(table)
