"""The script of the web page: a model, images, their probabilities, decisions and heat maps.

Streamlit runs the script in a new thread after every click of every user. Results of a user are in `st.session_state`.
Models are shared by all users and used under one lock, because Grad-CAM adds hooks to the network.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import streamlit as st

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.paddle_setup import paddle, select_device
from paddle_medcls.data.decode import SUFFIXES, to_channels
from paddle_medcls.data.sample import examples
from paddle_medcls.deployment.prediction import Prediction
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.deployment.trained_models import trained_models
from paddle_medcls.evaluation.plots import overlay
from paddle_medcls.models.novelty import SUFFIX as NOVELTY_SUFFIX
from paddle_medcls.web import is_local
from paddle_medcls.web.texts import LANGUAGES, words
from paddle_medcls.web.views import (
    STYLE,
    Words,
    bars,
    block,
    decide,
    plain,
    possible,
    safe,
    sentence,
    show_model,
    show_table,
)

SHOWN_PX = 800  # longer side of the images on the page
MAX_FAULTS = 20


class Model(NamedTuple):
    """The chosen model."""

    key: str  # differs when the files differ
    predictor: Predictor
    date: str  # of the weight file; "" for an upload


class Image(NamedTuple):
    """An uploaded or synthetic image."""

    key: str
    name: str
    read: Callable[[], bytes]
    synthetic: bool = False


def page(weights: str = "", language: str = "") -> None:
    """Draws the whole page.

    Args:
        weights: path of a weight file that is listed before those of the runs; "": none.
        language: "en" or "zh"; "": the browser's.
    """
    paddle.disable_static()  # a new thread starts in Paddle's static mode
    select_device()
    st.set_page_config(page_title="paddle_medcls", layout="wide")
    st.html(STYLE)
    head, toggle = st.columns([4, 1])
    language = language or ("zh" if str(st.context.locale).startswith("zh") else "en")
    with toggle:
        picked = st.segmented_control(
            "Language / 语言",
            LANGUAGES,
            default=language,
            format_func=LANGUAGES.get,
            key="language",
            label_visibility="collapsed",
        )
    t = words(picked or language)
    with st.sidebar:
        model = _choose_model(t, weights)
    with head:
        _show_head(t, model.predictor if model else None)
    work, about = st.tabs([t["predict"], t["about"]])
    with work:
        images = _choose_images(t, model.predictor.sidecar.dataset if model else "")
        if model:
            _show_results(t, model, images, _predict(t, model, images))
        else:
            st.info(t["no_model"])
    with about:
        if model:
            show_model(t, model.predictor, model.date)
        else:
            st.info(t["no_model"])


def _show_head(t: Words, predictor: Predictor | None) -> None:
    """The title, the model, and the notices that every view shows."""
    sidecar, known = (predictor.sidecar, predictor.novelty is not None) if predictor else (None, False)
    lines = [f"<h1>{t['title']}</h1>"]
    if sidecar:
        ellipsis = ", …" if len(sidecar.classes) > 8 else ""
        description = f"{sidecar.dataset} · {sidecar.network.model} · {', '.join(sidecar.classes[:8])}{ellipsis}"
        lines.append(f'<p class="soft">{safe(description)}</p>')
    lines.append(f'<p class="note"><b>{t["notice"]}</b> {t["told" if known else "any_picture"]}</p>')
    if sidecar and sidecar.drawn:
        lines.append(f'<p class="note">{t["synthetic_model"]}</p>')
    block(*lines)


# --- the model -----------------------------------------------------------------------------------


def _choose_model(t: Words, weights: str) -> Model | None:
    """The model that the user chose; None if there is none, or if it cannot be used, which the page then says."""
    files = [str(path) for path in trained_models(Path("runs"))]
    files = [weights, *(file for file in files if file != weights)] if weights else files
    options = {file: file[len(f"runs{os.sep}") :] if file.startswith(f"runs{os.sep}") else file for file in files}
    if is_local(st.get_option("server.address") or ""):  # other users must not try paths of this machine
        options["typed"] = t["typed"]
    options["uploaded"] = t["uploaded"]
    choice = st.selectbox(t["model"], options, format_func=options.get, key="model")
    try:
        if choice == "uploaded":
            return _uploaded_model(t)
        file = st.text_input(t["path"], key="path").strip() if choice == "typed" else choice
        if not file:
            return None
        path = Path(file)
        if not path.is_file() and not path.is_dir():
            raise WeightsError(t["no_such_file"].format(path=path))
        stats = [part.stat() for part in (path, path.with_suffix(".json")) if part.exists()]
        stamp = repr([(stat.st_mtime_ns, stat.st_size) for stat in stats])
        with st.spinner(t["loading"]):
            predictor = _load(str(path.resolve()), stamp)
        date = f"{datetime.fromtimestamp(stats[0].st_mtime):%Y-%m-%d %H:%M}"
        return Model(f"{path.resolve()} {stamp}", predictor, date)
    except Exception as error:
        st.error(plain(t["bad_model"].format(fault=sentence(error))))
        return None


def _uploaded_model(t: Words) -> Model | None:
    """The model of the uploaded files; None before the upload."""
    kinds = ["pdparams", "safetensors", "json"]
    files = st.file_uploader(t["weights_upload"], kinds, accept_multiple_files=True, key="weights")
    st.caption(t["weights_note"])
    if not files:
        return None
    parts = {_suffix(file.name): file.getvalue() for file in files}
    weights = parts.keys() - {".json", NOVELTY_SUFFIX}
    if len(parts) < len(files) or len(weights) != 1:
        raise WeightsError(t["one_weight_file"])
    digest = repr([(suffix, hashlib.sha256(data).hexdigest()) for suffix, data in sorted(parts.items())])
    with st.spinner(t["loading"]):
        stem = next(Path(file.name).stem for file in files if _suffix(file.name) in weights)
        return Model(digest, _unpack(digest, stem, parts)[0], "")


def _suffix(name: str) -> str:
    return NOVELTY_SUFFIX if name.lower().endswith(NOVELTY_SUFFIX) else Path(name).suffix.lower()


def _engine() -> str | None:
    """That of `predict.py`, so that both show the same digits; on a GPU the network in Paddle."""
    return "auto" if paddle.get_device() == "cpu" else None


@st.cache_resource(max_entries=3, show_spinner=False)
def _load(file: str, stamp: str) -> Predictor:
    return Predictor.from_weights(file, engine=_engine())


@st.cache_resource(max_entries=2, show_spinner=False)
def _unpack(digest: str, _stem: str, _parts: dict[str, bytes]) -> tuple[Predictor, tempfile.TemporaryDirectory]:
    """An uploaded model, and its temporary folder, which exists as long as the model is cached."""
    folder = tempfile.TemporaryDirectory(prefix="medcls-")
    try:
        for suffix, data in _parts.items():
            Path(folder.name, f"{_stem}{suffix}").write_bytes(data)
        weights = next(suffix for suffix in _parts if suffix not in (".json", NOVELTY_SUFFIX))
        return Predictor.from_weights(Path(folder.name, f"{_stem}{weights}"), engine=_engine()), folder
    except Exception as error:
        folder.cleanup()
        raise WeightsError(sentence(error).replace(f"{folder.name}{os.sep}", "")) from None


@st.cache_resource
def _lock() -> threading.Lock:
    """The lock of all models: hooks and gradients of two users would mix."""
    return threading.Lock()


# --- images --------------------------------------------------------------------------------------


def _choose_images(t: Words, dataset: str) -> list[Image]:
    """The uploaded images, and the chosen synthetic images of the model's data set."""
    kinds = sorted(suffix[1:] for suffix in SUFFIXES)
    uploads = st.file_uploader(t["images"], kinds, accept_multiple_files=True, help=t["images_help"], key="images")
    images = [Image(upload.file_id, upload.name, upload.getvalue) for upload in uploads]
    synthetic = examples(dataset)
    if synthetic:
        for name in st.pills(t["samples"], list(synthetic), selection_mode="multi", key=f"samples {dataset}") or ():
            title = t["synthetic_name"].format(name=name)
            images.append(Image(f"synthetic {dataset} {name}", title, lambda data=synthetic[name]: data, True))  # type: ignore[misc]
    return images


def _predict(t: Words, model: Model, images: Sequence[Image]) -> list[Prediction | str]:
    """The prediction of each image, computed once per image and model.

    Images are decoded and predicted one at a time, so that memory holds one decoded image.

    Returns:
        For each image its prediction, or a sentence with the error.
    """
    earlier = st.session_state.get("results", {})
    results = {key: earlier[key] for key in ((model.key, image.key) for image in images) if key in earlier}
    st.session_state["results"] = results  # stored first: a click may end this run at any time
    todo = [image for image in images if (model.key, image.key) not in results]
    bar = st.progress(0.0) if len(todo) > 1 else None
    for number, image in enumerate(todo):
        if bar:
            bar.progress(number / len(todo), t["predicting"].format(n=number + 1, total=len(todo)))
        try:
            pixels = model.predictor.decode(image.read(), image.name)
            with _lock():
                results[model.key, image.key] = model.predictor.predict(pixels, name=image.name)
        except Exception as error:
            results[model.key, image.key] = sentence(error)
    if bar:
        bar.empty()
    return [results[model.key, image.key] for image in images]


def _show_results(t: Words, model: Model, images: Sequence[Image], results: Sequence[Prediction | str]) -> None:
    """The errors, the table of all images, and one image in detail."""
    faults = [f"{image.name}: {r.removeprefix(f'{image.name}: ')}" for image, r in _pairs(images, results, str)]
    for fault in faults[:MAX_FAULTS]:
        st.error(plain(fault))
    if len(faults) > MAX_FAULTS:
        st.error(t["more_faults"].format(n=len(faults) - MAX_FAULTS))
    predicted = _pairs(images, results, Prediction)
    number = 0
    if len(predicted) > 1:
        show_table(t, model.predictor, [(image.name, prediction) for image, prediction in predicted])
        titles = [f"{n}. {image.name}" for n, (image, _) in enumerate(predicted, start=1)]
        number = st.selectbox(t["show"], range(len(predicted)), format_func=lambda n: titles[n], key="shown")
    if predicted:
        _show_image(t, model, *predicted[min(number, len(predicted) - 1)])
    elif not faults:
        st.info(t["first"])


def _pairs(images: Sequence[Image], results: Sequence, kind: type) -> list[tuple]:
    """Images whose result is of a type, with their results."""
    return [(image, result) for image, result in zip(images, results) if isinstance(result, kind)]


def _show_image(t: Words, model: Model, image: Image, prediction: Prediction) -> None:
    """One image: whether it is like the training images, its decision, probabilities, possible classes and heat map."""
    sidecar, probs, models = model.predictor.sidecar, prediction.probs, prediction.disagreement
    if prediction.in_distribution is False:
        score, limit = f"{prediction.novelty:.4g}", f"{sidecar.novelty['limit']:.4g}"
        block(f'<p class="note"><b>{t["unlike"].format(score=score, limit=limit)}</b> {t["unlike_note"]}</p>')
    yes, reason = decide(t, sidecar, probs)
    verdict = ", ".join(sidecar.classes[k] for k in yes) or t["none"]
    left, middle, right = st.columns(3, gap="medium")
    with left:
        block(
            f'<p class="soft">{t["decision"]}</p><p class="verdict">{safe(verdict)}</p>',
            f'<p class="soft">{safe(reason)}</p>',
            f'<p class="soft">{t["disagreement"].format(**models._asdict())}</p>' if models else "",
            *bars(t, sidecar, probs, yes),
            *possible(t, model.predictor, probs),
        )
        explained = int(model.predictor.head.explained(probs[None])[0])
        key, numbers = f"class {model.key} {image.key}", range(len(probs))
        k = st.selectbox(t["heat_class"], numbers, explained, format_func=lambda k: sidecar.classes[k], key=key)
        opacity = st.slider(t["opacity"], 0, 100, 60, 5, format="%d%%", key="opacity")
    picture, heat = _heat_map(model, image, k)
    with middle:
        st.image(picture, width="stretch")
        block(f'<p class="soft">{safe(image.name)}</p>', f"<p>{t['synthetic_image']}</p>" if image.synthetic else "")
    with right:
        if isinstance(heat, str):
            st.info(plain(t["no_heat"].format(fault=heat)))
            return
        st.image(overlay(picture, heat, opacity / 100), width="stretch")
        block(
            f'<p class="soft">{safe(t["heat"].format(name=sidecar.classes[k]))}</p>',
            f'<p class="scale">{t["heat_least"]}<i></i>{t["heat_most"]}</p>',
            f'<p class="soft">{t["heat_note"]}</p>',
            "" if heat.any() else f"<p>{t['empty_heat']}</p>",
        )


def _heat_map(model: Model, image: Image, k: int) -> tuple[np.ndarray, np.ndarray | str]:
    """An image for the page, and its heat map for class k.

    Returns:
        The image, RGB uint8 (H, W, 3); the heat map (H, W) in 0..1, or a sentence that says why there is none.
    """
    key = (model.key, image.key, k)
    earlier = st.session_state.get("heat")
    if earlier and earlier[0] == key:
        return earlier[1:]
    pixels = model.predictor.decode(image.read(), image.name)
    scale = SHOWN_PX / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    heat: np.ndarray | str
    try:
        with _lock():
            (full_size,) = model.predictor.heatmaps([pixels], [k])
        heat = cv2.resize(full_size, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    except Exception as error:
        heat = sentence(error)
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST  # small images keep visible pixels
    picture = cv2.resize(to_channels(pixels, "rgb"), size, interpolation=smooth)
    st.session_state["heat"] = (key, picture, heat)
    return picture, heat


def main(weights: str, language: str) -> None:
    """Shows the page; an unexpected error is one sentence, or a traceback with --debug."""
    try:
        page(weights, language)
    except Exception as error:
        if st.get_option("client.showErrorDetails") == "full":
            raise
        st.error(plain(sentence(error)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", default="")
    parser.add_argument("--lang", default="")
    args = parser.parse_args()
    main(args.weights, args.lang)
