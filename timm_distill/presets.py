"""Published combinations of methods under one name, with the papers' weights.

A preset's name is matched before '+' splits a `--kd` value; an alias needs no quoting in a shell.
"""
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Tuple

from .errors import UsageError


@dataclass(frozen=True)
class Preset:
    """Methods with weights and options.

    Attributes:
        name: Name that the user writes.
        description: One line on what it is.
        paper: Authors, venue and link.
        weights: Weight of each method's terms, by method name; its keys are the methods.
        options: Options by method name, where they differ from the defaults.
        aliases: Other names.
    """
    name: str
    description: str
    paper: str
    weights: Mapping[str, float]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Tuple[str, ...] = ()


_PRESETS: Dict[str, Preset] = {}


def register_preset(preset: Preset) -> Preset:
    """Make a preset known under its name and aliases.

    Raises:
        ValueError: If a name is taken.
    """
    for name in (preset.name, *preset.aliases):
        if name in _PRESETS:
            raise ValueError(f"preset '{name}' is registered already.")
        _PRESETS[name] = preset
    return preset


def presets_by_name() -> Dict[str, Preset]:
    """Return all presets by name and alias."""
    return dict(_PRESETS)


def get_preset(name: str) -> Preset:
    """Return the preset of a name or alias.

    Raises:
        UsageError: If the name is unknown; lists the known ones.
    """
    if name not in _PRESETS:
        raise UsageError(f"Unknown preset '{name}'. --kd takes the presets: {', '.join(sorted(_PRESETS)) or 'none'}.")
    return _PRESETS[name]
