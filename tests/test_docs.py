"""The examples of the documentation run."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim
from ditrim.export.family import FAMILIES
from ditrim.plugins.architectures import ARCHITECTURES

DOCS = Path(__file__).parent.parent / "docs"
EXTENDING = (DOCS / "internals" / "extending.md").read_text("utf-8")
BLOCKS = re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", EXTENDING, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_examples_of_extending_run(
    title: str, code: str, tiny_engine_sets: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my-edit", "my-flux-edit"):  # the examples add them
        monkeypatch.setitem(FAMILIES, name, FAMILIES["qwen-edit-plus"])
    monkeypatch.setitem(ARCHITECTURES, "my-flux", ARCHITECTURES["flux"])
    engines: Any = ditrim.load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    call = copy.deepcopy(request("qwen-edit", steps=3))
    names = {"ditrim": ditrim, "pipe": tiny_pipeline("qwen-edit"), "engines": engines, "call": call}
    with small_pictures(64):
        exec(compile(code, title, "exec"), names)


def test_every_section_has_an_example() -> None:
    sections = re.findall(r"^## ([^\n]+)$", EXTENDING, re.MULTILINE)
    assert [title for title, _ in BLOCKS] == sections
    assert "An architecture" in sections


def test_links_of_the_documentation_lead_somewhere() -> None:
    for path in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"
