"""Schedulers that take the place of a pipeline's own, as distilled editors need them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.engines.sets.manifest import Manifest

LIGHTNING = "lightning"
# Of the Qwen-Image-Edit-Lightning LoRAs, as their authors publish it: a shift of 3 at every size.
_LIGHTNING_CONFIG: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_FEW_STEPS = re.compile(r"(?<!\d)4[-_ ]?steps?", re.IGNORECASE)


def load_scheduler(choice: str) -> Any:
    """A scheduler by name or from its configuration.

    Args:
        choice: "lightning", a scheduler_config.json, or a folder that holds one.

    Raises:
        UsageError: there is none, or it is no scheduler of diffusers.
    """
    import diffusers

    if choice == LIGHTNING:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(_LIGHTNING_CONFIG)
    path = Path(os.path.expanduser(choice))
    places = (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
    found = next((place for place in (path, *places) if os.path.isfile(place)), None)
    if found is None:
        raise UsageError(
            f"--scheduler {choice} is neither {LIGHTNING}, nor a scheduler_config.json or a folder "
            "that holds one"
        )
    try:
        config = json.loads(found.read_text("utf-8"))
        name = str(config["_class_name"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"--scheduler {found} is no scheduler's configuration ({error!r}); it needs a "
            "_class_name, as save_pretrained writes it"
        ) from error
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise UsageError(f"--scheduler {found}: diffusers has no scheduler {name!r}")
    try:
        scheduler = kind.from_config(config)
        # What is wrong with values shows when they are used.
        wants_mu = config.get("use_dynamic_shifting")
        scheduler.set_timesteps(4, **({"mu": 1.0} if wants_mu else {}))
    except Exception as error:  # whatever a scheduler raises of values that it does not take
        raise UsageError(
            f"--scheduler {found}: {name} does not take this configuration ({error})"
        ) from error
    return kind.from_config(config)


def is_lightning(scheduler: Any) -> bool:
    """Whether a scheduler is configured as `lightning`."""
    config = getattr(scheduler, "config", {})
    return all(config.get(key) == value for key, value in _LIGHTNING_CONFIG.items())


def lightning_steps(manifest: Manifest) -> int:
    """Return a distilled editor's number of steps: 4 if a name of its weights says so, else 8."""
    source = manifest.source
    names = [str(source.get("location", ""))]
    names += [str(lora.get("file", "")) for lora in source.get("loras") or []]
    return 4 if any(_FEW_STEPS.search(Path(name).name) for name in names) else 8
