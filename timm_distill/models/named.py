"""Models by name: timm's architectures, a hub's and those of folders, with one message for every other name."""
import difflib
from typing import Any

import timm
import torch.nn as nn

from ..errors import UsageError
from .external import create_external, is_external

_HUB_PREFIXES = ('hf-hub:', 'hf_hub:', 'local-dir:')


def is_hub(name: str) -> bool:
    """Whether a name stands for a model with a config of its own."""
    return name.startswith(_HUB_PREFIXES)


def check_name(name: str, role: str) -> None:
    """Raise a UsageError for an architecture that timm does not know; `role` is the flag that named it."""
    if is_hub(name) or is_external(name) or timm.is_model(name):
        return
    names = timm.list_models()
    similar = timm.list_models(f'*{name}*')[:3] or difflib.get_close_matches(name, names, n=3)
    hint = f' (did you mean {", ".join(similar)}?)' if similar else ''
    raise UsageError(
        f"Unknown {role} '{name}'{hint}. --{role} takes a timm architecture, hf-hub:REPO, local-dir:FOLDER, "
        'torchvision:NAME or FILE.py:FUNCTION.')


def create_model(name: str, role: str, flags: str, **kwargs: Any) -> nn.Module:
    """Create a model as `timm.create_model` does.

    Args:
        name: timm architecture, `hf-hub:REPO`, `local-dir:FOLDER`, `torchvision:NAME` or `FILE.py:FUNCTION`.
        role: What it is for, by the flag that named it: 'student', 'teacher', 'model'.
        flags: What its other arguments were given by.
        kwargs: Arguments of `timm.create_model`.

    Raises:
        UsageError: If the name is unknown, or the model cannot be built.
    """
    check_name(name, role)
    if is_external(name):
        return create_external(name, role, **kwargs)
    try:
        return timm.create_model(name, **kwargs)
    except Exception as e:  # a hub, a folder, a file and a constructor each raise their own errors
        raise cannot_build(name, role, flags, e) from e


def cannot_build(name: str, role: str, flags: str, error: Exception) -> UsageError:
    """Return the error of a model that a constructor, a hub or a file refused."""
    reason = ' '.join(str(error).split())[:300] or 'no message'
    return UsageError(
        f"The {role} '{name}' cannot be built ({type(error).__name__}: {reason}): change --{role} or {flags}.")
