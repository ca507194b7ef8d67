#!/usr/bin/env python
"""Measure every timm architecture as student and as teacher, and write the table of docs/coverage.md.

    python benchmarks/coverage.py --output coverage.csv --markdown docs/coverage.md

Up to --max-params million parameters a model is built, trained one step with NORM, merged, loaded strictly into the
stock architecture, and read as a teacher. Larger ones are built on the meta device, where the tap is measured just the
same (the measurement needs the head's shapes, not its weights). Architectures already in the CSV are left out, so a
stopped run goes on; each chunk runs in a process of its own, so that its memory is returned.
"""
import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import timm
import torch
from tqdm import tqdm

import timm_distill
from timm_distill.features.inputs import CANNOT_RUN, evaluation_mode, random_images
from timm_distill.features.layouts import FeatureLayout
from timm_distill.features.stages import last_stage_feature, resolve_feature_layout
from timm_distill.student.merge import MERGE_TOLERANCE
from timm_distill.student.tap_search import resolve_student_tap
from timm_distill.teacher.teacher import Teacher

COLUMNS = (
    'name', 'module', 'params_m', 'input_size', 'how', 'student', 'consumers', 'fold_error', 'merge_error',
    'student_reason', 'teacher', 'teacher_shape', 'teacher_reason', 'seconds')
NUM_CLASSES = 10
SMALL_SIZES = (96, 128)
SMALL_FIXED_SIZE = 112  # a multiple of patches of 14 and 16
ERRORS = (*CANNOT_RUN, timm_distill.MergeError, MemoryError)


def main() -> None:
    args = parse_args()
    if args.worker:
        run_worker(args.worker, args.max_params)
        return
    names = args.names or timm.list_models()
    done = {row['name'] for row in read_rows(args.output) if not is_due(row, args.max_params)}
    run_chunks([name for name in names if name not in done], args)
    if args.markdown:
        with open(args.markdown, 'w') as f:
            f.write(render_markdown(read_rows(args.output)))


def is_due(row: Dict[str, str], max_params: float) -> bool:
    """Whether a row is of a model that was too large for an earlier run and is not for this one."""
    return row['how'] == 'meta' and float(row['params_m'] or 0) <= max_params


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='architectures; all of timm without any')
    parser.add_argument('--output', default='coverage.csv', help='CSV that rows are added to')
    parser.add_argument('--markdown', default='', help='where to write the table')
    parser.add_argument('--max-params', type=float, default=120, help='largest model that is trained, in millions')
    parser.add_argument('--chunk', type=int, default=10, help='architectures per process')
    parser.add_argument('--timeout', type=float, default=180, help='seconds per architecture')
    parser.add_argument('--worker', nargs='*', help=argparse.SUPPRESS)
    return parser.parse_args()


def run_chunks(names: Sequence[str], args: argparse.Namespace) -> None:
    """Run chunks in processes of their own; a process that dies costs only the architecture it was at."""
    todo = list(names)
    with tqdm(total=len(todo), desc='coverage', unit='model') as bar:
        while todo:
            chunk = todo[:args.chunk]
            bar.set_postfix_str(chunk[0])
            rows, died = run_process(chunk, args)
            if died and len(rows) < len(chunk):
                rows.append({
                    'name': chunk[len(rows)], 'student': 'failed', 'teacher': 'failed',
                    'student_reason': died, 'teacher_reason': died})
            append_rows(args.output, rows)
            todo = todo[len(rows):]
            bar.update(len(rows))


def run_process(chunk: Sequence[str], args: argparse.Namespace) -> Tuple[List[Dict[str, Any]], str]:
    command = [sys.executable, __file__, '--max-params', str(args.max_params), '--worker', *chunk]
    died = ''
    try:
        output = subprocess.run(command, stdout=subprocess.PIPE, timeout=args.timeout * len(chunk)).stdout
    except subprocess.TimeoutExpired as e:
        output, died = e.stdout or b'', f'took over {args.timeout:g} s'
    rows = [json.loads(line[4:]) for line in output.decode().splitlines() if line.startswith('row ')]
    if len(rows) < len(chunk) and not died:
        died = 'the process died, likely of memory'
    return rows, died


def run_worker(names: Sequence[str], max_params: float) -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings('ignore')
    for name in names:
        print('row ' + json.dumps(measure(name, max_params)), flush=True)


def measure(name: str, max_params: float) -> Dict[str, Any]:
    """Return the row of one architecture."""
    start = time.monotonic()
    row: Dict[str, Any] = {'name': name}
    try:
        with torch.device('meta'):
            model = timm.create_model(name, num_classes=NUM_CLASSES)
        params = sum(p.numel() for p in model.parameters()) / 1e6
        row.update(module=type(model).__module__.split('.')[-1], params_m=round(params, 2))
        row['how'] = 'trained' if params <= max_params else 'meta'
    except ERRORS:  # some constructors compute with their weights
        row['how'] = 'trained'
    kwargs: Dict[str, Any] = {}
    if row['how'] == 'trained':
        model, kwargs = create_small(name)
        row.update(
            module=type(model).__module__.split('.')[-1],
            params_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 2))
    size = small_input(model) if row['how'] == 'trained' else model.pretrained_cfg['input_size']
    size = (size[0], kwargs['img_size'], kwargs['img_size']) if kwargs else size
    row['input_size'] = 'x'.join(map(str, size))
    if row['how'] == 'trained':
        settle_batch_norms(model, size)
    row.update(as_student(name, model, size, kwargs) if row['how'] == 'trained' else as_meta_student(model, size))
    row.update(as_teacher(model, size, row['how']))
    row['seconds'] = round(time.monotonic() - start, 1)
    return row


def create_small(name: str) -> Tuple[torch.nn.Module, Dict[str, Any]]:
    """Build a model; those of a fixed input size are built for a smaller one, to save time, where they can be."""
    if timm.get_pretrained_cfg(name, allow_unregistered=True).fixed_input_size:
        try:
            kwargs = dict(img_size=SMALL_FIXED_SIZE)
            model = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
            with evaluation_mode(model):
                model(random_images(model, (model.pretrained_cfg['input_size'][0], SMALL_FIXED_SIZE, SMALL_FIXED_SIZE)))
            return model, kwargs
        except ERRORS:
            pass
    return timm.create_model(name, num_classes=NUM_CLASSES), {}


def settle_batch_norms(model: torch.nn.Module, size: Sequence[int]) -> None:
    """Give batch norms the statistics of a batch: with those of a new model, deep ones overflow in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.
    with torch.no_grad():
        model.train()(random_images(model, size, 4))
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def small_input(model: torch.nn.Module) -> Tuple[int, ...]:
    """Return the smallest of a few sizes that a model runs at, to save time; its own where it takes no other."""
    own = tuple(model.pretrained_cfg['input_size'])
    for size in SMALL_SIZES:
        if size < own[1] and not model.pretrained_cfg.get('fixed_input_size'):
            try:
                with evaluation_mode(model):
                    model(random_images(model, (own[0], size, size)))
                return (own[0], size, size)
            except ERRORS:
                continue
    return own


def as_student(name: str, model: torch.nn.Module, size: Sequence[int], kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Train one step with NORM, merge, and load the result into the stock architecture."""
    try:
        task = timm_distill.create_distill_task(
            model, 'test_resnet', kd='norm', kd_kwargs={'norm.segments': 2}, input_size=size, teacher_pretrained=False,
            verbose=False)
        module = task.module
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        images = random_images(model, size)
        result = task(images, torch.tensor([0, 1]))
        result['loss'].backward()
        missing = [n for n, p in module.adapters.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        if missing or not result['loss'].isfinite():
            raise RuntimeError(f'loss {result["loss"].item()}, no finite gradient in {missing}')
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.)  # random weights can have huge gradients
        optimizer.step()
        state = module.merged_state_dict()
        error = module.merge_error(images)
        if not error <= MERGE_TOLERANCE[torch.float32]:
            raise RuntimeError(f'merged logits differ by {error:.1e}')
        with torch.device('meta'):
            keys = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs).state_dict()
        if list(state) != list(keys) or any(state[k].shape != keys[k].shape for k in keys):
            raise RuntimeError('the merged state dict is not that of the architecture')
        return describe_tap(module.tap, error)
    except ERRORS as e:
        return {'student': 'failed', 'student_reason': f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'}


def as_meta_student(model: torch.nn.Module, size: Sequence[int]) -> Dict[str, Any]:
    try:
        return describe_tap(resolve_student_tap(model, size), float('nan'))
    except ERRORS as e:
        return {'student': 'failed', 'student_reason': f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'}


def describe_tap(tap: Any, merge_error: float) -> Dict[str, Any]:
    return {
        'student': tap.point, 'consumers': '; '.join(map(str, tap.consumers)), 'fold_error': f'{tap.error:.1e}',
        'merge_error': f'{merge_error:.1e}', 'student_reason': tap.rejected}


def as_teacher(model: torch.nn.Module, size: Sequence[int], how: str) -> Dict[str, Any]:
    """Read feature, pre-logits and logits."""
    try:
        if how == 'meta':
            return {'teacher': 'ok', 'teacher_shape': str(meta_feature_shape(model, size))}
        teacher = Teacher(model, size)
        features = teacher(random_images(model, size), {'feature', 'pre_logits', 'logits', 'stages'})
        for value in (features.feature, features.pre_logits, features.logits):
            if value is None or not value.isfinite().all():
                raise RuntimeError('an output is missing or not finite')
        return {'teacher': 'ok', 'teacher_shape': str(list(features.feature.shape[1:]))}
    except ERRORS as e:
        return {'teacher': 'failed', 'teacher_reason': f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'}


def meta_feature_shape(model: torch.nn.Module, size: Sequence[int]) -> List[int]:
    layout: FeatureLayout = resolve_feature_layout(model, size)
    with evaluation_mode(model):
        raw = model.forward_features(random_images(model, size))
        feature = last_stage_feature(raw, model)
        model.forward_head(raw, pre_logits=True)
    return list(layout.to_map(layout.to_positions(feature)).shape[1:])


def read_rows(path: str) -> List[Dict[str, str]]:
    if not os.path.exists(path):
        return []
    with open(path, newline='') as f:
        return list({row['name']: row for row in csv.DictReader(f)}.values())  # the last row of a name counts


def append_rows(path: str, rows: Sequence[Dict[str, Any]]) -> None:
    new = not os.path.exists(path)
    with open(path, 'a', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def render_markdown(rows: Sequence[Dict[str, str]]) -> str:
    """Return the table: per module how many architectures are tapped where, and what fails with the reason."""
    total = summarize(rows)
    small = sum(is_due(row, 120) for row in rows)
    lines = [
        '# Coverage',
        '',
        f'Every architecture of timm {timm.__version__} as student (with `--kd norm`) and as teacher, measured by',
        '`python benchmarks/coverage.py --output coverage.csv --markdown docs/coverage.md` on random weights.',
        '',
        f'- {total["trained"]} were trained for a step, merged (largest logit difference {total["worst"]:.0e} of the',
        f'  spread in float32) and compared key by key with the stock architecture; {total["meta"]} others, {small} of',
        '  them up to 120 M parameters, had their tap measured on the meta device.',
        f'- As student: {total["features"]} keep the spatial map (features), {total["pre_logits"]} are tapped at the',
        f'  pre-logits, {total["student failed"]} cannot be students.',
        f'- As teacher: {total["teacher ok"]} work, {total["teacher failed"]} do not.',
        '',
        '| module | architectures | features | pre-logits | failed as student | teacher | failed as teacher |',
        '|---|---|---|---|---|---|---|',
        *module_lines(rows),
        '',
        '## What fails',
        '',
        *failure_lines(rows),
        '',
    ]
    return '\n'.join(lines)


def summarize(rows: Sequence[Dict[str, str]]) -> Dict[str, Any]:
    errors = [float(row['merge_error']) for row in rows if row['merge_error'] not in ('', 'nan')]
    count = defaultdict(int, worst=max(errors, default=0.))
    for row in rows:
        count[row['how']] += 1
        count[row['student'] if row['student'] != 'failed' else 'student failed'] += 1
        count[f'teacher {row["teacher"]}'] += 1
    return count


def module_lines(rows: Sequence[Dict[str, str]]) -> Iterator[str]:
    modules: Dict[str, List[Dict[str, str]]] = defaultdict(list)
    for row in rows:
        modules[row['module'] or 'unknown'].append(row)
    for module, group in sorted(modules.items()):
        count = summarize(group)
        cells = (
            len(group), count['features'], count['pre_logits'], count['student failed'], count['teacher ok'],
            count['teacher failed'])
        yield f'| {module} | ' + ' | '.join(map(str, cells)) + ' |'


def failure_lines(rows: Sequence[Dict[str, str]]) -> Iterator[str]:
    reasons: Dict[str, List[str]] = defaultdict(list)
    for row in rows:
        for role in ('student', 'teacher'):
            if row[role] == 'failed':
                reasons[f'as {role}: {row[f"{role}_reason"]}'].append(row['name'])
    if not reasons:
        yield 'Nothing.'
    for reason, names in sorted(reasons.items()):
        yield f'- {", ".join(f"`{name}`" for name in names)} {reason}'


if __name__ == '__main__':
    main()
