"""The photograph editor's words, read by the small editor's tokenizer."""

from __future__ import annotations

# The order is the numbering: append, never insert.
_LIST = """
a an at away for from in into it like of on the to with
red orange yellow green blue purple white black
ball cube pyramid ring star heart moon
top bottom left right up down middle corner
make change colour paint remove take erase add put place replace turn swap
photo picture whole background wall front objects object second
smaller bigger light warmer colder tone sepia look night day season autumn winter give and
move shift camera view zoom out show more scene
"""
WORDS: tuple[str, ...] = tuple(_LIST.split())
