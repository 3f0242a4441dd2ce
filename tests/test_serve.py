"""The HTTP service: its answers are those of `predict`, its limits hold, and no request harms the next."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import TOOLS, pixels, within, write_image
from test_conformal import good_record
from test_predict import SIDECAR, SMALL, saved

from benchmarks.serving import memory_mb, under_load
from paddle_medcls.cli import serve
from paddle_medcls.deployment.prediction import prediction_row
from paddle_medcls.deployment.predictor import Predictor, load_predictor
from paddle_medcls.models.network import Network

pytest.importorskip("fastapi", reason="the service needs fastapi")
pytest.importorskip("prometheus_client", reason="the service needs prometheus-client")
pytest.importorskip("uvicorn", reason="the service needs uvicorn")
pytest.importorskip("python_multipart", reason="the service needs python-multipart")
httpx = pytest.importorskip("httpx", reason="the tests of the service need httpx")

from paddle_medcls.web.service import Limits, Service  # noqa: E402


class Means:
    """A network whose logits are the means of the channels; it keeps the sizes of batches, and can wait or fail."""

    engine, precision = "paddle", "f32"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.refused = -1.0  # mean of the image that it fails on

    def outputs(self, x: np.ndarray) -> dict[str, np.ndarray]:
        self.open.wait(20)
        self.batches.append(len(x))
        means = x.mean((2, 3)) / 64
        if (means[:, 0].round() == self.refused).any():
            raise KeyError("patient 4711")
        return {"logits": means, "features": means}

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.outputs(x)["logits"]


def service_of(limits: Limits = Limits(), token: str = "", **changes: object) -> tuple[Service, Means]:  # noqa: B008
    means = Means()
    predictor = Predictor(replace(SIDECAR, **{"preprocessing": SMALL, **changes}), means)  # type: ignore[arg-type]
    service = Service(predictor, limits, token)
    means.batches.clear()
    return service, means


def talk(service: Service, conversation: Callable[[httpx.AsyncClient], Awaitable], **options: object) -> object:
    """The result of a conversation with a running service; it must not take long."""

    async def run() -> object:
        transport = httpx.ASGITransport(service.app, raise_app_exceptions=False)
        async with service.running(service.app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await conversation(client)

    return within(20, lambda: asyncio.run(run()))


def png(level: int, size: int = 16) -> bytes:
    """A grey image; its logits are all `level` / 64."""
    return cv2.imencode(".png", np.full((size, size, 3), level, np.uint8))[1].tobytes()


def form(*images: bytes) -> list:
    return [("image", (f"{number}.png", data)) for number, data in enumerate(images)]


def post(service: Service, **request: object) -> httpx.Response:
    return talk(service, lambda client: client.post("/predict", **request))  # type: ignore[return-value]


# --- answers -----------------------------------------------------------------------------------------


def test_the_rows_are_those_of_predict(tmp_path: Path) -> None:
    service, _ = service_of(drawn=True)
    images = [write_image(tmp_path / f"{k}.png", pixels(k, size=24)).read_bytes() for k in range(3)]
    rows = post(service, files=form(*images), params={"topk": 3}).json()["predictions"]
    one = post(service_of(drawn=True)[0], content=images[1], params={"topk": 3}).json()["predictions"]
    expected = [
        prediction_row(f"{k}.png", service.predictor.predict(image), service.predictor.sidecar, 3)
        for k, image in enumerate(images)
    ]
    assert rows == json.loads(json.dumps(expected)) and rows[0]["drawn"] and len(rows[0]["topk"]) == 3
    assert one == [{**rows[1], "image": "image"}]


def test_requests_that_arrive_together_share_a_batch() -> None:
    service, means = service_of(Limits(batch=4))

    async def conversation(client: httpx.AsyncClient) -> list[float]:
        means.open.clear()
        first = asyncio.create_task(client.post("/predict", content=png(0)))
        while not service.waiting:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # it is being computed
        others = [asyncio.create_task(client.post("/predict", content=png(30 * k))) for k in range(1, 7)]
        while service._queue.qsize() < 6:
            await asyncio.sleep(0.01)
        means.open.set()
        answers = [await first, *[await other for other in others]]
        assert [answer.status_code for answer in answers] == [200] * 7
        return [answer.json()["predictions"][0]["probability"] for answer in answers]

    assert talk(service, conversation) == [round(1 / 3, 6)] * 7  # all logits of a grey image are equal
    assert means.batches == [1, 4, 2] and service.waiting == 0


def test_each_answer_is_that_of_its_own_image() -> None:
    """Forty requests at once, of images that all have other probabilities."""
    service, means = service_of(Limits(batch=8))
    images = [np.full((8, 8, 3), (0, 6 * k, 120), np.uint8) for k in range(40)]
    expected = [service.predictor.predict(image).probability for image in images]
    means.batches.clear()

    async def conversation(client: httpx.AsyncClient) -> list:
        data = [cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in images]
        return await asyncio.gather(*(client.post("/predict", content=one) for one in data))

    answers = talk(service, conversation)
    found = [answer.json()["predictions"][0]["probability"] for answer in answers]  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(set(found)) > 30 and len(means.batches) < 40


def test_an_image_that_cannot_be_read_stands_beside_the_others() -> None:
    service, _ = service_of()
    answer = post(service, files=form(png(1), png(2)[:60], b"GIF89a", png(3)))
    rows = answer.json()["predictions"]
    assert answer.status_code == 422 and ["error" in row for row in rows] == [False, True, True, False]
    assert rows[1]["error"].startswith("1.png: ") and rows[1]["image"] == "1.png"


def test_the_parameters_are_those_of_predict() -> None:
    strange = {"novelty": {"limit": 1.5, "sha256": "0" * 64}}
    service, _ = service_of(**strange)
    service.predictor.novelty = lambda outputs: outputs["features"][:, 0]
    rows = post(service, files=form(png(64), png(128)), params={"refuse": True}).json()["predictions"]
    assert [(row["label"], row["in_distribution"], row["novelty"]) for row in rows] == [
        ("a", True, 1),
        (None, False, 2),
    ]
    assert post(service_of(**strange)[0], content=png(1), params={"refuse": True}).status_code == 400
    for wrong, status in (("topk=0", 422), ("coverage=0.9", 400), ("coverage=7", 400), ("heatmap=true", 400)):
        assert post(service_of()[0], content=png(1), params=wrong).status_code == status, wrong


def test_a_prediction_set() -> None:
    service, _ = service_of(prediction_sets=good_record())
    expected = service.predictor.predict(png(1), coverage=0.9).prediction_set
    rows = post(service, content=png(1), params={"coverage": 0.9}).json()["predictions"]
    assert expected is not None and rows[0]["prediction_set"] == list(expected)


def test_heat_maps(tmp_path: Path) -> None:
    predictor = load_predictor(saved(tmp_path), engine="paddle")
    image = pixels(5, size=40)
    data = write_image(tmp_path / "eye.png", image).read_bytes()
    rows = post(Service(predictor, Limits(), heat_maps=True), files=form(data), params={"heatmap": True}).json()
    found = cv2.imdecode(np.frombuffer(base64.b64decode(rows["predictions"][0]["heatmap"]), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(found[:, :, ::-1], predictor.gradcam(image).overlay())


# --- limits ------------------------------------------------------------------------------------------


def test_too_large_a_body_is_refused_by_its_announcement_and_by_its_bytes() -> None:
    for body in (bytes(1_000_001), form(bytes(1_000_000))):
        service, means = service_of(Limits(megabytes=1))
        request = {"files": body} if isinstance(body, list) else {"content": body}
        assert post(service, **request).status_code == 413 and service.waiting == 0 and not means.batches

    async def pieces():  # of unknown length
        for _ in range(11):
            yield bytes(100_000)

    service, _ = service_of(Limits(megabytes=1))
    assert post(service, content=pieces()).status_code == 413 and service.waiting == 0


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = service_of(Limits(pixels=1000))
    monkeypatch.setattr(service.predictor, "decode", lambda *_: pytest.fail("it was decoded"))
    answer = post(service, content=png(1, size=32))
    assert answer.status_code == 422 and "1,000 pixels" in answer.json()["predictions"][0]["error"]


@pytest.mark.parametrize(
    "request_",
    [
        {"files": form(*[png(1)] * 17)},
        {"files": [("text", (None, "no file"))]},
        {"content": b"--x\r\n\r\nnothing", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
    ids=["too many images", "a field", "cut", "no boundary", "no part"],
)
def test_forms_that_are_refused(request_: dict) -> None:
    service, means = service_of()
    assert post(service, **request_).status_code == 400 and service.waiting == 0 and not means.batches


def test_a_full_queue_answers_503_and_recovers() -> None:
    service, means = service_of(Limits(queue=5))

    async def conversation(client: httpx.AsyncClient) -> None:
        means.open.clear()
        waiting = [asyncio.create_task(client.post("/predict", files=form(png(1), png(2)))) for _ in range(2)]
        while service.waiting < 4:
            await asyncio.sleep(0.01)
        assert (await client.get("/ready")).status_code == 200
        full = await client.post("/predict", files=form(png(1), png(2)))
        assert (full.status_code, full.headers["Retry-After"]) == (503, "1") and service.waiting == 4
        last = asyncio.create_task(client.post("/predict", content=png(3)))
        while service.waiting < 5:
            await asyncio.sleep(0.01)
        assert (await client.get("/ready")).status_code == 503 and (await client.get("/health")).status_code == 200
        means.open.set()
        assert [(await one).status_code for one in (*waiting, last)] == [200] * 3
        assert (await client.get("/ready")).status_code == 200 and service.waiting == 0

    talk(service, conversation)


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    service, _ = service_of(Limits(patience=0.1))

    async def endless():
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    assert post(service, content=endless()).status_code == 408 and service.waiting == 0


def test_the_token() -> None:
    service, _ = service_of(token="s3cret")
    right, wrong = {"Authorization": "Bearer s3cret"}, {"Authorization": "Bearer s3cre"}

    async def conversation(client: httpx.AsyncClient) -> None:
        for headers, status in ((right, 200), (wrong, 401), ({}, 401), ({"Authorization": "s3cret"}, 401)):
            answers = [await client.get(path, headers=headers) for path in ("/model", "/metrics")]
            answers.append(await client.post("/predict", content=png(1), headers=headers))
            assert {answer.status_code for answer in answers} == {status}
        assert [(await client.get(path)).status_code for path in ("/health", "/ready", "/docs")] == [200] * 3

    talk(service, conversation)


# --- what must not happen ----------------------------------------------------------------------------


def test_an_error_of_one_image_is_not_its_neighbours() -> None:
    service, means = service_of()
    means.refused = 2
    answer = post(service, files=form(png(64), png(128), png(192)))
    rows = answer.json()["predictions"]
    assert answer.status_code == 500 and [row.get("error") for row in rows] == [None, "unexpected KeyError", None]
    assert "4711" not in answer.text and service.alive is False and service.waiting == 0  # the service has ended
    assert post(service_of()[0], content=png(1)).status_code == 200


def test_nothing_of_an_image_is_written_or_logged(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: pytest.fail("on the disk"))
    service, _ = service_of()
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    large = cv2.imencode(".png", noise)[1].tobytes()
    files = [("image", ("Doe_John_1970.png", data)) for data in (large, large[:2_000_000])]
    assert len(large) > 2_500_000 and post(service, files=files).status_code == 422
    shown = capfd.readouterr()
    assert "Doe" not in shown.out + shown.err


def test_hostile_uploads_are_refused_and_harm_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All files of docs/hostile-inputs.md that are bytes: images, weights, tables, JSON."""
    import test_hostile_table as table

    monkeypatch.setattr(table, "written", lambda name, content, read: content)
    groups = (table.pictures, table.dicoms, table.weights, table.sidecars, table.recipes, table.tables)
    contents = [content for group in groups for _, content in group() if isinstance(content, (str, bytes))]
    uploads = [one.encode() if isinstance(one, str) else one for one in contents]
    service, _ = service_of(preprocessing=replace(SMALL, fit="crop"))

    async def conversation(client: httpx.AsyncClient) -> None:
        for upload in uploads:
            T = time.perf_counter()
            answer, good = await asyncio.gather(
                client.post("/predict", content=upload), client.post("/predict", content=png(1))
            )
            assert (answer.status_code, good.status_code) == (422, 200), upload[:40]
            if time.perf_counter() - T > 0.1:
                print(time.perf_counter() - T, len(upload), upload[:40])

    assert len(uploads) > 190
    talk(service, conversation)


# --- what is shown -----------------------------------------------------------------------------------


def test_the_card_the_figures_and_the_page() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    service, _ = service_of(drawn=True)

    async def conversation(client: httpx.AsyncClient) -> list[httpx.Response]:
        await client.post("/predict", files=form(png(1), b"x"))
        await client.post("/predict", content=png(1))
        return [await client.get(path) for path in ("/model", "/metrics", "/docs", "/openapi.json", "/redoc")]

    model, metrics, docs, schema, redoc = talk(service, conversation)  # type: ignore[misc]
    assert model.json()["sidecar"] == json.loads(json.dumps(service.predictor.sidecar.to_json()))
    assert "not for diagnosis" in model.json()["notices"][0] and "SYNTHETIC" in model.json()["notices"][1]
    samples = {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(metrics.text)
        for one in family.samples
    }
    assert samples["medcls_requests_total", "200"] == samples["medcls_requests_total", "422"] == 1
    assert samples["medcls_images_total", "predicted"] == 2 and samples["medcls_images_total", "refused"] == 1
    assert samples[("medcls_waiting_images",)] == 0 and samples[("medcls_batch_images_sum",)] == 2
    assert set(schema.json()["paths"]) == {"/predict", "/health", "/ready", "/model", "/metrics"}
    assert "<script" not in docs.text and "http" not in docs.text and "coverage" in docs.text
    assert redoc.status_code == 404


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [["--port", "0"], ["--queue", "0"], ["--queue", "15"], ["--max-delay", "-1"], ["--token", "x"]]
)
def test_wrong_usage(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        serve.main(options)
    assert end.value.code == 2


def test_what_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("two words")
    (tmp_path / "one").write_text("s3cret\n")
    assert serve._token(tmp_path / "one") == "s3cret" and serve._token(None) == ""
    for name in ("empty", "two", "none", "."):
        assert serve.main(["--token-file", str(tmp_path / name)]) == 1 and "token" in capsys.readouterr().err
    monkeypatch.setenv("MEDCLS_TOKEN", "")
    assert serve.main([]) == 1 and "MEDCLS_TOKEN" in capsys.readouterr().err
    monkeypatch.delenv("MEDCLS_TOKEN")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert serve.main(["--port", str(taken.getsockname()[1])]) == 1 and "port" in capsys.readouterr().err


def test_a_process_answers_and_ends_with_0(tmp_path: Path) -> None:
    """Started, asked, and ended by SIGTERM while it answers: the answer arrives, and nothing names the image."""
    weights = saved(tmp_path, network=Network("resnet18", 3))
    image = write_image(tmp_path / "Doe.png", pixels(1)).read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--weights", str(weights), "--port", str(port)]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen([sys.executable, str(TOOLS / "serve.py"), *options], stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and process.poll() is None:
                    try:
                        assert client.get("/ready").status_code == 200
                        break
                    except httpx.ConnectError:
                        time.sleep(0.1)
                rows = client.post("/predict", files=[("image", ("Doe.png", image))]).json()["predictions"]
                load = under_load(port, 3, [image], [b"no image"], 0.3)  # of the benchmark
                assert set(load.images) == {200} and set(load.uploads) == {422} and memory_mb(process.pid) > 50

                def slowly():
                    yield image[:-8]
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.3)
                    yield image[-8:]

                assert client.post("/predict", content=slowly()).json()["predictions"][0]["label"] == rows[0]["label"]
            assert process.wait(20) == 0
        finally:
            process.kill()
        log.seek(0)
        shown = log.read()
    expected = prediction_row("Doe.png", load_predictor(weights).predict(image), load_predictor(weights).sidecar)
    assert rows[0]["label"] == expected["label"] and rows[0]["probability"] == pytest.approx(expected["probability"])
    assert "Traceback" not in shown and "Doe" not in shown
