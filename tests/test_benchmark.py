"""The benchmark's arithmetic, its errors, and one call of each kind of row; never its times."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import ROOT
from test_predict import saved

from benchmarks import cell, networks, runner, shards, system
from benchmarks.cell import Job
from benchmarks.measure import measure
from benchmarks.networks import RESNET18
from benchmarks.rows import GFLOP, GROWTH, LIMITS, ONCE, PEERS, ROWS, UNITS
from paddle_medcls.cli.benchmark import main
from paddle_medcls.core.errors import RunError, SetupError

TINY = replace(RESNET18, side=8, batch=2)


def made_up(monkeypatch, figures: dict[str, list[float]]) -> list[str]:
    """Replaces measuring by these figures of each variant; returns the variants in the order of measuring."""
    order, left = [], {variant: iter(values) for variant, values in figures.items()}

    def found(job):
        order.append(job.variant)
        if job.variant not in left:
            return {"not_measured": f"{job.variant} is not installed"}
        return {"value": next(left[job.variant]), "peak_mb": 100.0 + len(order)}

    monkeypatch.setattr(runner, "fresh_process", found)
    return order


def test_medians_ratios_and_interleaving(monkeypatch):
    monkeypatch.setitem(ROWS, "training", dict.fromkeys(("a", "PyTorch f32", "b bf16")))
    order = made_up(monkeypatch, {"a": [2.0, 4.0, 3.0], "b bf16": [30.0, 600.0, 60.0], "PyTorch f32": [12.0] * 3})
    (rows,) = runner.run_rows(["training"], 3, False, sys.executable)
    assert order == ["a", "PyTorch f32", "b bf16"] * 3
    limits = [
        {"row": "limit", "variant": name, "value": value} for name, value in zip(LIMITS.values(), (492.0, 2952.0))
    ]
    a, torch, b, *_ = runner.compare(rows + limits)
    assert (a["value"], a["ratio"], a["to_peer"], a["rounds"]) == (3.0, 1.0, 0.25, [2.0, 4.0, 3.0])
    assert (b["value"], b["ratio"], b["to_peer"], b["unit"]) == (60.0, 20.0, 5.0, "images/s")
    assert b["peak_mb"] == 109.0  # the most of its rounds, 3, 6 and 9
    assert a["limit_share"] == pytest.approx(3 * 24.6 / 492)  # ResNet-50: 3 x 8.2 GFLOP an image
    assert b["limit_share"] == pytest.approx(60 * 24.6 / 2952)
    assert torch["to_peer"] == 1.0


def test_what_is_missing_is_named_once(monkeypatch):
    monkeypatch.setitem(ROWS, "training", dict.fromkeys(("a", "PyTorch f32")))
    order = made_up(monkeypatch, {"a": [2.0, 4.0]})
    (rows,) = runner.run_rows(["training"], 2, False, sys.executable)
    a, torch = runner.compare(rows)
    assert torch["not_measured"] == "PyTorch f32 is not installed" and "value" not in torch
    assert "to_peer" not in a and "limit_share" not in a and order == ["a", "PyTorch f32", "a"]


def test_a_missing_program_is_told_from_a_failure(tmp_path):
    job = Job("training", "PyTorch f32", torch_python=str(tmp_path / "no-such-python"))
    assert "no-such-python cannot be run" in measure(job)["not_measured"]
    empty = tmp_path / "python"
    empty.write_text('#!/bin/sh\necho \'{"missing": "PyTorch is not installed"}\'\n')
    empty.chmod(0o755)
    assert measure(replace(job, torch_python=str(empty))) == {"not_measured": "PyTorch is not installed"}
    empty.write_text("#!/bin/sh\necho no memory >&2; exit 3\n")
    with pytest.raises(RunError, match="PyTorch: exit code 3: no memory"):
        measure(replace(job, torch_python=str(empty)))


def test_a_process_that_fails_is_one_clear_error():
    with pytest.raises(RunError, match="benchmark nothing, cached: exit code 1: KeyError: 'nothing'"):
        runner.fresh_process(Job("nothing", "cached"))


def test_rate_counts_images_over_time(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 4.0, 4.0])
    monkeypatch.setattr(cell.time, "perf_counter", lambda: next(clock))
    calls = []
    assert cell.rate(lambda: calls.append(1), images=8, seconds=3.0) == 3 * 8 / 4.0
    assert len(calls) == 4  # one to warm up


def test_a_slow_call_is_measured_once(monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(cell.time, "perf_counter", lambda: next(clock))
    calls = []
    assert cell.rate(lambda: calls.append("whole"), 5, 3.0, lambda: calls.append("few")) == 0.5
    assert calls == ["few", "whole"]


@pytest.mark.parametrize(("costs", "expected"), [([2, 4, 8, 16, 32], 1.0), ([9, 9, 9, 36, 144], 2.0)])
def test_power_of_growth_is_that_of_the_larger_half(costs, expected):
    assert runner.power([1, 2, 4, 8, 16], costs) == pytest.approx(expected, abs=0.01)


def test_tables_name_rows_and_variants_that_exist():
    named = {*UNITS, *PEERS, *GFLOP, *GROWTH, *ONCE, *runner.PREPARED}
    assert named <= ROWS.keys()
    assert all(peer in ROWS[row] for row, peer in PEERS.items())
    assert set(LIMITS.values()) <= ROWS["limit"].keys()


def test_rows_are_added_to_a_file_of_the_same_machine(monkeypatch, tmp_path, capsys):
    about = {"machine": {"processor": "P", "cores": 2, "platform": "L"}, "versions": {"paddle": "3"}, "code": "c"}
    monkeypatch.setattr(runner, "describe", lambda torch_python: about)
    monkeypatch.setitem(ROWS, "head", dict.fromkeys(("uncached", "cached", "other")))
    made_up(monkeypatch, {"uncached": [2.0, 8.0], "cached": [10.0, 16.0]})
    file, picture = tmp_path / "figures.json", tmp_path / "growth.png"
    assert main(["--rows", "head", "--output", str(file)]) == 0
    for row in GROWTH:
        monkeypatch.setitem(ROWS, row, dict.fromkeys(("1", "2", "4")) if row == "batch" else {})
    made_up(monkeypatch, {"1": [1.0], "2": [2.0], "4": [4.0]})
    assert main(["--rows", "batch", "--output", str(file), "--growth", "--picture", str(picture)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert [f.get("ratio") for f in figures if f["row"] == "head"] == [1.0, 5.0, None]
    assert [f["ratio"] for f in figures if f["row"] == "batch"] == [1.0, 2.0, 4.0]
    assert picture.stat().st_size > 5000
    shown = capsys.readouterr()
    assert "| head" in shown.out and "P, 2 cores; paddle 3" in shown.out
    assert "head, other: not measured: other is not installed" in shown.err

    made_up(monkeypatch, {"uncached": [4.0], "cached": [4.0]})
    assert main(["--rows", "head", "--output", str(file)]) == 0  # measured again: replaced
    figures = json.loads(file.read_text())["figures"]
    assert [f["value"] for f in figures if f["row"] == "head" and "value" in f] == [4.0, 4.0]

    monkeypatch.setattr(runner, "describe", lambda torch_python: {**about, "versions": {"paddle": "2"}})
    assert main(["--rows", "head", "--output", str(file)]) == 1
    assert "different settings: versions" in capsys.readouterr().err
    file.write_text("[]")
    assert main(["--rows", "head", "--output", str(file)]) == 1
    assert "not a file of results" in capsys.readouterr().err


def test_a_picture_of_ratios(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "describe", lambda _: {"machine": {"processor": "P", "cores": 2}, "versions": {}})
    made_up(monkeypatch, {variant: [2.0 + k] for k, variant in enumerate(ROWS["inference1"])} | {"": [0.0]})
    picture = tmp_path / "ratios.png"
    assert main(["--rows", "inference1", "--quick", "--picture", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


# --- rows that run --------------------------------------------------------------------------------


def test_training_steps_run():
    job = Job("training", "", seconds=0.0)
    assert networks.training(job, TINY, "paddle") > 0
    assert networks.step_seconds(job, TINY) > 0


def test_reading_runs():
    job = Job("reading", "", seconds=0.0)
    assert system.read_mapped(job) > 0 and system.read_radiograph(job) > 0
    assert system.read_medmnist(job) > 0 and system.read_photograph(job) > 0


def test_shards_run(tmp_path):
    saved(tmp_path, "NET")
    job = Job("shards", "", str(tmp_path), divide=16)
    assert all(shards.to_network(job, kind, kind.startswith("PNG")) > 0 for kind in shards.KINDS)


def test_statistics_and_evaluation_of_generated_images_run():
    assert system.many_images(Job("memory", ""), 40) > 0


def test_start_is_measured_in_a_plain_installation(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(system, "run", lambda command: calls.append(command) or len(calls))
    job = Job("start", "", str(tmp_path))
    assert [system.predict_seconds(job, as_installed) for as_installed in (True, False)] == [4, 10]  # medians of five
    assert all("'pytest'" in command[2] and "'openvino'" not in command[2] for command in calls)
    assert all(("import zlib, paddle; " in command[2]) == ("--engine" in command) for command in calls)
    assert sum("--engine" in command for command in calls) == 6
    code = calls[-1][2].partition("from paddle_medcls")[0]
    hidden = subprocess.run(
        [sys.executable, "-c", f"{code}import cv2, matplotlib, pytest"], capture_output=True, text=True
    )
    assert "import of pytest halted" in hidden.stderr  # the others were found


@pytest.mark.parametrize("cached", [False, True])
def test_the_time_to_the_first_step(cached, monkeypatch):
    """The first start is not counted; all starts share one image cache, or each has a new one."""
    calls = []
    monkeypatch.setattr(system, "run", lambda command: calls.append(command) or len(calls))
    monkeypatch.setattr(system, "_draw", lambda dataset, root: None)
    assert system.first_step_seconds(Job("first", ""), "palm", cached) == 4  # the median of 2 to 6
    caches = {command[command.index("--image-cache") + 1] for command in calls}
    assert len(calls) == 6 and len(caches) == (1 if cached else 6)
    assert len({command[command.index("--output") + 1] for command in calls}) == 6


def test_a_training_ends_after_the_first_step():
    code = "from paddle_medcls.training import loop\nloop.train_step = lambda word: print(word, flush=True)"
    code += f"{system.FIRST_STEP}loop.train_step('a step')\nprint('not reached')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a step\n"), done.stderr


def test_a_matrix_product_in_onednn():
    assert networks.onednn_product(Job("limit", "", seconds=0.0), bf16=False) > 0


def test_a_plain_installation_is_what_the_requirements_bring(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# pytest\npandas >= 1  # why\n")
    hidden = system.not_required(file)
    assert {"pytest", "matplotlib", "openpyxl"} <= hidden
    assert not {"pandas", "numpy", "dateutil", "paddle", "cv2", "paddle_medcls"} & hidden  # dependencies, and any build
    file.write_text("pytest\nPandas\nmatplotlib\n")
    assert not {"pytest", "matplotlib"} & system.not_required(file)


def test_the_benchmark_is_not_installed(monkeypatch, tmp_path, capsys):
    assert 'include = ["paddle_medcls", "paddle_medcls.*"]' in (ROOT / "pyproject.toml").read_text()
    installed = tmp_path / "paddle_medcls" / "commands" / "benchmark.py"
    monkeypatch.setattr("paddle_medcls.cli.benchmark.__file__", str(installed))
    assert main(["--help"]) == 1
    assert "in a clone of the repository: python tools/benchmark.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [(["--torch-python", "/no/python"], "no such program"), (["--picture", "a.doc"], "ends in .png")],
)
def test_wrong_names_are_told_before_anything_is_measured(arguments, fault, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert fault in capsys.readouterr().err


def test_a_command_in_a_fresh_process():
    assert cell.run(cell.medcls("benchmark", "--help")) > 0
    with pytest.raises(RunError, match="exit code 2: medcls benchmark: error: .*--rounds"):
        cell.run(cell.medcls("benchmark", "--rounds", "0"))


def test_a_network_without_its_export_is_named(tmp_path):
    with pytest.raises(SetupError, match="the library that writes this format is not installed"):
        networks._export(Job("inference1", "", str(tmp_path)), "*.xml")


def test_the_file_for_pytorch_needs_nothing_of_this_package(tmp_path):
    script = Path(networks.__file__).with_name("pytorch.py")
    job = {"what": "training", "model": "resnet18", "stem": "small", "side": 8, "batch": 2, "precision": "f32"}
    job |= {"seconds": 0.0, "threads": 1}
    done = subprocess.run(
        [sys.executable, "-I", str(script), json.dumps(job)], capture_output=True, text=True, cwd=tmp_path
    )
    found = json.loads(done.stdout)
    assert found.get("value", 0) > 0 or "PyTorch is not installed" in found["missing"]
