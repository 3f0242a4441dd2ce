"""The only import of OpenVINO."""

from __future__ import annotations

import sys
from typing import Any

_CONVERTER = "openvino.tools.ovc"


def import_openvino() -> Any:
    """Imports OpenVINO without its model converter, which this package does not use.

    `import openvino` imports the converter too, and that reports every import to Google Analytics, with an identifier
    that it keeps in the home folder. Leaving it out also halves the time of the import. `import openvino.tools.ovc`
    still finds it.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    blocked = sys.modules.setdefault(_CONVERTER, None) is None  # type: ignore[arg-type]
    try:
        import openvino  # takes the missing converter for one that is not installed
    finally:
        if blocked:
            del sys.modules[_CONVERTER]
    return openvino
