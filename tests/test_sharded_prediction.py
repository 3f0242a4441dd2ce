"""Predicting very many images: each is in one row, whatever interrupts the work, and nothing foreign is continued."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import pixels, write_image
from test_conformal import good_record
from test_ensemble import cross_validation
from test_predict import SIDECAR, saved

from paddle_medcls.cli import predict
from paddle_medcls.core import files
from paddle_medcls.core.errors import DataError, MedclsError, RunError, SetupError, Stopped
from paddle_medcls.core.files import sha256
from paddle_medcls.data.image_files import ImageFiles, files_below, listed_files
from paddle_medcls.deployment import shard_manifest, sharded_prediction
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.deployment.sharded_prediction import Cluster, ShardOptions, Totals, predict_shards
from paddle_medcls.models.novelty import Novelty, novelty_path
from paddle_medcls.models.sidecar import Sidecar

OPTIONS = ShardOptions(rows=3, format="csv", batch_size=2)
DAMAGED = ("04.png", "09.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), prediction_sets=good_record())


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor.from_weights(model)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images, four blocks of three; two cannot be read, one of them is a block's last."""
    for number in range(11):
        write_image(tmp_path / "images" / f"{number:02}.png", pixels(number, 40 + 15 * number))
    (tmp_path / "images" / DAMAGED[0]).write_bytes(b"<html>")
    (tmp_path / "images" / DAMAGED[1]).write_bytes(b"")
    return tmp_path / "images"


def below(folder: Path) -> ImageFiles:
    return ImageFiles([str(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder: Path, what: str = "predictions") -> list[list[str]]:
    """The rows of all shards in CSV, in order."""
    found = []
    for path in sorted(folder.glob(f"{what}-*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            found += list(csv.reader(file))[1:]
    return found


# --- what is written -----------------------------------------------------------------------------------


def kind_of_model(kind: str, folder: Path, model: Path) -> tuple[list[str], list[str]]:
    """(arguments of `predict`, names of the columns after the classes)."""
    if kind == "coverage":
        return ["--weights", str(model), "--coverage", "0.9"], ["prediction_set"]
    if kind == "average":
        return ["--weights", str(cross_validation(folder / "cv"))], ["sd", "same_label", "models"]
    weights = saved(folder / "m")
    channels = len(Predictor.from_weights(weights).backend.outputs(np.zeros((1, 3, 32, 32), np.float32))["features"][0])
    Novelty.fit(np.random.default_rng(0).normal(size=(40, channels)), [channels]).write(novelty_path(weights))
    record = {"limit": 1e6 if kind == "novelty" else 0.001, "sha256": sha256(novelty_path(weights))}
    replace(Sidecar.read(weights.with_suffix(".json")), novelty=record).write(weights.with_suffix(".json"))
    return ["--weights", str(weights), *["--refuse"] * (kind == "refuse")], ["in_distribution", "novelty"]


@pytest.mark.parametrize("kind", ["coverage", "average", "novelty", "refuse"])
def test_the_rows_are_those_of_predict_csv(kind: str, model: Path, images: Path, tmp_path: Path, capsys) -> None:
    arguments, more = kind_of_model(kind, tmp_path, model)
    arguments += [str(images), "--batch-size", "3"]
    assert predict.main([*arguments, "--csv", str(tmp_path / "p.csv")]) == 1
    shards = ["--output", str(tmp_path / "out"), "--shard-rows", "3"]
    assert predict.main([*arguments, *shards, "--format", "csv"]) == 1
    shown = capsys.readouterr()
    assert shown.out.endswith(f"9 image(s) predicted: {tmp_path}/out/predictions-*\n")
    assert f"2 file(s) could not be read: {tmp_path}/out/errors-*\n" in shown.err
    with open(tmp_path / "p.csv", newline="") as file:
        header, *expected = csv.reader(file)
    assert header[-len(more) :] == more and rows(tmp_path / "out") == expected
    assert len({row[1] for row in expected}) == 1 if kind == "refuse" else all(row[1] for row in expected)
    errors = rows(tmp_path / "out", "errors")
    assert [Path(path).name for path, _ in errors] == list(DAMAGED)
    assert "not an image" in errors[0][1] and "empty" in errors[1][1]
    assert sorted(contents(tmp_path / "out")) == [
        *("errors-000001.csv", "errors-000003.csv", "manifest.json"),
        *(f"predictions-00000{number}.csv" for number in range(4)),
    ]


def test_parquet_holds_the_same(images: Path, tmp_path: Path, predictor: Predictor) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    options = replace(OPTIONS, coverage=0.9)
    assert predict_shards(predictor, below(images), tmp_path / "csv", options) == Totals(9, 2)
    assert predict_shards(predictor, below(images), tmp_path / "out", replace(options, format="")) == Totals(9, 2)
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "out").glob("predictions-*.parquet"))]
    names = ["image", "label", *SIDECAR.classes, "prediction_set"]
    assert all(table.schema == tables[0].schema and table.column_names == names for table in tables)
    found = [[str(value) for value in row.values()] for table in tables for row in table.to_pylist()]
    for one, other in zip(found, rows(tmp_path / "csv")):
        assert one[:2] + one[-1:] == other[:2] + other[-1:]
        np.testing.assert_allclose(np.float32(one[2:-1]), np.float32(other[2:-1]), atol=1e-7)
    assert len(found) == 9 and tables[0].schema.field("a").type == "float"
    errors = [parquet.read_table(path).to_pylist() for path in sorted((tmp_path / "out").glob("errors-*.parquet"))]
    assert [[row["image"], row["error"]] for table in errors for row in table] == rows(tmp_path / "csv", "errors")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_names_with_line_ends_and_other_bytes(suffix: str, tmp_path: Path, predictor: Predictor) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    data = write_image(tmp_path / "images" / "plain.png", pixels(0)).read_bytes()
    (tmp_path / "images" / 'a\nb,"c.png').write_bytes(data)
    (tmp_path / "images" / os.fsdecode(b"\xff.png")).write_bytes(data)
    (tmp_path / "images" / os.fsdecode(b"\xfe\n.png")).write_bytes(b"")
    options = replace(OPTIONS, format=suffix)
    for _ in range(2):
        assert predict_shards(predictor, below(tmp_path / "images"), tmp_path / "out", options) == Totals(3, 1)
    if suffix == "csv":
        names = [row[0] for what in ("predictions", "errors") for row in rows(tmp_path / "out", what)]
    else:
        from pyarrow import parquet

        tables = [
            parquet.read_table(path)
            for path in [*sorted((tmp_path / "out").glob("p*-*")), *(tmp_path / "out").glob("e*-*")]
        ]
        names = [name for table in tables for name in table["image"].to_pylist()]
    expected = ['a\nb,"c.png', "plain.png", "\\udcff.png", "\\udcfe\n.png"]
    assert [name.rpartition("/")[2] for name in names] == expected


def test_parquet_refuses_two_columns_of_one_name(tmp_path: Path, images: Path) -> None:
    predictor = Predictor.from_weights(saved(tmp_path / "m", classes=("a", "label", "c")))
    with pytest.raises(RunError, match="two columns have the name 'label'"):
        predict_shards(predictor, below(images), tmp_path / "out", replace(OPTIONS, format="parquet"))
    assert predict_shards(predictor, below(images), tmp_path / "out", OPTIONS) == Totals(9, 2)


@pytest.mark.parametrize("change", [{"rows": 0}, {"format": "json"}])
def test_options_that_are_not_possible(change: dict, tmp_path: Path, images: Path, predictor: Predictor) -> None:
    with pytest.raises(RunError, match="shards of (0 rows|3 rows in the format 'json')"):
        predict_shards(predictor, below(images), tmp_path / "out", replace(OPTIONS, **change))


def test_parquet_without_pyarrow(tmp_path: Path, images: Path, predictor: Predictor, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MedclsError, match="pip install pyarrow, or --format csv"):
        predict_shards(predictor, below(images), tmp_path / "out", replace(OPTIONS, format="parquet"))
    monkeypatch.setattr(sharded_prediction, "installed_version", lambda name: "")
    predict_shards(predictor, below(images), tmp_path / "other", replace(OPTIONS, format=""))
    assert (tmp_path / "other" / "predictions-000003.csv").is_file()


# --- interruptions -------------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_at_any_file_loses_and_repeats_nothing(
    moment: str, images: Path, tmp_path: Path, predictor: Predictor, monkeypatch
) -> None:
    """Each start is killed as it gives its nth file its name, with n = 1, 2, 3 …, until one ends by itself."""
    predict_shards(predictor, below(images), tmp_path / "reference", OPTIONS)
    output, rename, decoded, starts = tmp_path / "out", os.replace, [], 0
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    decode = Predictor.decode
    monkeypatch.setattr(Predictor, "decode", lambda self, image: decoded.append(image) or decode(self, image))
    while True:
        starts += 1
        left = starts

        def strike(source: str, target: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0 and moment == "before":  # a killed process leaves its temporary file
                rename(source, output / f".medcls-{files._MACHINE}-{dead.pid}-x.csv")
                raise Killed
            rename(source, target)
            if left == 0:
                raise Killed

        monkeypatch.setattr(os, "replace", strike)
        try:
            totals = predict_shards(predictor, below(images), output, OPTIONS)
            break
        except Killed:
            continue
    assert totals == Totals(9, 2) and contents(output) == contents(tmp_path / "reference")
    assert starts > 4 and len(decoded) < starts * 11  # finished shards are not computed again


def test_a_file_that_can_be_read_at_last_is_in_one_row(images: Path, tmp_path: Path, predictor, monkeypatch) -> None:
    """The killed attempt has written its errors, and the next one finds none."""
    write = files.write_csv

    def killed(path: Path, *table) -> None:
        write(path, *table)
        if path.name == "errors-000001.csv":
            raise Killed

    monkeypatch.setattr(sharded_prediction, "write_csv", killed)
    (images / DAMAGED[1]).write_bytes((images / "00.png").read_bytes())
    with pytest.raises(Killed):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    monkeypatch.setattr(sharded_prediction, "write_csv", write)
    (images / DAMAGED[0]).write_bytes((images / "00.png").read_bytes())
    assert predict_shards(predictor, below(images), tmp_path / "out", OPTIONS) == Totals(11, 0)
    assert len(rows(tmp_path / "out")) == 11 and not list((tmp_path / "out").glob("errors-*"))


def test_ctrl_c_between_shards(images: Path, tmp_path: Path, predictor: Predictor, monkeypatch, capsys) -> None:
    real, done = sharded_prediction.predict_shard, []

    def pressed(*arguments) -> dict:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[1][0])
        return real(*arguments)

    monkeypatch.setattr(sharded_prediction, "predict_shard", pressed)
    with pytest.raises(Stopped, match="2 of 4 shards are finished(.|\n)*run the same command again"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    monkeypatch.setattr(sharded_prediction, "predict_shard", lambda *a: done.append(a[1][0]) or real(*a))
    assert predict_shards(predictor, below(images), tmp_path / "out", OPTIONS) == Totals(9, 2)
    assert done == [0, 1, 2, 3] and "2 of 4 shards are finished" in capsys.readouterr().err


def test_a_finished_folder_is_only_counted(images: Path, tmp_path: Path, model: Path, capsys, monkeypatch) -> None:
    arguments = [str(images), "--weights", str(model), "--output", str(tmp_path / "out"), "--shard-rows", "4"]
    assert predict.main(arguments) == 1
    before = contents(tmp_path / "out")
    monkeypatch.setattr(Predictor, "decode", lambda *_: pytest.fail("an image is read again"))
    assert predict.main(arguments) == 1  # the damaged files are still those of this list
    assert "9 image(s) predicted" in capsys.readouterr().out and contents(tmp_path / "out") == before


def test_the_output_may_lie_among_the_images(images: Path, predictor: Predictor) -> None:
    for _ in range(2):
        assert predict_shards(predictor, below(images), images / "out", OPTIONS) == Totals(9, 2)


def test_two_processes_at_a_time(images: Path, tmp_path: Path, predictor: Predictor) -> None:
    with files.locked_folder(tmp_path / "out", "predicts into this folder"):
        with pytest.raises(RunError, match="another process predicts into this folder"):
            predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)


def test_the_largest_manifest_can_be_read_again(tmp_path: Path) -> None:
    digests = {name: "0" * 64 for name in shard_manifest.shard_names(0, "parquet")}
    shard = {"images": 10**6, "paths": "0" * 64, "predictions": 999_999, "errors": 999_999, "sha256": digests}
    shards, settings = [shard] * shard_manifest.MAX_SHARDS, {"columns": ["a long name"] * 2000}
    shard_manifest.write_manifest(tmp_path, settings, shards)
    assert files.read_json(tmp_path / "manifest.json")["shards"] == shards


# --- in a cluster -----------------------------------------------------------------------------------------


class Ray:
    """What the work needs of Ray, in this process; tasks end in the wrong order, all but the last."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [{"Resources": {"CPU": 4.0}} for _ in range(nodes)]
        self.most = self.closed = 0
        self.asked: dict = {}
        self.folders: list = []

    def remote(self, **resources) -> Callable[[Callable], _Tasks]:
        self.asked = resources
        return _Tasks

    def wait(self, tasks: list, timeout: float) -> tuple[list, list]:
        self.most = max(self.most, len(tasks))
        return [tasks[-1]], tasks[:-1]

    def get(self, task):
        function, arguments = task
        return function(*arguments)

    def shutdown(self) -> None:
        self.closed += 1


@pytest.fixture
def ray(monkeypatch) -> Ray:
    fake = Ray()
    monkeypatch.setattr(sharded_prediction, "connect", lambda *folders: fake.folders.append(folders) or fake)
    monkeypatch.setattr(sharded_prediction, "working_nodes", lambda found: found.nodes)
    return fake


class _Tasks:
    """Tasks that can be the keys of a dictionary."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def remote(self, *arguments) -> _Task:
        return _Task((self.function, arguments))


class _Task(tuple):
    __hash__ = object.__hash__


def test_a_cluster_writes_the_same(images: Path, tmp_path: Path, model: Path, predictor: Predictor, ray: Ray) -> None:
    predict_shards(predictor, below(images), tmp_path / "here", replace(OPTIONS, rows=1))
    cluster = Cluster("auto", functools.partial(Predictor.from_weights, model))
    for _ in range(2):
        assert predict_shards(predictor, below(images), tmp_path / "out", replace(OPTIONS, rows=1), cluster) == (9, 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    assert ray.asked == {"num_cpus": 4, "num_gpus": 0} and ray.most == 4 and ray.closed == 1
    assert ray.folders == [("auto", [tmp_path / "out"], [images])]  # the second call finds nothing to do


def test_faults_in_a_cluster(images: Path, tmp_path: Path, predictor: Predictor, ray: Ray, monkeypatch) -> None:
    other = Cluster("auto", functools.partial(Predictor.from_weights, saved(tmp_path / "other")))
    with pytest.raises(RunError, match="opens another model"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS, other)
    gone = Cluster("auto", functools.partial(Predictor.from_weights, tmp_path / "gone.pdparams"))
    with pytest.raises(RunError, match="gone.pdparams"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS, gone)

    def dies(task):
        raise Ray.exceptions.RayError("The worker died\nout of memory")

    monkeypatch.setattr(ray, "get", dies)
    with pytest.raises(RunError, match="shard 3: out of memory"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS, gone)
    monkeypatch.setattr(ray, "wait", lambda tasks, timeout: ray.nodes.clear() or ([], tasks))
    with pytest.raises(SetupError, match="no node of the Ray cluster is left"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS, gone)
    assert ray.closed == 4


# --- nothing else is continued ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, "shard_rows: 3, now 4"),
        ({"batch_size": 3}, "batch_size: 2, now 3"),
        ({"format": "parquet"}, "format: 'csv', now 'parquet'"),
        ({"coverage": 0.9}, "coverage: None, now 0.9"),
        ({"workers": 1}, ""),
    ],
)
def test_other_options(change: dict, message: str, images: Path, tmp_path: Path, predictor: Predictor) -> None:
    predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    before = contents(tmp_path / "out")
    if message:
        with pytest.raises(RunError, match=f"with another model, other options or another list(.|\n)*{message}"):
            predict_shards(predictor, below(images), tmp_path / "out", replace(OPTIONS, **change))
    else:
        predict_shards(predictor, below(images), tmp_path / "out", replace(OPTIONS, **change))
    assert contents(tmp_path / "out") == before


def test_another_model(images: Path, tmp_path: Path, model: Path, predictor: Predictor) -> None:
    predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    same = Predictor.from_weights(shutil.copytree(model.parent, tmp_path / "copied"))
    assert predict_shards(same, below(images), tmp_path / "out", OPTIONS) == Totals(9, 2)
    warmer = saved(tmp_path / "warmer", prediction_sets=good_record(), temperature=2.0)
    others = saved(tmp_path / "others", preprocessing=replace(SIDECAR.preprocessing, size_px=36))
    for weights, message in ((warmer, "sidecar: "), (others, "sidecar: ")):
        with pytest.raises(RunError, match=message):
            predict_shards(Predictor.from_weights(weights), below(images), tmp_path / "out", OPTIONS)
    averaged = Predictor.from_weights(cross_validation(tmp_path / "cv"))
    with pytest.raises(RunError, match="weights: (.|\n)*columns: "):
        predict_shards(averaged, below(images), tmp_path / "out", OPTIONS)


LISTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an image more": (lambda folder: (folder / "03a.png").write_bytes(b""), "from image 4 on"),
    "an image less": (lambda folder: (folder / "07.png").unlink(), "from image 7 on"),
    "the last image less": (lambda folder: (folder / "10.png").unlink(), "from image 10 on"),
    "a block less": (lambda folder: [(folder / f"{n}.png").unlink() for n in ("09", "10")], "from image 10 on"),
    "another name": (lambda folder: (folder / "00.png").rename(folder / "0.png"), "from image 1 on"),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("when", ["between two starts", "at work"])
def test_another_list(name: str, when: str, images: Path, tmp_path: Path, predictor: Predictor) -> None:
    change, message = LISTS[name]
    if when == "at work":

        class Changing(ImageFiles):
            def __iter__(self):
                yield from super().__iter__()
                if not (tmp_path / "changed").exists():
                    (tmp_path / "changed").touch()
                    change(images)

        with pytest.raises(RunError, match=f"has changed since the start, {message}"):
            predict_shards(predictor, Changing([str(images)]), tmp_path / "out", OPTIONS)
        return
    predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    change(images)
    with pytest.raises(RunError, match=f"another list(.|\n)*the list of images, {message}"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)


def _shard(number: int, **values: object) -> Callable[[dict], object]:
    return lambda manifest: manifest["shards"][number].update(values)


DAMAGES: dict[str, Callable[[dict], object] | bytes] = {
    "empty": b"",
    "not JSON": b"\x00\xff",
    "100,000 brackets": b"[" * 10**5,
    "a list": b"[]",
    "of another kind": lambda manifest: manifest.update(kind="paddle_medcls weights"),
    "settings: a list": lambda manifest: manifest.update(settings=[]),
    "settings of another model": lambda manifest: manifest["settings"].update(weights=["0" * 64]),
    "shards: an object": lambda manifest: manifest.update(shards={}),
    "shards: numbers": lambda manifest: manifest.update(shards=[1, 2]),
    "a shard less": lambda manifest: manifest["shards"].pop(),
    "a shard more": lambda manifest: manifest["shards"].append({"images": 3, "paths": "0" * 64}),
    "two rows more": _shard(0, predictions=5),
    "minus one row": _shard(0, predictions=-1, errors=4),
    "rows: text": _shard(0, predictions="3"),
    "rows: true": _shard(3, predictions=True, errors=True),
    "sha256: a list": _shard(0, sha256=[]),
    "sha256 of another file": _shard(0, sha256={"../model/COVID.pdparams": "0" * 64}),
    "another sha256": _shard(0, sha256={"predictions-000000.csv": "0" * 64}),
}
"""What a manifest may hold that is not the one that was written."""


def damaged(folder: Path, name: str, predictor: Predictor | None = None) -> None:
    """Continues a finished folder whose manifest is damaged."""
    predictor = predictor or Predictor.from_weights(saved(folder / "m"))
    for number in range(4):
        write_image(folder / "images" / f"{number}.png", pixels(number))
    (folder / "images" / "3.png").write_bytes(b"")
    predict_shards(
        predictor, below(folder / "images"), folder / "out", replace(OPTIONS, rows=1 if "true" in name else 3)
    )
    path, damage = folder / "out" / "manifest.json", DAMAGES[name]
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        manifest = json.loads(path.read_text())
        damage(manifest)
        path.write_text(json.dumps(manifest))
    predict_shards(
        predictor, below(folder / "images"), folder / "out", replace(OPTIONS, rows=1 if "true" in name else 3)
    )


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_manifest_is_refused(name: str, tmp_path: Path, predictor: Predictor) -> None:
    with pytest.raises(RunError, match="are damaged|with another model, other options or another list"):
        damaged(tmp_path, name, predictor)


@pytest.mark.parametrize("harm", ["changed", "missing", "a folder"])
@pytest.mark.parametrize("name", ["predictions-000002.csv", "errors-000001.csv"])
def test_a_finished_shard_that_was_harmed(name: str, harm: str, images: Path, tmp_path: Path, predictor) -> None:
    predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    path = tmp_path / "out" / name
    content = path.read_bytes()
    path.unlink()
    if harm == "changed":
        path.write_bytes(content.replace(b"0", b"1", 1))
    elif harm == "a folder":
        path.mkdir()
    with pytest.raises(RunError, match=f"are damaged(.|\n)*{name}: missing, or changed since it was written"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)


def test_shards_of_unknown_origin(images: Path, tmp_path: Path, predictor: Predictor) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions-000000.csv").write_text("mine")
    with pytest.raises(RunError, match="holds shards but no manifest.json(.|\n)*predictions-000000.csv"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == {"predictions-000000.csv": b"mine"}


def test_too_many_shards(images: Path, tmp_path: Path, predictor: Predictor, monkeypatch) -> None:
    monkeypatch.setattr(shard_manifest, "MAX_SHARDS", 3)
    with pytest.raises(RunError, match="larger --shard-rows"):
        predict_shards(predictor, below(images), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


# --- the list -------------------------------------------------------------------------------------------


def test_folders_are_listed_in_the_order_of_pathlib(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = ["a", "a.png", "a-b.png", "a b", "B.PNG", "é.jpg", "c.txt", "d.dcm", ".png", "x.png.d", "\n.jpeg"]
    for _ in range(60):
        parts = [rng.choice(names) for _ in range(rng.randint(1, 4))]
        path = tmp_path.joinpath(*parts)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path)  # a link to a folder, which has no end
    (tmp_path / "z.png").symlink_to(next(path for path in tmp_path.rglob("*.dcm") if path.is_file()))
    suffixes = (".png", ".jpg", ".jpeg", ".dcm")
    slow = sorted(path for path in tmp_path.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    assert list(files_below(str(tmp_path))) == [str(path) for path in slow] and len(slow) > 10


def test_a_pipe_with_the_name_of_an_image_is_reported(tmp_path: Path, predictor: Predictor) -> None:
    write_image(tmp_path / "images" / "a.png", pixels(0))
    os.mkfifo(tmp_path / "images" / "b.png")
    (tmp_path / "images" / "c.png").symlink_to(tmp_path / "none.png")
    assert predict_shards(predictor, below(tmp_path / "images"), tmp_path / "out", OPTIONS) == Totals(1, 2)
    errors = [error for _, error in rows(tmp_path / "out", "errors")]
    assert "a pipe or device" in errors[0] and "No such file" in errors[1]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    def refuses(path: str):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match="the folder cannot be read: Permission denied"):
        list(files_below(str(tmp_path)))


def test_a_list_holds_its_order_and_its_repetitions(images: Path, tmp_path: Path, model: Path, capsys) -> None:
    names = ["05.png", "00.png", "05.png", "none.png"]
    (images / os.fsdecode(b"\xff .png")).write_bytes((images / "00.png").read_bytes())
    content = b"\r\n".join([*(os.fsencode(images / name) for name in names), bytes(images) + b"/\xff .png"])
    (tmp_path / "list.txt").write_bytes(content)
    arguments = ["--list", str(tmp_path / "list.txt"), "--weights", str(model)]
    assert predict.main([*arguments, "--output", str(tmp_path / "out"), "--format", "csv"]) == 1
    assert [Path(row[0]).name for row in rows(tmp_path / "out")] == [*names[:3], "\\udcff .png"]
    assert "none.png: No such file" in rows(tmp_path / "out", "errors")[0][1]
    assert predict.main([*arguments, "--json"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 5  # with the line about the shards


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the list is empty"),
        (b"a.png\n\nb.png\n", "line 2 is empty"),
        (b"a.png\nb\0.png\n", "line 2 is no path"),
        (b"x" * 70_000, "line 1 is no path"),
        (None, "the list cannot be read: No such file"),
    ],
)
def test_a_faulty_list(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(listed_files(tmp_path / "list.txt"))


def test_a_list_that_cannot_be_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    for path in (tmp_path / "list.txt", tmp_path):
        with pytest.raises(DataError, match="must be a regular file"):
            list(listed_files(path))


def test_a_long_list_takes_no_memory() -> None:
    class Many:
        def __iter__(self):
            return (f"/data/images/{number:09}.png" for number in range(50_000))

    tracemalloc.start()
    try:
        plan = shard_manifest.plan_shards(Many(), 500)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # all paths would take 4 MB
    finally:
        tracemalloc.stop()
    assert len(plan) == 100 and len({shard["paths"] for shard in plan}) == 100
