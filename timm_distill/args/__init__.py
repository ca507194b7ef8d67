"""Command lines of the training and the validation script; the only package that knows argparse.

Flags of timm's `train.py` and `validate.py` keep timm's names, defaults and meanings; a flag is here only if the
scripts act on it. One `add_xxx_args` function per group: a new flag is one more line in one of them. Nothing here
builds a model or reads data, so only what the flags alone can show to be wrong is checked here.
"""
from .checks import check_train_args, check_validate_args
from .combinations import PROBE_METRICS
from .config import args_to_yaml, parse_args
from .export import create_export_parser
from .scripts import create_train_parser, create_validate_parser
from .timm_kd import translate_timm_distillation

__all__ = [
    'PROBE_METRICS',
    'args_to_yaml',
    'check_train_args',
    'check_validate_args',
    'create_export_parser',
    'create_train_parser',
    'create_validate_parser',
    'parse_args',
    'translate_timm_distillation',
]
