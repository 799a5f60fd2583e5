"""What `bench.py` compares: models at one size each, and our ways to run them.

A way is a transformer that takes diffusers' call, so that one loop drives them all. Those that are
not ours are in `others`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ditrim.runtime as ditrim
from ditrim.engines.backend import Engines
from ditrim.engines.build.build import run_build
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.load import load_engines
from ditrim.engines.sets.manifest import Manifest
from ditrim.runtime.caches.step_cache import Cache, StepCache
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.policy import Policy
from ditrim.runtime.profiling.measure import grid_of
from ditrim.runtime.report import RunReport
from ditrim.runtime.transformer import EngineTransformer, engine_transformer

# (frames, height, width) of a picture in tokens, as Qwen's pipelines have it.
Grid = tuple[int, int, int]
INTERVAL = 10
CACHE_THRESHOLD = 0.158  # reuses 70 % of the steps on training scenes of the small editor
# Words in an instruction and tokens of the references: of one size, every way is made once.
_SCENE_WORDS = 5
SCENE_REFERENCES = {"small": 144, "small-large": 324}
_SCENES_LOOKED_AT = 600

# (number, steps) -> the edit in one piece or more, the last of which is the picture or latents.
EditRun = Callable[[int, int], Iterator[Any]]


class Ours:
    """Engines behind diffusers' call, in one request until the next `start`."""

    def __init__(self, engines: Engines, policy: Policy, cache: Cache | None = None) -> None:
        self._transformer = engine_transformer(Denoiser(engines, policy, cache=cache))
        self._open = ExitStack()
        self.start()

    def start(self) -> None:
        """Close the open request and open another."""
        self._open.close()
        self._open.enter_context(self._transformer.open_request())

    @property
    def report(self) -> RunReport:
        """The report of the request that is open."""
        return self._transformer.report

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Name the guidance branch of the calls inside, as diffusers does."""
        return self._transformer.cache_context(name)

    def __call__(self, **call: Any) -> Any:
        return self._transformer(**call)


@dataclass(slots=True)
class Way:
    """One way to run a model.

    Attributes:
        name: unique in its case.
        transformer: takes diffusers' call and `cache_context`.
        prepare_s: making it: compiling, or exporting and loading; none where there is nothing.
        policy, cache: of ours; none for the others.
        counter: steps that ran all blocks, for First-Block-Cache.
    """

    name: str
    transformer: Any
    prepare_s: float | None = None
    policy: Policy | None = None
    cache: Cache | None = None
    counter: list[int] | None = None

    def start(self) -> None:
        """Drop what the previous request left behind."""
        if isinstance(self.transformer, Ours):
            self.transformer.start()
        elif self.counter is not None:
            self.transformer._reset_stateful_cache()
            self.counter[0] = 0

    def computed(self, steps: int) -> int:
        """Steps of the last request that ran more than the first blocks."""
        if isinstance(self.transformer, (Ours, EngineTransformer)):
            return self.transformer.report.back_calls
        return steps if self.counter is None else self.counter[0]


@dataclass(slots=True)
class Case:
    """A model at one size.

    Attributes:
        name: "small", "small-large" or "wide".
        title: for people.
        engines: loaded; build_s: of their set, none where it was there.
        transformer: diffusers' own, of the same weights.
        call: keyword arguments of one call.
        size: its lengths.
        grids: (frames, height, width) of the picture and of each reference.
        count: edits that there are.
        is_picture: edits give pictures, not latents.
        edit_with: from a transformer, or a policy of ours, to a function that makes edits.
    """

    name: str
    title: str
    engines: Engines
    build_s: float | None
    transformer: Any
    call: dict[str, Any]
    size: CallSize
    grids: list[Grid]
    count: int
    is_picture: bool
    edit_with: Callable[[Way], EditRun]

    @property
    def manifest(self) -> Manifest:
        """The manifest of the engine set."""
        return self.engines.engine_set.manifest

    def torch_engines(self) -> Engines:
        """The torch backend on diffusers' own transformer, split as the set is."""
        manifest = self.manifest
        return ditrim.torch_engines(
            self.transformer,
            front_depth=manifest.front_depth,
            layers=manifest.representative_layers,
            granularity=manifest.ladder.granularity,
        )

    def step(self, transformer: Any) -> Tensor:
        """One call, as a pipeline makes it: (B, G, c)."""
        with transformer.cache_context("cond"):
            velocity: Tensor = transformer(**self.call)[0][:, : self.size.num_noisy]
        return velocity


def small_case(name: str, folder: Path, threads: int, count: int) -> Case:
    """The shipped small editor, through its pipeline, on held-out scenes of one size."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from PIL import Image

    from ditrim.runtime.small_editor import SmallEditPipeline, held_out_edits, load_small_pipeline

    engines, build_s = _engines(BuildOptions(preset="small", output=str(folder / "small")), threads)
    pipe = load_small_pipeline()
    num_reference = SCENE_REFERENCES[name]
    examples = [
        example
        for example in held_out_edits(_SCENES_LOOKED_AT)
        if len(pipe.tokenizer.encode(example.prompt)) == _SCENE_WORDS
        and [len(picture) for picture in example.references] == [4 * int(num_reference**0.5)]
    ][:count]
    size = CallSize(num_noisy=144, num_reference=num_reference, num_text=_SCENE_WORDS)
    grids: list[Grid] = [(1, 12, 12), (1, int(num_reference**0.5), int(num_reference**0.5))]
    embeds, _ = pipe.encode_prompt(examples[0].prompt)

    def edit_with(way: Way) -> EditRun:
        own = SmallEditPipeline(
            transformer=pipe.transformer if way.policy is not None else way.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config),
            vae=pipe.vae,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
        )
        own.set_progress_bar_config(disable=True)
        if way.policy is not None:
            attachment = ditrim.attach(own, engines, way.policy, cache=way.cache)
            way.transformer = attachment.transformer
        pictures = [[Image.fromarray(item) for item in one.references] for one in examples]

        def edit(number: int, steps: int) -> Iterator[Any]:
            way.start()
            images = own(
                image=pictures[number],
                prompt=examples[number].prompt,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(number),
                output_type="np",
            ).images
            yield images[0]

        return edit

    return Case(
        name=name,
        title=f"the trained small editor, {_size_text(size)}",
        engines=engines,
        build_s=build_s,
        transformer=pipe.transformer.eval().requires_grad_(False),
        call=_call_of(size, grids, pipe.transformer.config, embeds),
        size=size,
        grids=grids,
        count=len(examples),
        is_picture=True,
        edit_with=edit_with,
    )


def wide_case(
    folder: Path,
    threads: int,
    count: int,
    *,
    config: dict[str, Any],
    num_layers: int,
    layers: tuple[int, ...],
    size: CallSize,
) -> Case:
    """A random Qwen-Image-Edit; edits are denoising loops from noise, on random references."""
    from ditrim.export.family import FAMILIES
    from ditrim.export.transformer import random_transformer

    width = config["num_attention_heads"] * config["attention_head_dim"]
    options = BuildOptions(
        model="qwen-edit",
        weights="random",
        num_layers=num_layers,
        config=config,
        front_depth=1,
        layers=layers,
        max_reference_tokens=size.num_reference,
        max_noisy_tokens=size.num_noisy,
        max_text_tokens=size.num_text,
        output=str(folder / f"width-{width}"),
    )
    engines, build_s = _engines(options, threads)
    built = engines.engine_set.manifest.transformer_config
    transformer = random_transformer(FAMILIES["qwen-edit"], built, 0, torch.float32)
    grids: list[Grid] = [(1, *grid_of(count)) for count in (size.num_noisy, size.num_reference)]
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, size.num_text, built["joint_attention_dim"], generator=generator)
    call = _call_of(size, grids, built, embeds)
    reference = call["hidden_states"][:, size.num_noisy :]

    def edit_with(way: Way) -> EditRun:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if way.policy is not None:
            way.transformer = Ours(engines, way.policy, way.cache)
        scheduler = FlowMatchEulerDiscreteScheduler()

        @torch.no_grad()
        def edit(number: int, steps: int) -> Iterator[Any]:
            way.start()
            noise = torch.Generator().manual_seed(number)
            latents = torch.randn(1, size.num_noisy, built["in_channels"], generator=noise)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
            scheduler.set_begin_index(0)
            for time_step in scheduler.timesteps:
                with way.transformer.cache_context("cond"):
                    velocity = way.transformer(
                        **call
                        | {
                            "hidden_states": torch.cat([latents, reference], dim=1),
                            "timestep": time_step.expand(1) / 1000,
                        }
                    )[0][:, : size.num_noisy]
                latents = scheduler.step(velocity, time_step, latents, return_dict=False)[0]
                yield latents.numpy()

        return edit

    return Case(
        name="wide",
        title=f"a random model of d = {width}, {num_layers} blocks, {_size_text(size)}",
        engines=engines,
        build_s=build_s,
        transformer=transformer,
        call=call,
        size=size,
        grids=grids,
        count=count,
        is_picture=False,
        edit_with=edit_with,
    )


def our_schedules(case: Case) -> list[Way]:
    """Full context and pruned schedules on our engines.

    Random weights spread the influence evenly, so that tau says nothing of them: there half of the
    references are kept, as in ToPi's Sec. 5.4.
    """
    kept: dict[str, Any] = {"tau": 0.85} if case.is_picture else {"ratio": 0.5}
    topi = ditrim.ToPi(**kept, interval=INTERVAL)
    cache = StepCache(threshold=CACHE_THRESHOLD)
    found: dict[str, tuple[Policy, Cache | None]] = {
        "ditrim, full context": (ditrim.FullContext(), None),
        "ditrim, ToPi": (topi, None),
        "ditrim, CoverageToPi": (ditrim.CoverageToPi(**kept, interval=INTERVAL), None),
        "ditrim, ToPi + StepCache": (topi, cache),
        "ditrim, StepCache": (ditrim.FullContext(), cache),
    }
    return [Way(name, None, policy=policy, cache=c) for name, (policy, c) in found.items()]


def _engines(options: BuildOptions, threads: int) -> tuple[Engines, float | None]:
    result = run_build(options)
    engines = load_engines(result.engine_set, device="cpu", threads=threads)
    return engines, None if result.is_reused else result.seconds


def _call_of(size: CallSize, grids: list[Grid], config: Any, embeds: Tensor) -> dict[str, Any]:
    """Return the arguments that a pipeline gives its transformer."""
    generator = torch.Generator().manual_seed(0)
    tokens = size.num_noisy + size.num_reference
    return {
        "hidden_states": torch.randn(1, tokens, config["in_channels"], generator=generator),
        "timestep": torch.tensor([0.7]),
        "guidance": None,
        "encoder_hidden_states_mask": None,
        "encoder_hidden_states": embeds,
        "img_shapes": [grids],
        "attention_kwargs": {},
        "return_dict": False,
    }


def _size_text(size: CallSize) -> str:
    return f"{size.num_noisy} noisy, {size.num_reference} reference and {size.num_text} text tokens"
