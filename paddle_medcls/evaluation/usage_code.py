"""Code and words that tell how to prepare an image for a trained network, for model cards.

The same scaling as `decode.fit`, written for this one network and without this package; tests run the code and compare.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.preprocessing.transforms import Preprocessing


def preprocessing_text(spec: Preprocessing, pixels: bool = False) -> str:
    """What happens to an image before the network sees it, in words.

    Args:
        pixels: of an exported model, which normalises inside.
    """
    channels = {"bgr": "8-bit BGR", "rgb": "8-bit RGB", "gray": "8-bit grey"}[spec.channels]
    size = f"{spec.size_px} × {spec.size_px} pixels"
    scaled = f"scaled to {size} whatever its aspect"
    if spec.fit == "crop":
        scaled = f"scaled so that its shorter side has {spec.resize_px} pixels, its middle {size} cut out"
    rounded = "without rounding" if spec.resize_dtype == "float32" else "rounded to whole values"
    large = (
        " (JPEGs far larger than that at reduced scale, a difference of under 0.5)" if spec.decode != "exact" else ""
    )
    text = (
        f"An image is decoded to {channels}{large}, {scaled} (OpenCV's {spec.interpolation} interpolation, {rounded})"
    )
    if pixels:
        return f"{text}; the model does the rest."
    normalised = f"(value − mean) / std with mean {_values(spec.mean)}, std {_values(spec.std)} of values 0 to 255"
    return f"{text}, then {normalised}."


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in (values[:1] if len(set(values)) == 1 else values))


def weights_code(name: str) -> str:
    """Python that predicts an image with a weight file and this package."""
    return f"""import paddle_medcls

predictor = paddle_medcls.load_predictor({name!r})
prediction = predictor.predict("image.png")
print(prediction.label, prediction.probabilities)
"""


def export_code(sidecar: Sidecar, form: str, files: Sequence[str]) -> str:
    """Python that predicts an image with an exported model, with OpenCV and the library of its form alone.

    Args:
        form: "paddle", "onnx" or "openvino".
        files: what the model is opened by: one name; for "paddle" the program's and the parameters'.
    """
    model = repr(files[0])
    if form == "onnx":
        library = "import onnxruntime"
        run = (
            f'session = onnxruntime.InferenceSession({model}, providers=["CPUExecutionProvider"])\n'
            'probs = session.run(["probabilities"], {"image": pixels})[0][0]\n'
        )
    elif form == "openvino":
        library = "import openvino"
        settings = f'{{"INFERENCE_PRECISION_HINT": "{sidecar.precision}"}}'
        run = (
            f'model = openvino.Core().compile_model({model}, "CPU", {settings})\n'
            'probs = model(pixels)["probabilities"][0]\n'
        )
    else:
        library = "from paddle.inference import Config, create_predictor"
        run = (
            f"predictor = create_predictor(Config({model}, {files[1]!r}))\n"
            'predictor.get_input_handle("image").copy_from_cpu(pixels)\n'
            "predictor.run()\n"
            "probs = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()[0]\n"
        )
    return (
        f"import cv2\nimport numpy as np\n{library}\n\n"
        f"classes = {list(sidecar.classes)!r}\n{_pixels_code(sidecar.preprocessing)}{run}{_decision_code(sidecar)}"
    )


def _pixels_code(spec: Preprocessing) -> str:
    side = spec.size_px
    if spec.channels == "gray":
        lines = ['image = cv2.imread("image.png", cv2.IMREAD_GRAYSCALE)']
    else:
        lines = ['image = cv2.cvtColor(cv2.imread("image.png", cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)']
    target = f"({side}, {side})"
    if spec.fit == "crop":
        target = "(width, height)"
        lines.append(f"scale = {spec.resize_px} / min(image.shape[:2])")
        lines.append(f"height, width = (max({side}, round(length * scale)) for length in image.shape[:2])")
    lines.append(f"image = cv2.resize(image, {target}, interpolation=cv2.INTER_{spec.interpolation.upper()})")
    if spec.fit == "crop":
        lines.append(f"top, left = (height - {side}) // 2, (width - {side}) // 2")
        lines.append(f"image = image[top : top + {side}, left : left + {side}]")
    lines.append(f"pixels = np.ascontiguousarray(image).reshape(1, {side}, {side}, {spec.num_channels})")
    return "\n".join(lines) + "\n"


def _decision_code(sidecar: Sidecar) -> str:
    """From probs, those of one image, to what is printed."""
    if sidecar.task == "multi-label":
        return f"print([name for name, p in zip(classes, probs) if p > {float(sidecar.threshold)!r}], probs.tolist())\n"
    decided = f"int(probs[1] > {float(sidecar.threshold)!r})" if sidecar.task == "binary" else "int(probs.argmax())"
    return f"print(classes[{decided}], probs.tolist())\n"
