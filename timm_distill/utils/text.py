"""Texts of values and names: readable, and such that UTF-8 can hold them (names of files need not be)."""
import re
from typing import Any, Mapping

from timm.models import safe_model_name

_NAME_LENGTH = 100  # of a model, whose name may be a path, in that of a file


def printable(value: Any) -> Any:
    """Return plain values with every text in them as UTF-8 can hold it, other bytes as \\xNN."""
    if isinstance(value, str):
        return value.encode(errors='surrogateescape').decode(errors='backslashreplace') if _is_odd(value) else value
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(printable(item) for item in value)
    return value


def _is_odd(text: str) -> bool:
    return any('\udc80' <= letter <= '\udcff' for letter in text)


def model_file_name(name: str) -> str:
    """Return a model's name as part of a file's; of a function in a file without the folder."""
    try:
        text = safe_model_name(name)
    except (AssertionError, ValueError):  # no name of timm's
        text = re.sub(r'[^A-Za-z0-9.]', '_', re.split(r'[/\\]', name)[-1]).replace('.py_', '_')
    return text[:_NAME_LENGTH]


def format_fact(value: Any) -> str:
    """Return a value of the provenance in words: lists and mappings without brackets and quotes."""
    if isinstance(value, Mapping):
        return ', '.join(f'{key} {format_fact(v)}' for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ', '.join(format_fact(v) for v in value)
    return f'{value:.6g}' if isinstance(value, float) else str(value)
