#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Evaluate timm models or training checkpoints: loss, top-1 and top-5 over a labelled image set.

Runs the evaluation of the training script on the same loader, so that a checkpoint gives the numbers of the training
log. `--model` may also be a wildcard, a file of names or 'all', and `--checkpoint` a folder: then each is evaluated.
`timm-distill validate` is the same.
"""
import sys

from timm_distill.run.validate_script import list_jobs, main
from timm_distill.utils.console import run_script

__all__ = ['list_jobs', 'main']

if __name__ == '__main__':
    sys.exit(run_script(main))
