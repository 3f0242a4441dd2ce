"""The command `prepare`: unpacks, splits, measures and checks a data set.

Example: `python tools/prepare.py --dataset covid --split`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.cli.common import add_own_options, list_own_images, named, parser, run

TEXT = """Prepares a data set: unpacks its archives, writes split files, computes counts, sizes, mean and
standard deviation, plots sample images, checks for faults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    p = parser("prepare", TEXT)
    p.add_argument(
        "--dataset",
        required=True,
        type=named("dataset"),
        help="palm, …, or a MedMNIST set: breastmnist, …; list: prints all names",
    )
    p.add_argument("--data-root", type=Path, help="folder of the images (default: datasets/<dataset>)")
    p.add_argument("--download", action="store_true", help="download the data set (MedMNIST) and verify it")
    p.add_argument(
        "--archives",
        type=Path,
        metavar="DIR",
        help="unpack the archives in this folder, or this archive, into the data root",
    )
    p.add_argument(
        "--split", action="store_true", help="write split files: COVID's train.txt, …; of own images images.csv"
    )
    p.add_argument(
        "--hold-out-source",
        metavar="NAME",
        help="with --split: a second split, with all images of this source (see --check) in the test split alone, in "
        "<data root>/without_NAME, which is its --data-root",
    )
    p.add_argument("--stats", action="store_true", help="counts, sizes, mean and std; writes statistics.json and plots")
    p.add_argument(
        "--check", action="store_true", help="unreadable, unusual and duplicate images; leaks between splits; sources"
    )
    p.add_argument(
        "--audit",
        action="store_true",
        help="shortcut audit: accuracy of a linear model on the image border, thumbnail, …",
    )
    p.add_argument("--sample", action="store_true", help="generate synthetic sample images in the data root")
    p.add_argument("--seed", type=int, default=0, help="of --split and --sample")
    p.add_argument("--labels", help="reading of the labels (palm: three; oct: shipped); table: its CSV or Excel file")
    add_own_options(p)
    p.add_argument(
        "--output",
        type=Path,
        help="folder for files (default: the data root for --stats and --split; none for --check and --audit)",
    )
    p.add_argument("--workers", type=int, help="threads (default: all cores)")
    args = p.parse_args(argv)
    if not any((args.download, args.archives, args.split, args.stats, args.check, args.audit, args.sample)):
        p.error("nothing to do: give --download, --archives, --split, --stats, --check, --audit or --sample")
    if args.hold_out_source is not None and not args.split:
        p.error("--hold-out-source needs --split")
    return run(_work, args)


def _work(args: argparse.Namespace) -> int:
    from paddle_medcls.core.errors import DataError
    from paddle_medcls.data.datasets import dataset_module, default_root, fetch, is_own, load_index, splits_of

    module = dataset_module(args.dataset)
    root = args.data_root or default_root(args.dataset)
    if args.hold_out_source is not None and not hasattr(module, "hold_out_source"):
        raise DataError(f"the sources of the images of {args.dataset} are not known", expected="--dataset covid")
    images = list_own_images(args, args.seed, again=args.split) if is_own(args.dataset) else None
    if args.download:
        print(fetch(args.dataset, root))
    if args.archives:
        _unpack_archives(args, module, root)
    if args.sample:
        from paddle_medcls.data.sample import draw

        draw(args.dataset, root, args.seed)
        print(f"synthetic sample images written to {root}")
    if images is not None:
        images = _describe_own(args, images)
    elif args.split:
        if not hasattr(module, "make_split_files"):
            raise DataError(
                f"{args.dataset} has its own splits", expected="covid, or own images", fix="leave --split out"
            )
        _write_split_files(module, root, args.seed, args.hold_out_source)
    if not (args.stats or args.audit or args.check):
        return 0
    place = images or root
    indexes = [
        load_index(args.dataset, place, split, args.labels or "default") for split in splits_of(args.dataset, place)
    ]
    if args.stats:
        _statistics(args, indexes)
    if args.audit:
        _audit(args, indexes)
    return _check(args, indexes) if args.check else 0


def _folder(args: argparse.Namespace) -> Path:
    """Where files are written without --output: the data root; a set in one file gets a folder of its own there."""
    from paddle_medcls.data.datasets import dataset_module, default_root

    root = args.data_root or default_root(args.dataset)
    if root.is_file():  # an image list
        return root.parent
    return root / args.dataset if hasattr(dataset_module(args.dataset), "file_of") else root


def _describe_own(args: argparse.Namespace, images):
    """Prints what a list of own images holds; with --split writes it. Returns the list, with remarks about copies."""
    from paddle_medcls.core.hardware import usable_cores
    from paddle_medcls.data.own_images import compared

    if args.split and not images.compared:
        images = compared(images, args.workers or usable_cores())
    print(images.summary())
    for remark in images.remarks:
        print(remark)
    if args.split:
        print(f"{images.write(args.output or _folder(args))} and images.json written")
    return images


def _unpack_archives(args: argparse.Namespace, module, root: Path) -> None:
    from paddle_medcls.data.archives import put, unpack_all

    if hasattr(module, "file_of") and (name := module.file_of(args.dataset)):
        single = args.archives / name if args.archives.is_dir() else args.archives
        if single.name == name and single.is_file():
            print(put(single, root / name))
            return
    for result in unpack_all(args.archives, root):
        print(result)


def _write_split_files(module, root: Path, seed: int, hold_out: str | None) -> None:
    from paddle_medcls.core.files import write_text

    if hold_out is None:
        folder, files = root, {f"{split}.txt": text for split, text in module.make_split_files(root, seed).items()}
    else:
        folder, files = module.hold_out_source(root, seed, hold_out)
    for name, text in files.items():
        write_text(folder / name, text)
    counts = {split: files[f"{split}.txt"].count("\n") for split in module.SPLITS}
    parts = " / ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{sum(counts.values())} images: {parts}; split files written to {folder}")
    if hold_out is not None:
        present = {line.rpartition(" ")[2] for line in files["train.txt"].splitlines()}
        missing = [name for label, name in enumerate(module.CLASSES) if str(label) not in present]
        lacks = f"; the training split then has no image of {', '.join(missing)}" if missing else ""
        print(f"{hold_out} is in the test split alone{lacks}. Use it with --data-root {folder}")


def _statistics(args: argparse.Namespace, indexes: list) -> None:
    from paddle_medcls.core.hardware import usable_cores
    from paddle_medcls.preprocessing.statistics import scan_splits

    output = args.output or _folder(args)
    scans = scan_splits(indexes, args.workers or usable_cores(), output / "statistics.json")
    print(_table(scans))
    _plot(indexes, scans, output)
    print(f"statistics.json, samples.png and sizes.png written to {output}")


def _table(scans: dict[str, dict]) -> str:
    from prettytable import PrettyTable

    classes = list(next(iter(scans.values()))["classes"])
    counts = PrettyTable(["split", "images", *classes])
    columns = [f"{statistic} of {unit}" for unit in ("images", "pixels") for statistic in ("mean", "std")]
    statistics = PrettyTable(["split", "sizes", "modes", *columns])

    def text(values: list[float]) -> str:
        return " ".join(f"{value:.3f}" for value in values)

    for split, scan in scans.items():
        counts.add_row([split, scan["count"], *scan["classes"].values()])
        sizes = ", ".join(f"{width}x{height} ({count})" for width, height, count in scan["sizes"][:3])
        more = f" and {len(scan['sizes']) - 3} more" if len(scan["sizes"]) > 3 else ""
        per_image, per_pixel = scan["per_image"], scan["per_pixel"]
        row = [per_image["mean"], per_image["std"], per_pixel["mean"], per_pixel["std"]]
        modes = ", ".join(f"{mode} ({count})" for mode, count in scan["modes"].items())
        statistics.add_row([split, sizes + more, modes, *map(text, row)])
    return f"{counts}\n{statistics}\nmean and std: red, green, blue, in units of pixel values (0 to 255)"


def _plot(indexes: list, scans: dict[str, dict], output: Path) -> None:
    from paddle_medcls.evaluation import plots
    from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE

    index = indexes[0]
    note = SYNTHETIC_NOTICE if index.synthetic else ""
    rows = [(name, [index.read(row, "rgb") for row in rows]) for name, rows in index.examples().items()]
    plots.sheet(output / "samples.png", rows, f"{index.dataset}, {index.split}", note)
    sizes = [size for scan in scans.values() for size in scan["sizes"]]
    plots.sizes(output / "sizes.png", sizes, f"{index.dataset}: sizes of all images", note)


def _audit(args: argparse.Namespace, indexes: list) -> None:
    from paddle_medcls.core.files import write_json
    from paddle_medcls.core.hardware import usable_cores
    from paddle_medcls.evaluation.shortcut_audit import audit
    from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE, audit_table

    train, scored = indexes[0], indexes[-1]
    result = audit(train, scored, args.workers or usable_cores())
    if train.synthetic:
        print(SYNTHETIC_NOTICE)
    print(audit_table(result))
    if args.output:
        write_json(args.output / "audit.json", result)
    _print_written(args.output, ["audit.json"])


def _check(args: argparse.Namespace, indexes: list) -> int:
    """Prints the report; returns exit code 1 if an image cannot be read."""
    from paddle_medcls.core.files import write_json
    from paddle_medcls.core.hardware import usable_cores
    from paddle_medcls.data.duplicates import check_images

    report = check_images(indexes, args.workers or usable_cores())
    for title, lines in (("cannot be read", report.unreadable), ("suspicious", report.suspicious)):
        print(f"{len(lines)} of {report.images} images {title}")
        _print_lines(lines, args.output)
    if any(index.groups for index in indexes):
        print(f"{len(report.patients)} patients in two splits")
        _print_lines(report.patients, args.output)
    leaks = sum(pair.leak for pair in report.pairs)
    print(f"{len(report.pairs)} pairs of the same image, {leaks} of them between training and another split")
    if report.pairs:
        print(_pair_table(report.pairs))
    sources: dict = {}
    if indexes[0].sources:
        from paddle_medcls.evaluation.by_source import check_sources

        sources["sources"], text = check_sources(indexes)
        print(text)
    if args.output:
        write_json(args.output / "check.json", report.record() | sources)
        if report.pairs:
            _sheet_of_pairs(indexes, report.pairs[:12], args.output / "duplicates.png")
    _print_written(args.output, ["check.json", *["duplicates.png"][: len(report.pairs)]])
    return 1 if report.unreadable else 0


def _print_lines(lines: list[str], output: Path | None) -> None:
    """Prints all lines, or the first 20 if a file holds the rest."""
    from paddle_medcls.core.errors import printable

    shown = lines[:20] if output else lines
    print("".join(f"  {printable(line)}\n" for line in shown), end="")
    if len(lines) > len(shown):
        print(f"  … and {len(lines) - len(shown)} more, in check.json")


def _print_written(output: Path | None, files: list[str]) -> None:
    names = " and ".join(files)
    print(f"{names} written to {output}" if output else f"no file written: --output DIR writes {names}")


def _sheet_of_pairs(indexes: list, pairs: list, path: Path) -> None:
    from paddle_medcls.evaluation import plots
    from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE

    places = {(index.split, name): (index, row) for index in indexes for row, name in enumerate(index.ids)}
    rows = []
    for pair in pairs:
        images = [index.read(row, "rgb") for index, row in (places[pair.a], places[pair.b])]
        rows.append(("\n".join(Path(name).stem for _, name in (pair.a, pair.b)), images))
    plots.sheet(path, rows, "the same image twice", SYNTHETIC_NOTICE if indexes[0].synthetic else "")


def _pair_table(pairs: list) -> str:
    from prettytable import PrettyTable

    table = PrettyTable(["split", "image", "split ", "the same as", "pixels", "class", "leak"], align="l")
    for pair in pairs:
        pixels = "equal" if pair.exact else f"correlation {pair.correlation:.3f}"
        table.add_row([*pair.a, *pair.b, pixels, "same" if pair.same_label else "OTHER", "LEAK" if pair.leak else ""])
    return str(table)
