"""Cached targets: a step that reads them against the student alone and the live one, in turns; memory of a reader.

    python -m benchmarks.cache --teacher resnet50 --student mobilenetv2_100 --kd kd norm --batch-size 32
"""
import argparse
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from timm import create_model

from timm_distill.cache.codecs import HalfCodec
from timm_distill.cache.targets import CachedTargets
from timm_distill.data.views import ViewGrid
from timm_distill.factory import create_distill_task
from timm_distill.run.cache_forms import choose_codecs
from timm_distill.task import DistillTask


def main() -> None:
    """Print a table of ratios for every method, then the memory of readers of two caches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--teacher', default='resnet50')
    parser.add_argument('--student', default='mobilenetv2_100')
    parser.add_argument('--kd', nargs='*', default=['kd', 'feature', 'norm'])
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--cache-precision', default='float16')
    parser.add_argument('--rows', type=int, default=20_000, help='views of the smaller of two caches that are read')
    parser.add_argument('--reads', type=int, default=200, help='batches that are read of each')
    args = parser.parse_args()
    print('| method | student alone, s | live | filling | reading | reading / alone | filling / live |')
    print('|---|---|---|---|---|---|---|')
    for kd in args.kd:
        times = measure_steps(kd, args)
        alone, live, filling, reading = (times[name] for name in ('alone', 'live', 'filling', 'reading'))
        print(
            f'| {kd} | {alone:.3f} | {live:.3f} | {filling:.3f} | {reading:.3f} | {reading / alone:.3f} | '
            f'{filling / live:.3f} |')
    for rows in (args.rows, 20 * args.rows):
        size, peak, added = measure_reader(rows, reads=args.reads)
        print(
            f'reader of {rows} views, {size:.0f} MB on disk: {added:.1f} MB are added to the memory of its process by '
            f'opening the cache and reading {args.reads} batches, {peak:.0f} MB at most in all')


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


def measure_reader(rows: int, width: int = 2048, reads: int = 200) -> Tuple[float, float, float]:
    """Measure a process (on Linux) that reads a cache as a run does: missing views counted, then batches at random.

    Args:
        rows: Views of the cache, all of them there.
        width: Of the vectors that it holds.
        reads: Batches of 256 views.

    Returns:
        Megabytes of the cache on disk, of the process at its peak, and of what the cache added to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        grid = ViewGrid(rows // 10, 10)
        targets = CachedTargets(folder, grid, {'pre_logits': HalfCodec('pre_logits', (width,))})
        table, block = targets.tables['pre_logits'], np.zeros((1000, 2 * width), np.uint8)
        for start in range(0, rows, len(block)):
            block[:] = np.random.default_rng(start).integers(0, 100, block.shape[1], np.uint8)
            table.write(range(start, start + len(block)), block)
        targets.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
        context = get_context('spawn')  # a fresh process: what this one has allocated would hide what is added
        queue = context.Queue()
        process = context.Process(target=_read, args=(folder, grid, width, reads, queue))
        process.start()
        before, after = queue.get()
        process.join()
    return size / 1e6, after / 1024, (after - before) / 1024


def _read(folder: str, grid: ViewGrid, width: int, reads: int, queue: Any) -> None:
    """Put the memory of this process before reading, and its peak since, in kB, into a queue."""
    images = torch.zeros(256, 1)
    Path('/proc/self/clear_refs').write_text('5')  # begins the peak anew: imports have needed more
    before = _memory('VmRSS')
    targets = CachedTargets(folder, grid, {'pre_logits': HalfCodec('pre_logits', (width,))}, writable=False)
    assert targets.count_missing(grid.num_views) == 0
    random = np.random.default_rng(0)
    for _ in range(reads):
        targets.read(torch.from_numpy(random.integers(0, len(grid), 256)), images, None)
    queue.put((before, _memory('VmHWM')))
    targets.close()


def _memory(kind: str) -> int:
    """Return a figure of this process, in kB, as Linux has it."""
    (line,) = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1])


if __name__ == '__main__':
    main()
