#!/usr/bin/env python
"""The training loop as users run it, against its own step and against timm's training script.

    python benchmarks/loop.py --csv loop.csv
    python benchmarks/loop.py --timm-script TIMM/train.py --kd kd norm -- --workers 1

What the loop costs: in turns, the task's step on a fixed batch without a loop, train_distill.py's loop over a loader
that yields this batch, its loop over the real loader, and the loader alone. Only updates amid an epoch count: at its
start the workers fill their queue, at its end they have nothing left to do.

With --timm-script: a copy of timm's train.py with its logit distillation and train_distill.py, on the same data, pair
and flags, as processes that take turns. The teacher is a local folder with random weights, since timm's script takes
pretrained ones only. Flags after `--` go to both scripts.
"""
import argparse
import logging
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence
from unittest.mock import patch

import numpy as np
import timm
import torch
from measure import Row, interleave, markdown_table, median_ratio, spread, synchronize, write_csv
from PIL import Image
from timm.models import save_for_hf
from turns import take_turns

REPO_DIR = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO_DIR))

import train_distill  # noqa: E402
from timm_distill.run import Run, epochs  # noqa: E402

COLUMNS = ('what', 'variant', 'seconds_per_update', 'images_per_second', 'reference', 'ratio', 'quartiles', 'speed')
CLASSES = 10


def main() -> None:
    args = parse_benchmark_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(timm_rows(args, Path(folder)) if args.timm_script else loop_rows(args, Path(folder)))
    print(markdown_table(COLUMNS, rows), flush=True)
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


def parse_benchmark_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--teacher', default='resnet34')
    parser.add_argument('--student', default='resnet18')
    parser.add_argument('--kd', nargs='+', default=['kd'], help='the first one for the loop, each one against timm')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--size', type=int, default=224, help='height and width of the batches')
    parser.add_argument(
        '--source-size', type=int, nargs=2, default=[500, 375], metavar=('WIDTH', 'HEIGHT'),
        help='size of the JPEG files that are made')
    parser.add_argument('--data-dir', default='', help='class folders to take images from; made ones by default')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--threads', type=int, default=0, help='of the compute; 0 leaves them as they are')
    parser.add_argument('--updates', type=int, default=6, help='updates in a turn')
    parser.add_argument('--repeats', type=int, default=5, help='turns')
    parser.add_argument('--timm-script', default='', help='path of a copy of timm\'s train.py')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--csv', default='', help='where to write the rows')
    parser.add_argument('flags', nargs='*', help='more flags of the training scripts, after --')
    return parser.parse_args()


def create_data(args: argparse.Namespace, root: Path, num_images: int) -> Path:
    """Make class folders with as many images for training, as links to those of `--data-dir` or to made ones."""
    if args.data_dir:
        files = sorted(Path(args.data_dir, 'train').glob('*/*'))[::7]
    else:
        files = [write_image(root / f'{i}.jpg', args.source_size, i) for i in range(64)]
    for i in range(num_images):
        folder = root / 'data' / 'train' / f'{i % CLASSES:03d}'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{i:06d}.jpg').symlink_to(files[i % len(files)].resolve())
    return root / 'data'


def write_image(path: Path, size: Sequence[int], seed: int) -> Path:
    """Write a JPEG of smooth colours with some noise, about as large as a photograph's."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(tuple(size), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + generator.normal(0, 8, smooth.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def shared_flags(args: argparse.Namespace, data_dir: Path, log_interval: int) -> List[str]:
    """Return the flags that both scripts take."""
    return [
        '--data-dir', str(data_dir), '--val-split', '', '--num-classes', str(CLASSES), '--img-size', str(args.size),
        '--batch-size', str(args.batch_size), '--workers', str(args.workers), '--opt', 'sgd', '--lr', '0.01',
        '--warmup-epochs', '0', '--log-interval', str(log_interval), '--device', args.device, *args.flags]


def margin(args: argparse.Namespace) -> int:
    """Return how many batches the workers and the prefetcher are ahead."""
    return 2 * args.workers + 1


class TimedLoader:
    """A loader that notes when the batches at `first` and at `last` were handed out.

    Args:
        batches: Loader, or a list of batches.
        first: Index of the batch that starts the clock.
        last: Index of the batch that stops it.
        run: The run that it is for. Its device is waited for at both.
    """

    def __init__(self, batches: Any, first: int, last: int, run: Run):
        self.batches, self.first, self.last, self.run = batches, first, last, run
        self.seconds = float('nan')  # per update

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start = 0.
        for i, batch in enumerate(self.batches):
            if i in (self.first, self.last):
                synchronize(self.run.device)
                start, elapsed = time.perf_counter(), time.perf_counter() - start
                if i == self.last:
                    self.seconds = elapsed / (self.last - self.first)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run.loaders.train, name)  # dataset, sampler and more, which a list does not have


class Measured(Exception):
    """Leaves a training run that was only there to be measured."""


def loop_rows(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Step, loop on a fixed batch, loop with the loader, and the loader alone, inside a run of train_distill.py."""
    if args.threads:
        torch.set_num_threads(args.threads)
    data_dir = create_data(args, folder, args.batch_size * (args.updates + 2 * margin(args)))
    flags = [
        *shared_flags(args, data_dir, log_interval=50), '--student', args.student, '--teacher', args.teacher,
        '--no-teacher-pretrained', '--kd', args.kd[0], '--epochs', '1000000', '--val-interval', '1000000',
        '--output', str(folder / 'output')]
    seconds: Dict[str, List[float]] = {}
    run_epoch = epochs.run_epoch

    def _measure(run: Run, epoch: int, recorder: Any, *rest: Any) -> None:
        def _run_epoch(loader: TimedLoader) -> None:
            run_epoch(replace(run, loaders=replace(run.loaders, train=loader)), epoch, recorder)

        seconds.update(measure_epochs(args, run, _run_epoch))
        raise Measured

    with patch.object(epochs, 'run_epoch', _measure), suppress(Measured):
        train_distill.main(flags)
    what = f'{args.teacher} -> {args.student}, {args.kd[0]}, {args.batch_size} images of {args.size}'
    yield from compare(what, args.batch_size, seconds, 'step')


def measure_epochs(
        args: argparse.Namespace,
        run: Run,
        run_epoch: Callable[['TimedLoader'], None],
) -> Dict[str, List[float]]:
    """Return the seconds per update of each variant's turns."""
    for input, target in run.loaders.train:  # starts the workers, which stay
        fixed = (input.clone(), target.clone())
    total, first = len(run.loaders.train), margin(args)
    repeated = [fixed] * (args.updates + 2)
    variants = {
        'step': (lambda loader: run_steps(run, loader), TimedLoader(repeated, 1, 1 + args.updates, run)),
        'loop': (run_epoch, TimedLoader(repeated, 1, 1 + args.updates, run)),
        'loop and loader': (run_epoch, TimedLoader(run.loaders.train, first, total - first, run)),
        'loader alone': (exhaust, TimedLoader(run.loaders.train, first, total - first, run)),
    }
    seconds: Dict[str, List[float]] = {name: [] for name in variants}

    def _turn(name: str) -> None:
        body, loader = variants[name]
        body(loader)
        seconds[name].append(loader.seconds)

    run_steps(run, variants['step'][1])
    interleave({name: lambda name=name: _turn(name) for name in variants}, args.repeats, run.device, warmup=0)
    return seconds


def run_steps(run: Run, loader: TimedLoader) -> None:
    """The step alone."""
    module = run.task.get_trainable_module()
    assert module is not None
    module.train()
    for input, target in loader:
        with run.precision.autocast():
            loss = run.task(input, target)['loss']
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


def exhaust(loader: TimedLoader) -> None:
    """The loader, as fast as it gets."""
    for _ in loader:
        pass


def timm_rows(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """timm's script with logit distillation and ours with each method, in turns."""
    warmup = args.updates
    updates = args.updates * (args.repeats + 2) + 2 * margin(args)
    data_dir = create_data(args, folder, args.batch_size * updates)
    teacher = save_teacher(args.teacher, folder / 'teacher', args.size)
    flags = [
        *shared_flags(args, data_dir, args.updates), '--epochs', '1', '--model', args.student,
        '--output', str(folder / 'output')]
    timm_flags = ['--kd-model-name', teacher, '--distill-loss-weight', '1', '--task-loss-weight', '1']
    commands = {'timm kd': [args.timm_script, *flags, *timm_flags]}
    for kd in args.kd:
        commands[f'ours {kd}'] = [
            str(REPO_DIR / 'train_distill.py'), *flags, '--teacher', teacher, '--kd', kd, '--no-teacher-eval']
    env = {'OMP_NUM_THREADS': str(args.threads)} if args.threads else {}
    seconds = take_turns(commands, env, args.repeats, args.updates, warmup)
    what = f'{args.teacher} -> {args.student}, {args.batch_size} images of {args.size}'
    yield from compare(what, args.batch_size, seconds, 'timm kd')


def save_teacher(name: str, folder: Path, size: int) -> str:
    """Save a model with random weights; returns a name under which timm finds it as a pretrained one."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model(name, num_classes=CLASSES), folder, safe_serialization=True)
    return f'local-dir:{folder}'


def compare(what: str, images: int, seconds: Dict[str, List[float]], reference: str) -> Iterator[Row]:
    """Yield a row for each variant."""
    for name, values in seconds.items():
        median = statistics.median(values)
        yield dict(
            what=what,
            variant=name,
            seconds_per_update=f'{median:.4f}',
            images_per_second=f'{images / median:.1f}',
            reference=reference,
            ratio=f'{median_ratio(values, seconds[reference]):.3f}',
            quartiles=spread(values, seconds[reference]),
            speed=f'{median_ratio(seconds[reference], values):.3f}',
        )


if __name__ == '__main__':
    main()
