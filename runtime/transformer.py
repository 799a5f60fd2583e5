"""`EngineTransformer`: stands where a diffusers pipeline expects its transformer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditrim.engines.forking import check_not_forked
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import UsageError
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.denoising.inputs import ModelInputs
from ditrim.runtime.denoising.request import Request
from ditrim.runtime.denoising.rope import RopeTables, rope_at
from ditrim.runtime.denoising.unchanged import Unchanged
from ditrim.runtime.guidance_split import GuidanceSplit
from ditrim.runtime.policy import FullContext
from ditrim.runtime.refusals import refuse_method
from ditrim.runtime.report import RunReport

# What an `EngineTransformer` has in common with diffusers' own transformers. Every other public
# method of theirs is refused with a sentence, also one that a later release adds.
_WORKS = {
    "cache_context",
    "config",
    "config_name",
    "cpu",
    "cuda",
    "device",
    "dtype",
    "float",
    "forward",
    "half",
    "has_compatibles",
    "ignore_for_config",
    "is_cache_enabled",
    "is_gradient_checkpointing",
    "num_parameters",
    "register_to_config",
    "to",
    "to_json_string",
}
_REFUSED_OF_MODULES = ("compile", "load_state_dict", "state_dict")
# Methods of a module that are asked of the pipeline's own transformer where the engines run it.
_OF_WEIGHTS = (
    *("compile", "load_state_dict", "state_dict", "num_parameters"),
    *("modules", "named_modules", "parameters", "named_parameters", "buffers", "named_buffers"),
    *("children", "named_children", "to", "half", "float", "bfloat16", "cpu", "cuda"),
)
# Arguments that hold arguments of blocks.
_INNER = ("attention_kwargs", "joint_attention_kwargs")


class OpenRequest:
    """The request of one pipeline call, from its first sign on.

    Attributes:
        transformer: whose it is.
        branch: the guidance branch that the pipeline named; none where it names none.
    """

    def __init__(self, transformer: EngineTransformer) -> None:
        self.transformer = transformer
        self.branch: str | None = None
        self.places = Unchanged(transformer.architecture.place)
        self.given: dict[str, Tensor] = {}  # of this step, where guidance is split
        self._request: Request | None = None

    def begin(self, times: Sequence[float] | None = None) -> Request:
        """Begin a request, in place of the one before it."""
        self._request = self.transformer.denoiser.begin(times)
        self.transformer.note(self._request)
        return self._request

    @property
    def request(self) -> Request:
        """The request, begun now if nothing announced it."""
        return self._request if self._request is not None else self.begin()

    @property
    def is_in_step(self) -> bool:
        """Whether a model call was made since the last step ended."""
        return self._request is not None and self._request.is_in_step

    def enter_call(self, timestep: Tensor) -> tuple[Request, str, float]:
        """Begin a step if this call begins one; the request, the branch and the timestep.

        Where a loop does without `pipe.scheduler`, another timestep, or a branch that has run
        already, means that a step ended, and a timestep that rises that a request did.

        Raises:
            UsageError: the policy acts on steps, and the last one's end was not reported to it.
        """
        request = self.request
        time = request.time_of(timestep)
        began = request.time
        has_run = self.branch is not None and request.has_run(self.branch)
        if began is not None and (time != began or has_run):
            if self.transformer.acts_on_steps:
                raise UsageError(
                    f"the step at {began:g} was not ended by pipe.scheduler.step, which "
                    f"{type(self.transformer.denoiser.policy).__name__} acts on: take the "
                    "scheduler from the attached pipeline inside the block "
                    "(`with attachment.request(): scheduler = pipe.scheduler`)"
                )
            if time > began:
                request = self.begin()
            else:
                request.end_step()
        if not request.is_in_step:
            request.begin_step(time)
        # FluxKontextPipeline names no branch; with true CFG it calls the transformer twice a step.
        names = {0: "cond", 1: "uncond"}
        number = request.branches_run
        return request, self.branch or names.get(number, f"branch-{number}"), time


# The pipeline calls that this thread is in, the innermost last.
_OPEN: ContextVar[tuple[OpenRequest, ...]] = ContextVar("ditrim_open_requests", default=())


class EngineTransformer(nn.Module):
    """Takes the calls of a diffusers transformer of any architecture that is known.

    Returns the velocity of the noisy tokens only, which is what the pipelines read. What belongs to
    a request lies in an `OpenRequest` of the thread that runs it, so threads may share a
    transformer. `engine_transformer` makes one.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype | None = None) -> None:
        """Make a stand-in.

        Args:
            denoiser: what requests are made of.
            dtype: that of the transformer whose place it takes; none means the engines'.
        """
        nn.Module.__init__(self)
        engines = denoiser.engines
        manifest = engines.engine_set.manifest
        self.denoiser = denoiser
        self.architecture = ARCHITECTURES[manifest.architecture]
        self._front_inputs = {spec.name for spec in manifest.graphs["front"].inputs}
        self._axes = tuple(manifest.transformer_config["axes_dims_rope"])
        self._internal_dict = FrozenDict(manifest.transformer_config)
        self._gradient_checkpointing_func = None
        # Libraries ask a module's first parameter where it is and of what dtype.
        self.split: GuidanceSplit | None = None
        self.placeholder = nn.Parameter(
            torch.empty(0, dtype=dtype or engines.dtype), requires_grad=False
        )
        self._here = threading.local()
        self._last_report = RunReport()

    def __copy__(self) -> EngineTransformer:
        made = engine_transformer(self.denoiser, self.dtype)
        made.split = self.split
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineTransformer:
        return self.__copy__()  # engines are shared, never copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "an engine set's transformer cannot be pickled: send the engine set's folder, and "
            "attach it in the other process"
        )

    @property
    def is_live(self) -> bool:
        """Whether the engines run the pipeline's own transformer."""
        return hasattr(self.denoiser.engines, "transformer")

    @property
    def config(self) -> FrozenDict:
        """The configuration of the transformer that the engines replace."""
        return self._internal_dict

    @property
    def device(self) -> torch.device:
        """The device of the engines' tensors."""
        return self.denoiser.engines.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pipeline's tensors; engines take any."""
        return self.denoiser.engines.dtype if self.is_live else self.placeholder.dtype

    @property
    def report(self) -> RunReport:
        """Report of this thread's current or last request; else of the last one of any thread."""
        report: RunReport = getattr(self._here, "report", self._last_report)
        return report

    @property
    def acts_on_steps(self) -> bool:
        """Whether the policy looks at finished steps, and may change their result."""
        return self.denoiser.acts_on_steps

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters the engines hold; none can be trained."""
        from ditrim.engines.cost.parameters import count_parameters

        if only_trainable:
            return 0
        manifest = self.denoiser.engines.engine_set.manifest
        return count_parameters(
            manifest.transformer_config, manifest.architecture, manifest.front_depth
        ).total

    def note(self, request: Request) -> None:
        """Remember a request as this thread's last one."""
        self._here.report = self._last_report = request.report

    @contextmanager
    def open_request(self) -> Iterator[OpenRequest]:
        """Keep what runs inside apart from every other request; its steps are reported.

        Raises:
            BackendError: this process was forked from one whose engines these are.
        """
        check_not_forked()  # before the pipeline's other parts wait for threads that are not there
        opened = OpenRequest(self)
        _OPEN.set((*_OPEN.get(), opened))
        try:
            yield opened
        finally:  # of a generator, perhaps in another context than it began in
            _OPEN.set(tuple(other for other in _OPEN.get() if other is not opened))

    def opened_request(self) -> OpenRequest | None:
        """The request of the pipeline call that this thread is in, if it is in one."""
        for opened in reversed(_OPEN.get()):
            if opened.transformer is self:
                return opened
        return None

    def _current(self) -> OpenRequest:
        """The open request; for a call outside of one, a request of its own.

        Raises:
            UsageError: the policy or the cache carries something from call to call, and nothing
                says which calls belong together.
        """
        opened = self.opened_request()
        if opened is not None:
            return opened
        denoiser = self.denoiser
        if denoiser.cache is not None or not isinstance(denoiser.policy, FullContext):
            raise UsageError(
                "this call of the transformer comes from outside the attached pipeline, so nothing "
                "says which calls are one request: attach to the pipeline that you call, or run "
                "your loop inside `with attachment.request():`"
            )
        return OpenRequest(self)

    @contextmanager
    def cache_context(self, name: str, **_: object) -> Iterator[None]:
        """Name the guidance branch of the calls inside, as diffusers' pipelines do."""
        current = self._current()
        before, current.branch = current.branch, name
        try:
            yield
        finally:
            current.branch = before

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        timestep: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """One model call with the arguments of the diffusers class, by keyword.

        Args:
            hidden_states: (B, G + C, c), noisy tokens first.
            encoder_hidden_states: (B, T, c_text).
            timestep: (B,) in [0, 1].
            guidance: (B,), models with guidance embeddings.
            return_dict: return an output object rather than a tuple.
            others: what the architecture's calls say of positions, masks and pooled text
                (`Architecture.arguments`).

        Returns:
            the velocity, (B, G, c_out), in the dtype of `hidden_states`.

        Raises:
            UsageError: what an engine cannot do (ControlNet, IP-Adapter, LoRA scales), or inputs
                that do not fit.
            LadderError: a size that the engine set was not built for.
        """
        if encoder_hidden_states is None or timestep is None:
            raise UsageError("encoder_hidden_states and timestep must be given")
        known = self.architecture.arguments
        positions = [others.pop(name, None) for name in known.positions]
        text_mask, pooled_text = (
            None if name is None else others.pop(name, None)
            for name in (known.text_mask, known.pooled_text)
        )
        kwargs = {k: v for name in _INNER for k, v in (others.pop(name, None) or {}).items()}
        lora_scale = kwargs.pop("scale", 1.0)
        if lora_scale != 1.0 and not self.is_live:
            kwargs["scale"] = lora_scale
        self._refuse(kwargs | {k: v for k, v in others.items() if k not in known.ignored})
        if known.pooled_text is not None and pooled_text is None:
            raise UsageError(f"{known.pooled_text} must be given")
        batch = hidden_states.shape[0]
        timestep = timestep.reshape(-1).expand(batch) if timestep.numel() == 1 else timestep
        if guidance is not None:
            guidance = guidance.reshape(-1).expand(batch) if guidance.numel() == 1 else guidance
        num_text = encoder_hidden_states.shape[1]
        current = self._current()
        places = current.places.get(hidden_states.shape[1], num_text, *positions)
        num_noisy = places.num_noisy

        def make_rope() -> RopeTables:
            return rope_at(self.architecture.name, places.positions(), self._axes, self.device)

        request, branch, time = current.enter_call(timestep)
        inputs = ModelInputs(
            noisy_latents=hidden_states[:, :num_noisy],
            reference_latents=hidden_states[:, num_noisy:],
            text_embeds=encoder_hidden_states,
            text_mask=text_mask,
            timestep=timestep,
            time=time,
            layout=places.layout,
            guidance=guidance if "guidance" in self._front_inputs else None,
            pooled_text=pooled_text,
            rope_key=places.key,
            make_rope=make_rope,
        )
        if self.split is not None and not self.split.runs(branch):
            velocity = request.skip(branch, inputs)
        else:
            with self._lora_scaled(lora_scale):
                velocity = request.predict(branch, inputs)
        velocity = velocity.to(hidden_states.device, hidden_states.dtype)
        if self.split is not None:
            self.split.give(branch, velocity, current.given)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @contextmanager
    def _lora_scaled(self, scale: float) -> Iterator[None]:
        """Scale the LoRAs of the pipeline's own transformer, as its forward does."""
        if scale == 1.0:
            yield
            return
        from diffusers.utils import scale_lora_layers, unscale_lora_layers

        transformer = self.denoiser.engines.transformer  # type: ignore[attr-defined]
        scale_lora_layers(transformer, scale)
        try:
            yield
        finally:
            unscale_lora_layers(transformer, scale)

    @staticmethod
    def _refuse(arguments: Mapping[str, Any]) -> None:
        for name, value in arguments.items():
            if value is not None:
                raise UsageError(
                    f"{name} was given, which a compiled engine cannot apply; merge it into the "
                    "weights and rebuild the engine set, or run without it"
                )


def engine_transformer(denoiser: Denoiser, dtype: torch.dtype | None = None) -> EngineTransformer:
    """Make a stand-in that is an instance of the diffusers class whose place it takes."""
    name = denoiser.engines.engine_set.manifest.transformer_class
    is_live = hasattr(denoiser.engines, "transformer")
    return (_live_class_for if is_live else _class_for)(name)(denoiser, dtype)


@functools.cache
def _live_class_for(name: str) -> type[EngineTransformer]:
    """`EngineTransformer` as a subclass of a diffusers transformer that answers for itself.

    It is seen by what runs inside a pipeline's call, as callbacks are.
    """
    import diffusers

    base: type[Any] = getattr(diffusers, name)
    own = {*dir(nn.Module), *_WORKS, *vars(EngineTransformer)} - {*_OF_WEIGHTS}
    methods = {
        attribute: _delegating(attribute)
        for attribute in dir(base)
        if not attribute.startswith("_")
        and attribute not in own
        and callable(getattr(base, attribute))
    }
    methods["__getattr__"] = _own_attribute
    members = {"__doc__": EngineTransformer.__doc__, "__module__": __name__}
    return type("EngineTransformer", (type("_Own", (), methods), EngineTransformer, base), members)


def _own_attribute(self: Any, name: str) -> Any:
    """What a stand-in lacks, as blocks and the list of loaded LoRAs, its transformer has."""
    try:
        return nn.Module.__getattr__(self, name)
    except AttributeError:
        if "denoiser" not in vars(self):  # half made
            raise
    return getattr(self.denoiser.engines.transformer, name)


def _delegating(name: str) -> Any:
    """A method that the transformer itself answers."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.denoiser.engines.transformer, name)(*args, **kwargs)

    call.__name__ = name
    return call


@functools.cache
def _class_for(name: str) -> type[EngineTransformer]:
    """`EngineTransformer` as a subclass of a diffusers transformer, whose methods it refuses."""
    import diffusers

    base: type[Any] = getattr(diffusers, name)
    plain = set(dir(nn.Module))
    refused = {
        attribute
        for attribute in dir(base)
        if not attribute.startswith("_")
        and attribute not in _WORKS
        and attribute not in plain
        and callable(getattr(base, attribute))
    }
    members = {
        attribute: _refusing(attribute) for attribute in (*sorted(refused), *_REFUSED_OF_MODULES)
    }
    members |= {"__doc__": EngineTransformer.__doc__, "__module__": __name__}
    # Those of `EngineTransformer` come first, then the refusals, then diffusers' own.
    return type("EngineTransformer", (EngineTransformer, type("_Refusing", (), members), base), {})


def _refusing(name: str) -> Any:
    """A method that says why it cannot work."""

    def refuse(*_: object, **__: object) -> NoReturn:
        refuse_method("transformer", name)

    refuse.__name__ = name
    return refuse
