"""Tables of metrics for people: intervals, and the published results beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from prettytable import PrettyTable

from paddle_medcls.core.files import write_csv
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation.calibration import predictive_values

NOTICE = "For research and teaching; not for diagnosis."
SYNTHETIC_NOTICE = "SYNTHETIC SAMPLE: these images are synthetic; the results say nothing about patients."
SUMMARY = ("accuracy", "auc", "sensitivity", "specificity", "quadratic_kappa", "mean_absolute_error")


def class_table(metrics: dict) -> str:
    """Precision, recall and F1 of each class, as the COVID-19 radiography tutorial prints them."""
    table = PrettyTable(["Type", "Precision", "Recall", "F1_Score", "Specificity", "Images"])
    for row in metrics["per_class"]:
        values = [row[name] for name in ("precision", "recall", "f1", "specificity")]
        table.add_row([row["class"], *("–" if np.isnan(f) else f"{f:.3f}" for f in values), row["support"]])
    return str(table)


def confusion_table(metrics: dict) -> str:
    """The confusion matrix: counts of images; rows are the true classes."""
    names = [row["class"] for row in metrics["per_class"]]
    table = PrettyTable(["true \\ predicted", *names])
    for name, row in zip(names, metrics["confusion"]):
        table.add_row([name, *row])
    return str(table)


def summary(metrics: dict, targets: Sequence[tuple[str, float]] = (), prevalence: float | None = None) -> str:
    """Loss, accuracy and AUC with 95% intervals, the published results and warnings.

    Args:
        metrics: see `outputs.score_split`.
        targets: published results, ("test/accuracy", 0.9651) each.
        prevalence: two classes: also PPV and NPV at this prevalence, in (0, 1).
    """
    lines = [f"{metrics['split']}: {metrics['n']} images", f"  loss         {metrics['loss']:.4f}"]
    published = {} if metrics.get("drawn") else dict(targets)  # nothing was published on synthetic images
    for name in SUMMARY[:2]:
        lines.append(f"  {name:<12} {metrics[name]:.4f}{_interval_text(name, metrics, published)}")
    for name in SUMMARY[2:]:
        if name in metrics:
            lines.append(f"  {name:<12} {metrics[name]:.4f}")
    if "calibration_error" in metrics:
        temperature_text = f"  (temperature {metrics['temperature']:.3f})" if metrics["temperature"] != 1 else ""
        lines.append(f"  calibration error {metrics['calibration_error']:.4f}{temperature_text}")
    if "aurc" in metrics:
        best = metrics["aurc"] - metrics["excess_aurc"]
        lines.append(f"  AURC         {metrics['aurc']:.4f}  (0 is best; the best order of certainty has {best:.4f})")
    if metrics.get("threshold", 0.5) != 0.5:
        lines.append(f"  threshold    {metrics['threshold']:.4f}")
    if prevalence is not None and "sensitivity" in metrics:
        positive, negative = predictive_values(metrics["sensitivity"], metrics["specificity"], prevalence)
        lines.append(f"  PPV {positive:.4f}, NPV {negative:.4f} at {prevalence:.2%} prevalence")
    if metrics.get("note"):
        lines.append(f"  NOTE: {metrics['note']}")
    never = [row["class"] for row in metrics["per_class"] if row["support"] and not row["predicted"]]
    if never:
        lines.append(f"  WARNING: never predicted: {', '.join(never)}")
    return "\n".join(lines)


def _interval_text(name: str, metrics: dict, published: dict[str, float]) -> str:
    """Text beside a metric: "(95% a to b, over n patients); published c: inside the interval", as far as known."""
    if name not in metrics.get("intervals", {}):
        return ""
    low, high = metrics["intervals"][name]
    patients_text = f", over {metrics['patients']} patients" if "patients" in metrics else ""
    text = f"  (95% {low:.4f} to {high:.4f}{patients_text})"
    target = published.get(f"{metrics['split']}/{name}")
    if target is not None:
        inside = low <= target <= high
        text += f"; published {target:.4f}: {'inside' if inside else 'outside'} the interval"
    return text


def fold_table(metrics: dict) -> str:
    """A cross-validation: each fold, mean ± standard deviation, and all images together with 95% intervals.

    Args:
        metrics: see `folds.CrossValidation`.
    """
    names = [name for name in ("loss", *SUMMARY) if name in metrics["mean"]]
    table = PrettyTable(["fold", "images", "epoch", *names])
    for row in metrics["folds"]:
        cells = [row["fold"], row["n"], row["epoch"], *(f"{row[name]:.4f}" for name in names)]
        table.add_row(cells, divider=row is metrics["folds"][-1])
    spread = [f"{metrics['mean'][name]:.4f} ± {metrics['sd'][name]:.4f}" for name in names]
    table.add_row(["mean ± sd", "", "", *spread])
    between = [f"\n({low:.4f} to {high:.4f})" for low, high in map(metrics["intervals"].get, SUMMARY[:2])]
    pooled = [f"{metrics[name]:.4f}{text}" for name, text in zip(names, ["", *between, *[""] * len(names)])]
    over = f" of {metrics['patients']} patients" if "patients" in metrics else ""
    table.add_row(["all (95%)", f"{metrics['n']}{over}", "", *pooled])
    chosen = " ".join(f"{name}={value:.4f}" for name, value in metrics["chosen"].items())
    return f"{table}\nfitted to these predictions, for a training on all images: --set {chosen}"


def choice_of_epoch(metrics: dict) -> str:
    """How the epoch of the weights was chosen and on what, from the metrics of a run."""
    monitor = metrics["monitor"]
    which = "of each fold" if "folds" in metrics else str(metrics.get("epoch"))
    if monitor == "last":
        return f"last epoch {which}, chosen on no images"
    images = "the fold's own images" if "fold" in metrics or "folds" in metrics else "the validation images"
    return f"best epoch {which} by {monitor} on {images}; results on these images are optimistic"


def comparison_table(result: dict) -> str:
    """Both models' metrics and their difference, with 95% intervals, see `significance.compare`."""

    def cell(value: float, interval: Sequence[float], sign: str = "") -> str:
        if np.isnan(value):
            return "–"
        between = "–" if np.isnan(interval[0]) else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"
        return f"{value:{sign}.4f} ({between})"

    table = PrettyTable(["", "A (95%)", "B (95%)", "B - A (95%)", "p", "test"], align="l")
    for name, row in result.items():
        difference = cell(row["difference"], row["interval"], "+")
        p = "–" if np.isnan(row["p"]) else f"{row['p']:.4f}" if row["p"] >= 0.0001 else "< 0.0001"
        table.add_row([name, cell(*row["a"]), cell(*row["b"]), difference, p, row["test"]])
    return str(table)


def audit_table(result: dict) -> str:
    """The result of `data.audit.audit` as text: accuracy and AUC of each view, beside guessing."""
    table = PrettyTable(["a small model sees", "pixels", "accuracy (95%)", "AUC (95%)"], align="l")
    table.add_row(["nothing: names the commonest class", 0, f"{result['majority']:.4f}", "0.5000"])
    for name, view in result["views"].items():
        cells = [
            f"{view[metric]:.4f} ({view['intervals'][metric][0]:.4f} to {view['intervals'][metric][1]:.4f})"
            for metric in ("accuracy", "auc")
        ]
        table.add_row([name, view["pixels"], *cells])
    patients_text = f", intervals over {result['patients']} patients" if "patients" in result else ""
    heading = f"{result['dataset']}: trained on {result['train']}, scored on {result['n']} images of {result['scored']}"
    return f"{heading}{patients_text}\n{table}"


def write_predictions(
    path: Path, index: Index, probs: np.ndarray, guesses: np.ndarray, folds: np.ndarray | None = None
) -> None:
    """Writes `id`, `label`, `predicted`, then one probability a class; multi-label: labels as 0/1 strings.

    Where the data set names patients, `patients_<split>.csv` beside it holds the patient of each image.

    Args:
        path: `predictions_<split>.csv`.
        probs: (N, C).
        guesses: (N,) class numbers, or (N, C) of 0 and 1.
        folds: (N,) of a cross-validation: the fold of each image, a last column `fold`.
    """

    def text(values: np.ndarray) -> object:
        return int(values) if np.ndim(values) == 0 else "".join(str(int(value)) for value in values)

    rows = [
        [name, text(label), text(guess), *(f"{p:.8f}" for p in row)]
        for name, label, guess, row in zip(index.ids, index.labels, guesses, probs)
    ]
    header = ["id", "label", "predicted", *index.classes]
    if folds is not None:
        header, rows = [*header, "fold"], [[*row, int(fold)] for row, fold in zip(rows, folds)]
    write_csv(path, header, rows)
    if index.groups:
        patients = path.with_name(f"patients_{index.split}.csv")
        write_csv(patients, ["id", "patient"], list(zip(index.ids, index.groups)))
