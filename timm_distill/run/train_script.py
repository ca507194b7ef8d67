"""Training script: `main` as phases that read top to bottom, and what ends it early as an exit code."""
import argparse
import json
import logging
import os
import shlex
import sys
import time
from functools import partial
from typing import List, Optional, Sequence

from timm import utils

from ..args import (
    args_to_yaml,
    check_train_args,
    create_train_parser,
    parse_args,
    translate_timm_distillation,
)
from ..checkpoint.file import check_folder
from ..checkpoint.lock import FolderLock
from ..data import user_message
from ..engine.meters import NonFiniteLossError
from ..engine.train_log import collect_warnings
from ..errors import LostStateError, MergeError, UsageError
from ..methods import describe_methods, list_methods, load_method_file
from ..methods._composition import check_mixing
from ..utils.console import program_name
from ..utils.random import unchanged_randomness
from ..utils.version import __version__
from .build import build_run
from .demo import run_demo
from .dry_run import dry_run
from .epochs import fit
from .folder import create_lock, open_run
from .prepare import prepare_run
from .recorder import Recorder
from .report import close
from .state import RunResult, describe_run
from .stopping import (
    EXIT_INTERRUPTED,
    StopRequested,
    StopSignals,
    end_child_processes,
    exit_code,
)

SCRIPT = 'train_distill.py'


def main(argv: Optional[Sequence[str]] = None, signals: Optional[StopSignals] = None) -> Optional[RunResult]:
    """Run the script and return what it leaves behind; None for `--list-kd` and `--demo`.

    Args:
        argv: Flags; those of the command line if None.
        signals: Already entered; by default entered here.

    Raises:
        UsageError: For anything that the user can put right.
        LostStateError: The newest state of the run is not on disk.
        StopRequested: A signal came before there was anything to save.
    """
    if signals is None:
        with StopSignals() as signals:
            return main(argv, signals)
    args = parse_args(create_train_parser(), argv)
    for path in args.kd_module:
        load_method_file(path)
    if args.list_kd:
        print(describe_methods())
        return None
    if args.demo:
        check_folder(args.demo_dir, '--demo-dir')
        run_demo(partial(main, signals=signals), args.demo_dir)
        return None
    with collect_warnings() as warnings:
        translate_timm_distillation(args, list_methods())
        check_train_args(args, list_methods())
        check_mixing(args.kd, mixing_flags(args))
        if args.dry_run:
            dry_run(args)
            return None
        if int(os.environ.get('RANK', 0)) == 0:  # the one that writes
            check_folder(os.path.join(args.output or './output/train', args.experiment), '--output')
        command = shlex.join([*program_name(SCRIPT).split(), *(sys.argv[1:] if argv is None else argv)])
        with create_lock() as lock:
            return train(args, signals, lock, command, warnings)


def mixing_flags(args: argparse.Namespace) -> List[str]:
    """Return the flags in use that mix images."""
    values = {'--mixup': args.mixup, '--cutmix': args.cutmix, '--cutmix-minmax': args.cutmix_minmax}
    return [f'{flag} {value}' for flag, value in values.items() if value]


def train(
        args: argparse.Namespace,
        signals: StopSignals,
        lock: FolderLock,
        command: str = '',
        warnings: Sequence[str] = (),
) -> RunResult:
    """Train as the flags say. The output folder is made when everything else stands.

    Args:
        args: Flags.
        signals: Asked whether to stop.
        lock: Keeps other runs out of the folder.
        command: How the run was started, for its report.
        warnings: What the log warns of, which grows while the run goes on; likewise.
    """
    start = time.monotonic()
    signals.begin()
    args_text = args_to_yaml(args)
    checkpoint = open_run(args, lock)
    if checkpoint is not None:
        signals.last_words = f'{args.resume} stays the newest state, start the same command again'
    run = build_run(args)
    start_epoch, position = prepare_run(run, checkpoint)
    if args.distributed:
        signals.share()
    with unchanged_randomness():  # whatever a tracker draws
        recorder = Recorder(run, args_text, checkpoint, start_epoch, signals, describe_run(run, __version__), lock)
    fit(run, recorder, start_epoch, position)
    recorder.check_saved()
    return close(run, recorder, start, command, warnings)


def cli() -> int:
    """Run from the command line: 0 on success, 2 for what the user can put right, 1 where training fails.

    A run that a signal stopped has saved its state, or has none, and exits with 75, after Ctrl-C with 130.
    """
    utils.setup_default_logging()
    with StopSignals() as signals:
        code = run_to_exit_code(signals)
        signals.ignore()
    if not end_child_processes():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # the end of the interpreter would wait for them
    return code


def run_to_exit_code(signals: StopSignals) -> int:
    """Run `main` and say in one line why it ends early."""
    try:
        result = main(signals=signals)
    except StopRequested as e:
        print(f'{program_name(SCRIPT)}: stopped by {e}: {signals.last_words}.', file=sys.stderr)
        return exit_code(e.number)
    except KeyboardInterrupt:
        print(f'{program_name(SCRIPT)}: interrupted: {signals.last_words}.', file=sys.stderr)
        return EXIT_INTERRUPTED
    except UsageError as e:
        print(f'{program_name(SCRIPT)}: error: {user_message(e)}', file=sys.stderr)
        return 2
    except (LostStateError, NonFiniteLossError, MergeError) as e:
        print(f'{program_name(SCRIPT)}: stopped: {e}', file=sys.stderr)
        return 1
    if result is not None and result.stopped_by:
        return exit_code(result.stopped_by)
    if result is not None and result.output_dir:
        print(f'--result\n{json.dumps(result.history[-10:], indent=4)}')  # what timm's runner scripts look for
    return 0
