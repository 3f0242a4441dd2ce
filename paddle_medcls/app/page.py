"""The page: one model; images, their probabilities, the decision, the heat map. Streamlit runs it at each click.

Every run is a thread of Streamlit's, so nothing of a user's is kept in the module: results are in
`st.session_state`, and models, which all users share, behind one lock (Grad-CAM hooks into the network).
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

from paddle_medcls.app import is_local
from paddle_medcls.app.texts import LANGUAGES, words
from paddle_medcls.app.views import STYLE, Words, bars, block, decide, plain, safe, sentence, show_card, show_table
from paddle_medcls.commands.predict import trained_models
from paddle_medcls.data.sample import examples
from paddle_medcls.errors import WeightsError
from paddle_medcls.images import SUFFIXES, to_channels
from paddle_medcls.plots import overlay
from paddle_medcls.predict import Predictor
from paddle_medcls.runtime import paddle, select_device
from paddle_medcls.sidecar import Sidecar

SHOWN_PX = 800  # longer side of the pictures on the page
MOST_FAULTS = 20


class Model(NamedTuple):
    key: str  # changes with the files
    predictor: Predictor
    date: str  # of the weight file; "" for an upload


class Image(NamedTuple):
    key: str
    name: str
    read: Callable[[], bytes]
    drawn: bool = False


def page(weights: str = "", language: str = "") -> None:
    """Draws the whole page.

    Args:
        weights: a weight file that is offered before those of the runs.
        language: "en" or "zh"; "": the browser's.
    """
    paddle.disable_static()  # this run may be a thread of its own, and other threads than Paddle's start static
    select_device()
    st.set_page_config(page_title="paddle_medcls", layout="wide")
    st.html(STYLE)
    head, toggle = st.columns([4, 1])
    language = language or ("zh" if str(st.context.locale).startswith("zh") else "en")
    with toggle:
        chosen = st.segmented_control(
            "Language / 语言",
            LANGUAGES,
            default=language,
            format_func=LANGUAGES.get,
            key="language",
            label_visibility="collapsed",
        )
    t = words(chosen or language)
    with st.sidebar:
        model = _choose_model(t, weights)
    with head:
        _show_head(t, model.predictor.card if model else None)
    work, about = st.tabs([t["predict"], t["card"]])
    with work:
        images = _choose_images(t, model.predictor.card.dataset if model else "")
        if model:
            _show_results(t, model, images, _predict(t, model, images))
        else:
            st.info(t["no_model"])
    with about:
        if model:
            show_card(t, model.predictor, model.date)
        else:
            st.info(t["no_model"])


def _show_head(t: Words, card: Sidecar | None) -> None:
    """The title and what every view must say."""
    lines = [f"<h1>{t['title']}</h1>"]
    if card:
        more = ", …" if len(card.classes) > 8 else ""
        about = f"{card.dataset} · {card.network.model} · {', '.join(card.classes[:8])}{more}"
        lines.append(f'<p class="soft">{safe(about)}</p>')
    lines.append(f'<p class="note"><b>{t["notice"]}</b> {t["any_picture"]}</p>')
    if card and card.drawn:
        lines.append(f'<p class="note">{t["drawn_model"]}</p>')
    block(*lines)


# --- the model -----------------------------------------------------------------------------------


def _choose_model(t: Words, weights: str) -> Model | None:
    """The model that the user chose; None, and a sentence, where it cannot be used."""
    files = [str(path) for path in trained_models(Path("runs"))]
    files = [weights, *(file for file in files if file != weights)] if weights else files
    options = {file: file[len(f"runs{os.sep}") :] if file.startswith(f"runs{os.sep}") else file for file in files}
    if is_local(st.get_option("server.address") or ""):  # others shall not try paths of this machine
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
    kinds = ["pdparams", "safetensors", "json"]
    files = st.file_uploader(t["weights_upload"], kinds, accept_multiple_files=True, key="weights")
    st.caption(t["weights_note"])
    if not files:
        return None
    parts = {Path(file.name).suffix.lower(): file.getvalue() for file in files}
    if len(parts) < len(files) or len(parts.keys() - {".json"}) != 1:
        raise WeightsError(t["one_weight_file"])
    digest = repr([(suffix, hashlib.sha256(data).hexdigest()) for suffix, data in sorted(parts.items())])
    with st.spinner(t["loading"]):
        stem = next(Path(file.name).stem for file in files if not file.name.lower().endswith(".json"))
        return Model(digest, _unpack(digest, stem, parts)[0], "")


def _engine() -> str | None:
    """That of `predict.py`, so that both show the same digits; on a GPU the network in Paddle."""
    return "auto" if paddle.get_device() == "cpu" else None


@st.cache_resource(max_entries=3, show_spinner=False)
def _load(file: str, stamp: str) -> Predictor:
    return Predictor.from_weights(file, engine=_engine())


@st.cache_resource(max_entries=2, show_spinner=False)
def _unpack(digest: str, _stem: str, _parts: dict[str, bytes]) -> tuple[Predictor, tempfile.TemporaryDirectory]:
    """An uploaded model, and its folder, which lives as long as the model is kept."""
    folder = tempfile.TemporaryDirectory(prefix="medcls-")
    try:
        for suffix, data in _parts.items():
            Path(folder.name, f"{_stem}{suffix}").write_bytes(data)
        weights = next(suffix for suffix in _parts if suffix != ".json")
        return Predictor.from_weights(Path(folder.name, f"{_stem}{weights}"), engine=_engine()), folder
    except Exception as error:
        folder.cleanup()
        raise WeightsError(sentence(error).replace(f"{folder.name}{os.sep}", "")) from None


@st.cache_resource
def _lock() -> threading.Lock:
    """One user's network runs at a time: hooks and gradients of two would mix."""
    return threading.Lock()


# --- images --------------------------------------------------------------------------------------


def _choose_images(t: Words, dataset: str) -> list[Image]:
    """Uploads, which stay while the model changes, and drawn images like those of the model's data set."""
    kinds = sorted(suffix[1:] for suffix in SUFFIXES)
    uploads = st.file_uploader(t["images"], kinds, accept_multiple_files=True, help=t["images_help"], key="images")
    images = [Image(upload.file_id, upload.name, upload.getvalue) for upload in uploads]
    drawn = examples(dataset)
    if drawn:
        for name in st.pills(t["samples"], list(drawn), selection_mode="multi", key=f"samples {dataset}") or ():
            title = t["drawn_name"].format(name=name)
            images.append(Image(f"drawn {dataset} {name}", title, lambda data=drawn[name]: data, True))  # type: ignore[misc]
    return images


def _predict(t: Words, model: Model, images: Sequence[Image]) -> list[np.ndarray | str]:
    """Probabilities (C,) of each image, or the sentence that says why there are none; each is computed once.

    One image at a time: its probabilities do not depend on its companions, and memory holds one decoded image.
    """
    known = st.session_state.get("results", {})
    kept = {key: known[key] for key in ((model.key, image.key) for image in images) if key in known}
    st.session_state["results"] = kept  # a click may end this run in the middle; what is done stays
    todo = [image for image in images if (model.key, image.key) not in kept]
    bar = st.progress(0.0) if len(todo) > 1 else None
    for number, image in enumerate(todo):
        if bar:
            bar.progress(number / len(todo), t["predicting"].format(n=number + 1, total=len(todo)))
        try:
            pixels = model.predictor.decode(image.read(), image.name)
            with _lock():
                logits = model.predictor.logits([pixels], [image.name])
                kept[model.key, image.key] = model.predictor.head.probabilities(logits)[0]
        except Exception as error:
            kept[model.key, image.key] = sentence(error)
    if bar:
        bar.empty()
    return [kept[model.key, image.key] for image in images]


def _show_results(t: Words, model: Model, images: Sequence[Image], results: Sequence[np.ndarray | str]) -> None:
    faults = [f"{image.name}: {r.removeprefix(f'{image.name}: ')}" for image, r in _pairs(images, results, str)]
    for fault in faults[:MOST_FAULTS]:
        st.error(plain(fault))
    if len(faults) > MOST_FAULTS:
        st.error(t["more_faults"].format(n=len(faults) - MOST_FAULTS))
    good = _pairs(images, results, np.ndarray)
    number = 0
    if len(good) > 1:
        show_table(t, model.predictor.card, [(image.name, probs) for image, probs in good])
        titles = [f"{n}. {image.name}" for n, (image, _) in enumerate(good, start=1)]
        number = st.selectbox(t["show"], range(len(good)), format_func=lambda n: titles[n], key="shown")
    if good:
        _show_image(t, model, *good[min(number, len(good) - 1)])
    elif not faults:
        st.info(t["first"])


def _pairs(images: Sequence[Image], results: Sequence, kind: type) -> list[tuple]:
    return [(image, result) for image, result in zip(images, results) if isinstance(result, kind)]


def _show_image(t: Words, model: Model, image: Image, probs: np.ndarray) -> None:
    card = model.predictor.card
    yes, reason = decide(t, card, probs)
    verdict = ", ".join(card.classes[k] for k in yes) or t["none"]
    left, middle, right = st.columns(3, gap="medium")
    with left:
        block(
            f'<p class="soft">{t["decision"]}</p><p class="verdict">{safe(verdict)}</p>',
            f'<p class="soft">{safe(reason)}</p>',
            *bars(t, card, probs, yes),
        )
        likely = int(model.predictor.head.explained(probs[None])[0])
        key, numbers = f"class {model.key} {image.key}", range(len(probs))
        k = st.selectbox(t["heat_class"], numbers, likely, format_func=lambda k: card.classes[k], key=key)
        opacity = st.slider(t["opacity"], 0, 100, 60, 5, format="%d%%", key="opacity")
    picture, heat = _heat_map(model, image, k)
    with middle:
        st.image(picture, width="stretch")
        block(f'<p class="soft">{safe(image.name)}</p>', f"<p>{t['drawn_image']}</p>" if image.drawn else "")
    with right:
        if isinstance(heat, str):
            st.info(plain(t["no_heat"].format(fault=heat)))
            return
        st.image(overlay(picture, heat, opacity / 100), width="stretch")
        block(
            f'<p class="soft">{safe(t["heat"].format(name=card.classes[k]))}</p>',
            f'<p class="scale">{t["heat_least"]}<i></i>{t["heat_most"]}</p>',
            f'<p class="soft">{t["heat_note"]}</p>',
            "" if heat.any() else f"<p>{t['empty_heat']}</p>",
        )


def _heat_map(model: Model, image: Image, k: int) -> tuple[np.ndarray, np.ndarray | str]:
    """The picture (H, W, 3) RGB uint8 at the size of the page and its heat map (H, W), or why there is none."""
    wanted = (model.key, image.key, k)
    kept = st.session_state.get("heat")
    if kept and kept[0] == wanted:
        return kept[1:]
    pixels = model.predictor.decode(image.read(), image.name)
    scale = SHOWN_PX / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    heat: np.ndarray | str
    try:
        with _lock():
            (whole,) = model.predictor.heatmaps([pixels], [k])
        heat = cv2.resize(whole, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    except Exception as error:
        heat = sentence(error)
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST  # the pixels of a small image may be seen
    picture = cv2.resize(to_channels(pixels, "rgb"), size, interpolation=smooth)
    st.session_state["heat"] = (wanted, picture, heat)
    return picture, heat


def main(weights: str, language: str) -> None:
    """The page; a fault that nobody foresaw is one sentence too, and its traceback with --debug."""
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
    given = parser.parse_args()
    main(given.weights, given.lang)
