"""How strong a LoRA is, as its makers' tools note it beside the tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from ditrim.plugins.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Ways of peft to begin a LoRA that change the base weights too: without the changed ones, the
# LoRA's own change is measured from weights that nobody has.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_METADATA = "lora_adapter_metadata"


class LoraSettings(BaseModel):
    """Scaling of a LoRA, from its file's metadata or peft's adapter_config.json beside it."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    peft_type: str | None = None
    init_lora_weights: bool | str | None = None

    def factor(self, module: str, rank: int, alpha: Tensor | None, where: str) -> float:
        """alpha / rank of a layer; alpha defaults to the rank."""
        value = self.lora_alpha if self.lora_alpha is not None else float(rank)
        if alpha is not None:
            if alpha.numel() != 1:
                raise CheckpointError(
                    f"--lora {where} has an alpha of the shape {list(alpha.shape)}, which is no "
                    "number"
                )
            value = float(alpha)
        else:
            patterns = (self.alpha_pattern or {}).items()
            named = (v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module))
            value = next(named, value)
        if not math.isfinite(value):
            raise CheckpointError(f"--lora {where} has an alpha of {value}, which is no number")
        return value / math.sqrt(rank) if self.use_rslora else value / rank


def read_settings(path: Path, metadata: Mapping[str, str], beside: Path | None) -> LoraSettings:
    """Read the settings of a LoRA.

    Args:
        path: its file, for messages.
        metadata: of the file, in which diffusers puts them.
        beside: peft's adapter_config.json, if there is one.

    Raises:
        CheckpointError: they are damaged, or of what is no plain LoRA.
    """
    try:
        if _METADATA in metadata:
            stored = json.loads(metadata[_METADATA])
            values = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif beside is not None:
            values = json.loads(beside.read_text("utf-8"))
        else:
            return LoraSettings()
        settings = LoraSettings.model_validate(values)
        for pattern in settings.alpha_pattern or {}:
            re.compile(pattern)
    except (ValueError, AttributeError, RecursionError, re.error) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"--lora {path}: its settings are damaged ({first})") from error
    if settings.use_dora:
        raise CheckpointError(f"--lora {path} is DoRA by its settings, which cannot be merged here")
    if settings.peft_type not in (None, "LORA"):
        raise CheckpointError(
            f"--lora {path} is {settings.peft_type} by its settings; only plain LoRAs can be merged"
        )
    begun = str(settings.init_lora_weights).lower()
    if begun.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"--lora {path} was begun with {begun!r}, which changed the base weights too: convert "
            "it with peft (save_pretrained(path_initial_model_for_weight_conversion=...)), which "
            "makes a plain LoRA of it"
        )
    return settings
