"""The sources of images: Kaggle's tables, the rule by number, the split without a source, metrics of each source."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from fakes import covid_images, covid_tree
from sklearn.metrics import mutual_info_score

from paddle_medcls.cli import prepare
from paddle_medcls.core.errors import DataError
from paddle_medcls.data.datasets import covid, covid_sources, load_index
from paddle_medcls.data.datasets.covid_sources import sources_of
from paddle_medcls.data.index import SYNTHETIC_MARK, Index
from paddle_medcls.evaluation.by_source import class_counts, label_from_source, metrics_by_source, source_table
from paddle_medcls.evaluation.metrics import evaluate_logits, wilson
from paddle_medcls.evaluation.outputs import score_split
from paddle_medcls.models.output_head import OutputHead

RSNA = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data"
KERMANY = "https://www.kaggle.com/paultimothymooney/chest-xray-pneumonia"


def xlsx(rows: list[tuple], columns: tuple = ("FILE NAME", "FORMAT", "SIZE", "URL")) -> bytes:
    """A table as Kaggle's archive has it."""
    data = io.BytesIO()
    pandas.DataFrame(rows, columns=list(columns)).to_excel(data, index=False)
    return data.getvalue()


def row(name: object, url: object) -> tuple:
    return name, "PNG", "256*256", url


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("Normal/images/Normal-62.png", "RSNA"),  # 62 to 63 and 1403 to 1404: adult beside child, looked at
        ("Normal/images/Normal-63.png", "Kermany"),
        ("Normal/images/Normal-1403.png", "Kermany"),
        ("Normal/images/Normal-1404.png", "RSNA"),
        ("Lung_Opacity/images/Lung_Opacity-63.png", "RSNA"),
        ("LungOpacity/LungOpacity-63.png", "RSNA"),
        ("Viral Pneumonia/images/Viral Pneumonia-2000.png", "Kermany"),
        ("COVID/images/COVID-1.png", "several"),
        ("Normal/images/photo-1.png", "unknown"),
        ("Normal/images/Normal-1-copy.png", "unknown"),
    ],
)
def test_sources_by_number(tmp_path: Path, name: str, source: str) -> None:
    known = "COVID/images/COVID-7.png"
    assert sources_of(tmp_path, [name, known]) == (source, "several")
    assert len(covid_sources.KERMANY) == 1341  # images of Normal from that set, says the archive's README


def test_images_of_unknown_names_have_no_sources(tmp_path: Path) -> None:
    assert sources_of(tmp_path, ["Normal/a.png", "COVID/b.png"]) == ()


def test_sources_from_tables(tmp_path: Path) -> None:
    """The table of a class stands above the rule; names differ in case; an image that it lacks is unknown."""
    rows = [row("NORMAL-1", KERMANY), row("NORMAL-2", RSNA), row("Normal-3.png", "https://www.example.org/x?y")]
    (tmp_path / "Normal.metadata.xlsx").write_bytes(xlsx(rows))
    ids = [f"Normal/images/Normal-{number}.png" for number in (1, 2, 3, 4)] + ["COVID/images/COVID-1.png"]
    assert sources_of(tmp_path, ids) == ("Kermany", "RSNA", "www.example.org", "unknown", "several")
    (tmp_path / "Normal.metadata.xlsx").write_bytes(xlsx([row("NORMAL-1", RSNA), *rows[1:], row("NORMAL-4", RSNA)]))
    assert sources_of(tmp_path, ids)[:4] == ("RSNA", "RSNA", "www.example.org", "RSNA")


def test_the_table_of_a_class_below_the_data_root(tmp_path: Path) -> None:
    inside = covid_images(tmp_path / "COVID-19_Radiography_Dataset", "kaggle", count=10)
    (inside / "Viral Pneumonia.metadata.xlsx").write_bytes(
        xlsx([row(f"Viral Pneumonia-{number}", RSNA) for number in range(1, 11)])
    )
    for split, text in covid.make_split_files(tmp_path, 0).items():
        (tmp_path / f"{split}.txt").write_text(text)
    index = load_index("covid", tmp_path, "test")
    assert index.sources == ("several", "RSNA", "RSNA", "RSNA") and index.subset([2, 0]).sources == ("RSNA", "several")
    (tmp_path / SYNTHETIC_MARK).touch()
    assert load_index("covid", tmp_path, "test").sources == ()


FAULTY_TABLES = [
    (b"<html>404</html>", "cannot be read: File is not a zip file"),
    (b"", "cannot be read: File is not a zip file"),
    (xlsx([]), "holds no rows"),
    (xlsx([row("Normal-1", "=1+1")]), "1 faulty row"),
    (xlsx([row("Normal-1", RSNA)])[:900], "cannot be read"),
    (xlsx([row("Normal-1", RSNA)], ("FILE", "FORMAT", "SIZE", "URL")), "lacks a column"),
    (xlsx([row("Normal-1", None)]), "1 faulty row"),
    (xlsx([row(None, RSNA), row("Normal-2", RSNA)]), "1 faulty row"),
    (xlsx([row("Normal-1", "see the README")]), "1 faulty row"),
    (xlsx([row("Normal-1", "http://[1")]), "1 faulty row"),
    (xlsx([row("Normal-1", RSNA), row("NORMAL-1", KERMANY)]), "1 faulty row"),
]


@pytest.mark.parametrize(("content", "message"), FAULTY_TABLES, ids=map(str, range(len(FAULTY_TABLES))))
def test_faulty_tables(tmp_path: Path, content: bytes, message: str) -> None:
    root = covid_tree(tmp_path / "covid")
    (root / "Normal.metadata.xlsx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_index("covid", root, "train")


@pytest.fixture
def large_root(tmp_path: Path) -> Path:
    """40 images: Normal-1 to -7 are RSNA's by a table, -8 to -10 Kermany's."""
    covid_images(tmp_path, count=10)
    rows = [row(f"NORMAL-{number}", RSNA if number < 8 else KERMANY) for number in range(1, 11)]
    (tmp_path / "Normal.metadata.xlsx").write_bytes(xlsx(rows))
    assert prepare.main(["--dataset", "covid", "--data-root", str(tmp_path), "--split"]) == 0
    return tmp_path


def test_a_source_is_held_out(large_root: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--dataset", "covid", "--data-root", str(large_root), "--split", "--hold-out-source", "Kermany"]
    assert prepare.main(words) == 0
    shown = capsys.readouterr().out
    assert "the training split then has no image of ViralPneumonia" in shown
    assert f"Use it with --data-root {large_root / 'without_Kermany'}" in shown
    usual, without = (
        {split: load_index("covid", root, split) for split in covid.SPLITS}
        for root in (large_root, large_root / "without_Kermany")
    )
    for split in ("train", "val"):  # the others stay where they are
        rows = [k for k, source in enumerate(usual[split].sources) if source != "Kermany"]
        assert without[split].ids == usual[split].subset(rows).ids and "Kermany" not in without[split].sources
    test = without["test"]
    assert set(usual["test"].ids) <= set(test.ids) and test.sources.count("Kermany") == 13
    assert sum(map(len, without.values())) == 40 == sum(map(len, usual.values()))
    assert test.note == "all images of the source Kermany are in the test split" and usual["test"].note == ""
    assert test[0][0].shape == (32, 32, 3)  # the images are found above the split files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hold-out-source", "kermani"], r"no image is of the source 'kermani'; did you mean 'Kermany'\?"),
        (["--hold-out-source", ""], "no image is of the source ''"),
        (["--hold-out-source", "../x"], "no image is of the source '../x'"),
    ],
)
def test_a_source_that_is_not_there(large_root: Path, words: list, message: str) -> None:
    words = ["--dataset", "covid", "--data-root", str(large_root), "--split", *words, "--debug"]
    with pytest.raises(DataError, match=message):
        prepare.main(words)
    assert not list(large_root.glob("without*"))


def test_the_only_source_cannot_be_held_out(tmp_path: Path) -> None:
    covid_images(tmp_path, count=10)
    for name in ("COVID", "LungOpacity", "Normal", "ViralPneumonia"):
        rows = [row(f"{name}-{number}", RSNA) for number in range(1, 11)]
        (tmp_path / f"{name}.metadata.xlsx").write_bytes(xlsx(rows))
    with pytest.raises(DataError, match="without RSNA there is no image for train and val"):
        covid.hold_out_source(tmp_path, 0, "RSNA")


def test_hold_out_needs_split_and_sources(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        prepare.main(["--dataset", "covid", "--check", "--hold-out-source", "RSNA"])
    assert end.value.code == 2


@pytest.mark.parametrize("content", [b"", b"a/b\n", b"\xff", b"x" * 300, b"RSNA\nKermany\n"])
def test_a_faulty_name_of_the_source(covid_root: Path, content: bytes) -> None:
    (covid_root / "held_out.txt").write_bytes(content)
    with pytest.raises(DataError, match="held_out.txt (does not name a source|cannot be read)"):
        load_index("covid", covid_root, "train")


def index_of(labels: list[int], sources: list[str], split: str = "train", groups: tuple = ()) -> Index:
    ids, images = tuple(map(str, range(len(labels)))), np.zeros((len(labels), 2, 2), np.uint8)
    return Index(
        "made", split, ids, images, np.array(labels), ("a", "b", "c"), "multi-class", groups, sources=tuple(sources)
    )


def test_what_the_source_tells_of_the_label() -> None:
    train = index_of([0, 0, 0, 1, 2, 2, 2, 1], list("xxxxyyyz"))
    scored = index_of([0, 1, 2, 1, 0, 2], list("xxyzqz"), "test")  # q is no training source: class 0, of 0 and 2
    assert class_counts([train]) == {"x": [3, 1, 0], "y": [0, 0, 3], "z": [0, 1, 0]}
    found = label_from_source(train, scored)
    assert (found["n"], found["accuracy"], found["chance"]) == (6, 4 / 6, 2 / 6)
    assert found["interval"] == list(wilson(4, 6))
    expected = mutual_info_score(train.labels, train.sources) / np.log(2)
    assert found["source_bits"] == pytest.approx(expected)
    assert found["label_bits"] == pytest.approx(mutual_info_score(train.labels, train.labels) / np.log(2))
    one = index_of([0, 1, 2], list("xxx"))
    assert label_from_source(one, one)["source_bits"] == pytest.approx(0)


HEAD = OutputHead("multi-class", "softmax", ("a", "b", "c"))


def test_metrics_of_each_source_are_those_of_its_images() -> None:
    rng = np.random.default_rng(0)
    labels, sources = rng.integers(0, 3, 90).tolist(), rng.choice(["x", "y"], 90).tolist()
    labels += [1, 1]
    sources += ["z", "z"]
    index = index_of(labels, sources, "test", tuple(f"p{k // 2}" for k in range(92)))
    logits = rng.normal(size=(92, 3)) + 2 * np.eye(3)[labels]
    found = score_split(logits, index, HEAD)["by_source"]
    assert list(found) == ["x", "y", "z"]
    for name, metrics in found.items():
        rows = [k for k, source in enumerate(sources) if source == name]
        part = index.subset(rows)
        expected = evaluate_logits(logits[rows], part.labels, HEAD, groups=part.groups)
        assert metrics["n"] == len(rows) and metrics["accuracy"] == expected["accuracy"]
        np.testing.assert_equal(metrics["auc"], expected["auc"])
        np.testing.assert_equal(metrics["intervals"], expected["intervals"])
        classes = [one for one in expected["per_class"] if one["support"]]
        for one, cells in zip(classes, metrics["recall"]):
            hits = round(one["recall"] * one["support"])
            assert cells == {key: one[key] for key in ("class", "recall", "support")} | {
                "interval": list(wilson(hits, one["support"]))
            }
        assert len(classes) == len(metrics["recall"]) == (1 if name == "z" else 3)
    assert np.isnan(found["z"]["auc"])
    text = source_table(found)
    assert f"b {found['z']['recall'][0]['recall']:.3f}" in text and "–" in text
    assert "by_source" not in score_split(logits, index_of(labels, [], "test"), HEAD)


def test_several_labels_an_image() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1]])
    index = Index(
        "made",
        "test",
        ("1", "2", "3"),
        np.zeros((3, 2, 2)),
        labels,
        ("a", "b", "c"),
        "multi-label",
        sources=("x", "x", "y"),
    )
    guesses = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 1]])
    found = metrics_by_source(guesses * 0.8 + 0.1, guesses, index)
    assert found["x"]["accuracy"] == pytest.approx(5 / 6) and found["y"]["accuracy"] == 1
    assert [one["recall"] for one in found["x"]["recall"]] == [1, 0.5]  # of a and c: no image of x has b


def test_the_check_prints_the_sources(large_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--dataset", "covid", "--data-root", str(large_root), "--check", "--workers", "1"]
    assert prepare.main([*words, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "3 source(s) of images:" in shown and "the source alone gives the class of" in shown
    found = json.loads((tmp_path / "out" / "check.json").read_text())["sources"]
    assert found["counts"] == {"Kermany": [0, 0, 3, 10], "RSNA": [0, 10, 7, 0], "several": [10, 0, 0, 0]}
    assert found["label_from_source"]["chance"] == 0.25
