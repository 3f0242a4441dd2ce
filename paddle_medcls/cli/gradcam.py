"""`python tools/gradcam.py --weights F DIR --output DIR`: Grad-CAM heat maps and their faithfulness."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import add_recipe_option, add_weights_option, images_behind_weights, parser, run

TEXT = """Shows by Grad-CAM which parts of an image are evidence for a class. Writes each image under its heat map, at
its own size, and contact_sheet.png, eight images above their maps. An unreadable file is reported, the
others are processed, and the exit code is 1.

--measure prints how faithful the maps are: deletion and insertion areas beside random maps, the
correlation with maps of networks with random weights, and, where <class>/masks/<name> exists, the
share of the map inside the mask, which is outlined in the pictures; --masks measures this share alone."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("gradcam", TEXT)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders (searched below) or globs")
    add_weights_option(p)
    add_recipe_option(p)
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the pictures; with --measure and --masks also measures.csv",
    )
    p.add_argument(
        "--layer", metavar="NAME", help="default: block.15 of ResNet-50, features.29 of VGG-16; see --list-layers"
    )
    p.add_argument(
        "--method", choices=("gradcam", "gradcam++"), default="gradcam", help="gradcam (default), or gradcam++ of 2018"
    )
    p.add_argument("--class", dest="class_name", metavar="NAME", help="explain this class, not the predicted one")
    p.add_argument("--measure", action="store_true", help="measure how faithful the maps are; about 60 passes an image")
    p.add_argument("--masks", action="store_true", help="measure the share inside <class>/masks/<name> alone; quick")
    p.add_argument(
        "--overview", action="store_true", help="with --output: also overview.png, four maps beside the curves"
    )
    p.add_argument("--list-layers", action="store_true", help="print the layers that --layer takes, and exit")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="threads that read images (default: 2)")
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU where Paddle sees one")
    args = p.parse_args(argv)
    args.images = images_behind_weights(args)
    if not args.list_layers and not args.images:
        p.error("images are needed: files, folders or globs; or --list-layers")
    if not args.list_layers and not (args.output or args.measure or args.masks):
        p.error("--output DIR, --measure or --masks is needed")
    if args.overview and not args.output:
        p.error("--overview needs --output DIR")
    if args.batch_size < 1:
        p.error("--batch-size must be at least 1")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.paddle_setup import select_device
    from paddle_medcls.data.image_files import expand
    from paddle_medcls.deployment.heatmaps import HeatMapOptions, heat_maps
    from paddle_medcls.deployment.predictor import Predictor
    from paddle_medcls.deployment.trained_models import newest_weights
    from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE
    from paddle_medcls.recipes import get_recipe

    paths = [] if args.list_layers else _without_masks(expand(args.images), args.output)
    weights = args.weights or [newest_weights(Path("runs"))]
    select_device(args.device)
    predictor = Predictor.from_weights(weights, get_recipe(args.recipe) if args.recipe else None)
    synthetic_note = [SYNTHETIC_NOTICE] if predictor.sidecar.drawn else []
    if args.list_layers:
        return _list_layers(predictor)
    for note in [f"weights: {', '.join(map(str, weights))}", *predictor.notes, *synthetic_note, NOTICE]:
        print(note, file=sys.stderr)
    names = ("output", "layer", "method", "class_name", "measure", "masks", "overview", "batch_size", "workers")
    result = heat_maps(predictor, paths, HeatMapOptions(**{name: getattr(args, name) for name in names}))
    if args.output and result.made:
        print(f"{len(result.made)} heat map(s) and contact_sheet.png written to {args.output}")
    if result.measurement and result.measurement.rows:
        print("\n".join([*synthetic_note, result.measurement.table()]))
    if result.empty:
        some = ", ".join(path.name for path in result.empty[:5]) + (" …" if len(result.empty) > 5 else "")
        print(
            f"{len(result.empty)} map(s) are empty: no positive evidence for the class in {result.layer}: {some}",
            file=sys.stderr,
        )
    if result.failed:
        print(f"{len(result.failed)} of {len(paths)} file(s) could not be read", file=sys.stderr)
    return 1 if result.failed else 0


def _without_masks(paths: list[Path], output: Path | None) -> list[Path]:
    """Leaves out masks and the pictures of an earlier call, and reports their number."""
    output_folder = output.resolve() if output else None
    images = [path for path in paths if path.parent.name != "masks" and output_folder not in path.resolve().parents]
    if len(images) < len(paths):
        print(f"left out: {len(paths) - len(images)} file(s) in masks/ and in the output folder", file=sys.stderr)
    if not images:
        from paddle_medcls.core.errors import DataError

        raise DataError("all files are masks or pictures of an earlier call", fix="name a folder of images")
    return images


def _list_layers(predictor) -> int:
    from prettytable import PrettyTable

    from paddle_medcls.core.errors import RecipeError
    from paddle_medcls.explanation.gradcam import default_layer, layer_shapes

    model, x = predictor.model, predictor.input_zeros()
    kinds = {name: type(layer).__name__ for name, layer in model.named_sublayers()}
    try:
        default = default_layer(model, x)
    except RecipeError:
        default = ""
    table = PrettyTable(["layer", "kind", "channels", "height x width"], align="l")
    for name, (channels, height, width) in layer_shapes(model, x).items():
        table.add_row([name + (" (default)" if name == default else ""), kinds[name], channels, f"{height} x {width}"])
    print(table)
    return 0
