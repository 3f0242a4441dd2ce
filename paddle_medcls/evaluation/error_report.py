"""HTML report of misclassified images, in one file that includes the images."""

from __future__ import annotations

import base64
import html
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.core.files import write_text
from paddle_medcls.data.index import Index
from paddle_medcls.evaluation import selective
from paddle_medcls.evaluation.metrics import auc, confusion, per_class
from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE
from paddle_medcls.models.output_head import OutputHead

SIDE = 192  # pixels of an image on the page

STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f4f5f7; --bar: #0072b2; --true: #009e73; --text: #1d2733; }
@media (prefers-color-scheme: dark) { :root { --line: #3a434e; --soft: #1c232b; --bar: #56b4e9; --true: #2fc79a;
  --text: #e6eaee; } body { background: #12171d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { break-after: avoid; font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; white-space: nowrap; border-bottom: 1px solid var(--line); text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(210px, 45%), 1fr)); gap: 1rem; }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .6rem;
  break-inside: avoid; }
.card img { width: 100%; border-radius: 4px; background: #000; }
.card p { margin: .3rem 0; overflow-wrap: anywhere; font-size: .85rem; }
.bar { display: grid; grid-template-columns: 42% 1fr 2.8rem; gap: .4rem; font-size: .78rem; align-items: center; }
.bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar i { display: block; height: .6rem; border-radius: 3px; background: var(--bar); min-width: 1px; }
.bar.true i { background: var(--true); } .bar.true span { font-weight: 600; }
.note { font-size: .9rem; opacity: .85; } .warn { border-left: 4px solid #d55e00; padding-left: .7rem; }
@media print { body { max-width: none; margin: 0; color: #000; background: #fff; } .card { background: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def write_error_page(path: Path, index: Index, probs: np.ndarray, head: OutputHead, title: str, count: int) -> None:
    """Writes the page. In a multi-label task an image's error is its worst label.

    Args:
        index: the split; its images are read again, for those that are shown.
        probs: (N, C).
        head: how the network decides.
        count: how many images each section shows at most.
    """
    guesses = head.decide(probs)
    accuracy, area = (guesses == index.labels).mean(), float(auc(probs, index.labels, head.task))
    own_probs = _probability_of_truth(probs, index.labels)
    wrong = np.flatnonzero((guesses != index.labels).reshape(len(index), -1).any(axis=1))
    confident = wrong[np.argsort(own_probs[wrong], kind="stable")][:count]
    doubtful = [row for row in np.argsort(own_probs, kind="stable") if own_probs[row] < 0.5][:count]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(index)} images, {len(wrong)} wrong; accuracy {accuracy:.4f}, AUC {_number(area, 4)}.</p>",
        f'<p class="note">{NOTICE}</p>',
    ]
    if index.synthetic:
        parts.append(f'<p class="warn">{SYNTHETIC_NOTICE}</p>')
    parts += ["<h2>Does the model know when it errs?</h2>", _kept_table(probs, index, head)]
    parts += ["<h2>Recall of each class</h2>", _class_table(per_class(index.labels, guesses, index.classes))]
    if head.task != "multi-label":
        table = confusion(index.labels, guesses, len(index.classes))
        parts += ["<h2>Most confused pairs</h2>", _confused_pairs(table, index.classes)]
    parts += ["<h2>Most confident mistakes</h2>"]
    parts += [_cards(confident, index, probs, guesses) if len(confident) else "<p>None.</p>"]
    parts += [
        "<h2>Suspected label errors</h2>",
        '<p class="note">Images whose own label gets the lowest probability. The network may be wrong, or the label: '
        "look at each.</p>",
        _cards(doubtful, index, probs, guesses) if doubtful else "<p>None.</p>",
    ]
    meta = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    meta += f"<title>{html.escape(title)}</title>"
    body = "\n".join(parts)
    write_text(path, f'<!doctype html>\n<html lang="en"><head>{meta}</head>\n<body>{body}</body></html>\n')


def _probability_of_truth(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) probability of each image's own label; multi-label: of the label that is predicted worst."""
    if labels.ndim == 2:
        return np.where(labels == 1, probs, 1 - probs).min(axis=1)
    return probs[np.arange(len(probs)), labels]


def _class_table(classes: list[dict]) -> str:
    rows = []
    for row in classes:
        cells = "".join(f'<td class="n">{_number(row[name])}</td>' for name in ("recall", "precision", "f1"))
        rows.append(f'<tr><td>{html.escape(row["class"])}</td>{cells}<td class="n">{row["support"]}</td></tr>')
    head = "<tr><th>class</th><th>recall</th><th>precision</th><th>F1</th><th>images</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _kept_table(probs: np.ndarray, index: Index, head: OutputHead) -> str:
    """Accuracy of the most certain answers, at several shares of them."""
    certain, errors = selective.certainty(probs, head), selective.errors_of(index.labels, head.decide(probs))
    kept = selective.kept_accuracies(selective.risk_coverage(certain, errors))
    rows = [
        f'<tr><td>{share:.0%}</td><td class="n">{count}</td><td class="n">{accuracy:.4f}</td></tr>'
        for share, count, accuracy in kept
    ]
    found = selective.areas(certain, errors)
    note = (
        f"Area under the curve of errors (AURC) {found['aurc']:.4f}, of which {found['excess_aurc']:.4f} could be "
        "saved by a better order of certainty."
    )
    head_row = "<tr><th>most certain answers</th><th>images</th><th>accuracy</th></tr>"
    return f'<table>{head_row}{"".join(rows)}</table><p class="note">{note}</p>'


def _number(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def _confused_pairs(table: np.ndarray, classes: tuple[str, ...]) -> str:
    pairs = [(table[i, j], i, j) for i in range(len(table)) for j in range(len(table)) if i != j and table[i, j]]
    if not pairs:
        return "<p>None.</p>"
    rows = "".join(
        f'<tr><td>{html.escape(classes[i])}</td><td>{html.escape(classes[j])}</td><td class="n">{count}</td>'
        f'<td class="n">{count / table[i].sum():.1%}</td></tr>'
        for count, i, j in sorted(pairs, reverse=True)[:10]
    )
    head = "<tr><th>true</th><th>predicted</th><th>images</th><th>of the class</th></tr>"
    return f"<table>{head}{rows}</table>"


def _cards(rows: np.ndarray | list, index: Index, probs: np.ndarray, guesses: np.ndarray) -> str:
    return f'<div class="cards">{"".join(_card(int(row), index, probs[row], guesses[row]) for row in rows)}</div>'


def _card(row: int, index: Index, probs: np.ndarray, guess: np.ndarray) -> str:
    label = index.labels[row]
    true, predicted = (np.flatnonzero(of).tolist() if np.ndim(of) else [int(of)] for of in (label, guess))
    bars = []
    for k in np.argsort(-probs)[:4]:
        name = html.escape(index.classes[k])
        mark = " true" if k in true else ""
        bars.append(
            f'<div class="bar{mark}"><span title="{name}">{name}</span>'
            f'<i style="width:{100 * probs[k]:.1f}%"></i><span>{probs[k]:.3f}</span></div>'
        )
    names = [", ".join(html.escape(index.classes[k]) for k in group) or "none" for group in (true, predicted)]
    name = html.escape(index.ids[row])
    picture = f'<img src="{_data_uri(index.read(row, "bgr"))}" alt="{name}">'
    verdict = f"<p>true <b>{names[0]}</b>, predicted <b>{names[1]}</b></p>"
    return f'<div class="card">{picture}<p>{name}</p>{verdict}{"".join(bars)}</div>'


def _data_uri(image: np.ndarray) -> str:
    scale = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
