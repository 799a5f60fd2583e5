"""The HTTP application over an `EditService`: OpenAI's image edits, health, models, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ditrim.runtime.service import EditHandle, EditJob, EditService, Progress
from ditrim.runtime.serving.answers import (
    answer_of,
    as_event,
    completed_event,
    encode_picture,
)
from ditrim.runtime.serving.body import EditBody, read_body
from ditrim.runtime.serving.errors import Refusal, refusal_of
from ditrim.runtime.serving.fields import EditFields, jobs_of, read_fields
from ditrim.runtime.serving.logs import RequestLog
from ditrim.runtime.serving.metrics import ServingMetrics
from ditrim.runtime.serving.settings import ServingSettings

_T = TypeVar("_T")


def create_app(service: EditService, settings: ServingSettings | None = None) -> FastAPI:
    """Make the application; it starts the service and drains it when it ends.

    Args:
        service: not started yet, or started by somebody else, who then closes it.
        settings: what is accepted.
    """
    server = _Server(service, settings or ServingSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        is_ours = service.start_once()
        yield
        if is_ours:
            await asyncio.to_thread(service.drain)
            await asyncio.to_thread(service.close)
        server.threads.shutdown(wait=False)

    app = FastAPI(title="ditrim", lifespan=lifespan, openapi_url=None)
    app.add_api_route("/v1/images/edits", server.edit, methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/liveness", server.liveness, methods=["GET"])
    app.add_api_route("/metrics", server.metrics, methods=["GET"])
    app.add_exception_handler(HTTPException, _plain_refusal)
    app.add_middleware(RequestLog, count=server.count)
    app.state.service = service
    return app


async def _plain_refusal(request: Request, error: Exception) -> Response:
    """What the framework refuses, as an unknown path, in the same shape."""
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, "not_served", str(error.detail))
    return JSONResponse(refusal.content(), error.status_code, headers=error.headers)


class _Server:
    """The endpoints. Nothing here runs longer than a moment on the event loop."""

    def __init__(self, service: EditService, settings: ServingSettings) -> None:
        self.service, self.settings = service, settings
        self.threads = ThreadPoolExecutor(settings.threads, "ditrim-pictures")
        self._metrics = ServingMetrics(service)

    def count(self, path: str, status: int) -> None:
        """Count an answered request."""
        self._metrics.requests.labels(path=path, status=str(status)).inc()

    async def health(self, request: Request) -> Response:
        """Whether edits are taken: 503 until the warm-up is over and after a device error."""
        state, reason = self.service.status
        content = {"status": state} | ({"reason": reason} if state != "ready" else {})
        return JSONResponse(content, 200 if state == "ready" else 503)

    async def liveness(self, request: Request) -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        """The numbers of the server, for Prometheus."""
        text = await self._in_thread(self._metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The models that are served."""
        return JSONResponse(
            {"object": "list", "data": [self._model(n) for n in self.service.names]}
        )

    def _model(self, name: str) -> dict[str, Any]:
        told: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "ditrim"}
        model = self.service.loaded(name)
        told["loaded"] = model is not None
        if model is not None:
            manifest = model.engine_set.manifest
            told |= {
                "family": manifest.model,
                "identity": manifest.identity,
                "backend": manifest.backend,
                "precision": manifest.precision,
                "max_noisy_tokens": manifest.limits.noisy,
                "max_reference_tokens": manifest.ladder.longest,
                "loras": list(model.loras),
            }
        return told

    async def edit(self, request: Request) -> Response:
        """Edit a picture."""
        try:
            body = await read_body(request, self.settings)
            fields = read_fields(body)
            jobs = await self._in_thread(partial(self._decoded, body, fields))
            self._note(request, fields, jobs)
            return await self._edited(request, fields, jobs)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:  # every failure is an answer of one sentence
            return _refused(request, error)

    def _decoded(self, body: EditBody, fields: EditFields) -> list[EditJob]:
        start = time.perf_counter()
        jobs = jobs_of(body, fields, self.settings)
        self.service.note_stage("decode", time.perf_counter() - start)
        return jobs

    async def _edited(self, request: Request, fields: EditFields, jobs: list[EditJob]) -> Response:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[int, Progress | None]] = asyncio.Queue()

        def tell(number: int, progress: Progress | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (number, progress))

        # Checking a job may resize a mask, so it is not for the event loop.
        handles = await self._in_thread(partial(self.service.submit_all, jobs, tell))
        for number, handle in enumerate(handles):
            handle.add_done_callback(lambda _, number=number: tell(number, None))
        watcher = asyncio.create_task(_disconnected(request))
        watcher.add_done_callback(partial(_cancel_unless_watched, handles))
        is_handed_on = False
        try:
            if not fields.stream:
                return await self._whole(handles, fields, watcher)
            await _either(_first(told), watcher)
            failed = next((h for h in handles if h.done() and h.future.exception()), None)
            if failed is not None:
                failed.result(0)
            is_handed_on = True
            events = self._events(handles, fields, told, watcher)
            return StreamingResponse(events, media_type="text/event-stream", headers=_UNCACHED)
        finally:
            if not is_handed_on:
                _end(handles, watcher)

    async def _whole(
        self, handles: list[EditHandle], fields: EditFields, watcher: asyncio.Task[None]
    ) -> Response:
        waits = asyncio.gather(*(asyncio.wrap_future(handle.future) for handle in handles))
        results = await _either(waits, watcher)
        encode = self._encode
        pictures = [await self._in_thread(partial(encode, one, fields)) for one in results]
        return JSONResponse(answer_of(pictures, results, fields))

    def _encode(self, result: Any, fields: EditFields) -> str:
        start = time.perf_counter()
        picture = encode_picture(result, fields)
        self.service.note_stage("encode", time.perf_counter() - start)
        return picture

    async def _events(
        self,
        handles: list[EditHandle],
        fields: EditFields,
        told: asyncio.Queue[tuple[int, Progress | None]],
        watcher: asyncio.Task[None],
    ) -> AsyncIterator[bytes]:
        left = len(handles)
        try:
            while left:
                number, progress = await told.get()
                if progress is not None:
                    yield as_event(_progress_event(number, progress))
                    continue
                left -= 1
                try:
                    result = handles[number].result(0)
                except Exception as error:  # the status was sent: the failure is an event
                    yield as_event({"type": "error", **refusal_of(error).content()})
                    return
                picture = await self._in_thread(partial(self._encode, result, fields))
                yield as_event(completed_event(picture, result, fields))
        finally:  # also where the client went away
            _end(handles, watcher)

    async def _in_thread(self, call: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    def _note(self, request: Request, fields: EditFields, jobs: list[EditJob]) -> None:
        """What the log says of an edit; its prompt only where it was asked for."""
        log = request.state.log
        log |= {"model": fields.model, "n": fields.n, "policy": jobs[0].policy}
        log |= {"seed": jobs[0].edit.seed, "pictures": len(jobs[0].edit.images)}
        if self.settings.log_prompts:
            log["prompt"] = fields.prompt


_UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _refused(request: Request, error: BaseException) -> Response:
    refusal = refusal_of(error)
    request.state.log |= {"code": refusal.code}
    if refusal.status >= 500:
        request.state.log["error"] = str(error)
    return JSONResponse(refusal.content(), refusal.status, headers=refusal.headers)


def _progress_event(number: int, progress: Progress) -> dict[str, Any]:
    return {
        "type": "image_edit.progress",
        "index": number,
        "phase": progress.phase,
        "step": progress.done,
        "steps": progress.total,
        "role": progress.role,
        "kept": round(progress.kept, 4),
    }


def _end(handles: list[EditHandle], watcher: asyncio.Task[None]) -> None:
    """Cancel what has not ended: its client is gone or has its answer."""
    watcher.cancel()
    for handle in handles:
        handle.cancel()


def _cancel_unless_watched(handles: list[EditHandle], watcher: asyncio.Task[None]) -> None:
    """Cancel edits whose client went away, which is what a watcher that ended by itself saw."""
    if not watcher.cancelled():
        for handle in handles:
            handle.cancel()


async def _first(told: asyncio.Queue[tuple[int, Progress | None]]) -> None:
    """Wait until something happened, and leave it in its place: it is the only thing there."""
    told.put_nowait(await told.get())


async def _disconnected(request: Request) -> None:
    """Return when the client goes away; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _either(work: Any, watcher: asyncio.Task[None]) -> Any:
    """The result of some work, unless the client goes away first.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    raise ClientDisconnect
