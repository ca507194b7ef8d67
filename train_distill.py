#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Train a timm model, alone or distilled from a frozen teacher, and save plain timm checkpoints.

    train_distill.py --data-dir DIR --teacher resnet50 --student mobilenetv2_100 --kd norm

Flags of timm's `train.py` keep their names, defaults and meanings; `--list-kd` shows the methods, `--demo` a complete
run on data that it brings along.
"""
import argparse
import json
import os
import sys
import time
from typing import List, Optional, Sequence

import torch
from timm import utils

from timm_distill import MergeError, UsageError, __version__
from timm_distill.args import (
    args_to_yaml,
    check_train_args,
    create_train_parser,
    parse_args,
    translate_timm_distillation,
)
from timm_distill.composition import check_mixing
from timm_distill.console import run_script
from timm_distill.data import user_message
from timm_distill.demo import run_demo
from timm_distill.locking import FolderLock
from timm_distill.meters import NonFiniteLossError
from timm_distill.methods import describe_methods, list_methods, load_method_file
from timm_distill.resume import check_same_run, restore_rank
from timm_distill.run import (
    Recorder,
    RunResult,
    build_run,
    check_same_data,
    check_same_teacher_input,
    create_lock,
    describe_run,
    dry_run,
    fit,
    forget_data,
    open_run,
    prepare_class_means,
    prepare_for_device,
    report_teacher,
    resume,
    write_run_report,
)
from timm_distill.stopping import StopSignals, exit_code
from timm_distill.storage import check_folder


def main(argv: Optional[Sequence[str]] = None) -> Optional[RunResult]:
    """Run the script and return what it leaves behind; None for `--list-kd` and `--demo`.

    Raises:
        UsageError: For anything that the user can put right.
    """
    args = parse_args(create_train_parser(), argv)
    for path in args.kd_module:
        load_method_file(path)
    if args.list_kd:
        print(describe_methods())
        return None
    if args.demo:
        check_folder(args.demo_dir, '--demo-dir')
        run_demo(main, args.demo_dir)
        return None
    translate_timm_distillation(args, list_methods())
    check_train_args(args, list_methods())
    check_mixing(args.kd, mixing_flags(args))
    if args.dry_run:
        dry_run(args)
        return None
    if int(os.environ.get('RANK', 0)) == 0:  # the one that writes
        check_folder(os.path.join(args.output or './output/train', args.experiment), '--output')
    with create_lock() as lock:
        return train(args, lock)


def mixing_flags(args: argparse.Namespace) -> List[str]:
    """Return the flags in use that mix images."""
    values = {'--mixup': args.mixup, '--cutmix': args.cutmix, '--cutmix-minmax': args.cutmix_minmax}
    return [f'{flag} {value}' for flag, value in values.items() if value]


def train(args: argparse.Namespace, lock: FolderLock) -> RunResult:
    """Train as the flags say. The output folder is made when everything else stands."""
    start = time.monotonic()
    args_text = args_to_yaml(args)
    checkpoint = open_run(args, lock)
    run = build_run(args)
    if checkpoint is not None:
        # weights that are not loaded are drawn by every rank and then the first one's
        check_same_run(args, checkpoint, getattr(run.task.teacher, 'digest', '') if args.rank == 0 else '')
        check_same_teacher_input(run, checkpoint)
    has_other_data = checkpoint is not None and check_same_data(run, checkpoint)
    report_teacher(run)
    if checkpoint is None or has_other_data:
        prepare_class_means(run)  # else the checkpoint holds them
    if checkpoint is not None and has_other_data:
        forget_data(run, checkpoint)
    start_epoch = resume(run, checkpoint)
    prepare_for_device(run)
    with StopSignals(args.distributed) as signals:
        recorder = Recorder(
            run, args_text, checkpoint, start_epoch, signals, describe_run(run, __version__), lock)
        position = restore_rank(run.task, run.loaders, checkpoint) if checkpoint is not None else None
        fit(run, recorder, start_epoch, position)
        if not recorder.result.stopped_by:
            write_run_report(run, recorder)
    if args.distributed:
        torch.distributed.destroy_process_group()
    return recorder.finish(time.monotonic() - start)


def cli() -> int:
    """Run from the command line: 0 on success, 2 for what the user can put right, 1 where training fails.

    A run that a signal stopped has saved its state and exits with 75, after Ctrl-C with 130.
    """
    utils.setup_default_logging()
    try:
        result = main()
    except UsageError as e:
        print(f'train_distill.py: error: {user_message(e)}', file=sys.stderr)
        return 2
    except (NonFiniteLossError, MergeError) as e:
        print(f'train_distill.py: stopped: {e}', file=sys.stderr)
        return 1
    if result is not None and result.stopped_by:
        return exit_code(result.stopped_by)
    if result is not None and result.output_dir:
        print(f'--result\n{json.dumps(result.history[-10:], indent=4)}')  # what timm's runner scripts look for
    return 0


if __name__ == '__main__':
    sys.exit(run_script(cli))
