"""`ditrim::LogSumExp` as a plugin of TensorRT 10.9 or later, its kernel embedded in the plan.

Replaces: a plugin library that every machine must load before it can read the plan. TensorRT takes
the compiled kernel while it builds, with launch parameters symbolic in the input lengths; a plan
that holds it needs neither Python nor Triton nor this module to run.

Limits: bfloat16 and float16 queries and keys; the head width is known when the engine is built;
scores are float32. Batch, heads, rows and keys may be free. A plan serves GPUs of the compute
capability it was built for. Trade-off: `tensorrt.plugin` reads annotations as classes, so this
module does not postpone their evaluation, and its functions are defined where the library is there.
The scale is declared as an array: TensorRT before 11.4 turns a lone number's field of shape (1,)
into a `float`, which NumPy 2.4 no longer does.
"""

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ditrim.plugins.compiled import PARAMETERS, compile_kernel, target_for_capability
from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME

PLUGIN_ID = f"{DOMAIN}::{OP_NAME}"
# Queries, keys, bias, result: queries and keys both bfloat16 or both float16. One kernel: tactic 1.
TYPES = "BF16|FP16, BF16|FP16, FP32, FP32"
LAYOUTS = "LINEAR"
TACTICS = (1,)
_RANKS = {"queries": 4, "keys": 4, "bias": 3}

logger = logging.getLogger(__name__)
_capability_registered: tuple[int, int] | None = None


def _capability_of_this_gpu() -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            "no NVIDIA GPU is visible: TensorRT builds on the GPU that will run the plan"
        )
    return torch.cuda.get_device_capability()


def register_plugin(capability: tuple[int, int] | None = None) -> None:
    """Register the plugin with TensorRT, once a process. Needed to build, not to run.

    Args:
        capability: compute capability to compile for; none means that of the current GPU.

    Raises:
        BackendError: TensorRT is missing or has no ahead-of-time plugins, or no GPU is visible.
        UsageError: there is no kernel for the capability, or another one was registered before.
    """
    global _capability_registered
    capability = capability or _capability_of_this_gpu()
    if _capability_registered is not None:
        if target_for_capability(capability) != target_for_capability(_capability_registered):
            raise UsageError(
                f"{PLUGIN_ID} was registered for compute capability {_capability_registered}, now "
                f"asked for {capability}; build for each in a process of its own"
            )
        return
    target = target_for_capability(capability)
    try:
        import tensorrt
        from tensorrt import plugin as trtp
    except ImportError as error:
        raise BackendError(
            "the tensorrt backend needs TensorRT 10.9 or later: pip install 'ditrim[tensorrt]'"
        ) from error
    if not hasattr(trtp, "aot_impl"):
        raise BackendError(
            f"TensorRT {tensorrt.__version__} has no ahead-of-time plugins; 10.9 or later does"
        )
    _define(tensorrt, trtp, target)
    _capability_registered = capability
    logger.info("registered %s for sm_%d", PLUGIN_ID, target)


def _dtype_name(tensorrt: Any, dtype: Any) -> str:
    if dtype == tensorrt.DataType.BF16:
        return "bfloat16"
    if dtype == tensorrt.DataType.HALF:
        return "float16"
    raise UsageError(
        f"{PLUGIN_ID} takes bfloat16 or float16 queries and keys; got {dtype}. Build with "
        "--precision bf16 or fp16, or keep the portable ONNX function"
    )


def _constant_width(queries: Any) -> int:
    """The head width, which the kernel has as a constant."""
    width = queries.shape_expr[3]
    if not width.is_constant:
        raise UsageError(f"{PLUGIN_ID} needs a fixed head width; that of its queries is free")
    return int(width.constant_value())


def _check_scale(field: npt.NDArray[np.float32]) -> float:
    """Reject a scale that was lost or misread between the graph and here."""
    if np.size(field) != 1:
        raise UsageError(f"{PLUGIN_ID} got {np.size(field)} scales in place of one")
    scale = float(np.reshape(field, ()))
    if not math.isfinite(scale) or not 1e-6 <= abs(scale) <= 1e6:
        raise UsageError(f"{PLUGIN_ID} got scale {scale}, which is no scale of an attention")
    return scale


def _define(tensorrt: Any, trtp: Any, target: int) -> None:
    """The plugin's three functions; `tensorrt.plugin` checks their names and annotations."""

    def describe(
        queries: trtp.TensorDesc,
        keys: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        scale: npt.NDArray[np.float32],
    ) -> trtp.TensorDesc:
        """(B, H, R, D), (B, H, N, D) and (B, H, N) -> (B, H, R) float32."""
        for tensor, (name, rank) in zip((queries, keys, bias), _RANKS.items(), strict=True):
            if tensor.ndim != rank:
                raise UsageError(f"{PLUGIN_ID}: {name} has {tensor.ndim} axes in place of {rank}")
        batch, heads, rows, _ = queries.shape_expr
        return trtp.from_shape_expr((batch, heads, rows), tensorrt.float32)

    def choices(
        queries: trtp.TensorDesc,
        keys: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination(TYPES, LAYOUTS, list(TACTICS))]

    def compiled(
        queries: trtp.TensorDesc,
        keys: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        scale: npt.NDArray[np.float32],
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        dtype, width = _dtype_name(tensorrt, queries.dtype), _constant_width(queries)
        image = compile_kernel(dtype, width, _check_scale(scale), target)
        batch, heads, num_rows, _ = queries.shape_expr
        num_groups, num_keys = batch * heads, keys.shape_expr[2]
        launch = trtp.KernelLaunchParams()
        # A grid may not be empty; the kernel returns where there are no rows.
        launch.grid_x = trtp.max(num_groups * trtp.cdiv(num_rows, image.block_rows), 1)
        launch.block_x = image.num_threads
        launch.shared_mem = image.shared_bytes
        scalars = (num_groups, num_rows, num_keys)
        assert len(_RANKS) + len(scalars) + len(outputs) == len(PARAMETERS)
        extra = trtp.SymIntExprs(len(scalars))
        for index, scalar in enumerate(scalars):
            extra[index] = trtp.SymInt32(scalar)
        return image.name, image.ptx, launch, extra

    trtp.register(PLUGIN_ID)(describe)
    trtp.autotune(PLUGIN_ID)(choices)
    trtp.aot_impl(PLUGIN_ID)(compiled)
