"""The parts of the page: probability bars, the table, the description of the model with its metrics.

Text from outside (names of files and classes, the sidecar) is shown as text, never as Markdown or HTML.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import streamlit as st

from paddle_medcls.core.errors import MedclsError
from paddle_medcls.deployment.prediction import Prediction
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.models.sidecar import Sidecar

Words = dict[str, str]

MAX_BARS = 16
STYLE = """<style>
.mc { font-size: .95rem; line-height: 1.5; overflow-wrap: anywhere; }
.mc h1 { font-size: 1.75rem; font-weight: 650; padding: 0; margin: 0; }
.mc h2 { font-size: 1.15rem; font-weight: 650; padding: 0; margin: .4rem 0 .2rem; }
.mc p { margin: .1rem 0; } .mc .soft { opacity: .75; font-size: .875rem; }
.mc .note { border-left: 4px solid #D55E00; padding: .1rem 0 .1rem .7rem; margin: .6rem 0 0; }
.mc .verdict { font-size: 1.5rem; font-weight: 650; line-height: 1.25; }
.mc .bar { display: grid; grid-template-columns: minmax(5rem, 38%) 1fr 3.4rem; gap: .6rem; align-items: center;
  margin: .3rem 0; }
.mc .bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.mc .bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.mc .bar.yes span { font-weight: 650; }
.mc .bar div { position: relative; height: .7rem; border-radius: 4px; background: rgba(128, 128, 128, .18); }
.mc .bar i { display: block; height: 100%; border-radius: 4px; min-width: 2px; background: rgba(128, 128, 128, .75); }
.mc .bar.yes i { background: #0072B2; }
.mc .bar u { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: #D55E00; }
.mc .scale { display: flex; gap: .5rem; align-items: center; font-size: .8rem; }
.mc .scale i { flex: 1; height: .5rem; border-radius: 3px; background: linear-gradient(90deg, #440154, #3b528b, #21918c,
  #5ec962, #fde725); }
.mc table { border-collapse: collapse; margin: .2rem 0 1rem; } .mc .wide { overflow-x: auto; }
.mc th, .mc td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid rgba(128, 128, 128, .25); }
.mc th { font-weight: 500; opacity: .75; } .mc th, .mc .wide td { white-space: nowrap; }
.block-container { padding-top: 3.75rem; }
</style>"""


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and value == value else "–"


def safe(value: object) -> str:
    """Text from outside, escaped for HTML."""
    return html.escape(str(value))


def plain(text: str) -> str:
    """Text from outside, escaped for Streamlit's Markdown."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def block(*parts: str) -> None:
    """Shows HTML in the style of the page."""
    st.html('<div class="mc">' + "".join(parts) + "</div>")


def sentence(error: Exception) -> str:
    """The first line of an error; of an unexpected one its type and 200 characters."""
    return error.what if isinstance(error, MedclsError) else f"{type(error).__name__}: {str(error)[:200]}"


# --- predictions ----------------------------------------------------------------------------------


def decide(t: Words, sidecar: Sidecar, probs: np.ndarray) -> tuple[list[int], str]:
    """The classes decided for an image, and the reason.

    Args:
        probs: (classes,) of one image.
    """
    yes, _ = sidecar.head.decide_one(probs)
    limit = f"{sidecar.threshold:.4g}"
    if sidecar.task == "multi-label":
        return yes, t["labels_above"].format(k=len(yes), n=len(probs), threshold=limit)
    if sidecar.task == "binary":
        reason = t["above" if yes[0] else "not_above"]
        return yes, reason.format(name=sidecar.classes[1], p=f"{probs[1]:.4f}", threshold=limit)
    return yes, t["most_probable"].format(n=len(probs))


def bars(t: Words, sidecar: Sidecar, probs: np.ndarray, yes: Sequence[int]) -> list[str]:
    """HTML of one bar per class, the most probable first, with a mark at the threshold if there is one.

    Args:
        probs: (classes,) of one image.
        yes: the decided classes, which are highlighted.
    """
    order = np.argsort(-probs, kind="stable")
    bars = []
    for k in order[:MAX_BARS]:
        name, share = safe(sidecar.classes[k]), 100 * probs[k]
        limited = sidecar.task == "multi-label" or (sidecar.task == "binary" and k == 1)
        mark = f'<u style="left:{100 * sidecar.threshold:.2f}%"></u>' if limited else ""
        bars.append(
            f'<div class="bar{" yes" if k in yes else ""}" title="{name} {probs[k]:.6f}"><span>{name}</span>'
            f'<div><i style="width:{share:.2f}%"></i>{mark}</div><span>{probs[k]:.4f}</span></div>'
        )
    rest = order[MAX_BARS:]
    if len(rest):
        text = t["more_classes"].format(n=len(rest), p=f"{probs[order[MAX_BARS - 1]]:.4f}")
        bars.append(f'<p class="soft">{text}</p>')
    return bars


def possible(t: Words, predictor: Predictor, probs: np.ndarray) -> list[str]:
    """HTML of the prediction set of an image, at a coverage of 0.9; nothing for a model that was not calibrated."""
    if not predictor.sidecar.prediction_sets:
        return []
    names = ", ".join(predictor.possible_classes(probs, 0.9)) or t["none"]
    return [f'<p class="soft">{t["possible"].format(share="90%")}: {safe(names)}</p>']


def show_table(t: Words, predictor: Predictor, rows: list[tuple[str, Prediction]]) -> None:
    """The table of all images, and the button that downloads it as CSV; rows of (name, prediction)."""
    sidecar, scored = predictor.sidecar, predictor.novelty is not None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", *["in_distribution", "novelty"] * scored, *sidecar.classes])
    lines = []
    for name, prediction in rows:
        probs, novelty, like = prediction.probs, prediction.novelty, prediction.in_distribution
        yes, largest = sidecar.head.decide_one(probs)
        labels = [sidecar.classes[k] for k in yes]
        scores = [like, round(novelty, 4)] if novelty is not None else []
        writer.writerow([name, "; ".join(labels), *scores, *(round(float(p), 8) for p in probs)])
        words = [t["yes" if like else "no"]] * scored
        lines.append([name, ", ".join(labels) or t["none"], largest, *words, *map(float, probs)])
    columns = [t["image"], t["decision"], t["probability"], *[t["like"]] * scored]
    columns += [f"P({name})" for name in sidecar.classes]
    bars = {t["probability"]: st.column_config.ProgressColumn(format="%.4f", min_value=0.0, max_value=1.0)}
    digits = {name: st.column_config.NumberColumn(format="%.4f") for name in columns[3 + scored :]}
    title, button = st.columns([3, 1], vertical_alignment="bottom")
    with title:
        block(f"<h2>{t['table']}</h2>")
    button.download_button(t["download"], text.getvalue(), "predictions.csv", "text/csv", on_click="ignore")
    st.dataframe(pd.DataFrame(lines, columns=columns), hide_index=True, column_config={**bars, **digits})


# --- the model -----------------------------------------------------------------------------------


def show_model(t: Words, predictor: Predictor, date: str) -> None:
    """The content of the sidecar: metrics with their intervals, data, network and preprocessing.

    Args:
        date: of the weight file, as text; "" for an uploaded one.
    """
    sidecar = predictor.sidecar
    metrics = sidecar.metrics if isinstance(sidecar.metrics, dict) else {}
    left, right = st.columns(2, gap="large")
    with left:
        if metrics:
            title = t["metrics"].format(split=metrics.get("split", "?"), n=metrics.get("n", "?"))
            note = t["metrics_note"] if metrics.get("split") == "val" else ""
            block(f'<h2>{safe(title)}</h2><p class="soft">{note}</p>', *_metric_tables(t, metrics))
        else:
            st.info(t["no_metrics"])
    spec, network = sidecar.preprocessing, sidecar.network
    mean, std = (", ".join(f"{value:.4g}" for value in dict.fromkeys(values)) for values in (spec.mean, spec.std))
    shape = f"{spec.size_px} × {spec.size_px} px, {spec.fit}, {spec.interpolation}, {spec.channels.upper()}"
    outputs = t["outputs"].format(n=network.num_outputs, channels=network.in_channels, stem=network.stem)
    versions = sidecar.versions if isinstance(sidecar.versions, dict) else {}
    rows = {
        "data": f"{sidecar.dataset} ({t['synthetic']})" if sidecar.drawn else sidecar.dataset,
        "recipe": sidecar.recipe,
        "task": sidecar.task,
        "classes": ", ".join(sidecar.classes),
        "network": f"{network.model}: {outputs}",
        "preprocessing": f"{shape}; mean {mean}; std {std}",
        "flips": ", ".join(sidecar.flips),
        "temperature": f"{sidecar.temperature:g}",
        "threshold": f"{sidecar.threshold:g}" if sidecar.task != "multi-class" else "",
        "date": date,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "assumed": " · ".join(predictor.notes),
    }
    lines = [f"<tr><th>{t[key]}</th><td>{safe(value)}</td></tr>" for key, value in rows.items() if value]
    lines.append(f"<tr><th>SHA-256</th><td>{safe(sidecar.sha256)}</td></tr>" if sidecar.sha256 else "")
    with right:
        block(f"<h2>{t['about']}</h2><table>", *lines, "</table>")


def _metric_tables(t: Words, metrics: dict) -> list[str]:
    """HTML of the metrics of the split, and of those of each class."""
    names = ("accuracy", "auc", "sensitivity", "specificity", "quadratic_kappa", "mean_absolute_error")
    intervals = metrics.get("intervals") if isinstance(metrics.get("intervals"), dict) else {}
    lines = [f"<table><tr><th>{t['metric']}</th><th>{t['value']}</th><th>{t['interval']}</th></tr>"]
    for name in (*names, "calibration_error", "loss"):
        if name in metrics:
            bounds = intervals.get(name)  # type: ignore[union-attr]
            between = " – ".join(map(_number, bounds)) if isinstance(bounds, list) else ""
            lines.append(f"<tr><td>{t[name]}</td><td>{_number(metrics[name])}</td><td>{between}</td></tr>")
    rows = metrics.get("per_class")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        columns = ("precision", "recall", "f1", "specificity")
        heads = "".join(f"<th>{t[name]}</th>" for name in ("class", *columns, "support"))
        lines.append(f'</table><div class="wide"><table><tr>{heads}</tr>')
        for row in rows:
            cells = [safe(row.get("class")), *(_number(row.get(name)) for name in columns), safe(row.get("support"))]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        lines.append("</table></div>")
        return lines
    return [*lines, "</table>"]
