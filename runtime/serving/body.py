"""The body of a request for an edit: multipart or JSON, bounded, in memory, no field twice."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ditrim.plugins.errors import UsageError
from ditrim.runtime.serving.errors import Refusal
from ditrim.runtime.serving.settings import ServingSettings

_PICTURES = {"image": "images", "image[]": "images", "mask": "mask", "mask[]": "mask"}
_MAX_TEXT = 1 << 20  # bytes of a field that is no picture


@dataclass(slots=True)
class EditBody:
    """What a request holds, before anything of it is read.

    Attributes:
        fields: everything but pictures, by name.
        images: files of the references, in order.
        mask: file of the mask, or none.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    mask: bytes | None = None


async def read_body(request: Request, settings: ServingSettings) -> EditBody:
    """Read the body of a request.

    Raises:
        Refusal: 413 for one that is too large, 415 for another type, 422 for one that cannot be
            parsed, 400 for fields that are given twice.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        raise Refusal(
            415,
            "unsupported_media_type",
            f"the body is {kind or 'of no type'}; send multipart/form-data or application/json",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > settings.max_body_bytes:
        raise _too_large(settings)
    stream = _bounded(request, settings)
    if kind == "application/json":
        content = b"".join([chunk async for chunk in stream])
        return await run_in_threadpool(_from_json, content)
    return await _from_multipart(request, stream, settings)


def _too_large(settings: ServingSettings) -> Refusal:
    most = settings.max_body_bytes
    return Refusal(413, "too_large", f"the request is larger than {most} bytes; send less")


async def _bounded(request: Request, settings: ServingSettings) -> AsyncIterator[bytes]:
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > settings.max_body_bytes:
            raise _too_large(settings)
        yield chunk


async def _from_multipart(
    request: Request, stream: AsyncIterator[bytes], settings: ServingSettings
) -> EditBody:
    class InMemory(MultiPartParser):
        spool_max_size = settings.max_body_bytes + 1  # nothing is written to a disk

    parser = InMemory(
        request.headers,
        stream,  # type: ignore[arg-type]
        max_files=settings.max_pictures + 2,
        max_fields=64,
        max_part_size=_MAX_TEXT,
    )
    try:
        form = await parser.parse()
    except (Refusal, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise Refusal(422, "malformed", f"the body is no whole form: {error.message}") from error
    except Exception as error:  # the parser fails on hostile headers in ways of its own
        raise Refusal(422, "malformed", f"the body is no form ({type(error).__name__})") from error
    body = EditBody()
    for name, value in form.multi_items():
        content = await value.read() if isinstance(value, UploadFile) else value
        _put(body, name, content)
    await form.close()
    return body


def _put(body: EditBody, name: str, content: bytes | str) -> None:
    """Add a part of a form."""
    kind = _PICTURES.get(name)
    if kind is None:
        if isinstance(content, bytes):
            raise Refusal(400, "invalid_value", f"{name} is a file, and must be text", name)
        if name in body.fields:
            raise Refusal(400, "duplicate_field", f"{name} is given twice; leave one out", name)
        body.fields[name] = content
        return
    if isinstance(content, str):
        raise Refusal(400, "invalid_value", f"{name} is text, and must be a file", name)
    if kind == "images":
        body.images.append(content)
    elif body.mask is not None:
        raise Refusal(400, "duplicate_field", "there are two masks; one edit takes one", name)
    else:
        body.mask = content


def _from_json(content: bytes) -> EditBody:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise Refusal(400, "duplicate_field", f"{key} is given twice; leave one out", key)
            result[key] = value
        return result

    try:
        given = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Refusal(422, "malformed", f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise Refusal(422, "malformed", "the body is no JSON object")
    images = given.pop("images", None)
    mask = given.pop("mask", None)
    if images is not None and not isinstance(images, list):
        raise Refusal(400, "invalid_value", "images must be a list of data URLs", "images")
    return EditBody(
        fields=given,
        images=[_from_url(image, f"images[{i}]") for i, image in enumerate(images or [])],
        mask=None if mask is None else _from_url(mask, "mask"),
    )


def _from_url(given: Any, name: str) -> bytes:
    """The file in a data URL, which may stand in an object as {"image_url": ...}."""
    url = given.get("image_url") if isinstance(given, dict) and len(given) == 1 else given
    if not isinstance(url, str):
        raise Refusal(400, "invalid_value", f"{name} must be a data URL", name)
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise Refusal(
            400,
            "invalid_value",
            f"{name} is no data URL (data:image/png;base64,...); this server fetches nothing",
            name,
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{name} is not base64: {error}") from error
