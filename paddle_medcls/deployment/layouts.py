"""Exports laid out as the folders that model servers read: `REPOSITORY/NAME/1/`; see docs/serving.md.

Sources: "Classic Models" in the documentation of OpenVINO Model Server; "Model Repository" and "Model Configuration" in
that of Triton.
"""

from __future__ import annotations

from pathlib import Path

from paddle_medcls.core.errors import RunError
from paddle_medcls.core.files import NAME, NAME_RULE
from paddle_medcls.models.sidecar import Sidecar

LAYOUTS = {"openvino-model-server": ("openvino", "onnx"), "triton": ("onnx",)}
"""Layout -> forms of exports that the server loads. Triton's OpenVINO backend cannot change the size of a batch."""
MAX_BATCH = 16
DELAY_US = 5000


def server_files(model: Path, sidecar: Sidecar, layout: str, form: str, novelty: bool = False) -> dict[Path, str]:
    """The files that a server needs beside the folder `1` of the export: path -> content.

    OpenVINO Model Server needs none, it reads inputs and outputs from the model.

    Args:
        model: folder of the model in the repository, `REPOSITORY/NAME`.
        novelty: the export gives the novelty score.

    Raises:
        RunError: a form that the server does not load, a name that it may not have, or a file that was changed.
    """
    if form not in LAYOUTS[layout]:
        raise RunError(f"--layout {layout} has no --format {form}", expected=" or ".join(LAYOUTS[layout]))
    if not NAME.fullmatch(model.name):
        raise RunError(f"{model.name!r} cannot be the name of a model on a server", expected=NAME_RULE)
    if layout != "triton":
        return {}
    spec, classes = sidecar.preprocessing, sidecar.classes
    more = ',\n  { name: "novelty", data_type: TYPE_FP32, dims: [ 1 ] }' if novelty else ""
    config = f'''name: "{model.name}"
backend: "onnxruntime"
default_model_filename: "{model.name}.onnx"
max_batch_size: {MAX_BATCH}
input [
  {{ name: "image", data_type: TYPE_UINT8, dims: [ {spec.size_px}, {spec.size_px}, {spec.num_channels} ] }}
]
output [
  {{ name: "probabilities", data_type: TYPE_FP32, dims: [ {len(classes)} ], label_filename: "labels.txt" }},
  {{ name: "logits", data_type: TYPE_FP32, dims: [ {sidecar.network.num_outputs} ] }}{more}
]
dynamic_batching {{ max_queue_delay_microseconds: {DELAY_US} }}
'''
    files = {model / "labels.txt": "".join(f"{one}\n" for one in classes), model / "config.pbtxt": config}
    for path, text in files.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise RunError(
                f"{path} was changed, or is of another model", fix="move it away, or give --output a new folder"
            )
    return files
