"""A training run: its parts, and the phases that build, prepare, train and close it."""
from .build import build_run
from .dry_run import dry_run
from .epochs import fit
from .folder import create_lock, open_run
from .prepare import prepare_class_means, prepare_for_device, report_teacher, resume
from .recorder import Recorder
from .report import close, write_run_report
from .state import Run, RunResult, describe_run
from .unchanged import check_same_data, check_same_teacher_input, forget_data

__all__ = [
    'Recorder',
    'Run',
    'RunResult',
    'build_run',
    'check_same_data',
    'check_same_teacher_input',
    'close',
    'create_lock',
    'describe_run',
    'dry_run',
    'fit',
    'forget_data',
    'open_run',
    'prepare_class_means',
    'prepare_for_device',
    'report_teacher',
    'resume',
    'write_run_report',
]
