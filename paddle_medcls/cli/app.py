"""`python tools/app.py`: serves the web page, to this machine only unless --address is given."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import parser, run

TEXT = """Serves a page for the browser: choose a model, upload images, see probabilities, decision and heat map.
Images stay in the memory of this machine, and the page makes no requests to other machines. Ctrl-C stops it."""
UPLOAD_MB = 200
"""Largest upload, per file; the decoder also limits the pixels of an image."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl-C; returns the exit code."""
    p = parser("app", TEXT)
    p.add_argument("--weights", type=Path, metavar="F", help="listed first; the runs in runs/ follow, newest first")
    p.add_argument("--port", type=int, default=8501, help="default: %(default)s")
    p.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="A",
        help="address to serve at (default: %(default)s, this machine only)",
    )
    p.add_argument("--lang", choices=("en", "zh"), help="language at the start (default: the language of the browser)")
    p.add_argument("--browser", action="store_true", help="also open the page in the browser")
    args = p.parse_args(argv)
    if not 1 <= args.port <= 65535:
        p.error("--port must be 1 to 65535")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.errors import SetupError, WeightsError
    from paddle_medcls.evaluation.tables import NOTICE
    from paddle_medcls.web import is_local

    try:
        from streamlit.web import cli
    except ImportError as error:
        raise SetupError(f"Streamlit cannot be loaded: {error}", fix="pip install streamlit") from None
    if args.weights and not args.weights.exists():
        raise WeightsError("no such file", path=args.weights, fix="check the path given to --weights")
    refuse_taken(args.address, args.port)
    import paddle_medcls.core.paddle_setup  # noqa: F401  in the main thread; errors show before the page opens

    print(NOTICE, flush=True)  # Streamlit prints the address
    if not is_local(args.address):
        print(
            f"--address {args.address}: everybody who can reach this machine can use the page, and can fill its "
            f"memory with uploads (at most {UPLOAD_MB} MB per file, any number of files)",
            file=sys.stderr,
        )
    options = {
        "server.address": args.address,
        "server.port": args.port,
        "browser.serverAddress": args.address,  # else Streamlit may ask the internet for this machine's address
        "server.headless": not args.browser,  # not headless, Streamlit opens a browser
        "server.showEmailPrompt": False,
        "server.maxUploadSize": UPLOAD_MB,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",  # no "Deploy" button
        "client.showErrorDetails": "full" if args.debug else "none",
        "runner.magicEnabled": False,
    }
    for scheme, color in (("LIGHT", "#0072B2"), ("DARK", "#56B4E9")):  # plots.COLORS
        os.environ.setdefault(
            f"STREAMLIT_THEME_{scheme}_PRIMARY_COLOR", color
        )  # not every version of Streamlit has these as options
    script = Path(__file__).parent.parent / "web" / "page.py"
    command = ["run", str(script), *(f"--{name}={value}" for name, value in options.items())]
    command += ["--", f"--weights={args.weights or ''}", f"--lang={args.lang or ''}"]
    cli.main(command, standalone_mode=False)
    return 0


def refuse_taken(address: str, port: int) -> None:
    """Raises SetupError if another program uses the port, or if the address is not one of this machine."""
    from paddle_medcls.core.errors import SetupError

    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            if os.name != "nt":
                trial.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # the port of a page that ended just now is free
            trial.bind(target)
    except OSError as error:
        raise SetupError(
            f"cannot serve at {address}, port {port}: {error.strerror or error}",
            fix="close the program that uses this port (another page?), or choose another with --port N",
        ) from None
