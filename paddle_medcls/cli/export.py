"""`python tools/export.py --weights F --format onnx --output DIR`: a trained model for other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import add_recipe_option, add_weights_option, parser, run

TEXT = """Exports a trained model with its sidecar and a model card, opens it again, and compares its
probabilities with the network's; an export that differs is not kept. predict.py, eval.py and the web
page take the folder in place of a weight file."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("export", TEXT)
    add_weights_option(p)
    add_recipe_option(p)
    p.add_argument("--format", choices=("paddle", "onnx", "openvino"), help="form of the export")
    p.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="precision at inference")
    p.add_argument("--output", type=Path, metavar="DIR", help="new, or an earlier export")
    text = "write DIR/NAME/1 as OpenVINO Model Server (openvino, onnx) or Triton (onnx) reads it, see docs/serving.md"
    p.add_argument("--layout", choices=("openvino-model-server", "triton"), help=text)
    p.add_argument(
        "--parity", action="store_true", help="keep no export; print how all engines and exports agree on the images"
    )
    p.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="compare on these, not on synthetic images; five or more",
    )
    args = p.parse_args(argv)
    if args.parity and (args.format or args.output or args.layout):
        p.error("--parity compares all formats and keeps none: leave --format, --output and --layout out")
    if not args.parity and not (args.format and args.output):
        p.error("--format and --output are needed, or --parity")
    return run(_parity if args.parity else _work, args)


def _parity(args: argparse.Namespace) -> int:
    from prettytable import PrettyTable

    from paddle_medcls.core.paddle_setup import select_device
    from paddle_medcls.data.image_files import expand
    from paddle_medcls.deployment.parity import all_ways
    from paddle_medcls.deployment.trained_models import newest_weights
    from paddle_medcls.evaluation.tables import NOTICE
    from paddle_medcls.recipes import get_recipe

    select_device("cpu")
    weights = args.weights or [newest_weights(Path("runs"))]
    images = expand(args.images) if args.images else []
    table = PrettyTable(["way", "precision", "largest difference of a probability", "same labels"], align="l")
    recipe = get_recipe(args.recipe) if args.recipe else None
    for way in all_ways(weights, images, recipe):
        print(f"{way.name}, {way.precision}: {way.reason or 'done'}", file=sys.stderr)
        values = ["not here", ""] if way.reason else [f"{way.difference:.1e}", f"{way.same_labels:.0%}"]
        table.add_row([way.name, way.precision, *values])
    print(table)
    count = f"{len(images)} images" if images else "synthetic images"
    print(f"{', '.join(map(str, weights))}, {count}, compared with the network in Paddle, float32\n{NOTICE}")
    return 0


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.files import write_text
    from paddle_medcls.core.paddle_setup import select_device
    from paddle_medcls.data.image_files import expand
    from paddle_medcls.deployment.export import export, weight_files
    from paddle_medcls.deployment.export_writers import gives_novelty
    from paddle_medcls.deployment.layouts import server_files
    from paddle_medcls.deployment.predictor import Predictor
    from paddle_medcls.deployment.trained_models import newest_weights
    from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE
    from paddle_medcls.models.sidecar import sidecar_of
    from paddle_medcls.recipes import get_recipe

    select_device("cpu")
    weights = weight_files(args.weights or newest_weights(Path("runs")))
    predictor = Predictor.from_weights(weights, get_recipe(args.recipe) if args.recipe else None)
    sidecar, folder, beside = predictor.sidecar, args.output, {}
    if args.layout:
        model = folder / sidecar_of(weights[0]).stem
        novelty = gives_novelty(predictor, args.format)
        folder, beside = model / "1", server_files(model, sidecar, args.layout, args.format, novelty)
    for note in [
        f"weights: {', '.join(map(str, weights))}",
        *predictor.notes,
        *([SYNTHETIC_NOTICE] if sidecar.drawn else []),
    ]:
        print(note, file=sys.stderr)
    images = expand(args.images) if args.images else []
    agreement = export(predictor, args.format, folder, images, args.precision)
    for path, text in beside.items():
        write_text(path, text)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{args.format}, {args.precision}: {size:.1f} MB written to {folder}")
    print(
        f"compared with the network on {agreement.images} {'' if images else 'synthetic '}images in batches of "
        f"{' and '.join(map(str, agreement.batches))}: largest difference of a probability {agreement.difference:.1e}, "
        f"same labels {agreement.same_labels:.0%}"
    )
    if agreement.rounding:
        print(
            f"an export takes pixels rounded to whole values, which recipe {sidecar.recipe} does not: "
            f"that changes a probability by up to {agreement.rounding:.1e}"
        )
    print(NOTICE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
