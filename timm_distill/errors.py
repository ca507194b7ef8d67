"""Exceptions that a user can cause, apart from those that are bugs.

The scripts print a `UsageError` as one line and exit with code 2; anything else keeps its traceback.
"""
from typing import Any, Dict, Optional


class UsageError(ValueError):
    """A wrong name, value, file or combination: names the value, what is allowed and the flag to change."""


class LostStateError(RuntimeError):
    """A run ends, or stops, and its newest state is not on disk: says why and where the space went."""


class MergeError(RuntimeError):
    """The merged student does not reproduce the student as trained.

    Attributes:
        raw_state: The unmerged tensors, `{'state_dict': student, 'task_state': adapter and methods}`, so that the
            caller can write them to disk before giving up.
        spoiled_state: What would have been returned, where the student as trained is not finite itself, so that
            nothing tells whether it was merged; None where it is finite.
    """

    def __init__(self, message: str, raw_state: Dict[str, Any]):
        super().__init__(message)
        self.raw_state = raw_state
        self.spoiled_state: Optional[Dict[str, Any]] = None
