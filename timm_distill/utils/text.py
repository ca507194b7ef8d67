"""Texts that can be written: names of files need not be UTF-8, files of text are."""
from typing import Any

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
    """Return a model's name as part of a file's."""
    return safe_model_name(name)[:_NAME_LENGTH]
