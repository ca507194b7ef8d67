"""A training run: its parts, and the phases that build, prepare, train and close it."""
from .build import build_run
from .dry_run import dry_run
from .epochs import fit
from .folder import create_lock, open_run
from .prepare import prepare_run
from .recorder import Recorder
from .report import close, write_run_report
from .state import Run, RunResult, describe_run

__all__ = [
    'Recorder',
    'Run',
    'RunResult',
    'build_run',
    'close',
    'create_lock',
    'describe_run',
    'dry_run',
    'fit',
    'open_run',
    'prepare_run',
    'write_run_report',
]
