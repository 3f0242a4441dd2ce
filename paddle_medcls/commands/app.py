"""`python tools/app.py`: the web page, on this machine alone unless --address says otherwise."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import parser, run

TEXT = """Shows a page in the browser: choose a model, drop images, see probabilities, decision and heat map.
Images stay in the memory of this machine; the page sends nothing anywhere. Ctrl-C stops it."""
UPLOAD_MB = 200
"""Largest file that the page takes; images are limited in pixels as well, by the decoder."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("app", TEXT)
    p.add_argument("--weights", type=Path, metavar="F", help="offered first; the runs below runs/ follow, newest first")
    p.add_argument("--port", type=int, default=8501)
    p.add_argument("--address", default="127.0.0.1", metavar="A", help="default: %(default)s, this machine alone")
    p.add_argument("--lang", choices=("en", "zh"), help="language at the start; default: the browser's")
    p.add_argument("--browser", action="store_true", help="also open the page in a browser")
    args = p.parse_args(argv)
    if not 1 <= args.port <= 65535:
        p.error("--port must be 1 to 65535")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.app import is_local
    from paddle_medcls.errors import SetupError, WeightsError
    from paddle_medcls.report import NOTICE

    try:
        from streamlit.web import cli
    except ImportError as error:
        raise SetupError(f"Streamlit cannot be loaded: {error}", do="pip install streamlit") from None
    if args.weights and not args.weights.exists():
        raise WeightsError(f"{args.weights}: No such file", do="check the path given to --weights")
    _refuse_taken(args.address, args.port)
    import paddle_medcls.runtime  # noqa: F401  Paddle in the main thread, and its faults before the page opens

    print(NOTICE, flush=True)  # Streamlit prints the address
    if not is_local(args.address):
        print(
            f"--address {args.address}: everybody who reaches this machine can use the page, and fill its memory "
            f"with uploads (each file at most {UPLOAD_MB} MB, their number is not limited)",
            file=sys.stderr,
        )
    options = {
        "server.address": args.address,
        "server.port": args.port,
        "browser.serverAddress": args.address,  # else Streamlit may ask the internet for ours
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
        os.environ.setdefault(f"STREAMLIT_THEME_{scheme}_PRIMARY_COLOR", color)  # no options of every Streamlit
    script = Path(__file__).parent.parent / "app" / "page.py"
    command = ["run", str(script), *(f"--{name}={value}" for name, value in options.items())]
    command += ["--", f"--weights={args.weights or ''}", f"--lang={args.lang or ''}"]
    cli.main(command, standalone_mode=False)
    return 0


def _refuse_taken(address: str, port: int) -> None:
    """One clear message for a port that another program has, or an address that is not this machine's."""
    from paddle_medcls.errors import SetupError

    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            if os.name != "nt":
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that just ended is no obstacle
            trial.bind(target)
    except OSError as error:
        raise SetupError(
            f"cannot serve at {address}, port {port}: {error.strerror or error}",
            do="close the program that has this port (another page?), or choose one with --port N",
        ) from None
