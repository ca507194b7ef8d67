"""What `--dry-run` does."""
import argparse
from dataclasses import replace

import torch
from timm.data import resolve_data_config

from ..errors import UsageError
from ..pair import check_pair
from .build import count_epochs, teacher_input_kwargs
from .device import resolve_device_name, resolve_dtype
from .models import build_student, fit_input_size


def dry_run(args: argparse.Namespace) -> None:
    """Print what `check_pair` finds for the flags; nothing is downloaded and no data is read.

    Raises:
        UsageError: If the pair does not work.
    """
    device = torch.device(resolve_device_name(args.device))
    args.pretrained, args.rank = False, 0
    student = build_student(args)
    data_config = fit_input_size(args, student, resolve_data_config(vars(args), model=student))
    report = check_pair(
        args.teacher,
        student,
        args.kd,
        teacher_kwargs=args.teacher_kwargs,
        teacher_pretrained=args.teacher_pretrained,
        teacher_checkpoint=args.teacher_checkpoint,
        **teacher_input_kwargs(args),
        teacher_dtype=resolve_dtype(args.teacher_dtype),
        kd_weight=args.kd_weight,
        kd_kwargs=args.kd_kwargs,
        kd_schedule=args.kd_schedule,
        kd_tap=args.kd_tap,
        num_epochs=count_epochs(args),
        num_samples=args.train_num_samples,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        device=device,
    )
    if not report.ok:
        raise UsageError(report.reason)
    print(replace(report, student=args.model))
