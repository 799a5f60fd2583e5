"""Kinds of transformers that can be split, by the name that manifests have for them.

A new one is a module beside `flux`, and its value here.
"""

from ditrim.plugins.architectures.architecture import Architecture
from ditrim.plugins.architectures.flux import FLUX
from ditrim.plugins.architectures.qwen import QWEN

ARCHITECTURES: dict[str, Architecture] = {value.name: value for value in (QWEN, FLUX)}
