"""The model card: `README.md` beside a weight file or an exported model, for readers who have nothing else of ours.

What is known about a data set (where from, licence, known faults) is taken from its module in `data`
and, for MedMNIST, from `data.medmnist_cards`; the results from the sidecar, the counts from the run directory.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from paddle_medcls.core.files import sha256, write_text
from paddle_medcls.evaluation import metrics, tables
from paddle_medcls.evaluation.conformal import calibration_text
from paddle_medcls.evaluation.model_facts import dataset_card, known_recipe, overrides
from paddle_medcls.evaluation.usage_code import export_code, preprocessing_text, weights_code
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.models.sidecar_checks import FORMS as EXPORT_FORMS
from paddle_medcls.recipes.recipe import Recipe

FORMS = ("weights", *EXPORT_FORMS)
MARK = "# written by paddle_medcls, and written again when the model is"
_PUBLISHED = ("what", "classes", "counts", "splits", "patients", "made by", "from", "to cite")
"""Rows of a data set's card that a model card repeats."""


def write_card(folder: Path, sidecar: Sidecar, form: str, files: Sequence[str], facts: dict) -> Path:
    """Writes the model card of what lies in a folder.

    Args:
        files: names in the folder: first what the model is opened by (for "paddle" the program, then the
            parameters), then others that belong to it.
        facts: as `run_facts` gives it; what is missing in it is not said.

    Returns:
        The file: `README.md`, or `MODEL_CARD.md` where the folder has a `README.md` of another origin.
    """
    path = folder / "README.md"
    if path.exists() and not is_card(path):
        path = folder / "MODEL_CARD.md"
    write_text(path, card_text(folder, sidecar, form, files, facts))
    return path


def is_card(path: Path) -> bool:
    """Whether a file is a model card that was written here."""
    try:
        return MARK in path.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return False


def card_text(folder: Path, sidecar: Sidecar, form: str, files: Sequence[str], facts: dict) -> str:
    """The model card as Markdown, with the front matter that model hubs read; arguments as of `write_card`."""
    recipe = Recipe.from_json(facts["recipe"]) if "recipe" in facts else known_recipe(sidecar)
    about_data, faults = ({}, []) if sidecar.drawn else dataset_card(sidecar.dataset)
    if "images" in facts:
        faults = [_cell(remark["what"]) for remark in facts["images"]["remarks"]]
        faults = faults or ["None was found when the images were listed and compared with each other."]
    sections = [
        _front_matter(sidecar, form),
        f"# {sidecar.network.model} trained on {about_data.get('title', _cell(sidecar.dataset))}",
        _summary(sidecar, about_data),
        f"## How to use it\n\n{_loading(sidecar, form, files)}",
        f"## Results\n\n{_results(sidecar, recipe, facts)}",
        f"## Training\n\n{_training(folder, sidecar, recipe, facts)}",
        f"## Data\n\n{_data(sidecar, about_data, facts)}",
        f"## Limits\n\n{_limits(sidecar)}",
        f"## Licence\n\n{_licence(sidecar, about_data)}",
        "## Files\n\n" + _table(["file", "sha256"], [[f"`{name}`", f"`{sha256(folder / name)}`"] for name in files]),
    ]
    if not sidecar.drawn:
        faults = [re.sub(r"(?:python )?tools/(\w+)\.py", r"medcls \1", fault) for fault in faults]  # no clone at hand
        faults_text = _bullets(faults) or "The data set's own card was not at hand when this was written: look there."
        sections.insert(7, f"## Known faults of the data\n\n{faults_text}")
    if sidecar.members:
        members = [[f"`{digest}`", f"`{_cell(model)}`"] for digest, model in sidecar.members.items()]
        sections[-1] += "\n\nThe weights that it averages:\n\n" + _table(["sha256", "network"], members)
    if form != "weights" and sidecar.sha256:
        sections[-1] += f"\n\nExported from weights with sha256 `{_cell(sidecar.sha256)}`."
    return "\n\n".join(sections) + "\n"


# --- sections ----------------------------------------------------------------------------------------


def _front_matter(sidecar: Sidecar, form: str) -> str:
    tags = ["medical-imaging", sidecar.dataset, sidecar.network.model, "paddlepaddle" if form in FORMS[:2] else form]
    lines = ["---", MARK, "pipeline_tag: image-classification", "license: other"]
    lines += ["license_name: see-the-section-licence", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if sidecar.metrics and not sidecar.drawn:
        lines += ["metrics:", "- accuracy", "- roc_auc"]
    return "\n".join([*lines, "---"])


def _summary(sidecar: Sidecar, about_data: dict[str, str]) -> str:
    lines = [f"> **{tables.NOTICE}** Not a medical device, and not tested in a clinic."]
    if sidecar.drawn:
        lines += [">", f"> **{tables.SYNTHETIC_NOTICE}**"]
    what = f" of {about_data['what']}" if "what" in about_data else ""
    names = ", ".join(f"{k} `{_cell(name)}`" for k, name in enumerate(sidecar.classes))
    kind = {"multi-label": "Findings, each yes or no", "ordinal": "Grades"}.get(sidecar.task, "Classes")
    return "\n".join(lines) + f"\n\nA {sidecar.task} classifier{what}.\n\n{kind}: {names}."


def _results(sidecar: Sidecar, recipe: Recipe | None, facts: dict) -> str:
    metrics = sidecar.metrics
    if not metrics.get("per_class"):
        return "None: this file was not evaluated by the run that made it."
    split, fold = metrics.get("split", "val"), metrics.get("fold")
    published = {} if sidecar.drawn or recipe is None or fold else dict(recipe.targets)
    ranges = metrics.get("intervals", {})
    area = "AUC, mean over the classes" if len(sidecar.classes) > 2 else "AUC"
    rows = [
        [text, _number(metrics[name]), _interval(ranges.get(name)), _number(published.get(f"{split}/{name}"))]
        for name, text in (("accuracy", "accuracy"), ("auc", area), ("quadratic_kappa", "quadratic kappa"))
        if name in metrics
    ]
    chosen_here = split == "val" and metrics.get("monitor") != "last"
    caveat = ", which also chose the epoch: these results are optimistic" if chosen_here else ""
    images = f"fold {fold} of the training images" if fold else f"the split `{split}`"
    lines = [f"On the {metrics['n']} images of {images}{caveat}."]
    lines.append(_table(["metric", "here", "95% interval", "published"], rows))
    if recipe is not None and published:
        other_splits = [name for name in published if not name.startswith(f"{split}/")]
        text = f"Published results are those that the recipe is compared with ({recipe.source})."
        if other_splits:
            text += " Also published, for another split than the results above: "
            text += ", ".join(f"{name.replace('/', ' ')} {published[name]:.4f}" for name in other_splits)
            text += " (`medcls eval` scores the test split)."
        if "recipe" in facts and overrides(sidecar, recipe, facts.get("environment", {})):
            text += " This model was trained with other settings, see Training."
        lines.append(text)
    rows = []
    for row in metrics["per_class"]:
        support, predicted, negatives = row["support"], row.get("predicted"), metrics["n"] - row["support"]
        shares = [(row["recall"], support), (row.get("specificity"), negatives), (row["precision"], predicted)]
        rows.append([f"`{_cell(row['class'])}`", str(support), *(_share(*share) for share in shares)])
        rows[-1].append(_number(row["f1"], 3))
    lines.append(_table(["class", "images", "recall (95%)", "specificity (95%)", "precision (95%)", "F1"], rows))
    scored = facts.get("metrics", {})
    if scored.get("confusion") and all(
        scored.get(one) == metrics.get(one) for one in ("split", "n", "accuracy", "loss")
    ):
        names = [f"`{_cell(row['class'])}`" for row in metrics["per_class"]]
        counts = [[name, *map(str, row)] for name, row in zip(names, scored["confusion"])]
        lines.append(_table(["true \\ predicted", *names], counts))
    return "\n\n".join([*lines, _calibration(sidecar, recipe)])


def _calibration(sidecar: Sidecar, recipe: Recipe | None) -> str:
    error = sidecar.metrics.get("calibration_error")
    lines = [] if error is None else [f"Expected calibration error {error:.4f}."]
    if sidecar.temperature == 1:
        lines.append("The probabilities are as the network gives them (temperature 1).")
    else:
        origin = (
            "the recipe's" if recipe and recipe.temperature == sidecar.temperature else "fitted on the validation split"
        )
        lines.append(f"Logits are divided by the temperature {sidecar.temperature:.4f}, {origin}.")
    if sidecar.task == "binary":
        lines.append(
            f"The answer is `{_cell(sidecar.classes[1])}` where its probability is above {sidecar.threshold:.4g}."
        )
    if sidecar.task == "multi-label":
        lines.append(f"The answer is yes where a finding's probability is above {sidecar.threshold:.4g}.")
    metrics_calibration = sidecar.metrics.get("temperature", 1.0), sidecar.metrics.get("threshold", 0.5)
    if metrics_calibration != (sidecar.temperature, sidecar.threshold):
        lines.append("The results above are from before this calibration.")
    if sidecar.prediction_sets:
        lines.append(
            f"Prediction sets (`--coverage 0.9`) are calibrated, method {sidecar.prediction_sets['method']}, on "
            f"{calibration_text(sidecar.prediction_sets)}."
        )
    return " ".join(lines)


def _training(folder: Path, sidecar: Sidecar, recipe: Recipe | None, facts: dict) -> str:
    network, place = sidecar.network, facts.get("environment", {})
    size = f", {facts['parameters']:,} parameters" if "parameters" in facts else ""
    channels = f"{network.in_channels} channel(s) in, {network.num_outputs} logit(s) out"
    count = len(sidecar.members)
    lines = [f"An average of {count} models: the mean of their probabilities."] if count else []
    lines += [f"Network: {network.model}, {network.stem} stem, {channels}{size}."]
    if "recipe" in facts and recipe is not None:
        start = {"": "random weights", "imagenet": "ImageNet weights"}.get(recipe.pretrained, "other weights")
        epoch = f": {sidecar.metrics['epoch']}" if "epoch" in sidecar.metrics else ""
        last = recipe.monitor == "last"
        choice = "the last epoch, chosen on no images," if last else f"the best epoch by validation {recipe.monitor}"
        augmented = [f"{name} {value:g}" for name, value in asdict(recipe.augmentation).items() if value]
        lines += [
            f"Recipe `{_cell(recipe.name)}` ({recipe.source}), from {start}, seed {recipe.seed}.",
            f"{recipe.epochs} epochs, batch {recipe.batch_size}, {recipe.optimizer}, learning rate {recipe.lr:g} "
            f"({recipe.schedule}); {choice} is kept{epoch}.",
            f"Augmentation: {', '.join(augmented) or 'none'}.",
        ]
        changes = [_cell(line) for line in overrides(sidecar, recipe, place)]
        lines += [f"Changed from the recipe of that name: {'; '.join(changes)}."] if changes else []
    else:
        lines.append(f"Recipe `{_cell(sidecar.recipe)}`; how it was run is not known here.")
    versions = {**sidecar.versions, **{name: place[name] for name in ("code", "python") if name in place}}
    if versions:
        lines.append("Made with " + ", ".join(f"{_cell(name)} {_cell(text)}" for name, text in versions.items()) + ".")
    when = [f"Started on {place['date']}."] if "date" in place else []
    if "seconds" in facts and "processor" in place:
        on = place["processor"] if place.get("device") == "cpu" else place.get("device")
        when.append(f"{max(1, round(facts['seconds'] / 60))} minutes on {_cell(on)}.")
    picture = "\n\n![loss and accuracy by epoch](curves.png)" if (folder / "curves.png").is_file() else ""
    return _bullets([*lines, *([" ".join(when)] if when else [])]) + picture


def _data(sidecar: Sidecar, about_data: dict[str, str], facts: dict) -> str:
    counted = facts.get("data", {})
    splits = [split for split in ("train", "val") if split in counted]
    lines = []
    if splits:
        rows = [
            [f"`{_cell(name)}`", *(f"{counted[split]['classes'].get(name, 0):,}" for split in splits)]
            for name in sidecar.classes
        ]
        rows.append(["images", *(f"{counted[split]['images']:,}" for split in splits)])
        names = {"train": "for training", "val": "for validation"}
        lines.append(_table(["used here", *(names[split] for split in splits)], rows))
    else:
        lines.append("How many images were used is not known here.")
    if counted.get("note"):
        lines.append(f"**{_cell(counted['note'])}**")
    origin = facts.get("images", {}).get("origin", {})
    if origin:
        lines.append(_table(["own images", "from"], [[_cell(name), _cell(text)] for name, text in origin.items()]))
    rows = [[name, about_data[name]] for name in _PUBLISHED if name in about_data]
    if rows:
        lines.append(_table(["the data set", "as published"], rows))
    if sidecar.labels != "default":
        lines.append(f"Its labels are read as `{_cell(sidecar.labels)}`.")
    return "\n\n".join(lines)


def _limits(sidecar: Sidecar) -> str:
    strange = "Every image gets an answer, also one of another kind and one to which none of the classes applies."
    if sidecar.novelty:
        strange = (
            f"An image whose features are unlike those of the training images (score above "
            f"{sidecar.novelty['limit']:.4g}; 95% of the validation images are below) is said to be so, and gets no "
            "label with `--refuse`. Images of quite another kind are recognised so, and not all that differ slightly; "
            "an image of the right kind to which none of the classes applies is not."
        )
    elif sidecar.form:
        strange += " The export has no score that tells them; predictions with the weight file may have one."
    people = "How the results differ among groups of patients (age, sex, origin) was not measured."
    return _bullets(
        [
            "Intended use: research and teaching. Not for diagnosis, screening or triage.",
            "The results are those of one run on one data set. Images of another device, hospital, population or "
            "preparation may be classified much worse, without any sign of it in the probabilities.",
            strange,
            "It was trained on synthetic images: it knows nothing about patients." if sidecar.drawn else people,
        ]
    )


def _licence(sidecar: Sidecar, about_data: dict[str, str]) -> str:
    data = (
        "synthetic, made by paddle_medcls" if sidecar.drawn else about_data.get("licence", "ask the data set's makers")
    )
    weights = "chosen by those who publish them, within the terms of the data"
    return _bullets([f"Data: {data}.", "Code (paddle_medcls): Apache-2.0.", f"Weights: {weights}."])


def _loading(sidecar: Sidecar, form: str, files: Sequence[str]) -> str:
    spec, name = sidecar.preprocessing, shlex.quote(files[0])
    text = preprocessing_text(spec, form != "weights")
    if form == "weights":
        return (
            f"With the Python package paddle_medcls and `{Path(files[0]).stem}.json` beside the weights:\n\n"
            f"```python\n{weights_code(files[0])}```\n\n"
            f"or `medcls predict image.png --weights {name}`. The weight file holds arrays and no program; to "
            f"run it without Paddle: `medcls export --weights {name} --format onnx --output DIR`.\n\n{text}"
        )
    module = {"paddle": "Paddle's inference library", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}[form]
    shape = f"(N, {spec.size_px}, {spec.size_px}, {spec.num_channels})"
    order = "grey" if spec.num_channels == 1 else "RGB"
    flag = " --allow-program" if form == "paddle" else ""
    return (
        f"With {module}, OpenCV and NumPy alone:\n\n```python\n{export_code(sidecar, form, files)}```\n\n"
        f"With the Python package paddle_medcls: `medcls predict image.png --weights {name}{flag}`.\n\n{text} "
        f"It takes `image`, uint8 {shape}, {order}, and gives `probabilities`, float32 (N, {len(sidecar.classes)}), "
        f"and `logits`, float32 (N, {sidecar.network.num_outputs}), from which they come."
        + " `novelty`, float32 (N, 1), says how unlike the training images each image is."
        * bool(sidecar.novelty)
    )


# --- text --------------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    """Text that stays inside a table cell, a line and a code span, whatever a sidecar says."""
    return " ".join(str(value).split()).replace("|", "/").replace("`", "'").replace("<", "‹").replace(">", "›")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _interval(interval: Sequence[float] | None) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}" if interval else "–"


def _share(share: float | None, total: int | None) -> str:
    """A proportion of `total` images with its 95% interval."""
    if share is None or share != share or not total:
        return "–"
    low, high = metrics.wilson(share * total, total)
    return f"{share:.3f} ({low:.3f} to {high:.3f})"
