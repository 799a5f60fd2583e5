"""The torch backend in diffusers' own pipelines: the pipeline's own transformer, reduced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as torchao
from lora_files import layers_of, random_lora, write_lora
from tiny import FAMILY_NAMES, tiny_transformer
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import UsageError
from ditrim.runtime.attachment import Attachment

SPLIT: dict[str, Any] = {"front_depth": 1, "layers": (2, 3)}


def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    arguments = copy.deepcopy(arguments)
    with small_pictures(64), torch.no_grad():
        return pipe(**arguments).images  # type: ignore[no-any-return]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def attach(pipe: Any, policy: Any = None, *, options: Any = None, **others: Any) -> Attachment:
    engines = ditrim.torch_engines(pipe, **(SPLIT if options is None else options))
    return ditrim.attach(pipe, engines, policy, **others)


def kept(attachment: Attachment) -> list[list[list[int]] | None]:
    return [
        None if step.kept_indices is None else step.kept_indices.tolist()
        for step in attachment.report.steps
    ]


def lora_file(folder: Path, name: str = "style", seed: int = 0, family: str = "qwen-edit") -> Path:
    lora = random_lora(layers_of(tiny_transformer(family)), seed=seed)
    return write_lora(folder / f"{name}.safetensors", lora, "diffusers")


def add_lora(pipe: Any, path: Path) -> None:
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=path.stem)


# --- the pipeline's own results -------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_context_gives_the_pipelines_own_latents(family: str, guided: bool) -> None:
    pipe = tiny_pipeline(family)
    batch = 2 if family in ("qwen-edit", "flux-kontext") else 1
    arguments = request(family, guided=guided, batch=batch, short_prompts=family == "qwen-edit")
    expected = run(pipe, arguments)
    with attach(pipe, ditrim.FullContext()):
        assert difference(run(pipe, arguments), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_context_in_bfloat16(family: str) -> None:
    pipe = tiny_pipeline(family).to(torch.bfloat16)
    arguments = request(family, guided=True)
    arguments = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in arguments.items()
    }
    expected = run(pipe, arguments)
    with attach(pipe, ditrim.FullContext()):
        found = run(pipe, arguments)
    assert found.dtype == expected.dtype
    error = float((found - expected).float().norm() / expected.float().norm())
    assert error < 1e-2


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_one_line_with_the_familys_own_split(family: str) -> None:
    pipe = tiny_pipeline(family)
    with ditrim.attach(pipe, policy=ditrim.ToPi(tau=0.5, interval=2)) as attachment:
        found = run(pipe, request(family))
        manifest = attachment.transformer.denoiser.engines.engine_set.manifest
    assert manifest.model == family
    assert manifest.layers_source.startswith("scaled from")
    assert bool(found.isfinite().all())
    roles = [step.role for step in attachment.report.steps]
    assert roles == ["anchor", "reduced", "anchor", "reduced"]
    assert attachment.report.steps[1].num_kept < attachment.report.steps[0].num_kept


POLICIES: dict[str, Callable[[], dict[str, Any]]] = {
    "topi": lambda: {"policy": ditrim.ToPi(tau=0.5, interval=2)},
    "coverage": lambda: {"policy": ditrim.CoverageToPi(ratio=0.4, interval=2)},
    "tokendrop": lambda: {"policy": ditrim.TokenDrop()},
    "random": lambda: {
        "policy": ditrim.RandomDrop(policy=ditrim.ToPi(tau=0.5, interval=2), seed=1)
    },
    "merge": lambda: {"policy": ditrim.ImportanceMerge()},
    "tome": lambda: {"policy": ditrim.ToMeSD()},
    "toma": lambda: {"policy": ditrim.ToMA()},
    "cache": lambda: {
        "policy": ditrim.ToPi(tau=0.5, interval=2),
        "cache": ditrim.StepCache(threshold=0.5),
    },
    "region": lambda: {
        "policy": ditrim.ToPi(tau=0.3, interval=2),
        "region": torch.eye(4, dtype=torch.bool),
    },
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_and_cache_does_what_it_does_on_an_engine_set(
    name: str, tiny_engine_sets: Any
) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    pipe, arguments = tiny_pipeline("qwen-edit"), request("qwen-edit", guided=True, steps=6)
    with ditrim.attach(pipe, engines, **POLICIES[name]()) as built:
        expected = run(pipe, arguments)
    with attach(pipe, **POLICIES[name]()) as live:
        found = run(pipe, arguments)
    steps = [(step.role, step.branch, step.num_kept) for step in live.report.steps]
    assert steps == [(step.role, step.branch, step.num_kept) for step in built.report.steps]
    if name != "random":  # drawn from every bit of the influence
        assert kept(live) == kept(built)
        assert difference(found, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_kept_tokens_are_those_of_onnx_runtime(family: str, tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets(family), device="cpu")
    pipe, policy = tiny_pipeline(family), ditrim.ToPi(tau=0.6, interval=3)
    many = {} if family in ("qwen-edit", "flux-kontext") else {"num_references": 2}
    arguments = request(family, guided=True, **many)
    with ditrim.attach(pipe, engines, policy) as built:
        expected = run(pipe, arguments)
    with attach(pipe, policy) as live:
        found = run(pipe, arguments)
    assert kept(live) == kept(built)
    assert difference(found, expected) < 1e-4


# --- nothing is left behind, and nobody else notices ----------------------------------------------


def state_of(pipe: Any) -> list[Any]:
    """All that an attachment could have changed, by identity."""
    transformer = pipe.transformer
    modules = [(name, id(module)) for name, module in transformer.named_modules()]
    tensors = [(name, id(value)) for name, value in transformer.named_parameters()]
    inner = [sorted(vars(module)) for module in transformer.modules()]
    processors = [id(block.attn.processor) for block in transformer.transformer_blocks]
    return [type(pipe), sorted(vars(pipe)), modules, tensors, inner, processors]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_detach_restores_the_pipeline_exactly(family: str) -> None:
    pipe, arguments = tiny_pipeline(family), request(family)
    expected, before = run(pipe, arguments), state_of(pipe)
    attachment = attach(pipe, ditrim.ToPi(tau=0.5, interval=2))
    assert not torch.equal(run(pipe, arguments), expected)
    attachment.detach()
    attachment.detach()
    assert state_of(pipe) == before
    assert torch.equal(run(pipe, arguments), expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_pipeline_over_the_same_transformer_is_undisturbed(family: str) -> None:
    pipe, other = tiny_pipeline(family), tiny_pipeline(family, seed=0)
    other.transformer = pipe.transformer
    arguments, during = request(family), []
    expected = run(other, arguments)

    def look(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        during.append(run(other, arguments))
        return values

    with attach(pipe, ditrim.ToPi(tau=0.5, interval=2)) as attachment:
        run(pipe, arguments | {"callback_on_step_end": look})
        assert torch.equal(run(other, arguments), expected)
    assert len(during) == 4
    assert all(torch.equal(found, expected) for found in during)
    assert torch.equal(run(other, arguments), expected)
    assert len(attachment.report.steps) == 4


def test_threads_with_light_copies_and_a_plain_pipeline_are_exact() -> None:
    pipe = tiny_pipeline("qwen-edit")
    plain = copy.copy(pipe)
    requests = [request("qwen-edit", seed=seed) for seed in range(4)]
    with small_pictures(64), torch.no_grad():
        expected_plain = [plain(**copy.deepcopy(given)).images for given in requests]
        with attach(pipe, ditrim.ToPi(tau=0.5, interval=2)):

            def edit(number: int) -> torch.Tensor:
                light = copy.copy(pipe if number % 2 else plain)
                light.scheduler = copy.deepcopy(light.scheduler)
                return light(**copy.deepcopy(requests[number // 2])).images  # type: ignore[no-any-return]

            alone = [edit(number) for number in range(8)]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(edit, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[::2], expected_plain, strict=True))


def test_two_attachments_over_one_transformer_end_in_any_order() -> None:
    first, arguments = tiny_pipeline("qwen-edit"), request("qwen-edit")
    second = tiny_pipeline("qwen-edit")
    second.transformer = first.transformer
    plain, before = run(first, arguments), state_of(first)
    one = attach(first, ditrim.FullContext())
    two = attach(second, ditrim.ToPi(tau=0.5, interval=2), options={"front_depth": 2})
    reduced = run(second, arguments)
    one.detach()
    assert torch.equal(run(second, arguments), reduced)
    assert torch.equal(run(first, arguments), plain)
    two.detach()
    assert state_of(first) == before


def test_an_attached_transformer_can_be_copied_pickled_and_saved(tmp_path: Path) -> None:
    pipe, arguments = tiny_pipeline("qwen-edit"), request("qwen-edit")
    expected = run(pipe, arguments)
    with attach(pipe):
        copied = copy.deepcopy(pipe.transformer)
        pickled = pickle.loads(pickle.dumps(pipe.transformer))
        pipe.save_pretrained(tmp_path)
    for transformer in (
        copied,
        pickled,
        type(pipe.transformer).from_pretrained(tmp_path, subfolder="transformer"),
    ):
        other = tiny_pipeline("qwen-edit", seed=1)
        other.transformer, other.vae = transformer, pipe.vae
        assert torch.equal(run(other, arguments), expected)


# --- what the user has in his pipeline ------------------------------------------------------------


def full_context_matches(pipe: Any, arguments: dict[str, Any], limit: float = 1e-5) -> torch.Tensor:
    """Compare the attached pipeline with itself untouched; return the plain result."""
    plain = copy.copy(pipe)
    plain.__class__ = plain.__class__.__mro__[2] if "_ditrim_stand_in" in vars(pipe) else type(pipe)
    vars(plain).pop("_ditrim_stand_in", None)
    expected = run(plain, arguments)
    assert difference(run(pipe, arguments), expected) < limit
    return expected


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_loras_are_loaded_switched_scaled_and_unloaded_live(family: str, tmp_path: Path) -> None:
    pipe, arguments = tiny_pipeline(family), request(family)
    paths = [lora_file(tmp_path, name, seed, family) for seed, name in enumerate(("a", "b"))]
    add_lora(pipe, paths[0])
    scales = "joint_attention_kwargs" if family == "flux-kontext" else "attention_kwargs"
    seen = []
    with attach(pipe, ditrim.FullContext()):
        seen.append(full_context_matches(pipe, arguments))
        add_lora(pipe, paths[1])
        pipe.set_adapters(["b"])
        seen.append(full_context_matches(pipe, arguments))
        pipe.set_adapters(["a", "b"], [0.5, 0.8])
        seen.append(full_context_matches(pipe, arguments))
        seen.append(full_context_matches(pipe, arguments | {scales: {"scale": 0.3}}))
        pipe.fuse_lora()
        full_context_matches(pipe, arguments, 1e-4)
        pipe.unfuse_lora()
        pipe.disable_lora()
        seen.append(full_context_matches(pipe, arguments))
        pipe.unload_lora_weights()
        assert difference(full_context_matches(pipe, arguments), seen[-1]) < 1e-5
    for index, one in enumerate(seen):
        assert all(difference(one, other) > 1e-3 for other in seen[:index])


def test_a_lora_switched_between_two_edits_changes_a_reduced_one(tmp_path: Path) -> None:
    pipe, arguments = tiny_pipeline("qwen-edit"), request("qwen-edit")
    for seed, name in enumerate(("a", "b")):
        add_lora(pipe, lora_file(tmp_path, name, seed))
    with attach(pipe, ditrim.ToPi(tau=0.5, interval=2)):
        pipe.set_adapters(["a"])
        first = run(pipe, arguments)
        pipe.set_adapters(["b"])
        second = run(pipe, arguments)
        pipe.set_adapters(["a"])
        assert torch.equal(run(pipe, arguments), first)
    assert difference(second, first) > 1e-3


class QuantisedLinear(torch.nn.Linear):
    """A linear layer with weights of 8 bits, as quantising libraries put them in."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        scale = plain.weight.abs().amax(dim=1, keepdim=True) / 127
        whole = (plain.weight / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)
        self.scale, self.bias = torch.nn.Parameter(scale.detach()), plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, QuantisedLinear(child))
        else:
            quantise(child)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_quantised_linears_run(family: str) -> None:
    pipe = tiny_pipeline(family)
    plain = run(pipe, request(family))
    quantise(pipe.transformer)
    with attach(pipe, ditrim.FullContext()):
        assert difference(full_context_matches(pipe, request(family)), plain) > 0


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_torchao_weights_run(family: str) -> None:
    pipe = tiny_pipeline(family)
    plain = run(pipe, request(family))
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    with attach(pipe, ditrim.FullContext()):
        assert difference(full_context_matches(pipe, request(family)), plain) > 0
    with attach(pipe, ditrim.ToPi(tau=0.5, interval=2)) as attachment:
        assert bool(run(pipe, request(family)).isfinite().all())
        assert attachment.report.kept_ratio < 1


def test_torchao_weights_are_not_taken_for_those_of_a_set(
    tiny_engine_sets: Callable[[str], Path],
) -> None:
    pipe = tiny_pipeline("qwen-edit")
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    with pytest.raises(UsageError, match=r"is Int8Tensor on cpu \(quantised or rebuilt\?\)"):
        ditrim.attach(pipe, tiny_engine_sets("qwen-edit"))


@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_layerwise_casting_runs(family: str) -> None:
    pipe = tiny_pipeline(family)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    with attach(pipe, ditrim.FullContext()):
        full_context_matches(pipe, request(family))


def dispatch_sequentially(pipe: Any) -> None:
    """Hook every leaf of the transformer, as sequential offloading does on an accelerator."""
    from accelerate.hooks import attach_align_device_hook

    cpu = torch.device("cpu")
    attach_align_device_hook(pipe.transformer, execution_device=cpu, offload=False)
    assert hasattr(pipe.transformer.transformer_blocks[0].attn.to_q, "_hf_hook")


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": dispatch_sequentially,
    "blocks": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "leaves": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("moment", ["before", "while attached"])
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading_works(kind: str, family: str, moment: str) -> None:
    expected = run(tiny_pipeline(family), request(family))
    pipe = tiny_pipeline(family)
    if moment == "before":
        OFFLOADS[kind](pipe)
    with attach(pipe, ditrim.FullContext()):
        if moment != "before":
            OFFLOADS[kind](pipe)
        for _ in range(2):
            assert difference(run(pipe, request(family)), expected) < 1e-5
    assert difference(run(pipe, request(family)), expected) < 1e-5


def test_an_attention_backend_that_is_set_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    pipe, arguments = tiny_pipeline("qwen-edit"), request("qwen-edit")
    used = []
    registry = attention_dispatch._AttentionBackendRegistry
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    plain = registry._backends[name]

    def watched(*args: Any, **kwargs: Any) -> Any:
        used.append(kwargs["query"].shape)
        return plain(*args, **kwargs)

    monkeypatch.setitem(registry._backends, name, watched)
    expected = run(pipe, arguments)
    with attach(pipe, ditrim.FullContext()):
        pipe.transformer.set_attention_backend("_native_math")
        assert difference(run(pipe, arguments), expected) < 1e-5
        assert len(used) == 4 * 4  # steps and blocks
        pipe.transformer.reset_attention_backend()
    # diffusers makes it the default of everything too.
    registry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    assert difference(run(pipe, arguments), expected) == 0
    assert len(used) == 4 * 4


# --- compiled -------------------------------------------------------------------------------------


def graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "kinds"), [("qwen-edit-2511", 1), ("flux-kontext", 2)])
def test_each_kind_of_block_is_compiled_once_for_all_lengths(
    family: str, kinds: int, fresh_compiler: None
) -> None:
    pipe = tiny_pipeline(family)
    many = {"num_references": 2} if family != "flux-kontext" else {}
    plain = [run(pipe, request(family, num_text=n, **many)) for n in (5, 9)]
    options = SPLIT | {"compile": "blocks", "granularity": 1}
    with attach(pipe, ditrim.FullContext(), options=options):
        found = [run(pipe, request(family, num_text=n, **many)) for n in (5, 9)]
    assert all(difference(a, b) < 1e-4 for a, b in zip(found, plain, strict=True))
    with attach(pipe, ditrim.ToPi(tau=0.5, interval=2), options=options) as live:
        for num_text in (5, 9, 12):
            run(pipe, request(family, num_text=num_text, **many))
        lengths = {step.num_kept for step in live.report.steps}
    before = graphs_compiled()
    # Plain, scoring, and the last one with and without scoring; FLUX has two kinds.
    assert before <= 2 * kinds + 2
    assert len(lengths) > 1
    with attach(pipe, ditrim.ToPi(tau=0.9, interval=4), options=options):
        for num_text in (7, 11):
            run(pipe, request(family, num_text=num_text, side=64, **many))
    assert graphs_compiled() == before


COMPILED: dict[str, Callable[[Any], None]] = {
    "wrapped": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer)),
    "in place": lambda pipe: pipe.transformer.compile(),
    "by block": lambda pipe: pipe.transformer.compile_repeated_blocks(fullgraph=True),
}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_a_compiled_transformer_runs_compiled(kind: str, family: str, fresh_compiler: None) -> None:
    pipe, arguments = tiny_pipeline(family), request(family)
    expected = run(pipe, arguments)
    COMPILED[kind](pipe)
    with attach(pipe, ditrim.FullContext()):
        assert difference(run(pipe, arguments), expected) < 1e-4
    assert graphs_compiled() > 0


# --- what cannot work together --------------------------------------------------------------------


def test_what_cannot_work_together_is_refused_with_a_remedy() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    class Odd:
        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    def replace_forward(pipe: Any) -> None:
        plain = pipe.transformer.forward
        pipe.transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs)

    cases: list[tuple[Callable[[Any], Any], str]] = [
        (lambda pipe: setattr(pipe, "transformer", None), "without its transformer"),
        (lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig()), "disable_cache"),
        (replace_forward, "undo it first"),
        (lambda pipe: pipe.transformer.set_attn_processor(Odd()), "default ones"),
    ]
    for change, remedy in cases:
        pipe = tiny_pipeline("qwen-edit")
        change(pipe)
        with pytest.raises(UsageError, match=remedy):
            attach(pipe)
    pipe = tiny_pipeline("flux-kontext")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UsageError, match="unfuse_qkv_projections"):
        attach(pipe)


def test_changes_while_attached_that_cannot_work_are_refused_at_the_call() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe, arguments = tiny_pipeline("qwen-edit"), request("qwen-edit")
    with attach(pipe):
        own = pipe.transformer
        own.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(UsageError, match="disable_cache"):
            run(pipe, arguments)
        own.disable_cache()
        run(pipe, arguments)
        pipe.transformer = tiny_transformer("qwen-edit", seed=1)
        with pytest.raises(UsageError, match="attach again"):
            run(pipe, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "all"}, "give 'blocks'"),
        ({"cuda_graphs": -1}, "must not be negative"),
        ({"front_depth": 4}, "allowed: 0 to 3"),
        ({"layers": (0,), "front_depth": 1}, "not a layer of BACK"),
        ({"granularity": 0}, "granularity"),
        ({"model": "flux-kontext"}, "choose one of qwen-edit"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ditrim.torch_engines(tiny_pipeline("qwen-edit"), **options)


def test_a_policy_in_the_place_of_engines_names_the_remedy() -> None:
    with pytest.raises(UsageError, match="a policy: name it"):
        ditrim.attach(tiny_pipeline("qwen-edit"), ditrim.ToPi())  # type: ignore[arg-type]


def test_another_models_pipeline_is_told_by_its_configuration() -> None:
    engines = ditrim.torch_engines(tiny_pipeline("qwen-edit-2511"))
    assert engines.engine_set.manifest.model == "qwen-edit-2511"
    alone = ditrim.torch_engines(tiny_transformer("qwen-edit-2511"))
    assert alone.engine_set.manifest.model == "qwen-edit-2511"
