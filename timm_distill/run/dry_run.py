"""Dry run: what `--dry-run` prints in place of training."""
import argparse
from dataclasses import replace
from typing import List

import torch
from timm.data import resolve_data_config

from ..data import read_class_names
from ..errors import UsageError, flags_in_messages
from ..pair import check_pair
from ..task import DistillTask
from .build import distill_kwargs, recipe_of
from .cache_forms import report_cache_size
from .device import resolve_device_name
from .labels import settle_labels
from .models import build_student, fit_input_size

_IMAGENET = 1_281_167  # images of ImageNet-1k, where nothing says how many there are


def dry_run(args: argparse.Namespace) -> None:
    """Print what `check_pair` finds for the flags; nothing is downloaded and no data is read.

    With `--teacher-classes` the names of the data's classes are read, and no image.

    Raises:
        UsageError: If the pair does not work.
    """
    device = torch.device(resolve_device_name(args.device))
    args = argparse.Namespace(**{**vars(args), 'pretrained': False, 'rank': 0})
    settle_labels(args, recipe_of(args), look=False)
    student = build_student(args)
    data_config = fit_input_size(args, student, resolve_data_config(vars(args), model=student))
    names = read_class_names(args, data_config, args.num_classes) if args.teacher_classes else []
    sizes: List[str] = []

    def measure_cache(task: DistillTask) -> None:
        if args.teacher_cache:
            sizes.extend(report_cache_size(args, task, args.train_num_samples or _IMAGENET))

    with flags_in_messages():
        report = check_pair(
            student=student, device=device, num_samples=args.train_num_samples, has_labels=not args.no_labels,
            inspect=measure_cache,
            **distill_kwargs(args, data_config, names))
    if not report.ok:
        raise UsageError(report.reason)
    print('\n'.join([str(replace(report, student=args.model)), *sizes]))
