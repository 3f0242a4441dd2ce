"""Corrupted images, and the report on them."""

from __future__ import annotations

import json
from pathlib import Path

import fakes
import numpy as np
import pytest

from paddle_medcls.cli import eval
from paddle_medcls.preprocessing.corruptions import KINDS, SEVERITIES, corrupt
from paddle_medcls.training.loop import Options, train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", (1, 3))
def test_a_higher_severity_changes_an_image_more(kind: str, channels: int) -> None:
    image = fakes.pixels(1, size=64)[:, :, :channels]
    made = [corrupt(image, kind, severity, seed=5) for severity in SEVERITIES]
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in made)
    changes = [float(np.abs(one.astype(int) - image).mean()) for one in made]
    assert 0 < changes[0] < changes[4] and changes[2] < changes[4]
    np.testing.assert_array_equal(made[3], corrupt(image, kind, 4, seed=5))


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_28_pixels_and_of_one_colour(kind: str) -> None:
    for image in (np.zeros((28, 28, 1), np.uint8), np.full((28, 28, 3), 255, np.uint8)):
        assert corrupt(image, kind, 5).shape == image.shape


@pytest.mark.pictures
def test_eval_reports_every_kind_and_severity(tmp_path: Path, capsys) -> None:
    root, run = fakes.palm_tree(tmp_path / "palm"), tmp_path / "run"
    train(fakes.recipe(epochs=1), root, run, Options(device="cpu", workers=1, say=lambda line: None))
    arguments = ["--weights", str(run / "PALM.pdparams"), "--data-root", str(root), "--robustness"]
    assert eval.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    report = metrics["robustness"]
    assert set(report["corruptions"]) == set(KINDS) and all(len(rows) == 5 for rows in report["corruptions"].values())
    assert report["clean"]["accuracy"] == metrics["accuracy"] and report["clean"]["auc"] == pytest.approx(
        metrics["auc"]
    )
    assert report["clean"]["passed"] == metrics["novelty"]["passed"]
    recalls = [row["recall"] for row in metrics["per_class"]]
    assert report["clean"]["balanced_error"] == pytest.approx(1 - np.mean(recalls))
    every = [row["balanced_error"] for rows in report["corruptions"].values() for row in rows]
    relative = np.mean(every) - report["clean"]["balanced_error"]
    assert report["relative_balanced_error"] == pytest.approx(relative)
    assert all(kind in said for kind in KINDS) and (tmp_path / "out" / "robustness_val.png").stat().st_size > 1000
