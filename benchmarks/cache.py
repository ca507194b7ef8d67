"""Cached targets: a step that reads them against the student alone and the live one, in turns; memory of a reader.

    python -m benchmarks.cache --teacher resnet50 --student mobilenetv2_100 --kd kd norm --batch-size 32
"""
import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import torch
from timm import create_model

from timm_distill.cache.codecs import HalfCodec
from timm_distill.cache.table import Table
from timm_distill.cache.targets import CachedTargets
from timm_distill.data.views import ViewGrid
from timm_distill.factory import create_distill_task
from timm_distill.run.cached import choose_codecs
from timm_distill.task import DistillTask


def main() -> None:
    """Print a table of ratios for every method, then the memory of readers of two caches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--teacher', default='resnet50')
    parser.add_argument('--student', default='mobilenetv2_100')
    parser.add_argument('--kd', nargs='+', default=['kd', 'feature', 'norm'])
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--cache-precision', default='float16')
    args = parser.parse_args()
    print('| method | student alone, s | live | filling | reading | reading / alone | filling / live |')
    print('|---|---|---|---|---|---|---|')
    for kd in args.kd:
        times = measure_steps(kd, args)
        alone, live, filling, reading = (times[name] for name in ('alone', 'live', 'filling', 'reading'))
        print(
            f'| {kd} | {alone:.3f} | {live:.3f} | {filling:.3f} | {reading:.3f} | {reading / alone:.3f} | '
            f'{filling / live:.3f} |')
    for rows in (10_000, 100_000):
        print(f'memory that reading adds, cache of {rows} views: {measure_reader(rows):.1f} MB')


def measure_steps(kd: str, args: argparse.Namespace) -> Dict[str, float]:
    """Return the median seconds of CPU time of a step in each way, taken in turns; other processes do not count."""
    size = (3, args.img_size, args.img_size)
    options = dict(num_classes=1000, input_size=size, verbose=False)
    task = create_distill_task(args.student, create_model(args.teacher), kd, **options)
    alone = create_distill_task(args.student, None, 'none', **options)
    grid = ViewGrid(args.batch_size, 1 + args.turns + 1)
    images, keys = torch.randn(args.batch_size, *size), torch.arange(args.batch_size) * grid.num_views
    labels = torch.arange(args.batch_size) % 1000
    flags = argparse.Namespace(
        kd=kd, cache_topk=None, cache_precision=args.cache_precision, train_img_sizes=None)
    assert task.teacher is not None
    codecs = choose_codecs(flags, task, task.teacher.feature_spec)
    times: Dict[str, List[float]] = {name: [] for name in ('alone', 'live', 'filling', 'reading')}
    with tempfile.TemporaryDirectory() as folder:
        targets = CachedTargets(folder, grid, codecs)
        for turn in range(args.turns + 1):  # the first warms up
            pairs = torch.stack([labels, keys + turn], 1)
            steps: Dict[str, Callable[[], None]] = {
                'alone': lambda: _step(alone, images, labels),
                'live': lambda: _step(task, images, labels),
                'filling': lambda pairs=pairs: _step(task, images, pairs, targets),  # type: ignore[misc]
                'reading': lambda pairs=pairs: _step(task, images, pairs, targets),  # type: ignore[misc]
            }
            for name, step in steps.items():
                start = time.process_time()
                step()
                times[name].append(time.process_time() - start)
        targets.close()
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def _step(
        task: DistillTask,
        images: torch.Tensor,
        target: torch.Tensor,
        targets: 'CachedTargets | None' = None,
) -> None:
    task.targets = targets
    task.trainable_module.train()
    task(images, target)['loss'].backward()
    task.trainable_module.zero_grad()


def measure_reader(rows: int, width: int = 2048) -> float:
    """Return the megabytes by which the peak memory of this process grows when all rows of a table are read."""
    codec = HalfCodec('pre_logits', (width,))
    with tempfile.TemporaryDirectory() as folder:
        table = Table(str(Path(folder) / 'rows'), codec.row_bytes, rows)
        for start in range(0, rows, 1000):
            table.write(range(start, start + 1000), codec.encode(torch.randn(1000, width)))
        table.close()
        table = Table(str(Path(folder) / 'rows'), codec.row_bytes, rows, writable=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for start in range(0, rows, 1000):
            codec.decode(table.read(np.random.default_rng(start).integers(0, rows, 256))[0])
        table.close()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == '__main__':
    main()
