"""The evidence in results/: how it is written, what its table says, and that README, table and folders agree."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from fakes import ROOT
from sklearn.metrics import roc_auc_score

from paddle_medcls.cli import reproduce as command
from paddle_medcls.core.errors import RunError
from paddle_medcls.data.index import SYNTHETIC_MARK
from paddle_medcls.data.sample import draw_npz
from paddle_medcls.evaluation.predictions import read_predictions
from paddle_medcls.models.output_head import OutputHead
from paddle_medcls.recipes import get_recipe
from paddle_medcls.training.evidence import (
    average_text,
    command_of,
    compare,
    read_rows,
    result_text,
    results_page,
    row_name,
    write_evidence,
)
from paddle_medcls.training.folds import choice
from paddle_medcls.training.grid import Grid, plan
from paddle_medcls.training.loop import Options
from paddle_medcls.training.reproduce import run_grid

RESULTS = ROOT / "results"
ROW = "medmnist-breastmnist-toy-1epochs"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished trainings of one row, on synthetic images."""
    root = tmp_path_factory.mktemp("grid")
    (root / "data").mkdir()
    (root / "data" / SYNTHETIC_MARK).touch()
    draw_npz("breastmnist", root / "data", counts=(8, 8, 8))
    cells = cells_of(root)
    assert run_grid(cells, root / "runs", Options(device="cpu", workers=1)) == ([], {})
    return root


def cells_of(root: Path, seeds: int = 2, epochs: int = 1) -> list:
    return plan(Grid("medmnist", seeds, sets=("breast",), models=("toy",), epochs=epochs), root / "runs", root / "data")


def test_the_evidence_of_a_row(grid: Path, tmp_path: Path) -> None:
    assert write_evidence(cells_of(grid), tmp_path) == [ROW]
    files = sorted(str(path.relative_to(tmp_path / ROW)) for path in tmp_path.rglob("*.*") if path.name != "README.md")
    names = ["cell.json", "data.json", "environment.json", "history.csv", "metrics.json", "predictions_test.csv"]
    assert files == [f"seed{k}/{name}" for k in (0, 1) for name in [*names, "recipe.json"]]
    assert not [path for path in tmp_path.rglob("*.*") if str(grid) in path.read_text()]
    assert "data_root" not in json.loads((tmp_path / ROW / "seed0/data.json").read_text())

    (runs,) = read_rows(tmp_path).values()
    areas, shares, probs = [], [], []  # once more, the slow way
    for seed in (0, 1):
        with open(tmp_path / ROW / f"seed{seed}/predictions_test.csv") as file:
            _, *rows = csv.reader(file)
        labels = [int(row[1]) for row in rows]
        probs.append([float(row[4]) for row in rows])
        areas.append(roc_auc_score(labels, probs[-1]))
        shares.append(statistics.fmean(row[1] == row[2] for row in rows))
    spread = [f"{statistics.fmean(of):.3f} ± {statistics.stdev(of):.3f}" for of in (areas, shares)]
    assert result_text(runs) == f"AUC {spread[0]}, accuracy {spread[1]}"
    mean = np.mean(probs, axis=0)
    assert average_text(runs) == (
        f"AUC {roc_auc_score(labels, mean):.3f}, accuracy {np.mean((mean > 0.5) == np.array(labels)):.3f}"
    )
    low, high = json.loads((tmp_path / ROW / "seed0/metrics.json").read_text())["intervals"]["accuracy"]
    assert result_text(runs[:1]).endswith(f"accuracy {shares[0]:.3f} ({low:.3f} to {high:.3f})")

    page = (tmp_path / "README.md").read_text()
    assert page == results_page(tmp_path)
    words = "--suite medmnist --recipe medmnist --sets breastmnist --models toy --seeds 2 --epochs 1 --kernels paddle"
    assert f"`tools/reproduce.py {words}`" in page and result_text(runs) in page and "synthetic images" in page
    assert "epoch 1, 1 of 1, by auc on validation images" in page


def test_the_average_decides_by_the_recipes_threshold(grid: Path, tmp_path: Path) -> None:
    write_evidence(cells_of(grid), tmp_path)
    runs = [*read_rows(tmp_path).values()][0]
    mean = np.mean([run.predictions.probs for run in runs], axis=0)[:, 1]
    labels = runs[0].predictions.labels
    for threshold in (0.0, float(np.median(mean)), 1.0):
        stricter = [dataclasses.replace(run, recipe=run.recipe.replace(threshold=threshold)) for run in runs]
        assert average_text(stricter).endswith(f"accuracy {((mean > threshold) == labels).mean():.3f}")


def test_the_command_of_a_row_runs_it_again(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The grid is finished, so that the command only compares, and writes the same bytes."""
    write_evidence(cells_of(grid), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    (runs,) = read_rows(tmp_path).values()
    words = command_of(runs).split()[1:]
    places = ["--output", str(grid / "runs"), "--data-root", str(grid / "data"), "--results", str(tmp_path)]
    assert command.main([*words, *places, "--device", "cpu", "--evidence"]) == 0
    shown = capsys.readouterr().out
    assert f"| {ROW} | {result_text(runs)} | {result_text(runs)} | the same / the same |" in shown
    assert f"1 row(s) written to {tmp_path}: {ROW}" in shown
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_rerun_with_other_numbers_gets_a_verdict(grid: Path, tmp_path: Path) -> None:
    write_evidence(cells_of(grid), tmp_path)
    for seed in (0, 1):
        folder = tmp_path / ROW / f"seed{seed}"
        labels = ["0", "1"] * 4
        lines = [f"test{k},{label},{label},{1 - int(label)},{label}" for k, label in enumerate(labels)]
        (folder / "predictions_test.csv").write_text("\n".join(["id,label,predicted,a,b", *lines]))
        for name in ("metrics.json", "cell.json"):
            values = json.loads((folder / name).read_text()) | {"auc": 1.0, "accuracy": 1.0}
            (folder / name).write_text(json.dumps(values))
    text = compare(cells_of(grid), tmp_path)
    (runs,) = read_rows(tmp_path).values()
    assert "AUC 1.000 ± 0.000, accuracy 1.000 ± 0.000" in text and re.search(
        r"\| (inside|below) / (inside|below) \|", text
    )
    assert compare(cells_of(grid), tmp_path / "none") == ""
    assert compare(plan(Grid("palm", 1), tmp_path / "p"), tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.json", {"accuracy": 0.99}),
        ("cell.json", {"auc": None}),
        ("recipe.json", {"seed": 7}),
        ("recipe.json", {"epochs": 9}),
    ],
)
def test_files_that_disagree(grid: Path, tmp_path: Path, name: str, change: dict) -> None:
    write_evidence(cells_of(grid), tmp_path)
    path = tmp_path / ROW / "seed1" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=f"{ROW}/seed1: its files disagree"):
        read_rows(tmp_path)


def test_the_page_has_the_results_of_each_source(grid: Path, tmp_path: Path) -> None:
    write_evidence(cells_of(grid), tmp_path)
    assert "By source" not in results_page(tmp_path)
    path = tmp_path / ROW / "seed0/metrics.json"
    values = json.loads(path.read_text())
    recall = {"class": "benign", "recall": 0.25, "support": 4, "interval": [0.1, 0.7]}
    source = {"n": 4, "accuracy": 0.25, "intervals": {"accuracy": [0.05, 0.7]}, "recall": [recall]}
    path.write_text(json.dumps(values | {"by_source": {"north": source}}))
    assert f"| {ROW}, seed 0 | north | 0.250 (0.050 to 0.700) | benign 0.250 of 4 |" in results_page(tmp_path)
    for faulty in ([], {"north": {}}, {"north": source | {"accuracy": "x"}}):
        path.write_text(json.dumps(values | {"by_source": faulty}))
        with pytest.raises(RunError, match="by_source is damaged"):
            results_page(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"", b"{", b"\xff"])
def test_damaged_evidence(grid: Path, tmp_path: Path, content: bytes) -> None:
    write_evidence(cells_of(grid), tmp_path)
    (tmp_path / ROW / "seed0/cell.json").write_bytes(content)
    with pytest.raises(RunError, match="cell.json cannot be read"):
        read_rows(tmp_path)


def test_a_row_of_other_images_is_not_replaced(grid: Path, tmp_path: Path) -> None:
    write_evidence(cells_of(grid), tmp_path)
    path = tmp_path / ROW / "seed1/data.json"
    data = json.loads(path.read_text())
    data["train"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(data))
    before = path.read_bytes()
    with pytest.raises(RunError, match="seed1 has other settings or other images") as caught:
        write_evidence(cells_of(grid, seeds=1), tmp_path)
    assert "images of train" in str(caught.value) and path.read_bytes() == before


def test_weight_files_lose_their_folder(grid: Path, tmp_path: Path) -> None:
    cells = cells_of(grid, seeds=1)
    path = cells[0].folder / "recipe.json"
    before = path.read_bytes()
    path.write_text(json.dumps(json.loads(before) | {"pretrained": str(tmp_path / "start.pdparams")}))
    try:
        write_evidence(cells, tmp_path)
    finally:
        path.write_bytes(before)
    assert json.loads((tmp_path / ROW / "seed0/recipe.json").read_text())["pretrained"] == "start.pdparams"


def test_rows_are_named_by_what_differs() -> None:
    full, short = Path("datasets/covid"), plan(Grid("covid", 1, ("covid",), models=("resnet18",), epochs=8), Path("x"))
    assert [row_name(cell.recipe, full) for cell in [*plan(Grid("covid", 1), Path("x")), *short]] == [
        "covid-covid-resnet50",
        "covid_best-covid-resnet50",
        "covid-covid-resnet18-8epochs",
    ]


def test_a_row_without_a_source(grid: Path, tmp_path: Path) -> None:
    """Such a split is another row, and its command names the split's data root."""
    cells = [dataclasses.replace(cell, data_root=Path("data/without_Kermany")) for cell in cells_of(grid, 1)]
    assert write_evidence([*cells, *cells_of(grid, 1)], tmp_path) == [ROW, f"{ROW}-without_Kermany"]
    usual, without = read_rows(tmp_path).values()
    assert command_of(without) == f"{command_of(usual)} --data-root datasets/covid/without_Kermany"


# --- what the repository holds ---


def rows_of(name: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the README's first table below a heading."""
    table = (ROOT / name).read_text(encoding="utf-8").partition(heading)[2]
    lines = table[table.index("\n| ") + 1 :].partition("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(
    ("name", "heading"), [("README.md", "## What it reproduces"), ("README.zh-CN.md", "## 复现了什么")]
)
def test_the_readme_says_what_the_evidence_says(name: str, heading: str) -> None:
    kept = read_rows(RESULTS)
    for cells in rows_of(name, heading):
        links = re.findall(r"\]\(results/([^)]+)\)", " ".join(cells))
        if not links:
            assert "not yet run" in cells[2] or "尚未" in cells[2], cells
            continue
        (row,) = links
        numbers = re.findall(r"\d\.\d+", result_text(kept[row]))
        assert re.findall(r"\d\.\d+", cells[2].replace("*", ""))[: len(numbers)] == numbers, row
        assert command_of(kept[row]) in cells[3], row


def test_the_long_table_is_made_from_the_folders() -> None:
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == results_page(RESULTS)


def test_palms_temperature_and_threshold_fit_its_folds() -> None:
    found = read_predictions(RESULTS / "palm-palm-resnet50" / "folds")
    assert len(found.ids) == 400 and all(name[0] in "HNP" for name in found.ids)  # training images
    head = OutputHead("binary", "sigmoid", found.classes)
    recipe = get_recipe("palm")
    assert choice(found.probs, found.labels, head) == {
        "temperature": pytest.approx(recipe.temperature, abs=5e-5),
        "threshold": pytest.approx(recipe.threshold, abs=5e-5),
    }
    assert recipe.monitor == "last"


def test_no_image_no_weights_no_path_of_a_machine() -> None:
    for path in RESULTS.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".csv", ".md") and path.stat().st_size < 2**20, path
            assert not re.search(r'"/|data_root|,/', path.read_text(encoding="utf-8")), path
