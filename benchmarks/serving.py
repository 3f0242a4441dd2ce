"""The HTTP service under load, beside its engine alone: images a second, times of answers, memory.

    python -m benchmarks.serving --weights PALM.pdparams --images DIR
    python -m benchmarks.serving --weights PALM.pdparams --images DIR --uploads DIR

Each round measures the engine alone, on preprocessed images in memory, then the service: a process of its own on
127.0.0.1 that `--clients` connections ask without a pause, with one image a request. With `--uploads` a third part of
the round mixes files of that folder, such as damaged images, into the requests: one of four.

On a machine that does other work too, look at the processor time (CPU ms an image: engine alone, service).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from paddle_medcls.data.image_files import expand
from paddle_medcls.deployment.predictor import Predictor, load_predictor

BATCH = 16
SERVE = Path(__file__).parent.parent / "tools" / "serve.py"


def engine_alone(predictor: Predictor, images: Sequence[Path], seconds: float) -> tuple[float, float]:
    """Images a second of the engine, in batches of BATCH, and milliseconds of processor time an image."""
    x = predictor.input_of([images[k % len(images)] for k in range(BATCH)])
    predictor.backend.logits(x)
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        predictor.backend.logits(x)
        count += BATCH
    return count / (time.perf_counter() - start), 1000 * (time.process_time() - cpu) / count


class Load:
    """What clients found: statuses of the images and of the uploads, and seconds of each answer to an image."""

    def __init__(self) -> None:
        self.images: Counter[int] = Counter()
        self.uploads: Counter[int] = Counter()
        self.seconds: list[float] = []

    async def client(
        self, port: int, number: int, images: Sequence[bytes], uploads: Sequence[bytes], end: float
    ) -> None:
        """Asks without a pause until `end`."""
        reader = writer = None
        for turn in itertools.count(number):
            if time.perf_counter() > end:
                break
            strange = bool(uploads) and turn % 4 == 0
            body = uploads[turn // 4 * 7 % len(uploads)] if strange else images[turn % len(images)]
            if writer is None or reader is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            start = time.perf_counter()
            writer.write(b"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length, head
            await reader.readexactly(int(length[1]))
            now = time.perf_counter()
            if now <= end:  # those that wait for the last answers would leave the engine idle
                (self.uploads if strange else self.images)[int(head[9:12])] += 1
                self.seconds += [] if strange else [now - start]
            if b"connection: close" in head.lower():
                writer.close()
                writer = None
        if writer is not None:
            writer.close()


def under_load(port: int, clients: int, images: Sequence[bytes], uploads: Sequence[bytes], seconds: float) -> Load:
    """The answers that so many clients got."""
    load, end = Load(), time.perf_counter() + seconds

    async def run() -> None:
        await asyncio.gather(*(load.client(port, number, images, uploads, end) for number in range(clients)))

    asyncio.run(run())
    return load


@contextlib.contextmanager
def service(arguments: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Port and process number of a running service; it is ended by SIGTERM, and must end with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVE), "--port", str(port), *arguments])
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
                break
            time.sleep(0.1)
        yield port, process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


def images_predicted(port: int) -> float:
    """The images that the service has predicted, by its own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return sum(map(float, re.findall(rb'medcls_images_total{result="(?:predicted|unlike)"} (\S+)', answer.read())))


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1000  # type: ignore[index]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--weights", type=Path, required=True)
    p.add_argument("--images", nargs="+", required=True)
    p.add_argument("--uploads", type=Path, metavar="DIR", help="other files, mixed into the requests")
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--seconds", type=float, default=15, help="of each part of a round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--engine", default="auto")
    p.add_argument("--precision", default="f32")
    args = p.parse_args()
    paths = expand(args.images)[:64]
    images = [path.read_bytes() for path in paths]
    uploads = [path.read_bytes() for path in sorted(args.uploads.iterdir())] if args.uploads else []
    predictor = load_predictor(args.weights, engine=args.engine, precision=args.precision)
    options = ["--weights", str(args.weights), "--engine", args.engine, "--precision", args.precision]
    names = ("round", "engine", "service", "ratio", "CPU ms", "p50 ms", "p99 ms", "answers", "memory MB")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    with service(options) as (port, pid):
        under_load(port, args.clients, images, [], 2)
        for number in range(args.rounds):
            alone, needed = engine_alone(predictor, paths, args.seconds)
            for mixed in [[], uploads] if uploads else [[]]:
                before, count = cpu_seconds(pid), images_predicted(port)
                load = under_load(port, args.clients, images, mixed, args.seconds)
                rate = load.images[200] / args.seconds
                used = 1000 * (cpu_seconds(pid) - before) / (images_predicted(port) - count)
                p50, p99 = np.quantile(load.seconds, (0.5, 0.99)) * 1000
                answers = f"{dict(load.images)}" + (f", uploads {dict(load.uploads)}" if mixed else "")
                rates = f"{alone:.1f} | {rate:.1f} | {rate / alone:.3f} | {needed:.1f}, {used:.1f}"
                cells = f"{rates} | {p50:.0f} | {p99:.0f} | {answers}"
                print(f"| {number + 1}{' mixed' if mixed else ''} | {cells} | {memory_mb(pid):.0f} |", flush=True)


if __name__ == "__main__":
    main()
