"""What `bench.py` compares ditrim with, over the same parameters, and plain matrix products.

The unmodified diffusers class as it is, compiled by `torch.compile`, with diffusers' own
First-Block-Cache, or exported as one graph for ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Way
from ditrim.engines.cost.flops import MatrixProduct
from ditrim.runtime.profiling.product import onnxruntime_product

OTHERS = ("eager", "compile", "fbc", "onnxruntime")
# Near 44 and 36 dB on training scenes of the small editor.
FBC_THRESHOLDS = (0.1, 0.2)


def other_ways(case: Case, wanted: tuple[str, ...], folder: Path, threads: int) -> list[Way]:
    """The unmodified transformer, run as its users can."""
    made = []
    if "eager" in wanted:
        made.append(Way("diffusers eager", case.transformer))
    if "compile" in wanted:
        made.append(_compiled(case))
    if "onnxruntime" in wanted:
        made.append(_one_graph(case, folder, threads))
    if "fbc" in wanted:
        made += [_first_block_cache(case, threshold) for threshold in FBC_THRESHOLDS]
    return made


def _twin(transformer: Any) -> Any:
    """The same module over the same parameters, to be changed apart."""
    shared: dict[int, Any] = {id(value): value for value in transformer.parameters()}
    return copy.deepcopy(transformer, shared)


@torch.no_grad()
def _compiled(case: Case) -> Way:
    """`torch.compile` with its defaults; making it is the first call, nothing cached before."""
    way = Way("torch.compile", torch.compile(_twin(case.transformer)))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its complaint about complex numbers
        case.step(way.transformer)
    way.prepare_s = time.perf_counter() - start
    return way


def _first_block_cache(case: Case, threshold: float) -> Way:
    from diffusers import FirstBlockCacheConfig

    transformer = _twin(case.transformer)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    counter = [0]

    def count(*_: Any) -> None:
        counter[0] += 1

    # Inside the second block, which a reused step skips.
    transformer.transformer_blocks[1].attn.register_forward_hook(count)
    return Way(f"diffusers First-Block-Cache, {threshold:g}", transformer, counter=counter)


class OneGraph(nn.Module):
    """One graph of the whole transformer in a session with default options.

    Takes diffusers' call at the size that it was exported for.
    """

    def __init__(self, path: Path, like: Any, threads: int) -> None:
        super().__init__()
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.config, self.dtype, self.device = like.config, like.dtype, like.device

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: object) -> Iterator[None]:
        """Do nothing: one graph caches nothing between calls."""
        yield

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **_: Any
    ) -> tuple[Tensor]:
        """The velocity, (B, G + C, c_out)."""
        feed = {
            "hidden_states": hidden_states.numpy(),
            "encoder_hidden_states": encoder_hidden_states.numpy(),
            "timestep": timestep.numpy(),
        }
        return (torch.from_numpy(self._session.run(None, feed)[0]),)


@torch.no_grad()
def _one_graph(case: Case, folder: Path, threads: int) -> Way:
    """`torch.onnx.export` of the whole transformer at this size.

    It refuses the complex numbers of diffusers' rotary positions; they are replaced by the same
    rotation in real numbers, with tables made beforehand. Nothing else is changed.
    """

    class Whole(nn.Module):
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
        ) -> Tensor:
            velocity: Tensor = self.transformer(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                img_shapes=case.call["img_shapes"],
                return_dict=False,
            )[0]
            return velocity

    start = time.perf_counter()
    inputs = {
        name: case.call[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")
    }
    transformer = _twin(case.transformer)
    tables = transformer.pos_embed(
        case.call["img_shapes"], max_txt_seq_len=case.size.num_text, device=torch.device("cpu")
    )
    transformer.pos_embed = _RealTables(*tables)
    path = folder / f"{case.name}.onnx"
    with _real_rotation(), _quiet():
        program = torch.onnx.export(
            Whole(transformer).eval(), (), kwargs=inputs, dynamo=True, verbose=False
        )
    assert program is not None
    program.save(path, external_data=True)
    del program
    found = OneGraph(path, case.transformer, threads)
    return Way("ONNX Runtime, one graph", found, prepare_s=time.perf_counter() - start)


class _RealTables(nn.Module):
    """Rotary tables of one size as (cosines, sines)."""

    def __init__(self, image: Tensor, text: Tensor) -> None:
        super().__init__()
        for name, table in (("image", image), ("text", text)):
            self.register_buffer(f"{name}_cos", table.real.unsqueeze(1).contiguous())
            self.register_buffer(f"{name}_sin", table.imag.unsqueeze(1).contiguous())

    def forward(self, *_: Any, **__: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        return (self.image_cos, self.image_sin), (self.text_cos, self.text_sin)


@contextlib.contextmanager
def _real_rotation() -> Iterator[None]:
    import diffusers.models.transformers.transformer_qwenimage as home

    def rotated(x: Tensor, tables: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        cosines, sines = tables
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = (even * cosines - odd * sines, even * sines + odd * cosines)
        return torch.stack(turned, dim=-1).flatten(-2)

    before = home.apply_rotary_emb_qwen
    home.apply_rotary_emb_qwen = rotated
    try:
        yield
    finally:
        home.apply_rotary_emb_qwen = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def product_runners(products: list[MatrixProduct], threads: int) -> dict[str, Callable[[], None]]:
    """Functions that run plain matrix products of these shapes: by torch, and by ONNX Runtime.

    Buffers are shared by equal shapes, so that memory stays bounded.
    """
    return {"torch": _torch_products(products), "onnxruntime": _ort_products(products, threads)}


def _torch_products(products: list[MatrixProduct]) -> Callable[[], None]:
    buffers: dict[tuple[int, ...], Tensor] = {}
    calls = []
    for item in products:
        left, right, repeats = _shapes(item)
        operands = [buffers.setdefault(shape, torch.randn(shape)) for shape in (left, right)]
        calls.append((*operands, repeats))

    def run() -> None:
        for left, right, repeats in calls:
            for _ in range(repeats):
                torch.matmul(left, right)

    return run


def _ort_products(products: list[MatrixProduct], threads: int) -> Callable[[], None]:
    """Right operands are weights, packed beforehand as an engine's are, except attention's."""
    calls: dict[Any, tuple[Callable[[], Any], int]] = {}
    for item in products:
        left, right, repeats = _shapes(item)
        key = left, right, item.is_batched
        multiply, before = calls.get(key) or (
            onnxruntime_product(left, right, threads, is_weight=not item.is_batched),
            0,
        )
        calls[key] = multiply, before + repeats

    def run() -> None:
        for multiply, repeats in calls.values():
            for _ in range(repeats):
                multiply()

    return run


def _shapes(item: MatrixProduct) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Operands of a call, and how often it is made."""
    if item.is_batched:
        return (item.count, item.m, item.k), (item.count, item.k, item.n), 1
    return (item.m, item.k), (item.k, item.n), item.count
