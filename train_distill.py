#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Train a timm model, alone or distilled from a frozen teacher, and save plain timm checkpoints.

    train_distill.py --data-dir DIR --teacher resnet50 --student mobilenetv2_100 --kd norm

Flags of timm's `train.py` keep their names, defaults and meanings; `--list-kd` shows the methods, `--demo` a complete
run on data that it brings along. `timm-distill train` is the same. Its phases: `timm_distill/run/train_script.py`.
"""
# ruff: noqa: E402 (handlers of signals come before imports that take seconds)
import sys

from timm_distill_cli import catch_early_signals

if __name__ == '__main__':
    catch_early_signals('train_distill.py')

from timm_distill.run.train_script import cli, main
from timm_distill.utils.console import run_script

__all__ = ['cli', 'main']

if __name__ == '__main__':
    sys.exit(run_script(cli))
