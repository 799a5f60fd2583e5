"""The fields of a request, OpenAI's and this server's own, and the jobs that they ask for."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from PIL import Image, ImageChops
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ditrim.plugins.errors import UsageError
from ditrim.runtime.editing.pictures import picture_from_bytes
from ditrim.runtime.editing.result_size import parse_size
from ditrim.runtime.service import EditJob, EditRequest
from ditrim.runtime.serving.body import EditBody
from ditrim.runtime.serving.errors import Refusal
from ditrim.runtime.serving.settings import ServingSettings

MAX_SEED = 2**32 - 1
_Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise ValueError("it must be a whole number")
    return value


_Int = Annotated[int, BeforeValidator(_whole)]


class EditFields(BaseModel):
    """Everything that a request may hold besides pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(max_length=32_000)]
    model: str | None = None
    n: Annotated[_Int, Field(ge=1, le=4)] = 1
    size: str = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[_Int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[_Int, Field(ge=0, le=3)] = 0
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    user: str | None = None
    seed: Annotated[_Int, Field(ge=0, le=MAX_SEED)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: Annotated[_Int, Field(ge=1)] | None = None
    true_cfg_scale: _Scale | None = None
    guidance_scale: _Scale | None = None
    policy: Annotated[str, Field(max_length=1000)] | None = None
    preset: str | None = None
    cache: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    lora: str | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    report: bool = False


def read_fields(body: EditBody) -> EditFields:
    """Check the fields of a request.

    Raises:
        Refusal: 422 where the prompt or the picture is missing, 400 for a wrong or unknown field.
    """
    if not body.images:
        raise Refusal(422, "missing", "there is no picture to edit: send image", "image")
    try:
        fields = EditFields.model_validate(body.fields)
    except ValidationError as error:
        raise _refused(error) from error
    if fields.partial_images:
        raise Refusal(
            400,
            "invalid_value",
            "partial_images: this server sends progress and the finished picture; leave it out",
            "partial_images",
        )
    if fields.output_compression is not None and fields.output_format == "png":
        raise Refusal(
            400,
            "invalid_value",
            "output_compression is for jpeg and webp; a png loses nothing: leave it out",
            "output_compression",
        )
    return fields


def _refused(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return Refusal(422, "missing", f"{name} is missing", name)
    if first["type"] == "extra_forbidden":
        return Refusal(400, "unknown_field", f"{name[:80]} is no field of an edit", name[:80])
    message = first["msg"].replace("Input should", "it must").removeprefix("Value error, ")
    return Refusal(400, "invalid_value", f"{name} is {first['input']!r:.80}; {message}", name)


def jobs_of(body: EditBody, fields: EditFields, settings: ServingSettings) -> list[EditJob]:
    """Decode the pictures and make the jobs of a request, one a picture that is asked for.

    Raises:
        UsageError: a picture, the mask, the size or the policy cannot be accepted.
    """
    policy = _policy_of(fields, settings)
    if len(body.images) > settings.max_pictures:
        raise UsageError(
            f"{len(body.images)} pictures were given; this server takes {settings.max_pictures}"
        )
    size = parse_size(fields.size)
    if fields.seed is not None and fields.seed + fields.n - 1 > MAX_SEED:
        raise UsageError(f"seed {fields.seed} with n {fields.n} passes {MAX_SEED}; lower it")
    seed = secrets.randbelow(MAX_SEED - 4) if fields.seed is None else fields.seed
    images = tuple(
        picture_from_bytes(content, f"image[{number}]", settings.max_pixels)
        for number, content in enumerate(body.images)
    )
    edit = EditRequest(
        images=images,
        prompt=fields.prompt,
        negative_prompt=fields.negative_prompt,
        true_cfg_scale=fields.true_cfg_scale,
        guidance=fields.guidance_scale,
        steps=fields.num_inference_steps,
        size=size,
    )
    job = EditJob(
        edit=edit,
        model=fields.model,
        policy=policy,
        cache=None if fields.cache is None else str(fields.cache),
        lora=fields.lora,
        mask=_mask_of(body, settings),
        deadline_s=fields.timeout,
    )
    return [replace(job, edit=replace(edit, seed=seed + number)) for number in range(fields.n)]


def _mask_of(body: EditBody, settings: ServingSettings) -> Image.Image | None:
    """OpenAI's mask, whose transparent pixels may change, as the library's: white there."""
    if body.mask is None:
        return None
    alpha = picture_from_bytes(body.mask, "mask", settings.max_pixels, is_mask=True)
    return ImageChops.invert(alpha)


def _policy_of(fields: EditFields, settings: ServingSettings) -> str:
    if fields.policy is not None and fields.preset is not None:
        raise UsageError("policy and preset both say how an edit is reduced; give one of them")
    if fields.preset is not None:
        if fields.preset not in settings.presets:
            names = ", ".join(settings.presets)
            raise UsageError(f"there is no preset {fields.preset!r}; there are: {names}")
        return settings.presets[fields.preset]
    policy = settings.default_policy if fields.policy is None else fields.policy
    for word in policy.split()[1:]:
        name = word.partition("=")[0].replace("-", "_")
        if fields.policy is not None and name in ("tea", "predictor", "quality"):
            raise UsageError(f"policy: {name} names a file, which a request may not; use a preset")
    return policy
