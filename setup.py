"""Installation. Paddle itself is the user's choice: CPU and GPU builds clash when both are installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "paddle_medcls/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="paddle_medcls",
    version=version,
    description="Medical image classification in PaddlePaddle: published tutorials, reproduced",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["paddle_medcls", "paddle_medcls.*"]),
    package_data={"paddle_medcls": ["py.typed"]},
    python_requires=">=3.9",
    install_requires=[
        # any build of cv2 and of Paddle serves; requirements.txt brings the usual ones
        "numpy",
        "openvino>=2025.0",
        "pandas",
        "prettytable",
        "matplotlib",
        "Pillow",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "cpu": ["paddlepaddle", "opencv-python", "setuptools<81"],
        # ONNX exports; of networks that `graph` does not know they also need paddle2onnx (below 2 for Paddle 2.6)
        "engines": ["onnxruntime", "onnx"],
        "xlsx": ["openpyxl"],
        "dicom": ["pydicom>=2.4"],
        "app": ["streamlit>=1.50"],
        "docs": [  # the site, see mkdocs.yml
            *("properdocs", "mkdocs-material", "mkdocs-same-dir", "mkdocs-static-i18n", "mkdocstrings[python]"),
            "ruff",  # lays out long signatures
        ],
        "dev": [
            *("pytest", "pytest-cov", "pytest-xdist", "hypothesis", "scikit-learn", "openpyxl", "pydicom"),
            *("ruff", "mypy"),
            *("onnx", "onnxruntime"),
            'mapie>=1; python_version >= "3.10"',  # reference of the prediction sets
            *("streamlit>=1.50", "playwright"),  # the page, and its test in a browser
        ],
    },
    entry_points={"console_scripts": ["medcls=paddle_medcls.cli:main"]},
)
