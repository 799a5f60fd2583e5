"""The pipeline around an engine set: where it comes from, and one edit through it."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.editing.result_size import check_size, size_like
from ditrim.runtime.editing.schedulers import is_lightning, lightning_steps, load_scheduler
from ditrim.runtime.fit import MODEL_OF

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.plugins.layout import TokenGrid
    from ditrim.runtime.editing.result_size import ResultSize

SMALL_PIPELINE = "SmallEditPipeline"
SMALL_TRANSFORMER = "QwenImageTransformer2DModel"  # that it runs
# Pipelines that take a list of references; the others read a list as a batch.
_TAKES_MANY = (SMALL_PIPELINE, "QwenImageEditPlusPipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """One edit, as a pipeline is asked for it; None means the pipeline's default.

    Attributes:
        images: references in order, RGB; the first is the picture to edit.
        prompt: the instruction.
        negative_prompt: of true classifier-free guidance.
        true_cfg_scale: its strength.
        guidance: the embedded guidance scale, for models that have one.
        steps: denoising steps.
        size: of the result; none until `prepare_request` decides it.
        seed: of the noise, which is drawn on the CPU so that devices agree.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    guidance: float | None = None
    steps: int | None = None
    size: ResultSize | None = None
    seed: int = 0


def load_pipeline(
    engine_set: EngineSet,
    location: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    scheduler: str | None = None,
) -> Any:
    """Load what surrounds the transformer: VAE, text encoder and scheduler.

    Args:
        engine_set: names the pipeline's class and where its weights came from.
        location: a folder or hub id; by default where the engine set's weights came from.
        dtype: of the components; the files' own by default.
        scheduler: in place of the pipeline's, see `load_scheduler`.

    Returns:
        a diffusers pipeline. Its transformer is None, except for the small editor, whose weights
        are at hand and let `attach` check that they are the engine set's.

    Raises:
        UsageError: there is no pipeline at that place, it is of another class, or there is no such
            scheduler.
        DitrimError: it cannot be downloaded or read.
    """
    chosen = None if scheduler is None else load_scheduler(scheduler)
    pipe = _load(engine_set, location, dtype)
    if chosen is not None:
        pipe.scheduler = chosen
    return pipe


def load_whole_pipeline(
    location: str, *, dtype: torch.dtype | None = None, scheduler: str | None = None
) -> Any:
    """Load a pipeline with its transformer, for the torch backend.

    Args:
        location: a folder, a hub id, or "small" for the shipped editor.
        dtype: of its components; float32 by default.
        scheduler: in place of the pipeline's, see `load_scheduler`.

    Raises:
        UsageError: there is no pipeline at that place, or it is of a class that is not served.
        DitrimError: it cannot be downloaded or read.
    """
    chosen = None if scheduler is None else load_scheduler(scheduler)
    pipe = _load_whole(location, dtype)
    if chosen is not None:
        pipe.scheduler = chosen
    return pipe


def _load_whole(location: str, dtype: torch.dtype | None) -> Any:
    folder = _pipeline_folder(location)
    if folder is None and location == "small":
        from ditrim.runtime.small_editor import load_small_pipeline

        return load_small_pipeline()
    if folder is None and not _is_hub_id(location):
        raise UsageError(
            f"pipeline {location} is neither a folder that exists nor a hub id (owner/name); "
            "name one with --pipeline"
        )
    options: dict[str, Any] = {} if folder is None else {"local_files_only": True}
    name = _class_at_hub(location) if folder is None else _class_in(folder)
    if name == SMALL_PIPELINE and folder is not None:
        from ditrim.runtime.small_editor import SmallEditPipeline

        return SmallEditPipeline.from_pretrained(folder)
    if name not in MODEL_OF:
        raise UsageError(
            f"pipeline {location} is a {name}; served are {', '.join(MODEL_OF)}: name one of them"
        )
    where = location if folder is None else str(folder)
    try:
        return _from_pretrained(name, where, options, dtype, with_transformer=True)
    except (OSError, ValueError) as error:
        raise DitrimError(f"pipeline {location} cannot be loaded: {error}") from error


def _class_at_hub(location: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(location)["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise DitrimError(
            f"pipeline {location} is not in the local cache of the hub and cannot be downloaded: "
            f"check the name, the connection and that you are logged in; or name a folder. The "
            f"hub's library says: {error}"
        ) from error


def _load(engine_set: EngineSet, location: str | None, dtype: torch.dtype | None) -> Any:
    source, revision = engine_set.manifest.source, None
    if location is None:
        if source["kind"] == "small":
            from ditrim.runtime.small_editor import load_small_pipeline

            return load_small_pipeline()
        if source["kind"] not in ("folder", "hub"):
            raise UsageError(
                f"engine set {engine_set.folder} has {source['kind']} weights, so nothing says "
                "where the VAE, the text encoder and the scheduler are: name them with --pipeline"
            )
        location = str(source["location"])
        revision = source["revision"] if source["kind"] == "hub" else None
    folder = _pipeline_folder(location)
    if folder is None:
        if not _is_hub_id(location):
            raise UsageError(
                f"pipeline {location} is neither a folder that exists nor a hub id (owner/name); "
                "name one with --pipeline"
            )
        return _from_hub(engine_set, location, revision, dtype)
    return _from_folder(engine_set, folder, dtype)


def _from_folder(engine_set: EngineSet, folder: Path, dtype: torch.dtype | None) -> Any:
    found, name = _class_in(folder), engine_set.manifest.pipeline_class
    if found == SMALL_PIPELINE and engine_set.manifest.transformer_class == SMALL_TRANSFORMER:
        from ditrim.runtime.small_editor import SmallEditPipeline

        return SmallEditPipeline.from_pretrained(folder)
    if found != name:
        raise UsageError(f"pipeline {folder} is a {found}, the engine set needs a {name}")
    variant = engine_set.manifest.source.get("variant")
    options: dict[str, Any] = {"local_files_only": True}
    if variant is not None and _has_variant(folder, variant):
        options["variant"] = variant
    try:
        return _from_pretrained(name, str(folder), options, dtype)
    except (OSError, ValueError) as error:
        raise DitrimError(f"pipeline {folder} cannot be loaded: {error}") from error


def _from_hub(
    engine_set: EngineSet, location: str, revision: str | None, dtype: torch.dtype | None
) -> Any:
    manifest = engine_set.manifest
    given = {"revision": revision, "variant": manifest.source.get("variant")}
    options = {key: value for key, value in given.items() if value is not None}
    try:
        return _from_pretrained(manifest.pipeline_class, location, options, dtype)
    except (OSError, ValueError) as error:
        raise DitrimError(
            f"pipeline {location} is not in the local cache of the hub and cannot be downloaded: "
            "check the name, the connection and, for gated models, that you are logged in; or "
            f"name a folder with --pipeline. The hub's library says: {error}"
        ) from error


def _from_pretrained(
    name: str,
    where: str,
    options: dict[str, Any],
    dtype: torch.dtype | None,
    *,
    with_transformer: bool = False,
) -> Any:
    """A pipeline of diffusers, by default without its transformer."""
    import diffusers

    parts: dict[str, Any] = {} if with_transformer else {"transformer": None}
    if name.startswith("QwenImage") and importlib.util.find_spec("torchvision") is None:
        from ditrim.runtime.editing.qwen_processor import load_picture_processor

        place = {key: value for key, value in options.items() if key != "variant"}
        parts["processor"] = load_picture_processor(where, subfolder="processor", **place)
    if dtype is not None:
        options = {**options, "torch_dtype": dtype}
    return getattr(diffusers, name).from_pretrained(where, **parts, **options)


def _pipeline_folder(location: str) -> Path | None:
    """The folder of a pipeline, also if its transformer's folder is named; none if not a folder."""
    folder = Path(location).expanduser()
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UsageError(f"pipeline {folder} is a file; give the folder of a diffusers pipeline")
    for place in (folder, folder.resolve().parent):
        if (place / "model_index.json").is_file():
            return place
    raise UsageError(
        f"pipeline {folder} has no model_index.json: it holds no whole diffusers pipeline; name "
        "one with --pipeline"
    )


def _has_variant(folder: Path, variant: str) -> bool:
    """Whether a part of a pipeline beside its transformer has files of a variant."""
    files = folder.glob(f"*/*.{variant}*.safetensors")
    return any(file.parent.name != "transformer" for file in files)


def _is_hub_id(location: str) -> bool:
    return location.count("/") == 1 and not location.startswith((".", "/", "~"))


def _class_in(folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'model_index.json'} is damaged: {error!r}") from error


def pipeline_name(pipe: Any) -> str:
    """The class by which a pipeline is known here."""
    return type(pipe).__name__


def default_steps(pipe: Any, engine_set: EngineSet) -> int:
    """Denoising steps where nobody says how many: the pipeline's, or a distilled editor's."""
    if is_lightning(pipe.scheduler):
        return lightning_steps(engine_set.manifest)
    return int(_parameters(pipe)["num_inference_steps"].default)


def prepare_request(pipe: Any, engine_set: EngineSet, request: EditRequest) -> EditRequest:
    """Check what a pipeline would ignore, misread or fail on, and decide what was left open.

    Args:
        pipe: from `load_pipeline`.
        engine_set: to be attached to it.
        request: to be checked.

    Returns:
        the request with the steps, the guidance and the size of the result.

    Raises:
        UsageError: names the option.
        LadderError: the engine set was not built for the result's size.
    """
    name = pipeline_name(pipe)
    if len(request.images) > 1 and name not in _TAKES_MANY:
        raise UsageError(
            f"{len(request.images)} pictures were given with --image, and {name} takes one; "
            "several references need qwen-edit-plus or qwen-edit-2511"
        )
    inputs = engine_set.manifest.graphs["front"].inputs
    if request.guidance is not None and all(spec.name != "guidance" for spec in inputs):
        raise UsageError(
            f"--guidance {request.guidance:g}: this model has no guidance embeddings; use "
            "--true-cfg-scale with --negative-prompt"
        )
    if request.true_cfg_scale is None and is_lightning(pipe.scheduler):
        request = replace(request, true_cfg_scale=1.0)
    scale = request.true_cfg_scale
    if scale is None:
        scale = float(_parameters(pipe)["true_cfg_scale"].default)
    if request.negative_prompt is not None and scale <= 1.0:
        raise UsageError(
            f"--negative-prompt has no effect at a true-cfg-scale of {scale:g}: give "
            "--true-cfg-scale above 1"
        )
    size = request.size
    if size is not None:
        check_size(size, _pixel_unit(pipe), engine_set)
    elif name != SMALL_PIPELINE:
        size = size_like(request.images[0].size, pipe, _pixel_unit(pipe), engine_set)
    steps = request.steps or default_steps(pipe, engine_set)
    return replace(request, size=size, steps=steps)


def _pixel_unit(pipe: Any) -> int:
    """Pixels that a token spans."""
    if pipeline_name(pipe) == SMALL_PIPELINE:
        return int(pipe.patch_size)
    return int(pipe.vae_scale_factor) * 2


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipe.__call__).parameters)


def run_edit(
    pipe: Any,
    request: EditRequest,
    on_step: Callable[[int, int], None] | None = None,
    on_latents: Callable[[Any, int, torch.Tensor], None] | None = None,
) -> Image.Image:
    """Run one edit through a pipeline with an engine set attached.

    Args:
        pipe: from `load_pipeline`.
        request: from `prepare_request`.
        on_step: called after each step with the steps done and the steps in all.
        on_latents: called after each step with the pipeline, the steps done and the packed latents
            (B, G, c); before `on_step`.

    Raises:
        UsageError: what the pipeline says of values that it does not take.
        DitrimError: the latents are not finite any more, or memory ran out.
    """
    import torch

    def watch(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not bool(torch.isfinite(tensors["latents"]).all()):
            raise DitrimError(
                f"the latents hold NaN or infinite values after step {index + 1}; nothing was "
                "written. A lower precision than the model bears is the usual cause: build the "
                "engine set with a higher --precision"
            )
        if on_latents is not None:
            on_latents(pipe, index + 1, tensors["latents"])
        if on_step is not None:
            on_step(index + 1, int(pipe.num_timesteps))
        return {}

    pipe.set_progress_bar_config(disable=True)
    try:
        call = _arguments_of(pipe, request)
        image: Image.Image = pipe(**call, callback_on_step_end=watch).images[0]
    except DitrimError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{pipeline_name(pipe)}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise DitrimError(
            f"the GPU ran out of memory: {error}. Use a smaller picture or fewer references"
        ) from error
    return image


def _arguments_of(pipe: Any, request: EditRequest) -> dict[str, Any]:
    """A request as the arguments of its pipeline's call."""
    import torch

    many = pipeline_name(pipe) in _TAKES_MANY
    call: dict[str, Any] = {
        "image": list(request.images) if many else request.images[0],
        "prompt": request.prompt,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
    }
    optional = {
        "negative_prompt": request.negative_prompt,
        "true_cfg_scale": request.true_cfg_scale,
        "guidance_scale": request.guidance,
        "num_inference_steps": request.steps,
    }
    call |= {key: value for key, value in optional.items() if value is not None}
    if request.size is not None:
        call |= {"width": request.size.width, "height": request.size.height}
        if "max_area" in _parameters(pipe):  # Kontext scales the size it is given to this area
            call["max_area"] = request.size.width * request.size.height
    scale = request.true_cfg_scale
    if scale is not None and scale > 1.0 and request.negative_prompt is None:
        call["negative_prompt"] = " "  # as the Qwen-Image-Edit model card does
    return call


def seen_references(
    pipe: Any, images: Sequence[Image.Image], grids: Sequence[TokenGrid]
) -> list[Image.Image]:
    """The references as the model saw them, in the geometry of their token grids.

    The small editor crops to a square; diffusers' pipelines only resize.
    """
    if pipeline_name(pipe) == SMALL_PIPELINE:
        from ditrim.runtime.small_editor import fit_reference

        return [fit_reference(image, is_first=index == 0) for index, image in enumerate(images)]
    unit = _pixel_unit(pipe)
    return [
        image.resize((columns * unit, rows * unit))
        for image, (rows, columns) in zip(images, grids, strict=True)
    ]


def region_from(pipe: Any, mask: Image.Image, request: EditRequest) -> torch.Tensor:
    """A region for `attach` from a mask of the first picture: (height, width) bool.

    Raises:
        UsageError: the mask is of another shape than the picture, or nothing in it is light.
    """
    import numpy as np
    import torch

    first = request.images[0]
    if abs(mask.width * first.height - mask.height * first.width) > max(first.size):
        raise UsageError(
            f"the region is {mask.width} x {mask.height} pixels and the picture {first.width} x "
            f"{first.height}: both need the same shape"
        )
    if pipeline_name(pipe) == SMALL_PIPELINE:
        from ditrim.runtime.small_editor import fit_reference

        mask = fit_reference(mask.resize(first.size))
    region = torch.from_numpy(np.asarray(mask.convert("L")) > 127)
    if not bool(region.any()):
        raise UsageError("the region is empty: nothing in its mask is lighter than half")
    return region


def describe_references(pipe: Any, seen: Sequence[Image.Image], result: Image.Image) -> str:
    """The sizes of the references that a model saw, and where the result lies in the first."""
    sizes = " and ".join(f"{image.width} x {image.height}" for image in seen)
    if pipeline_name(pipe) == SMALL_PIPELINE and seen[0].width > result.width:
        return f"{sizes} pixels, the picture is the middle {result.width} x {result.height}"
    return f"{sizes} pixels"


def silence_libraries() -> None:
    """Their progress bars; the command shows its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def component_dtype(engines: Engines) -> Any:
    """Half precision on a GPU, and then bfloat16: text encoders overflow in float16."""
    import torch

    is_half = engines.device.type == "cuda" and engines.dtype != torch.float32
    return torch.bfloat16 if is_half else None
