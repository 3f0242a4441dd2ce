"""`python tools/serve.py --weights F`: answers over HTTP, to this machine only unless --address is given."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import (
    add_engine_options,
    add_recipe_option,
    add_weights_option,
    open_predictor,
    parser,
    run,
)

TEXT = """Answers over HTTP with the JSON of `predict --json`. POST /predict takes one image, or many as a form; /docs
says more; /metrics is for Prometheus. Requests that arrive together share a batch. Nothing of an image is written or
logged. After SIGTERM or Ctrl-C it answers what it has accepted, and ends."""
TOKEN = "MEDCLS_TOKEN"


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code."""
    p = parser("serve", TEXT)
    add_weights_option(p)
    add_recipe_option(p)
    p.add_argument("--port", type=int, default=8000, help="default: 8000")
    text = "address to serve at (default: 127.0.0.1, this machine only)"
    p.add_argument("--address", default="127.0.0.1", metavar="A", help=text)
    text = f"requests need the token in this file, as `Authorization: Bearer TOKEN`; or set {TOKEN}"
    p.add_argument("--token-file", type=Path, metavar="FILE", help=text)
    p.add_argument("--heatmaps", action="store_true", help="allow ?heatmap=true (Grad-CAM); it loads Paddle")
    for name, default, text in (
        ("batch-size", 16, "images computed together"),
        ("max-delay", 5, "milliseconds that a batch waits for images that are being read"),
        ("max-images", 16, "images of a request"),
        ("max-mb", 32, "megabytes of a request"),
        ("max-megapixels", 50, "million pixels of an image"),
        ("queue", 64, "images accepted and not yet answered; above it requests get 503"),
    ):
        p.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    add_engine_options(p)
    args = p.parse_args(argv)
    if not 1 <= args.port <= 65535:
        p.error("--port must be 1 to 65535")
    if min(args.batch_size, args.max_images, args.max_mb, args.max_megapixels, args.queue) < 1 or args.max_delay < 0:
        p.error("sizes and numbers must be at least 1, --max-delay at least 0")
    if args.queue < args.max_images:
        p.error("--queue must be at least --max-images")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    import warnings

    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # a damaged image needs no lines in a log
    from paddle_medcls.cli.app import refuse_taken
    from paddle_medcls.core.errors import printable
    from paddle_medcls.deployment.trained_models import newest_weights
    from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE
    from paddle_medcls.web import is_local
    from paddle_medcls.web.service import Limits, Service

    token = _token(args.token_file)
    refuse_taken(args.address, args.port)
    warnings.simplefilter("ignore")  # those of decoders may quote a patient's data
    weights = args.weights or [newest_weights(Path("runs"))]
    predictor = open_predictor(weights, args)
    limits = Limits(
        megabytes=args.max_mb,
        pixels=args.max_megapixels * 10**6,
        images=args.max_images,
        queue=args.queue,
        batch=args.batch_size,
        delay=args.max_delay / 1000,
    )
    service = Service(predictor, limits, token, args.heatmaps)
    notices = [NOTICE, *([SYNTHETIC_NOTICE] if predictor.sidecar.drawn else [])]
    if not is_local(args.address):
        notices.append(
            f"--address {args.address}: everybody who can reach this machine can send images"
            + ("" if token else ", and no token is needed (--token-file)")
        )
    about = f"weights: {', '.join(map(str, weights))} ({predictor.engine}, {predictor.precision})"
    print(*map(printable, [about, *predictor.notes, *notices]), sep="\n", file=sys.stderr)
    address = f"[{args.address}]" if ":" in args.address else args.address
    print(f"serving at http://{address}:{args.port}, /docs says how; Ctrl-C stops", flush=True)
    service.run(args.address, args.port)
    return 0


def _token(file: Path | None) -> str:
    """The token of a file, or of the environment; not of the command line, which other users can read."""
    from paddle_medcls.core.errors import SetupError
    from paddle_medcls.core.files import read_bounded

    try:
        token = (read_bounded(file, 4096).decode("utf-8") if file else os.environ.get(TOKEN, "")).strip()
    except (OSError, ValueError) as error:
        raise SetupError(f"the token cannot be read: {error}", path=file, expected="a text file of one line") from None
    if (file or TOKEN in os.environ) and not (token.isascii() and token.isprintable() and len(token.split()) == 1):
        raise SetupError(
            "the token is empty or has other characters than ASCII", path=file or TOKEN, expected="one word"
        )
    return token
