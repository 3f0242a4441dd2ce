"""The grid of trainings: its plan, its table, and going on after interruptions."""

import csv
import json
import math
import statistics
import time

import numpy as np
import pytest

from paddle_medcls.cli import reproduce as command
from paddle_medcls.core.errors import RecipeError, RunError, Stopped
from paddle_medcls.core.files import write_json
from paddle_medcls.data.index import SYNTHETIC_MARK
from paddle_medcls.data.sample import draw_npz
from paddle_medcls.recipes import published_results
from paddle_medcls.training import reproduce, reproduction_table
from paddle_medcls.training.grid import Grid, plan
from paddle_medcls.training.loop import Options, train
from paddle_medcls.training.reproduce import run_grid, score_without_leaks, write_tables
from paddle_medcls.training.reproduction_table import Row, permutation_p, table, verdict


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / SYNTHETIC_MARK).touch()
    draw_npz("breastmnist", folder, counts=(8, 8, 8))
    yield folder
    for state in tmp_path.rglob("state.safetensors"):  # 130 MB each
        state.unlink()


def shown(cells):
    return table([Row(cell.name, cell.recipe, cell.result()) for cell in cells])


def quiet(**changes):
    return Options(device="cpu", workers=1, **changes)


def test_plan_of_the_medmnist_suite(tmp_path):
    cells = plan(
        Grid("medmnist", 2, sets=("breast", "retinamnist", "breast_224"), models=("resnet18", "resnet50")), tmp_path
    )
    names = [cell.name for cell in cells]
    assert len(names) == 12 and names[0] == "medmnist-breastmnist-resnet18-seed0"
    assert [cell.recipe.seed for cell in cells] == [0] * 6 + [1] * 6  # one seed of everything first
    assert cells[5].recipe.dataset == "breastmnist_224" and cells[5].recipe.preprocessing.size_px == 224
    assert str(cells[0].data_root) == "datasets/medmnist"
    assert len(plan(Grid("medmnist", 3), tmp_path)) == 12 * 2 * 3


def test_plan_of_other_recipes_and_suites(tmp_path):
    both = plan(Grid("medmnist", 1, ("medmnist", "medmnist_best"), ("breast",), ("resnet18",), epochs=10), tmp_path)
    assert [(cell.recipe.name, cell.recipe.epochs) for cell in both] == [("medmnist", 10), ("medmnist_best", 10)]
    assert both[0].recipe.decay_epochs == (5, 7.5)
    palm = plan(Grid("palm", 2, models=("resnet18",)), tmp_path)
    assert {(cell.recipe.name, cell.recipe.model) for cell in palm} == {
        ("palm_tutorial", "resnet18"),
        ("palm", "resnet18"),
    }
    assert [cell.recipe.name for cell in plan(Grid("covid", 1), tmp_path)] == ["covid", "covid_best"]
    assert [cell.recipe.dataset for cell in plan(Grid("oct", 1), tmp_path)] == ["oct"]
    (without,) = plan(Grid("covid", 1, ("covid",)), tmp_path, tmp_path / "without_RSNA")
    assert without.name == "covid-covid-resnet50-without_RSNA-seed0"  # beside the training on all sources
    with pytest.raises(RecipeError, match="leave --sets out"):
        plan(Grid("palm", 1, sets=("breast",)), tmp_path)
    with pytest.raises(RecipeError, match="recipe palm is for palm"):
        plan(Grid("medmnist", 1, ("palm",), ("breast",)), tmp_path)


@pytest.mark.parametrize(
    ("mean", "sd", "n", "figure", "noise", "expected"),
    [
        (0.900, 0.010, 3, 0.900, None, "inside"),
        (0.922, 0.010, 3, 0.900, None, "inside"),  # limit 2 x sqrt(.01^2 / 3 + .01^2) = .0231
        (0.924, 0.010, 3, 0.900, None, "above"),
        (0.870, 0.010, 3, 0.900, None, "below"),
        (0.870, 0.010, 3, 0.900, 0.020, "inside"),  # the published figure is noisier than ours
        (0.870, None, 1, 0.900, 0.012, "inside"),
        (0.850, None, 1, 0.900, 0.012, "below"),
        (0.850, None, 1, 0.900, None, "–"),
        (0.850, 0.010, 3, None, 0.012, "–"),
        (0.9004, 0.0, 3, 0.900, None, "inside"),  # published to three digits
    ],
)
def test_verdict(mean, sd, n, figure, noise, expected):
    assert verdict(mean, sd, n, figure, noise) == expected


def test_a_published_mean_is_less_noisy_than_a_run():
    # limit 2 x sqrt(.01^2 / 3 + .01^2 / 3) = .0163, and half of a third digit
    assert verdict(0.9165, 0.010, 3, 0.900, None, target_runs=3) == "inside"
    assert verdict(0.9170, 0.010, 3, 0.900, None, target_runs=3) == "above"


def test_the_paper_gives_means_of_three_runs():
    """The names of the authors' own prediction files of BreastMNIST, ResNet-18 at 28 pixels."""
    runs = [(0.898, 0.872), (0.917, 0.872), (0.889, 0.846)]
    assert len(runs) == published_results.PAPER_RUNS
    for figures, stated, noise in zip(
        zip(*runs), published_results.paper("breastmnist", "resnet18"), published_results.SEED_NOISE["breastmnist"]
    ):
        assert round(statistics.fmean(figures), 3) == stated
        assert round(statistics.stdev(figures), 3) == noise


def finish(cell, auc, accuracy, **changes):
    row = dict.fromkeys(reproduce.RESULTS, 0) | {"split": "test", "auc": auc, "accuracy": accuracy, "note": ""}
    row |= {"parameters": 11_168_000, "minutes": 12.25, **changes}
    row = {name: value for name, value in row.items() if not name.endswith("_clean")}
    write_json(cell.folder / "cell.json", row)


def test_the_table(tmp_path):
    cells = plan(Grid("medmnist", 3, sets=("breast",), models=("resnet18", "resnet50")), tmp_path)
    for cell, auc in zip([cell for cell in cells if cell.recipe.model == "resnet18"], (0.89, 0.90, 0.91)):
        finish(cell, auc, 0.80, note="breastmnist.npz: differs from the official file")
    text = shown(cells)
    line = next(line for line in text.splitlines() if line.startswith("| breastmnist"))
    assert line == (
        "| breastmnist | resnet18 | medmnist | 0.901 / 0.863 | 0.883 / 0.827 | 0.900 ± 0.010 / 0.800 ± 0.000 | 3 "
        "| -0.001 / -0.063 | inside / below | – | 11.17 M | 12.2 |"
    )
    assert "- breastmnist: breastmnist.npz: differs from the official file" in text
    assert "Not run: medmnist-breastmnist-resnet50-seed0, " in text
    assert "2 x sqrt(sd^2 / n + s^2 / m)" in text


def test_recipes_beside_each_other(tmp_path):
    cells = plan(Grid("medmnist", 3, ("medmnist", "medmnist_best"), ("breast",), ("resnet18",)), tmp_path)
    for cell in cells:
        best = cell.recipe.name == "medmnist_best"
        finish(cell, 0.90 + 0.03 * best + 0.01 * cell.recipe.seed, 0.80)
    line = "- breastmnist, resnet18: medmnist_best - medmnist: auc +0.030 (p 0.100), accuracy +0.000 (p 1.000); "
    assert line + "3 and 3 seeds" in shown(cells)
    assert "permutation" not in shown(cells[::2])  # one recipe alone


def test_permutation_p(monkeypatch: pytest.MonkeyPatch) -> None:
    assert permutation_p([5, 6, 7, 8], [1, 2, 3, 4]) == 2 / 70  # of 8 over 4 deals these two go as far
    assert permutation_p([1, 4], [2, 3]) == 1  # no difference
    assert permutation_p([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) == 1  # none but rounding's
    assert permutation_p([5], [1, 2]) == 1 / 3  # 5, 1 or 2 alone: 3.5, -2.5, -1
    exact = permutation_p([5, 6, 7, 8, 9], [1, 2, 3, 4, 6])  # 252 deals
    monkeypatch.setattr(reproduction_table, "MAX_PERMUTATIONS", 200)
    assert permutation_p([5, 6, 7, 8, 9], [1, 2, 3, 4, 6]) == pytest.approx(exact, abs=0.02)


def test_drawn_permutations_never_give_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 runs all above 11 others: exactly 2 / C(22, 11) = 2.8e-6, which 2000 deals cannot show."""
    assert permutation_p(range(8, 16), range(8)) == pytest.approx(2 / math.comb(16, 8))  # 12,870 deals, all of them
    monkeypatch.setattr(reproduction_table, "MAX_PERMUTATIONS", 2000)
    assert permutation_p(range(11, 22), range(11)) == 1 / 2001


def test_figures_without_leaks(root, tmp_path):
    file = root / "breastmnist.npz"
    arrays = dict(np.load(file))
    arrays["test_images"][2] = arrays["train_images"][5]
    arrays["test_labels"][:, 0] = [0, 1, 0, 1, 0, 1, 0, 1]
    np.savez(file, **arrays)
    cells = plan(Grid("medmnist", 2, sets=("breast",), models=("resnet18",)), tmp_path / "grid", root)
    finish(cells[0], 0.9, 0.8)
    # The copy, test2, is one of two mistakes; of the 4 x 3 pairs without it one is in the wrong order: test3, test6.
    scores = [0.2, 0.8, 0.9, 0.3, 0.1, 0.7, 0.4, 0.6]
    guesses = [int(score > 0.5) for score in scores]
    lines = [f"test{k},{k % 2},{guesses[k]},{1 - score:.8f},{score:.8f}" for k, score in enumerate(scores)]
    (cells[0].folder / "test").mkdir()
    text = "\n".join(['id,label,predicted,malignant,"normal, benign"', *lines])
    (cells[0].folder / "test/predictions_test.csv").write_text(text)
    score_without_leaks(cells, 1)  # the second cell is not finished
    row = cells[0].result()
    assert row["n_clean"] == 7 and row["auc_clean"] == 11 / 12 and row["accuracy_clean"] == 6 / 7
    assert "| 0.917 / 0.857 (7 images) |" in shown(cells)
    write_tables(cells, tmp_path)
    assert "auc_clean" in (tmp_path / "results.csv").read_text()


def test_figures_that_a_recipe_names_itself(tmp_path):
    cells = plan(Grid("covid", 1), tmp_path)
    finish(cells[0], 0.99, 0.96)
    assert "| – / 0.965 | – | 0.990 / 0.960 | 1 | – / -0.005 | – / – |" in shown(cells)
    enlarged = plan(Grid("medmnist", 1, ("medmnist_28_to_224",), ("breast",), ("resnet50",)), tmp_path)
    finish(enlarged[0], 0.8, 0.8)
    assert "| 0.866 / 0.842 | – |" in shown(enlarged)  # the paper's column (224); the document has 28 alone


def test_a_grid_goes_on_after_interruptions(root, tmp_path, monkeypatch):
    output = tmp_path / "grid"
    cells = plan(Grid("medmnist", 2, sets=("breast",), models=("toy",), epochs=2), output, root)
    past = quiet(deadline=time.monotonic())
    assert run_grid(cells, output, past) == (list(cells), {})  # no time: nothing is begun
    assert "Not run: " in (output / "table.md").read_text() and not cells[0].folder.exists()

    with pytest.raises(Stopped):
        train(cells[0].recipe, root, cells[0].folder, past)  # a half-done cell
    calls = []

    def spy(recipe, data_root, folder, options, resume):
        calls.append((folder.name, resume))
        return train(recipe, data_root, folder, options, resume)

    monkeypatch.setattr(reproduce, "train", spy)
    assert run_grid(cells, output, quiet()) == ([], {})
    assert calls == [(cells[0].name, True), (cells[1].name, False)]
    with open(output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"] and {row["note"] for row in rows} == {"synthetic images"}
    assert float(rows[0]["minutes"]) > 0 and int(rows[0]["parameters"]) == 218
    assert (cells[0].folder / "test/metrics.json").is_file()

    stored = json.loads((cells[0].folder / "recipe.json").read_text())
    stored |= {"source": "the text of another version", "targets": []}
    (cells[0].folder / "recipe.json").write_text(json.dumps(stored))
    assert run_grid(cells, output, quiet()) == ([], {})  # all finished, with the same settings: nothing runs
    assert len(calls) == 2
    longer = plan(Grid("medmnist", 2, sets=("breast",), models=("toy",), epochs=3), output, root)
    with pytest.raises(RunError, match="run with another recipe") as caught:
        run_grid(longer, output, quiet())
    assert "epochs: 2 -> 3" in str(caught.value)


def test_the_budget_ends_the_command_cleanly(root, tmp_path, capsys):
    words = ["--suite", "medmnist", "--sets", "breast", "--models", "resnet18", "--seeds", "1", "--device", "cpu"]
    words += ["--data-root", str(root), "--output", str(tmp_path / "grid"), "--budget-minutes", "1e-6"]
    assert command.main(words) == 0
    said = capsys.readouterr()
    assert "0 of 1 runs are done" in said.out and "Not run: medmnist-breastmnist-resnet18-seed0" in said.out
    assert "rerun the same command" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "medmnist,nonsense"], "nonsense"),
        (["--models", "resnet19"], "resnet19"),
        (["--sets", "brest"], "brest"),
    ],
)
def test_unknown_names_are_found_before_any_work(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "load_index", None)
    monkeypatch.setattr(reproduce, "train", None)
    assert command.main(["--suite", "medmnist", *words, "--output", str(tmp_path / "grid")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "grid").exists()


def test_a_grid_keeps_decoded_images_as_train_does(root, tmp_path, monkeypatch):
    """Else the same run decodes each image in every epoch, only because a grid started it."""
    seen = []
    monkeypatch.setattr(
        reproduce, "run_grid", lambda cells, output, options, parallel: seen.append(options) or (cells, {})
    )
    words = ["--suite", "medmnist", "--sets", "breast", "--data-root", str(root), "--output", str(tmp_path / "grid")]
    assert command.main(words) == 0
    assert seen[0].image_cache == str(tmp_path / "grid" / "images")


def test_faulty_data_stop_a_grid_before_anything_runs(tmp_path, capsys):
    words = [
        "--suite",
        "medmnist",
        "--sets",
        "breast,retina",
        "--data-root",
        str(tmp_path),
        "--output",
        str(tmp_path / "g"),
    ]
    assert command.main(words) == 1
    assert "no file breastmnist.npz" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


def test_noise_is_known_for_sets_of_the_paper():
    assert set(published_results.SEED_NOISE) <= set(published_results.PAPER)
