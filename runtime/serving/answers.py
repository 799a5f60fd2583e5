"""What a client gets of finished edits: pictures as base64, and what was done."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

from ditrim.runtime.service import EditResult
from ditrim.runtime.serving.fields import EditFields


def encode_picture(result: EditResult, fields: EditFields) -> str:
    """The picture of a result as base64, in the format that was asked for."""
    buffer = io.BytesIO()
    compression = fields.output_compression
    if fields.output_format == "png":
        result.image.save(buffer, "PNG")
    elif fields.output_format == "jpeg":
        result.image.save(buffer, "JPEG", quality=95 if compression is None else compression)
    elif compression is None:
        result.image.save(buffer, "WEBP", lossless=True)
    else:
        result.image.save(buffer, "WEBP", quality=compression)
    return base64.b64encode(buffer.getvalue()).decode()


def describe(result: EditResult, fields: EditFields) -> dict[str, Any]:
    """What was done for a picture, beside the picture."""
    told: dict[str, Any] = {
        "seed": result.edit.seed,
        "size": f"{result.image.width}x{result.image.height}",
        "seconds": round(result.seconds, 4),
        "queue_seconds": round(result.queue_seconds, 4),
        "model": result.model,
    }
    if fields.report:
        report = result.report.as_dict(with_steps=False)
        keys = ("kept_ratio", "calls_by_role", "mean_ms_by_role", "back_calls")
        told["report"] = {key: report[key] for key in keys}
        told["report"]["stages_ms"] = {k: round(v, 3) for k, v in result.stages.items()}
    return told


def answer_of(pictures: list[str], results: list[EditResult], fields: EditFields) -> dict[str, Any]:
    """The whole answer of a request that is not streamed."""
    first = results[0]
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": picture, **describe(result, fields)}
            for picture, result in zip(pictures, results, strict=True)
        ],
        "background": "opaque",
        "output_format": fields.output_format,
        "quality": "auto",
        "size": f"{first.image.width}x{first.image.height}",
        "seed": first.edit.seed,
        "seconds": round(max(result.seconds for result in results), 4),
    }


def completed_event(picture: str, result: EditResult, fields: EditFields) -> dict[str, Any]:
    """The event of a finished picture, with OpenAI's name."""
    return {
        "type": "image_edit.completed",
        "b64_json": picture,
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": fields.output_format,
        "quality": "auto",
        **describe(result, fields),
    }


def as_event(content: dict[str, Any]) -> bytes:
    """A server-sent event; its name is the content's type."""
    name = content.get("type", "error")
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()
