"""Feature-transform adapters: trainable modules on the student's own path that fold away at inference.

Each lives in one file of this package, which is imported when the names are first asked for.
"""
from typing import Any, List, Sequence, Union

from .base import ADAPTERS, Adapter, AdapterOutput, Match, register_adapter

__all__ = ['ADAPTERS', 'Adapter', 'AdapterOutput', 'Match', 'create_adapter', 'list_adapters', 'register_adapter']


def list_adapters() -> List[str]:
    """Return the names of all adapters."""
    return ADAPTERS.names()


def create_adapter(
        name: str,
        student_channels: int,
        teacher_channels: Union[int, Sequence[int]],
        **options: Any,
) -> Adapter:
    """Create an adapter by name.

    Args:
        name: One of `list_adapters()`.
        student_channels: Channels of the student's feature at the tap.
        teacher_channels: Channels of the teacher's feature, or of that of each of several teachers.
        options: Options of the adapter.

    Raises:
        UsageError: If the name or an option is unknown.
    """
    return ADAPTERS.create(name, student_channels, teacher_channels, **options)
