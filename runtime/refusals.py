"""Why methods of diffusers cannot work while an engine set stands in for a transformer."""

from __future__ import annotations

from typing import NoReturn

from ditrim.plugins.errors import UsageError

# The first of these words in a method's name decides the reason and the remedy.
_REMEDIES = (
    (
        ("ip_adapter",),
        "an IP-Adapter acts in attention, which was compiled without it: detach, and run without "
        "an engine set",
    ),
    (
        ("lora", "adapter"),
        "its weights were merged when the set was built: detach, and build a set with "
        "build-engine --lora FILE[:SCALE]",
    ),
    (
        ("cache",),
        "diffusers' caches look at blocks that an engine does not show: give attach a cache of "
        "ditrim's (cache=ditrim.StepCache(...))",
    ),
    (
        ("attention", "attn", "qkv", "xformers"),
        "the engine's attention was chosen when it was built: leave the call out",
    ),
    (
        ("offload", "parallelism"),
        "an engine places its own weights: leave the call out, or make it before attach",
    ),
    (("compile",), "an engine is compiled already: leave the call out"),
    (("quant", "casting", "layerwise"), "an engine has the precision that it was built with"),
    (
        ("save", "push", "state_dict"),
        "an engine's weights are not in the pipeline: detach first (leave the `with` block, or "
        "call detach())",
    ),
)
_OTHERWISE = "detach first (leave the `with` block, or call detach())"


def refuse_method(owner: str, name: str) -> NoReturn:
    """Raise what a method that cannot work says.

    Args:
        owner: "transformer" or "pipe".
        name: of the method.

    Raises:
        UsageError: always; with the remedy.
    """
    remedy = next(
        (text for words, text in _REMEDIES if any(word in name for word in words)), _OTHERWISE
    )
    raise UsageError(
        f"{owner}.{name}() cannot work while an engine set stands in for the pipeline's "
        f"transformer; {remedy}"
    )
