#!/usr/bin/env python3
"""Evaluate a timm model or a training checkpoint: loss, top-1 and top-5 over a labelled image set.

Runs the evaluation of the training script on the same loader, so that a checkpoint gives the numbers of the training
log. The model is built by timm alone.
"""
import csv
import difflib
import json
import logging
import os
import sys
from argparse import Namespace
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import create_model, get_pretrained_cfg, is_model, list_models, load_state_dict
from timm.utils import random_seed, setup_default_logging

from timm_distill.args import check_validate_args, create_validate_parser, parse_args
from timm_distill.data import create_eval_dataset, create_eval_loader, user_message
from timm_distill.device import enable_fast_math, resolve_device_name, resolve_precision
from timm_distill.engine import evaluate
from timm_distill.errors import UsageError

_logger = logging.getLogger('validate')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the script; 2 is the exit code for anything that a user can repair."""
    setup_default_logging()
    args = parse_args(create_validate_parser(), argv)
    try:
        check_validate_args(args)
        check_results_file(args.results_file)
        results = validate(args)
    except UsageError as e:
        print(f'validate.py: error: {user_message(e)}', file=sys.stderr)
        return 2
    if args.results_file:
        write_results(args.results_file, results, args.results_format)
    # timm's runner scripts look for this line
    print(f'--result\n{json.dumps(results, indent=4)}')
    return 0


def validate(args: Namespace) -> Dict[str, Any]:
    """Build model and loader, evaluate, and return a row of results."""
    random_seed(args.seed)
    device = torch.device(resolve_device_name(args.device))
    precision = resolve_precision(device, args.amp, args.amp_dtype, args.model_dtype)
    enable_fast_math()
    if args.fast_norm:
        set_fast_norm()
    model = build_model(args)
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size, verbose=True)
    dataset = create_eval_dataset(args, data_config, model.num_classes)  # type: ignore[arg-type]
    param_count = sum(p.numel() for p in model.parameters())
    model, data_config = prepare_model(model, data_config, args, device, precision.model_dtype)
    metrics = evaluate(
        model,
        create_eval_loader(args, data_config, dataset, device, model_dtype=precision.model_dtype),
        device=device,
        model_dtype=precision.model_dtype,
        amp_autocast=precision.autocast,
        channels_last=args.channels_last,
        prefetcher=not args.no_prefetcher,
        log_interval=args.log_freq,
    )
    results = create_results(args.model, metrics, data_config, param_count)
    _logger.info(' * Acc@1 {top1:.3f} ({top1_err:.3f}) Acc@5 {top5:.3f} ({top5_err:.3f})'.format(**results))
    return results


def build_model(args: Namespace) -> nn.Module:
    """Create the model with the weights of --checkpoint, or else with its pretrained ones."""
    if not args.model.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) and not is_model(args.model):
        similar = ', '.join(difflib.get_close_matches(args.model, list_models())) or 'none'
        raise UsageError(f"--model '{args.model}' is not a timm model, similar ones: {similar}")
    state_dict = read_weights(args.checkpoint, args.use_ema) if args.checkpoint else None
    num_classes = args.num_classes
    if num_classes is None and state_dict is not None:
        num_classes = infer_num_classes(args.model, state_dict)
    try:
        model = create_model(
            args.model,
            pretrained=args.pretrained or state_dict is None,
            num_classes=num_classes,
            in_chans=args.input_size[0] if args.input_size else args.in_chans or 3,
            global_pool=args.gp,
            **args.model_kwargs,
        )
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise UsageError(f"--model '{args.model}' cannot be built with these flags: {' '.join(str(e).split())}") from e
    if state_dict is not None:
        load_weights(model, state_dict, args)
    return model


def read_weights(path: str, use_ema: bool) -> Dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise UsageError(f"--checkpoint '{path}' is not a file")
    try:
        return load_state_dict(path, use_ema)
    except Exception as e:  # each file format fails in its own ways
        reason = str(e).split('\n')[0] or type(e).__name__
        raise UsageError(f"--checkpoint '{path}' cannot be read, it is damaged or no checkpoint: {reason}") from e


def infer_num_classes(name: str, state_dict: Dict[str, torch.Tensor]) -> Optional[int]:
    """Rows of the classifier in the weights; None where the classifier's name is not known or not in them."""
    cfg = None if ':' in name else get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(cfg, 'classifier', None)
    if isinstance(classifier, (tuple, list)):
        classifier = classifier[0]
    weight = state_dict.get(f'{classifier}.weight')
    return None if weight is None else weight.shape[0]


def load_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor], args: Namespace) -> None:
    try:
        model.load_state_dict(state_dict)
    except (AttributeError, RuntimeError, TypeError) as e:  # also where the file holds no state dict at all
        reason = ' '.join(str(e).split())
        raise UsageError(
            f"--checkpoint '{args.checkpoint}' does not fit --model {args.model}, name the model it was trained as "
            f'(with its --num-classes and --model-kwargs): {reason[:300]}') from e


def prepare_model(
        model: nn.Module,
        data_config: Dict[str, Any],
        args: Namespace,
        device: torch.device,
        model_dtype: Optional[torch.dtype],
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Apply test-time pooling, placement and compilation; pooling also changes the crop."""
    if args.test_pool:
        model, pools = apply_test_time_pool(model, data_config)
        if pools:
            data_config = {**data_config, 'crop_pct': 1.0}
    model = model.to(device=device, dtype=model_dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)  # type: ignore[assignment]
    return model, data_config


def create_results(
        name: str,
        metrics: Dict[str, float],
        data_config: Dict[str, Any],
        param_count: int,
) -> Dict[str, Any]:
    """Arrange one row under the column names of timm's results."""
    return OrderedDict(
        model=name,
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        param_count=round(param_count / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )


def check_results_file(path: str) -> None:
    """Find out before the evaluation, not after it."""
    folder = os.path.dirname(path) or '.'
    if path and (os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK)):
        raise UsageError(f"--results-file '{path}' cannot be written: its folder has to exist and be writable")


def write_results(path: str, results: Dict[str, Any], format: str = 'csv') -> None:
    with open(path, 'w', newline='') as f:
        if format == 'json':
            json.dump(results, f, indent=4)
        else:
            writer = csv.DictWriter(f, fieldnames=list(results))
            writer.writeheader()
            writer.writerow(results)


if __name__ == '__main__':
    sys.exit(main())
