"""`python tools/predict.py img.png …`: predicts files, folders and globs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import add_engine_options, named, open_predictor, parser, run

TEXT = """Predicts images with a trained model. Standard output holds the table, or one JSON object a
line, and nothing else. An unreadable file is reported, the others are predicted, and the exit code is 1."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("predict", TEXT)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (searched below) or globs")
    p.add_argument("--weights", type=Path, help="weight file or export (default: the newest run's)")
    p.add_argument(
        "--recipe", type=named("recipe"), help="for a file without a sidecar: the recipe it was trained with"
    )
    p.add_argument("--topk", type=int, default=1, metavar="K", help="show the K most probable classes")
    p.add_argument("--json", action="store_true", help="one JSON object a line: image, label, probability, topk")
    p.add_argument("--csv", type=Path, metavar="FILE", help="also write image, label and all probabilities")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="each image beside its probabilities, as a picture")
    p.add_argument("--gradcam", type=Path, metavar="DIR", help="each image with the heat map of its class (Grad-CAM)")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    add_engine_options(p)
    args = p.parse_args(argv)
    if args.topk < 1 or args.batch_size < 1:
        p.error("--topk and --batch-size must be at least 1")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.errors import DataError
    from paddle_medcls.files import write_csv
    from paddle_medcls.inputs import expand, picture_names
    from paddle_medcls.report import DRAWN_NOTICE, NOTICE

    paths = expand(args.images)
    weights = args.weights or newest_weights(Path("runs"))
    predictor = open_predictor(weights, args)
    card = predictor.card
    for note in [
        f"weights: {weights} ({predictor.engine}, {predictor.precision})",
        *predictor.notes,
        *([DRAWN_NOTICE] if card.drawn else []),
        NOTICE,
    ]:
        print(note, file=sys.stderr)
    rows, failed = [], 0
    pictures, heat_maps = picture_names(paths, "prediction"), picture_names(paths, "gradcam")
    for path, probs in predictor.predict_files(paths, args.batch_size, args.workers):
        if isinstance(probs, DataError):
            print(f"{type(probs).__name__}: {probs}", file=sys.stderr)
            failed += 1
            continue
        rows.append(_row(path, probs, card, args.topk))
        if args.pictures:
            _picture(args.pictures / pictures[path], path, rows[-1][0], card)
        if args.gradcam:
            _heat_map(args.gradcam / heat_maps[path], path, probs, predictor)
        if args.json:
            print(json.dumps(rows[-1][0], ensure_ascii=False), flush=True)
    if rows and not args.json:
        print(_table([row for row, _ in rows], args.topk))
    if args.csv:
        header = ["image", "label", *card.classes]
        write_csv(args.csv, header, [[row["image"], row["label"], *probs] for row, probs in rows])
    if failed:
        print(f"{failed} of {len(paths)} file(s) could not be read", file=sys.stderr)
    return 1 if failed else 0


def _row(path: Path, probs, card, k: int) -> tuple[dict, list[float]]:
    order = probs.argsort()[::-1][:k]
    labels, largest = card.head.decide_one(probs)
    names = [card.classes[i] for i in labels]
    label: object = names if card.task == "multi-label" else names[0]
    topk = [{"label": card.classes[i], "probability": round(float(probs[i]), 6)} for i in order]
    row = {"image": str(path), "label": label, "probability": round(largest, 6), "topk": topk}
    if card.drawn:
        row["drawn"] = True  # trained on drawn images: the figures say nothing about patients
    return row, [round(float(p), 8) for p in probs]


def _picture(target: Path, path: Path, row: dict, card) -> None:
    """Writes the picture; a folder named like a class is taken as the true one, as in document 004."""
    from paddle_medcls import plots
    from paddle_medcls.images import read_image
    from paddle_medcls.report import DRAWN_NOTICE

    title = path.name
    if path.parent.name in card.classes:
        title += f"\ntrue class: {path.parent.name}"
    bars = [(item["label"], item["probability"]) for item in row["topk"]]
    plots.prediction(target, read_image(path, "rgb"), bars, title, DRAWN_NOTICE if card.drawn else "")


def _heat_map(target: Path, path: Path, probs, predictor) -> None:
    """Writes the image under the heat map of the class that was decided for."""
    from paddle_medcls.images import read_image, to_rgb, write_png
    from paddle_medcls.plots import overlay

    spec = predictor.card.preprocessing
    channels = spec.channels
    image = read_image(path, channels, spec.least_px)
    heat = predictor.heatmaps([image], predictor.head.explained(probs[None]))[0]
    write_png(target, overlay(to_rgb(image, channels), heat))


def _table(rows: list[dict], k: int) -> str:
    from prettytable import PrettyTable

    table = PrettyTable(["image", "label", "probability", *(["most probable classes"] if k > 1 else [])], align="l")
    for row in rows:
        label = row["label"] if isinstance(row["label"], str) else ", ".join(row["label"]) or "none"
        others = ", ".join(f"{item['label']} {item['probability']:.4f}" for item in row["topk"])
        table.add_row([row["image"], label, f"{row['probability']:.4f}", *([others] if k > 1 else [])])
    return str(table)


def newest_weights(runs: Path) -> Path:
    """The weight file of the newest run that has one."""
    from paddle_medcls.errors import WeightsError

    found = [path for path in runs.glob("*/*.pdparams") if path.with_suffix(".json").is_file()]
    if not found:
        raise WeightsError(
            "no trained model yet", where=f"{runs}/*/*.pdparams", do="train one (tools/train.py), or give --weights"
        )
    return max(found, key=lambda path: path.stat().st_mtime)
