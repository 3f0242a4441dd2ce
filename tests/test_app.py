"""The web page: same probabilities as predict.py, separate users, one sentence per error."""

from __future__ import annotations

import csv
import html
import json
import os
import pickle
import re
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

import cv2
import numpy as np
import pytest
import toynet  # noqa: F401  adds the network "toy"
from fakes import ROOT, TOOLS, pixels, write_image

from paddle_medcls.cli import app, predict
from paddle_medcls.core.files import sha256
from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.evaluation.tables import NOTICE
from paddle_medcls.models.network import Network
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.models.weights import save_weights
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.web import is_local

CHROMIUM = Path("/usr/bin/chromium")
FIGURES = {
    "split": "val",
    "n": 40,
    "accuracy": 0.875,
    "auc": 0.9375,
    "loss": 0.4,
    "intervals": {"accuracy": [0.7389, 0.9454], "auc": [0.8471, 1.0]},
    "per_class": [
        {
            **{"class": "a", "precision": 0.5, "recall": 1.0, "f1": 0.6667, "specificity": None},
            **{"support": 7, "predicted": 14},
        }
    ],
}


@pytest.fixture(autouse=True)
def main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """AppTest leaves its script as the module __main__, which processes that other tests start would run again."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture(scope="session")
def apptest():
    """Streamlit's test of a script without a browser, where it can upload files."""
    testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")
    if not hasattr(testing.AppTest, "file_uploader"):  # the newest for Python 3.9, 1.50, has not
        pytest.skip("this Streamlit cannot upload files in its tests; a newer one can")
    return testing.AppTest


def model(folder: Path, task: str = "multi-class", classes: tuple = ("a", "b", "c"), **changes) -> Path:
    """A weight file of random values with its sidecar; `changes` are fields of the sidecar."""
    loss = "softmax" if task == "multi-class" else "sigmoid"
    name, size = changes.pop("network", "toy"), changes.pop("size_px", 16)
    network = Network(name, 1 if task == "binary" else len(classes))
    paddle.seed(len(classes))
    weights = folder / "MODEL.pdparams"
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(network.build(), weights)
    fields = {"dataset": "palm", "recipe": "toy", "classes": classes, "task": task, "loss": loss, "network": network}
    fields |= {"preprocessing": Preprocessing(size_px=size), "metrics": FIGURES, "sha256": sha256(weights), **changes}
    Sidecar(**fields).write(weights.with_suffix(".json"))
    return weights


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def opened(apptest, weights: Path | str = "", language: str = "en"):
    """The page after its first run."""

    def script(weights: str, language: str) -> None:
        from paddle_medcls.web.page import main

        main(weights, language)

    at = apptest.from_function(script, kwargs={"weights": str(weights), "language": language}, default_timeout=30)
    return checked(at.run())


def checked(at):
    assert not at.exception, at.exception
    return at


def upload(at, *files: tuple[str, bytes]):
    return checked(at.file_uploader(key="images").set_value([(*file, "image/png") for file in files]).run())


def markup(at) -> str:
    return "\n".join(element.proto.body for element in at.get("html"))


def bars(text: str) -> dict[str, float]:
    """Class -> probability with six digits, from the bars of the page."""
    titles = re.findall(r'class="bar[^"]*" title="([^"]*) ([0-9.]+)"', text)
    return {html.unescape(name): float(p) for name, p in titles}


def by_command(weights: Path, files: list[Path], capsys) -> list[dict]:
    """What `predict.py --json` says, one object a file."""
    capsys.readouterr()
    arguments = ["--weights", str(weights), "--json", "--topk", "99", "--device", "cpu"]
    assert all(predict.main([*arguments, str(file)]) == 0 for file in files)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- without a browser ------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_command(apptest, tmp_path: Path, capsys) -> None:
    weights = model(tmp_path)
    files = [tmp_path / name for name in ("a.png", "b.jpg", "c.tiff", "grey.png")]
    for number, file in enumerate(files[:2]):
        write_image(file, pixels(number, 60 + 90 * number))
    cv2.imwrite(str(files[2]), pixels(5).astype(np.uint16) * 257)  # 16 bits
    write_image(files[3], pixels(7)[:, :, 0])
    at = opened(apptest, weights)
    upload(at, *((file.name, file.read_bytes()) for file in files))
    for number, said in enumerate(by_command(weights, files, capsys)):
        checked(at.selectbox(key="shown").set_value(number).run())
        assert bars(markup(at)) == {item["label"]: item["probability"] for item in said["topk"]}
        assert f'class="verdict">{said["label"]}<' in markup(at)
    table = at.dataframe[0].value
    assert list(table["Image"]) == [file.name for file in files] and len(set(table["P(a)"])) == 4
    assert not at.error


def test_an_average_says_how_far_its_models_agree(apptest, tmp_path: Path, capsys) -> None:
    for number, temperature in ((1, 1.0), (2, 0.2)):
        model(tmp_path / "cv" / f"fold{number}", temperature=temperature)
    at = opened(apptest, tmp_path / "cv")
    file = write_image(tmp_path / "a.png", pixels(3))
    upload(at, (file.name, file.read_bytes()))
    (said,) = by_command(tmp_path / "cv", [file], capsys)
    assert bars(markup(at)) == {item["label"]: item["probability"] for item in said["topk"]}
    found = said["disagreement"]
    assert found["sd"] > 0.001
    assert f"average of 2 models: {found['same_label']} give this result" in markup(at)
    assert f"probability {found['sd']:.4f}" in markup(at)


def test_a_bad_file_is_a_sentence_and_the_others_are_predicted(apptest, tmp_path: Path) -> None:
    at = opened(apptest, model(tmp_path))
    good = png(pixels(1))
    bad = "x ![](http://a.b).png"
    upload(at, ("good.png", good), (bad, b"<html>not found</html>"), ("half.png", good[:200]), ("none.png", b""))
    said = [error.value.replace("\\", "") for error in at.error]
    assert said[0].startswith(f"{bad}: not an image") and "half.png: " in said[1] and "truncated" in said[1]
    assert said[2] == "none.png: the file is empty" and len(said) == 3
    assert "![" not in at.error[0].value.replace(r"\!\[", "")  # no picture of another server
    assert len(bars(markup(at))) == 3


def test_many_files_good_and_bad(apptest, tmp_path: Path) -> None:
    """Every good one is in the table; of the bad ones the first are named, and the others counted."""
    at = opened(apptest, model(tmp_path))
    good = [(f"{number}.png", png(pixels(number))) for number in range(100)]
    upload(at, *good, *((f"bad {number}.png", b"<html>") for number in range(30)))
    assert list(at.dataframe[0].value["Image"]) == [name for name, _ in good]
    said = [error.value.replace("\\", "") for error in at.error]
    assert len(said) == 21 and said[19].startswith("bad 19.png: ") and said[20].startswith("… and 10 more files")


def test_the_decision_of_each_task(apptest, tmp_path: Path) -> None:
    """The threshold decides, not the largest probability; no label may be above it, or several."""
    file = ("a.png", png(pixels(1)))
    at = upload(opened(apptest, model(tmp_path / "low", "binary", ("no", "yes"), threshold=0.001)), file)
    assert 'class="verdict">yes<' in markup(at) and "is above the threshold of 0.001" in markup(at)
    assert markup(at).count("<u style") == 1  # the mark stands on the bar of class 1
    at = upload(opened(apptest, model(tmp_path / "high", "binary", ("no", "yes"), threshold=0.999)), file)
    assert 'class="verdict">no<' in markup(at) and "is not above the threshold of 0.999" in markup(at)
    labels = tuple(f"label {k}" for k in range(14))
    at = upload(opened(apptest, model(tmp_path / "none", "multi-label", labels, threshold=0.9999)), file)
    assert 'class="verdict">none of the labels<' in markup(at) and "0 of 14 labels" in markup(at)
    at = upload(opened(apptest, model(tmp_path / "all", "multi-label", labels, threshold=0.0)), file)
    assert f'class="verdict">{", ".join(labels)}<' in markup(at)
    many = tuple(f"class {k}" for k in range(30))
    at = upload(opened(apptest, model(tmp_path / "many", classes=many)), file)
    assert len(bars(markup(at))) == 16 and "and 14 more classes" in markup(at)


def test_the_heat_map_or_why_there_is_none(apptest, tmp_path: Path) -> None:
    file = ("a.png", png(pixels(1, size=64)))
    at = upload(opened(apptest, model(tmp_path / "toy")), file)  # its map has too few cells
    assert "No heat map: no layer of this Toy" in at.info[-1].value.replace("\\", "") and isinstance(kept(at)[2], str)
    at = upload(opened(apptest, model(tmp_path / "resnet", network="toy_resnet", size_px=64)), file)
    first = kept(at)
    assert first[2].shape == first[1].shape[:2] == (800, 800) and 0.5 < first[2].max() <= 1 and not at.info
    other = next(k for k in range(3) if k != first[0][2])
    selectbox = next(box for box in at.selectbox if box.key.startswith("class "))
    checked(selectbox.set_value(other).run())
    assert kept(at)[0][2] == other and not np.array_equal(kept(at)[2], first[2])
    assert f"evidence for {'abc'[other]}" in markup(at)


def kept(at) -> tuple:
    return at.session_state["heat"]


def test_every_view_says_what_it_is_for(apptest, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for weights in ("", model(tmp_path / "m", drawn=True)):
        assert NOTICE in markup(opened(apptest, weights))
        chinese = opened(apptest, weights, "zh")
        assert "仅供研究和教学" in markup(chinese) and NOTICE not in markup(chinese)
    at = opened(apptest, weights)
    assert "trained on synthetic images" in markup(at)
    checked(at.pills[0].set_value(["pathologic"]).run())
    assert "generated by this program" in markup(at) and len(bars(markup(at))) == 3
    checked(at.segmented_control(key="language").set_value("zh").run())
    assert "程序生成" in markup(at) and len(bars(markup(at))) == 3


def test_texts_have_both_languages_and_the_same_gaps() -> None:
    from paddle_medcls.web.texts import TEXTS

    for key, both in TEXTS.items():
        gaps = [sorted(name for _, name, _, _ in string.Formatter().parse(text) if name) for text in both]
        assert len(both) == 2 and all(both) and gaps[0] == gaps[1], key
    chinese = [key for key, (_, text) in TEXTS.items() if not re.search("[\u4e00-\u9fff]", text)]
    assert set(chinese) == {"auc", "f1"}


def test_models_of_the_runs_newest_first_typed_and_missing(apptest, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = model(Path("runs/old")), model(Path("runs/new"), classes=("p", "q"))
    os.utime(old, (1e9, 1e9))
    (tmp_path / "runs/unfinished").mkdir()
    (tmp_path / "runs/unfinished/MODEL.pdparams").write_bytes(b"")  # no sidecar: no model yet
    at = opened(apptest)
    options = at.selectbox(key="model").options
    assert options[:2] == [os.path.join("new", "MODEL.pdparams"), os.path.join("old", "MODEL.pdparams")]
    assert len(options) == 3 and "p, q" in markup(at)  # served to whom is not known here: no typed paths
    monkeypatch.setattr("paddle_medcls.web.page.is_local", lambda _: True)
    checked(at.run())
    checked(at.selectbox(key="model").set_value("typed").run())
    checked(at.text_input(key="path").set_value("no/such.pdparams").run())
    assert [error.value.replace("\\", "") for error in at.error] == [
        "The model cannot be used: There is no file no/such.pdparams."
    ]
    checked(at.text_input(key="path").set_value(str(new)).run())
    assert "p, q" in markup(at) and not at.error


def test_an_uploaded_model_is_read_without_running_its_code(apptest, tmp_path: Path) -> None:
    weights = model(tmp_path / "m", classes=("p", "q"))
    at = opened(apptest)
    checked(at.selectbox(key="model").set_value("uploaded").run())

    def give(*files: tuple[str, bytes]) -> list[str]:
        checked(at.file_uploader(key="weights").set_value([(*file, "") for file in files]).run())
        return [error.value.replace("\\", "") for error in at.error]

    pair = [(file.name, file.read_bytes()) for file in (weights, weights.with_suffix(".json"))]
    assert give(*pair) == [] and "p, q" in markup(at)
    canary = tmp_path / "canary"
    (hostile,) = give(("x.pdparams", pickle.dumps(Hostile(canary))))
    assert hostile.startswith("The model cannot be used: x.pdparams: ") and "\n" not in hostile
    assert not canary.exists()
    assert len(give(pair[1])) == len(give(pair[0], pair[0])) == 1
    (damaged,) = give(pair[0], ("MODEL.json", pair[1][1][:100]))
    assert "sidecar cannot be read" in damaged


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def test_a_hostile_sidecar_is_shown_as_text(apptest, tmp_path: Path) -> None:
    evil = '<img src="http://a.b/x.png" onerror=alert(1)>'
    row = {"class": evil, **dict.fromkeys(("precision", "recall", "f1", "specificity")), "support": 0, "predicted": 0}
    figures = {"split": evil, "n": 0, "accuracy": None, "intervals": {"accuracy": [None, None]}, "per_class": [row]}
    weights = model(tmp_path, classes=(evil, "![](http://a.b)"), metrics=figures, versions={evil: evil})
    at = upload(opened(apptest, weights), (f"{evil}.png".replace("/", "_"), png(pixels(1))))
    assert "<img" not in markup(at) and html.escape(evil) in markup(at) and len(bars(markup(at))) == 2
    assert "http" not in " ".join(element.value for element in (*at.markdown, *at.caption, *at.subheader))


def test_the_card_shows_figures_with_intervals(apptest, tmp_path: Path) -> None:
    shown = markup(opened(apptest, model(tmp_path, temperature=1.25)))
    for text in ("<td>0.8750</td><td>0.7389 – 0.9454</td>", "<td>0.9375</td>", "<td>1.25</td>", "16 × 16 px, stretch"):
        assert text in shown
    assert sha256(tmp_path / "MODEL.pdparams") in shown


def test_paddle_first_imported_in_a_thread_of_streamlits(apptest, tmp_path: Path) -> None:
    """Other threads than that one start in Paddle's static mode, so a second run would fail."""
    script = f"""
import zlib, toynet
from paddle_medcls.web.page import main
main({str(model(tmp_path))!r}, "en")
"""
    code = f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from streamlit.testing.v1 import AppTest
at = AppTest.from_string({script!r}, default_timeout=60).run()
assert not at.exception, at.exception
at.pills[0].set_value(["pathologic"]).run()
assert not at.exception and not at.error, (at.exception, at.error)
print(sum('class="verdict"' in element.proto.body for element in at.get("html")))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["0", "65536", "many"])
def test_a_wrong_port_is_wrong_usage(port: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        app.main(["--port", port])
    assert stop.value.code == 2


def test_a_taken_port_is_one_message(capsys) -> None:
    pytest.importorskip("streamlit", reason="streamlit is not installed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert app.main(["--port", str(port)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and f"port {port}" in said.err and "--port N" in said.err and "Traceback" not in said.err
    assert app.main(["--address", "203.0.113.7"]) == 1  # of the documentation's net, no machine's
    assert "cannot serve at 203.0.113.7" in capsys.readouterr().err


def test_without_streamlit_the_message_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "streamlit.web", None)
    assert app.main([]) == 1
    assert "SetupError: Streamlit cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False)]
)
def test_which_addresses_are_this_machine_alone(address: str, local: bool) -> None:
    assert is_local(address) is local


# --- in a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-18 with random weights: at 64 px its heat maps have 4 x 4 cells."""
    folder = tmp_path_factory.mktemp("page")
    return model(folder / "runs/toy", network="resnet18", size_px=64, classes=("left", "middle", "right"), drawn=True)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("streamlit", reason="streamlit is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} does not exist (Debian's package chromium)")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(browser, trained: Path):
    """The page as the command serves it, until Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(TOOLS / "app.py"), "--port", str(port), "--lang", "en"]
    log = open(trained.parent / "log.txt", "w+")
    server = subprocess.Popen(command, cwd=trained.parents[2], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            time.sleep(0.25)
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, Path(log.name).read_text()
        yield url
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) == 0, Path(log.name).read_text()
        assert "Traceback" not in Path(log.name).read_text()
    finally:
        server.kill()
        server.wait()
        log.close()


def tab(browser, url: str, asked: list[str]):
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(url)
    return page


def drop(page, *files: Path) -> None:
    page.locator("[data-testid=stMain] input[type=file]").set_input_files(list(map(str, files)))


def test_in_a_browser(browser, address: str, trained: Path, tmp_path: Path, capsys) -> None:
    """Two users at once: each sees the command's figures for the own image, a heat map, and nothing leaves."""
    files = [write_image(tmp_path / f"{name}.png", pixels(k, 50 + 90 * k, 64)) for k, name in enumerate("ab")]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<html>not found</html>")
    asked: list[str] = []
    pages = [tab(browser, address, asked) for _ in files]
    for page, file in zip(pages, files):  # both are sent before either is awaited
        drop(page, file)
    said = by_command(trained, files, capsys)
    for page, expected, file in zip(pages, said, files):
        page.get_by_text("evidence for").wait_for(timeout=60_000)
        wanted = {item["label"]: item["probability"] for item in expected["topk"]}
        assert bars(page.content()) == pytest.approx(wanted, abs=1.5e-6)  # six digits; threads may turn the last
        assert page.locator(".verdict").inner_text() == expected["label"]
        pictures = page.locator("[data-testid=stMain] [data-testid=stImage] img")
        assert pictures.count() == 2 and len({picture_bytes(page, picture) for picture in pictures.all()}) == 2
        shown = page.inner_text("[data-testid=stMain]")
        assert NOTICE in shown and "trained on synthetic images" in shown and file.name in shown
    assert said[0]["topk"] != said[1]["topk"]

    page = pages[0]
    drop(page, bad, files[1])
    error = page.locator("[data-testid=stAlert]")
    error.wait_for(timeout=60_000)
    assert error.inner_text().startswith("bad.png: not an image")
    with page.expect_download(timeout=60_000) as download:
        page.get_by_text("Download as CSV").click()
    command = tmp_path / "command.csv"
    arguments = ["--weights", str(trained), "--csv", str(command), "--device", "cpu"]
    assert predict.main([*map(str, files), *arguments]) == 0
    ours, theirs = (list(csv.reader(Path(file).read_text().splitlines())) for file in (download.value.path(), command))
    assert ours[0] == theirs[0] and [row[1] for row in ours] == [row[1] for row in theirs]
    figures = [np.array([row[2:] for row in rows[1:]], float) for rows in (ours, theirs)]
    assert np.abs(figures[0] - figures[1]).max() < 1e-6 and len(ours) == 3

    assert asked and all(re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:", url) for url in asked), asked


def picture_bytes(page, picture) -> bytes:
    return page.request.get(urljoin(page.url, picture.get_attribute("src"))).body()
