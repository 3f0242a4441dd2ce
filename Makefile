# `make demo` and `make test` need only make and Python 3.9 to 3.13; they install the rest into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= runs/demo
# Modules are compiled when they are first imported, and kept: pip would compile all of Paddle's, for 20 seconds.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =

PADDLE ?= paddlepaddle

.PHONY: demo test lint docs package clean

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(BIN)/python -c "import cv2" 2>/dev/null || { \
	  $(BIN)/pip uninstall --quiet -y opencv-python && $(INSTALL) opencv-python-headless; }
	$(INSTALL) -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps medmnist  # its evaluator; its other modules need torch
	touch $@

SCANS = $(DEMO)/sample/PALM-Validation400

demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(BIN)/medcls train --dataset palm --sample --recipe palm_tutorial --model resnet18 --epochs 5 \
	  --set size_px=96 --precision auto --output $(DEMO)
	$(BIN)/medcls eval --weights $(DEMO) --output $(DEMO)/evaluation --errors 8
	$(BIN)/medcls predict $(SCANS)/V000*.jpg --weights $(DEMO) --topk 2
	$(BIN)/medcls gradcam $(SCANS)/V0005.jpg $(SCANS)/V0007.jpg $(SCANS)/V0002.jpg $(SCANS)/V0009.jpg \
	  --weights $(DEMO) --output $(DEMO)/gradcam --overview
	@echo "The demo is done. Its picture is $(DEMO)/gradcam/overview.png; the pages for a browser are"
	@echo "$(DEMO)/evaluation/errors.html, the misclassified images, and $(DEMO)/README.md, the model card."

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov=paddle_medcls --cov-report=term

lint: $(VENV)/ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	rm -rf build/documents && mkdir -p build/documents
	tar -c README*.md CHANGELOG.md CONTRIBUTING.md docs datasets/*/README*.md results/README.md notebooks \
	  | tar -x -C build/documents
	NO_MKDOCS_2_WARNING=1 $(BIN)/properdocs build --strict -f mkdocs.yml

# The package as a user installs it, tried in an empty folder; the Dockerfile has the same lines.
package: export PATH := $(CURDIR)/$(VENV)-package/bin:$(PATH)
package:
	$(PYTHON) -m venv --clear $(VENV)-package
	rm -rf package-trial
	pip install --quiet --disable-pip-version-check $(PADDLE)
	pip install --quiet --disable-pip-version-check "setuptools<81" opencv-python-headless ".[app,dicom,engines,xlsx]"
	mkdir package-trial
	cd package-trial && medcls train --dataset palm --sample --recipe palm_tutorial --model resnet18 --epochs 1 --set size_px=32 --output run
	cd package-trial && medcls predict run/sample/PALM-Validation400/V0001.jpg --weights run --csv predictions.csv
	rm -r package-trial

clean:
	rm -rf $(VENV) $(VENV)-package build site *.egg-info
