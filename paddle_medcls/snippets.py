"""Code and words that tell how to prepare an image for a trained network, for model cards.

The same arithmetic as `images.preprocess` and `OutputHead.probabilities`, written for this one network and
without this package; tests run the code and compare.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddle_medcls.images import Preprocessing
from paddle_medcls.sidecar import Sidecar


def preprocessing_text(spec: Preprocessing) -> str:
    """What happens to an image before the network sees it, in words."""
    channels = {"bgr": "8-bit BGR", "rgb": "8-bit RGB", "gray": "8-bit grey"}[spec.channels]
    size = f"{spec.size_px} × {spec.size_px} pixels"
    scaled = f"scaled to {size} whatever its aspect"
    if spec.fit == "crop":
        scaled = f"scaled so that its shorter side has {spec.resize_px} pixels, its middle {size} cut out"
    rounded = "without rounding" if spec.resize_dtype == "float32" else "rounded to whole values"
    large = (
        " (JPEGs far larger than that at reduced scale, a difference of under 0.5)" if spec.decode != "exact" else ""
    )
    return (
        f"An image is decoded to {channels}{large}, {scaled} "
        f"(OpenCV's {spec.interpolation} interpolation, {rounded}), then "
        f"(value − mean) / std with mean {_values(spec.mean)}, std {_values(spec.std)} of values 0 to 255."
    )


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in (values[:1] if len(set(values)) == 1 else values))


def weights_code(name: str) -> str:
    """Python that predicts an image with a weight file and this package."""
    return f"""from pathlib import Path
from paddle_medcls.predict import Predictor

predictor = Predictor.from_weights({name!r})
for path, probs in predictor.predict_files([Path("image.png")]):
    print(path, dict(zip(predictor.card.classes, probs.tolist())))
"""


def export_code(card: Sidecar, form: str, files: Sequence[str]) -> str:
    """Python that predicts an image with an exported model, without this package.

    Args:
        form: "paddle", "onnx" or "openvino".
        files: what the model is opened by: one name; for "paddle" the program's and the parameters'.
    """
    model = repr(files[0])
    if form == "onnx":
        library = "import onnxruntime"
        run = (
            f'session = onnxruntime.InferenceSession({model}, providers=["CPUExecutionProvider"])\n'
            'logits = session.run(["logits"], {"image": x})[0][0]\n'
        )
    elif form == "openvino":
        library = "import openvino"
        run = (
            f'model = openvino.Core().compile_model({model}, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})\n'
            "logits = model(x)[0][0]\n"
        )
    else:
        library = "from paddle.inference import Config, create_predictor"
        run = (
            f"predictor = create_predictor(Config({model}, {files[1]!r}))\n"
            'predictor.get_input_handle("image").copy_from_cpu(x)\n'
            "predictor.run()\n"
            "logits = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()[0]\n"
        )
    divided = "" if card.temperature == 1 else f" / {float(card.temperature)!r}"
    return (
        f"import cv2\nimport numpy as np\n{library}\n\n"
        f"classes = {list(card.classes)!r}\n{_preprocessing_code(card.preprocessing)}{run}"
        f"z = logits.astype(np.float64){divided}\n{_decision_code(card)}"
    )


def _preprocessing_code(spec: Preprocessing) -> str:
    side = spec.size_px
    read = f'cv2.imread("image.png", cv2.IMREAD_{"GRAYSCALE" if spec.channels == "gray" else "COLOR"})'
    read = f"cv2.cvtColor({read}, cv2.COLOR_BGR2RGB)" if spec.channels == "rgb" else read
    lines = [f"image = {read}"]
    if spec.resize_dtype == "float32":
        lines.append("image = image.astype(np.float32)")
    target = f"({side}, {side})"
    if spec.fit == "crop":
        target = "(width, height)"
        lines.append(f"scale = {spec.resize_px} / min(image.shape[:2])")
        lines.append(f"height, width = (max({side}, round(length * scale)) for length in image.shape[:2])")
    lines.append(f"image = cv2.resize(image, {target}, interpolation=cv2.INTER_{spec.interpolation.upper()})")
    if spec.fit == "crop":
        lines.append(f"top, left = (height - {side}) // 2, (width - {side}) // 2")
        lines.append(f"image = image[top : top + {side}, left : left + {side}]")
    lines.append(f"x = (image.astype(np.float32) - {_array(spec.mean)}) / {_array(spec.std)}")
    batch = "x[None, None]" if spec.channels == "gray" else "x.transpose(2, 0, 1)[None]"
    lines.append(f"x = np.ascontiguousarray({batch})")
    return "\n".join(lines) + "\n"


def _array(values: Sequence[float]) -> str:
    same = len(set(values)) == 1
    return repr(float(values[0])) if same else f"np.array({[float(value) for value in values]!r}, np.float32)"


def _decision_code(card: Sidecar) -> str:
    """From z, the logits of one image divided by the temperature, to what is printed."""
    if card.task == "multi-label":
        return (
            "probs = 1 / (1 + np.exp(-z))\n"
            f"print([name for name, p in zip(classes, probs) if p > {float(card.threshold)!r}], probs.tolist())\n"
        )
    if card.loss == "sigmoid":
        probs = "p = 1 / (1 + np.exp(-z[0]))\nprobs = np.array([1 - p, p])\n"
    else:
        probs = "e = np.exp(z - z.max())\nprobs = e / e.sum()\n"
    decided = f"int(probs[1] > {float(card.threshold)!r})" if card.task == "binary" else "int(probs.argmax())"
    return f"{probs}print(classes[{decided}], probs.tolist())\n"
