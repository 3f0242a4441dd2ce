# `make demo` and `make test` need only make and Python 3.9 to 3.13; they install the rest into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= runs/demo

.PHONY: demo test lint docs clean

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -c "import cv2" 2>/dev/null || { \
	  $(BIN)/pip uninstall --quiet -y opencv-python && $(BIN)/pip install --quiet opencv-python-headless; }
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps medmnist  # its evaluator; its other modules need torch
	touch $@

demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(BIN)/python tools/train.py --dataset palm --sample --recipe palm_tutorial --model resnet18 --epochs 6 \
	  --set size_px=96 --output $(DEMO)
	$(BIN)/python tools/eval.py --weights $(DEMO)/PALM.pdparams --output $(DEMO)/evaluation --errors 8
	$(BIN)/python tools/predict.py $(DEMO)/sample/PALM-Validation400/V000*.jpg --weights $(DEMO)/PALM.pdparams --topk 2
	@echo "The demo is done. Look at: $(DEMO)/curves.png, $(DEMO)/confusion_val.png, $(DEMO)/roc_val.png,"
	@echo "and the report of misclassified images: $(DEMO)/evaluation/errors.html"

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov=paddle_medcls --cov-report=term

lint: $(VENV)/ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/properdocs build --strict -f mkdocs.yml

clean:
	rm -rf $(VENV) build site *.egg-info
