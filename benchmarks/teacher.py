#!/usr/bin/env python
"""Measure what folding batch norms does to teachers: how many fold, what changes, and how much faster they get.

    python benchmarks/teacher.py --max-params 30 --output teacher.csv
    python benchmarks/teacher.py resnet50 resnet34 --speed --batch-size 16 --output -

Random weights with settled batch norms; errors are those of the float32 outputs against float64, relative to their
spread, before and after folding. With --speed every architecture runs at its own size, plain, folded, and folded in
channels_last, interleaved; the times are medians.
"""
import argparse
import csv
import logging
import statistics
import sys
import time
import warnings
from functools import partial
from typing import Any, Callable, Dict, List, Sequence

import timm
import torch
from coverage import create_small, small_input
from tqdm import tqdm

from timm_distill.features.inputs import CANNOT_RUN, random_images
from timm_distill.features.tracing import output_error
from timm_distill.teacher.fold import is_batch_norm, settle_batch_norms
from timm_distill.teacher.teacher import Teacher

OUTPUTS = frozenset({'logits', 'feature'})


def main() -> None:
    args = parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings('ignore')
    torch.set_grad_enabled(False)
    names = args.names or timm.list_models()
    rows = []
    for name in tqdm(names, unit='model', disable=args.speed):
        row = measure_speed(name, args) if args.speed else measure_folding(name, args.max_params)
        if row:
            rows.append(row)
            write_rows(rows, args.output)
    if not args.speed:
        print(summarize(rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='architectures; all of timm without any')
    parser.add_argument('--output', default='-', help='CSV; - for the terminal')
    parser.add_argument('--max-params', type=float, default=30, help='largest model that is measured, in millions')
    parser.add_argument('--speed', action='store_true', help='measure time instead of coverage')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    return parser.parse_args()


def measure_folding(name: str, max_params: float) -> Dict[str, Any]:
    """Return what folding did to one architecture; nothing for a larger one and one without batch norms."""
    try:
        with torch.device('meta'):
            stock = timm.create_model(name)
        params = sum(p.numel() for p in stock.parameters()) / 1e6
        if params > max_params or not any(map(is_batch_norm, stock.modules())):
            return {}
    except CANNOT_RUN:  # some constructors compute with their weights
        pass
    row: Dict[str, Any] = {
        'name': name, 'norms': 0, 'folded': 0, 'error': '', 'plain_error': '', 'folded_error': '',
        'seconds': '', 'failed': ''}
    try:
        model, kwargs = create_small(name)
        size = (3, kwargs['img_size'], kwargs['img_size']) if kwargs else small_input(model.eval())
        images = random_images(model.eval(), size)
        settle_batch_norms(model, images)
        plain = Teacher(model, size, fold=False)
        start = time.monotonic()
        folded = Teacher(model, size)
        row.update(
            norms=folded.folded.norms, folded=folded.folded.folded, error=f'{folded.folded.error:.1e}',
            seconds=round(time.monotonic() - start, 1))
        if folded.folded.norms:
            exact = read(Teacher(model.double(), size, fold=False), images.double())
            row.update({
                key: f'{output_error([x.double() for x in read(teacher, images)], exact):.1e}'
                for key, teacher in (('plain_error', plain), ('folded_error', folded))})
    except (*CANNOT_RUN, MemoryError) as e:
        row['failed'] = f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'
    return row


def read(teacher: Teacher, images: torch.Tensor) -> List[torch.Tensor]:
    return teacher(images, frozenset({'logits', 'feature', 'pre_logits', 'stages'})).tensors()


def measure_speed(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Return the medians of a teacher's forward."""
    model, dtype = timm.create_model(name).to(args.device), getattr(torch, args.dtype)
    size = model.pretrained_cfg['input_size']
    images = random_images(model, size, args.batch_size).to(dtype)
    teachers = {
        'plain': Teacher(model, size, dtype=dtype, fold=False, channels_last=False),
        'folded': Teacher(model, size, dtype=dtype, channels_last=False),
        'channels_last': Teacher(model, size, dtype=dtype, channels_last=True),
    }
    runs = {key: partial(teacher, images, OUTPUTS) for key, teacher in teachers.items()}
    seconds = time_interleaved(runs, args.repeats, args.device)
    return {
        'name': name, 'batch_size': args.batch_size, **{key: f'{s:.4f}' for key, s in seconds.items()},
        'speedup': f'{seconds["plain"] / seconds["folded"]:.2f}',
        'with_channels_last': f'{seconds["plain"] / seconds["channels_last"]:.2f}'}


def time_interleaved(runs: Dict[str, Callable[[], Any]], repeats: int, device: str) -> Dict[str, float]:
    durations: Dict[str, List[float]] = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            durations[key].append(time.perf_counter() - start)
    return {key: statistics.median(values[1:]) for key, values in durations.items()}


def write_rows(rows: Sequence[Dict[str, Any]], path: str) -> None:
    if path == '-':
        print(', '.join(f'{key} {value}' for key, value in rows[-1].items()), flush=True)
        return
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: Sequence[Dict[str, Any]]) -> str:
    """Return the counts over all architectures."""
    complete = sum(row['folded'] == row['norms'] for row in rows)
    norms, folded = (sum(row[key] for row in rows) for key in ('norms', 'folded'))
    failed = [row['name'] for row in rows if row['failed']]
    return (
        f'{len(rows)} architectures with batch norms: {folded} of {norms} folded, all of them in {complete} '
        f'architectures; failed: {failed or "none"}')


if __name__ == '__main__':
    sys.exit(main())
