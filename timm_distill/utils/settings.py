"""Settings that the flags of a run leave open, and the one place where they are written among the flags."""
from argparse import Namespace
from typing import Any


def settle(args: Namespace, **values: Any) -> None:
    """Write what a run made of flags that were left open: its device, rate, class count, the file that it resumes.

    All that reads the flags afterwards, and the files of the run, have these. Nothing else writes flags.
    """
    for name, value in values.items():
        if not hasattr(args, name):
            raise AttributeError(f'there is no flag of the name {name!r}')
        setattr(args, name, value)
