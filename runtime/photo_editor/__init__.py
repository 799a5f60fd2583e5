"""Scenes on photographs for a second editor, whose weights are not shipped yet."""
