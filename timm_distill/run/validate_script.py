"""Validation script: one evaluation, or one for each of many models or checkpoints, and their results."""
import copy
import csv
import glob
import json
import logging
import os
import sys
from argparse import Namespace
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.models import is_model, list_models
from timm.utils import check_batch_size_retry, decay_batch_step, natural_key, setup_default_logging

from ..args import PROBE_METRICS, check_validate_args, create_validate_parser, parse_args
from ..checkpoint.file import check_file, why_unwritten, written_at_once
from ..data import user_message
from ..errors import UsageError
from ..utils.console import program_name
from .evaluate import describe_results, evaluate_model

_logger = logging.getLogger('validate')

SCRIPT = 'validate.py'

Results = Union[Dict[str, Any], List[Dict[str, Any]]]

# 'all' leaves out what has another label space than ImageNet-1k, or none, as timm's script does.
_NOT_IMAGENET = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']


def main(argv: Optional[List[str]] = None) -> int:
    """Run the script; 2 is the exit code for anything that a user can repair."""
    setup_default_logging()
    args = parse_args(create_validate_parser(), argv)
    try:
        check_validate_args(args)
        if args.results_file:
            check_file(args.results_file, '--results-file')  # before the evaluation, not after it
        jobs = list_jobs(args)
        results: Results = validate_many(args, jobs) if jobs else validate(args)
    except UsageError as e:
        print(f'{program_name(SCRIPT)}: error: {user_message(e)}', file=sys.stderr)
        return 2
    # timm's runner scripts look for this line
    print(f'--result\n{json.dumps(results, indent=4)}')
    try:
        if args.results_file:
            write_results(args.results_file, results, args.results_format)
    except OSError as e:
        print(
            f'{program_name(SCRIPT)}: error: --results-file {args.results_file} could not be written '
            f'({why_unwritten(e)}), the results stand above: make room or give another file.', file=sys.stderr)
        return 2
    return 0


def list_jobs(args: Namespace) -> List[Tuple[str, str]]:
    """Return model and checkpoint of each evaluation; empty where the flags name a single one."""
    if os.path.isdir(args.checkpoint):
        folder = glob.escape(args.checkpoint)
        files = glob.glob(f'{folder}/*.pth.tar') + glob.glob(f'{folder}/*.pth')
        if not files:
            raise UsageError(f"--checkpoint '{args.checkpoint}' is a folder without .pth.tar and .pth files")
        return [(args.model, path) for path in sorted(files, key=natural_key)]
    names: List[str] = []
    if args.model == 'all':
        names = list_models(pretrained=True, exclude_filters=_NOT_IMAGENET)
    elif os.path.isfile(args.model):
        with open(args.model, encoding='utf-8') as f:
            names = [line.strip() for line in f if line.strip()]
    elif not is_model(args.model) and any(c in args.model for c in '*?['):
        names = list_models(args.model, pretrained=not args.checkpoint)
        if not names:
            raise UsageError(f"--model '{args.model}' matches no timm model with pretrained weights")
    return [(name, args.checkpoint) for name in names]


def validate_many(args: Namespace, jobs: List[Tuple[str, str]]) -> List[Dict[str, Any]]:
    """Evaluate one after the other; return the rows, best first. What fails is reported and left out."""
    _logger.info(f'Evaluating {len(jobs)}: {", ".join(checkpoint or name for name, checkpoint in jobs)}')
    rows = []
    try:
        for name, checkpoint in jobs:
            job = copy.copy(args)
            job.model, job.checkpoint, job.retry = name, checkpoint, True
            try:
                row = validate(job)
            except UsageError as e:
                _logger.error(f'{checkpoint or name} failed: {user_message(e)}')
                continue
            rows.append({**row, 'checkpoint': checkpoint} if checkpoint else row)
    except KeyboardInterrupt:
        _logger.warning(f'Interrupted after {len(rows)} of {len(jobs)}.')
    if not rows:
        raise UsageError(f'None of the {len(jobs)} evaluations succeeded, see the messages above.')
    metrics = ('map', 'top1', *PROBE_METRICS)
    return sorted(rows, key=lambda row: next(row[name] for name in metrics if name in row), reverse=True)


def validate(args: Namespace) -> Dict[str, Any]:
    """Evaluate one model; with `--retry` in ever smaller batches until memory suffices.

    Raises:
        UsageError: Also where no batch size works.
    """
    batch_size = args.batch_size
    while True:
        job = copy.copy(args)
        job.batch_size = batch_size * args.num_gpu  # DataParallel splits it again
        try:
            row = evaluate_model(job)
        except RuntimeError as e:
            batch_size = decay_batch_step(batch_size)
            if not args.retry:
                raise
            if not batch_size or not check_batch_size_retry(str(e)):
                raise UsageError(f'{args.model} cannot be evaluated: {" ".join(str(e).split())[:300]}') from e
            _logger.warning(f'"{" ".join(str(e).split())[:200]}": trying again with batches of {batch_size}.')
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        _logger.info(describe_results(row))
        return row


def write_results(path: str, results: Results, format: str = 'csv') -> None:
    """Write one row or several."""
    with written_at_once(path) as name, open(name, 'w', newline='') as f:
        if format == 'json':
            json.dump(results, f, indent=4)
            return
        rows = results if isinstance(results, list) else [results]
        writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval='')
        writer.writeheader()
        writer.writerows(rows)
