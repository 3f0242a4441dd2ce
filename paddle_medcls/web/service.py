"""The HTTP service: images in, the JSON of `predict --json` out; see docs/serving.md.

A request is read into memory within its limits. A few threads decode its images, with the checks of `data.decode`.
Decoded images wait in a queue, and one thread computes those that wait together as one batch. Nothing of an image, nor
its name, is written, logged or kept after the answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import html
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from paddle_medcls import __version__
from paddle_medcls.core.errors import DataError, MedclsError, SetupError
from paddle_medcls.core.hardware import usable_cores
from paddle_medcls.data.decode import image_size, to_channels
from paddle_medcls.deployment.prediction import Prediction, check_options, prediction_row
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE

try:
    import python_multipart  # noqa: F401  Starlette needs it when a request comes
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise SetupError(
        f"the service cannot be loaded: {error}", fix="pip install fastapi uvicorn python-multipart prometheus-client"
    ) from error

SHOWN_PX = 800  # longer side of heat maps
FAULTS = {
    400: "The body is not as its Content-Type says, or this model does not have what a parameter asks for.",
    401: "The token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "A parameter is wrong; or images were refused, and `predictions` has the error in place of each.",
    500: "Images could not be computed; `predictions` has the error in place of each.",
    503: "Too many images are waiting; try again after the seconds of Retry-After.",
}
BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "additionalProperties": BINARY}
BODY = {"content": {"image/*": {"schema": BINARY}, "multipart/form-data": {"schema": FORM}}}


@dataclass(frozen=True)
class Limits:
    """What the service accepts, and how it makes batches.

    Attributes:
        megabytes: of a request.
        pixels: of an image, by its header.
        images: of a request.
        queue: images that are accepted and not yet answered, in all.
        batch: images computed together.
        delay: seconds that a batch waits for images that are still being read.
        patience: seconds in which a request must have arrived.
    """

    megabytes: int = 32
    pixels: int = 50_000_000
    images: int = 16
    queue: int = 64
    batch: int = 16
    delay: float = 0.005
    patience: float = 30.0


class Service:
    """A model that answers over HTTP.

    Attributes:
        predictor, limits, heat_maps: as given; heat maps need Paddle.
        waiting: images that are accepted and not yet answered; a request that is being read counts as one.
        app: the ASGI application.
    """

    def __init__(self, predictor: Predictor, limits: Limits, token: str = "", heat_maps: bool = False) -> None:
        """With a `token`, /predict, /model and /metrics need it. Computes one image, so that faults show now."""
        self.predictor, self.limits, self.heat_maps = predictor, limits, heat_maps
        self.waiting = 0
        if heat_maps:
            predictor.default_layer()
        self._readers = ThreadPoolExecutor(usable_cores(), "reader")
        self._engine = ThreadPoolExecutor(1, "engine", _paddle_here())
        self._engine.submit(predictor.predictions, predictor.input_zeros(), ["an empty image"]).result()
        self._batches: asyncio.Task | None = None
        self._token = f"Bearer {token}".encode() if token else b""
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self._requests = Counter("medcls_requests", "Requests to /predict.", ["status"], registry=own)
        self._images = Counter("medcls_images", "Images predicted, refused, or unlike.", ["result"], registry=own)
        self._seconds = Histogram("medcls_request_seconds", "Time of requests to /predict.", registry=own)
        self._sizes = Histogram("medcls_batch_images", "Images a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=own)
        gauge = Gauge("medcls_waiting_images", "Images accepted and not yet answered.", registry=own)
        gauge.set_function(lambda: self.waiting)
        self.app = _application(self)

    def run(self, address: str, port: int) -> None:
        """Answers until SIGTERM or Ctrl-C, which leave 30 seconds for what was accepted."""
        quiet = {"log_level": "warning", "access_log": False, "server_header": False, "ws": "none"}
        server = uvicorn.Server(uvicorn.Config(self.app, address, port, timeout_graceful_shutdown=30, **quiet))  # type: ignore[arg-type]
        for one in (signal.SIGTERM, signal.SIGINT):  # uvicorn has its own handlers, then raises the signal once more
            signal.signal(one, lambda *_: setattr(server, "should_exit", True))
        server.run()

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Computes batches for as long as the application runs."""
        self._queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self._batches = asyncio.create_task(self._compute_batches())
        yield
        self._batches.cancel()
        self._engine.shutdown()
        self._readers.shutdown()

    @property
    def alive(self) -> bool:
        """Whether batches are being computed."""
        return self._batches is not None and not self._batches.done()

    async def authorize(self, request: Request) -> None:
        """Refuses a request without the token."""
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, self._token):
            raise HTTPException(401, FAULTS[401], {"WWW-Authenticate": "Bearer"})

    async def answer(self, request: Request, options: Options) -> Response:
        """The answer to a request for predictions."""
        start, status = time.perf_counter(), 500
        try:
            await self.authorize(request)
            self._check(options)
            async with self._accepted(request) as files:
                rows = await asyncio.gather(*(self._row(*file, options) for file in files))
            status = max(code for code, _ in rows)
            return JSONResponse({"notice": NOTICE, "predictions": [row for _, row in rows]}, status)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._requests.labels(status).inc()
            self._seconds.observe(time.perf_counter() - start)

    def _check(self, options: Options) -> None:
        """Refuses options that this model cannot serve."""
        try:
            check_options(self.predictor, options.coverage, refuse=False)  # that has its own message below
        except MedclsError as error:
            raise HTTPException(400, str(error)) from None
        if options.refuse and self.predictor.novelty is None:
            raise HTTPException(400, "refuse: this model cannot tell which images are unlike its training images")
        if options.heatmap and not self.heat_maps:
            raise HTTPException(400, "heatmap: the service was started without --heatmaps")

    # --- from the request to its files ---------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _accepted(self, request: Request) -> AsyncIterator[list[tuple[str, bytes]]]:
        """The files of a request, (name, content) each; they count as waiting until the block ends."""
        count = 0
        try:
            count += self._wait_for(1)
            files = await asyncio.wait_for(self._files(request), self.limits.patience)
            if not files:
                raise HTTPException(400, "The request has no image.")
            count += self._wait_for(len(files) - 1)
            yield files
        except asyncio.TimeoutError:
            raise HTTPException(408, FAULTS[408]) from None
        except ClientDisconnect:
            raise HTTPException(400, "The client has gone.") from None
        finally:
            self.waiting -= count

    def _wait_for(self, count: int) -> int:
        """Counts images as waiting, where there is room for them."""
        if self.waiting + count > self.limits.queue:
            raise HTTPException(503, FAULTS[503], {"Retry-After": "1"})
        self.waiting += count
        return count

    async def _files(self, request: Request) -> list[tuple[str, bytes]]:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return [("image", b"".join([chunk async for chunk in self._body(request)]))]
        parser = MultiPartParser(request.headers, self._body(request), max_files=self.limits.images, max_fields=0)
        parser.spool_max_size = 2 * self.limits.megabytes * 10**6  # Starlette writes larger parts to the disk
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, error.message) from None
        files = [(file.filename or "image", await file.read()) for _, file in form.multi_items()]  # type: ignore[union-attr]
        await form.close()
        return files

    async def _body(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The body as it arrives; one that is too large is refused as soon as that is known."""
        announced, total = request.headers.get("content-length", ""), 0
        if announced.isdecimal():
            self._refuse_large(int(announced))
        async for chunk in request.stream():
            total += len(chunk)
            self._refuse_large(total)
            yield chunk

    def _refuse_large(self, size: int) -> None:
        if size > self.limits.megabytes * 10**6:
            raise HTTPException(413, f"{FAULTS[413]} At most {self.limits.megabytes} MB are taken.")

    # --- from a file to its prediction ---------------------------------------------------------------

    async def _row(self, name: str, data: bytes, options: Options) -> tuple[int, dict]:
        """Status and JSON of one image."""
        loop = asyncio.get_running_loop()
        try:
            pixels, x = await loop.run_in_executor(self._readers, self._read, name, data, options.heatmap)
            future = loop.create_future()
            self._queue.put_nowait((x, future))
            prediction = await future
            if isinstance(prediction, Exception):
                raise prediction
            prediction = self.predictor.with_prediction_set(prediction, options.coverage)
            row = prediction_row(name, prediction, self.predictor.sidecar, options.topk, options.refuse)
            if pixels is not None:
                row["heatmap"] = await loop.run_in_executor(self._engine, self._heat_map, pixels, prediction)
        except Exception as error:
            self._images.labels("refused").inc()
            known = isinstance(error, MedclsError)
            fault = str(error) if known else f"unexpected {type(error).__name__}"  # of unknown content
            return (422 if isinstance(error, DataError) else 500), {"image": name, "error": fault}
        self._images.labels("unlike" if prediction.in_distribution is False else "predicted").inc()
        return 200, row

    def _read(self, name: str, data: bytes, keep: bool) -> tuple[np.ndarray | None, np.ndarray]:
        """The decoded image if it is kept, and the network's input (C, S, S)."""
        width, height = image_size(data, name)
        if width * height > self.limits.pixels:
            what, most = f"{name}: {width} x {height} pixels", f"at most {self.limits.pixels:,} pixels"
            raise DataError(what, expected=most, fix="scale it down first")
        pixels = self.predictor.decode(data, name)
        return (pixels if keep else None), self.predictor.input_of([pixels])[0]

    async def _compute_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            group = [await self._queue.get()]
            if 1 + self._queue.qsize() < min(self.limits.batch, self.waiting):  # others are still being read
                await asyncio.sleep(self.limits.delay)
            while len(group) < self.limits.batch and not self._queue.empty():
                group.append(self._queue.get_nowait())
            self._sizes.observe(len(group))
            found = await loop.run_in_executor(self._engine, self._compute, [x for x, _ in group])
            for (_, future), prediction in zip(group, found):
                if not future.done():  # cancelled, when the service ends
                    future.set_result(prediction)

    def _compute(self, inputs: Sequence[np.ndarray]) -> list[Prediction | Exception]:
        """The prediction for each input (C, S, S), or the error that it meets alone."""
        try:
            return list(self.predictor.predictions(np.stack(inputs), ["the image"] * len(inputs)))
        except Exception as error:
            return [error] if len(inputs) == 1 else [self._compute([x])[0] for x in inputs]

    def _heat_map(self, pixels: np.ndarray, prediction: Prediction) -> str:
        """The image under the heat map of its class, as a PNG file in base64."""
        from paddle_medcls.evaluation.plots import overlay  # matplotlib takes half a second to import

        (heat,) = self.predictor.heatmaps([pixels], self.predictor.head.explained(prediction.probs[None]).tolist())
        scale = min(1.0, SHOWN_PX / max(heat.shape))
        size = tuple(max(1, round(side * scale)) for side in heat.shape[::-1])
        small, heat = (cv2.resize(array, size, interpolation=cv2.INTER_AREA) for array in (pixels, heat))
        picture = overlay(to_channels(small, "rgb"), heat)[:, :, ::-1]
        return base64.b64encode(cv2.imencode(".png", np.ascontiguousarray(picture))[1].tobytes()).decode()


@dataclass(frozen=True)
class Options:
    """The parameters of a request, as the options of `predict`."""

    topk: int
    coverage: float | None
    refuse: bool
    heatmap: bool


def _paddle_here() -> Callable[[], None]:
    """What lets another thread compute with Paddle as this one does: a new thread starts in Paddle's static mode."""
    if "paddle" not in sys.modules:
        return lambda: None
    from paddle_medcls.core.paddle_setup import paddle

    device = paddle.get_device()
    return lambda: (paddle.disable_static(), paddle.set_device(device))[0]


def _application(service: Service) -> FastAPI:
    """The addresses of the service. FastAPI's own page would load scripts from other machines: `/docs` has none."""
    app = FastAPI(
        title="paddle_medcls",
        version=__version__,
        description=NOTICE,
        lifespan=service.running,
        docs_url=None,
        redoc_url=None,
    )
    guard = [Depends(service.authorize)]
    faults: dict = {status: {"description": text} for status, text in FAULTS.items()}

    @app.post("/predict", responses=faults, openapi_extra={"requestBody": BODY})
    async def predict(
        request: Request,
        topk: int = Query(1, ge=1, description="the number of most probable classes to list"),
        coverage: float = Query(None, description="also `prediction_set`, for this coverage, such as 0.9"),
        refuse: bool = Query(False, description="give images that are unlike the training images no label"),
        heatmap: bool = Query(False, description="also `heatmap`, a PNG picture in base64; needs `--heatmaps`"),
    ) -> Response:
        """Predicts the image that is the body, or the files of a form: one row an image, as `predict --json` prints."""
        return await service.answer(request, Options(topk, coverage, refuse, heatmap))

    @app.get("/health")
    async def health() -> Response:
        """Whether the service works: 200, or 503 if it must be started again."""
        return Response(status_code=200 if service.alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether there is room for another request: 200 or 503."""
        room = service.alive and service.waiting < service.limits.queue
        return Response(status_code=200 if room else 503)

    @app.get("/model", dependencies=guard)
    async def model() -> dict:
        """The card of the model: its sidecar, its engine, and what it is for."""
        one = service.predictor
        notices = [NOTICE, *([SYNTHETIC_NOTICE] if one.sidecar.drawn else [])]
        about = {"notices": notices, "notes": one.notes, "engine": one.engine, "precision": one.precision}
        return {**about, "sidecar": one.sidecar.to_json()}

    @app.get("/metrics", dependencies=guard)
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        lines = [
            f"<h1>{app.title} {app.version}</h1><p>{html.escape(NOTICE)} <a href=openapi.json>openapi.json</a></p>"
        ]
        for path, calls in app.openapi()["paths"].items():
            for method, call in calls.items():
                lines.append(f"<h2>{method.upper()} {path}</h2><p>{html.escape(call['description'])}</p><ul>")
                names = [(one["name"], one["description"]) for one in call.get("parameters", ())]
                names += [(status, one["description"]) for status, one in call["responses"].items()]
                lines += [f"<li><b>{name}</b> {html.escape(text)}</li>" for name, text in names]
                lines.append("</ul>")
        return HTMLResponse("\n".join(lines))

    return app
