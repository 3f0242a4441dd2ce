"""`python tools/prepare.py --dataset covid --split`: gets a data set ready."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.commands import parser, run

TEXT = """Gets a data set ready: unpacks its archives, writes list files, computes counts, sizes, mean
and standard deviation, draws a sheet of sample images."""


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("prepare", TEXT)
    p.add_argument("--dataset", required=True, help="palm, covid, … or a MedMNIST set: breastmnist, …")
    p.add_argument("--data-root", type=Path, help="folder of the images (default: datasets/<dataset>)")
    p.add_argument("--download", action="store_true", help="fetch the set (MedMNIST), size and checksum checked")
    p.add_argument(
        "--archives", type=Path, metavar="DIR", help="unpack the zip files of this folder into the data root"
    )
    p.add_argument("--split", action="store_true", help="write list files train.txt, val.txt, test.txt (7:2:1)")
    p.add_argument("--stats", action="store_true", help="counts, sizes, mean and std; statistics.json and pictures")
    p.add_argument("--sample", action="store_true", help="draw sample images into the data root")
    p.add_argument("--seed", type=int, default=0, help="of --split and --sample")
    p.add_argument("--labels", default="default", help="reading of the labels (palm: three)")
    p.add_argument("--output", type=Path, help="folder for statistics.json and pictures (default: the data root)")
    p.add_argument("--workers", type=int, help="threads (default: all cores)")
    args = p.parse_args(argv)
    if not (args.download or args.archives or args.split or args.stats or args.sample):
        p.error("nothing to do: give --download, --archives, --split, --stats or --sample")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.data import dataset_module, default_root, fetch
    from paddle_medcls.errors import DataError

    module = dataset_module(args.dataset)
    root = args.data_root or default_root(args.dataset)
    if args.download:
        print(fetch(args.dataset, root))
    if args.archives:
        _unpack_all(args.archives, root)
    if args.sample:
        from paddle_medcls.data.sample import draw

        draw(args.dataset, root, args.seed)
        print(f"drew sample images in {root}")
    if args.split:
        if not hasattr(module, "make_lists"):
            raise DataError(f"{args.dataset} has its own splits", expected="covid", do="leave --split out")
        _write_lists(module, root, args.seed)
    if args.stats:
        _statistics(args, module, root)
    return 0


def _unpack_all(archives: Path, root: Path) -> None:
    from paddle_medcls.data.archives import unpack
    from paddle_medcls.errors import DataError

    files = sorted(archives.glob("*.zip"))
    if not files:
        raise DataError("no zip files", where=archives)
    for file in files:
        count = unpack(file, root / file.stem)
        print(f"{file.name}: {count} files -> {root / file.stem}")


def _write_lists(module, root: Path, seed: int) -> None:
    from paddle_medcls.files import write_text

    lists = module.make_lists(root, seed)
    for split, text in lists.items():
        write_text(root / f"{split}.txt", text)
    total = sum(text.count("\n") for text in lists.values())
    counts = " / ".join(f"{split} {text.count(chr(10))}" for split, text in lists.items())
    print(f"{total} images: {counts}; lists written to {root}")


def _statistics(args: argparse.Namespace, module, root: Path) -> None:
    from paddle_medcls.cpu import usable_cores
    from paddle_medcls.data import load_index
    from paddle_medcls.data.statistics import cached_scan, read_cache
    from paddle_medcls.files import write_json

    shared = hasattr(module, "NAMES")  # several sets in one folder: each has its own for the results
    output = args.output or (root / args.dataset if shared else root)
    cache = output / "statistics.json"
    indexes = [load_index(args.dataset, root, split, args.labels) for split in module.SPLITS]
    found = {index.split: cached_scan(index, args.workers or usable_cores(), cache) for index in indexes}
    write_json(cache, {**read_cache(cache), **found})
    print(_table(found))
    _pictures(indexes, found, output)
    print(f"statistics.json, samples.png and sizes.png written to {output}")


def _table(found: dict) -> str:
    from prettytable import PrettyTable

    classes = list(next(iter(found.values()))["classes"])
    counts = PrettyTable(["split", "images", *classes])
    figures = PrettyTable(
        ["split", "sizes", "modes", "mean of images", "std of images", "mean of pixels", "std of pixels"]
    )

    def text(values: list[float]) -> str:
        return " ".join(f"{value:.3f}" for value in values)

    for split, scan in found.items():
        counts.add_row([split, scan["count"], *scan["classes"].values()])
        sizes = ", ".join(f"{width}x{height} ({count})" for width, height, count in scan["sizes"][:3])
        more = f" and {len(scan['sizes']) - 3} more" if len(scan["sizes"]) > 3 else ""
        per_image, per_pixel = scan["per_image"], scan["per_pixel"]
        row = [per_image["mean"], per_image["std"], per_pixel["mean"], per_pixel["std"]]
        modes = ", ".join(f"{mode} ({count})" for mode, count in scan["modes"].items())
        figures.add_row([split, sizes + more, modes, *map(text, row)])
    return f"{counts}\n{figures}\nmean and std: red, green, blue, in units of pixel values (0 to 255)"


def _pictures(indexes: list, found: dict, output: Path) -> None:
    from paddle_medcls import plots
    from paddle_medcls.report import DRAWN_NOTICE

    index = indexes[0]
    note = DRAWN_NOTICE if index.drawn else ""
    rows = []
    for label, name in enumerate(index.classes):  # six of each class, spread over the list
        members = (index.labels == label if index.labels.ndim == 1 else index.labels[:, label] == 1).nonzero()[0]
        spread = members[:: max(1, len(members) // 6)][:6]
        rows.append((name, [index.read(int(row), "rgb") for row in spread]))
    plots.sheet(output / "samples.png", rows, f"{index.dataset}, {index.split}", note)
    sizes = [size for scan in found.values() for size in scan["sizes"]]
    plots.sizes(output / "sizes.png", sizes, f"{index.dataset}: sizes of all images", note)


if __name__ == "__main__":
    sys.exit(main())
