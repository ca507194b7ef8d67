#!/usr/bin/env python
"""Time and memory of the N-to-one transform and of whole training steps, side by side in one run.

    python benchmarks/step.py --csv step.csv

Every repetition runs all variants in turns, so that whatever else the machine does meets all of them; what is
reported is the median over repetitions of each variant's time divided by the reference's in the same repetition.
Memory is the peak above what stood before the call, with the gradients allocated already: resident on the CPU (each
variant in a process of its own), allocated on CUDA.
"""
import argparse
import csv
import logging
import multiprocessing
import statistics
import time
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterator, List, Tuple

import timm
import torch

import timm_distill
from timm_distill.adapters import Match, create_adapter

# student channels, teacher channels, images (of 7 x 7 positions)
TRANSFORMS = {
    'resnet34 -> resnet18': (512, 512, (32, 64, 128)),
    'resnet50 -> 1024 channels': (1024, 2048, (64,)),
    'resnet50 -> mobilenetv2_100': (1280, 2048, (64, 256)),
}
PAIRS = {
    'resnet34 -> resnet18': ('resnet34', 'resnet18'),
    'resnet50 -> mobilenetv2_100': ('resnet50', 'mobilenetv2_100'),
    'resnet50 -> mobilenetv3_large_100': ('resnet50', 'mobilenetv3_large_100'),
    'deit_small -> deit_tiny': ('deit_small_patch16_224', 'deit_tiny_patch16_224'),
}
COLUMNS = ('what', 'pair', 'images', 'variant', 'seconds', 'ratio', 'reference', 'memory_mib')
Row = Dict[str, Any]


def main() -> None:
    args = parse_args()
    logging.disable(logging.WARNING)
    rows: List[Row] = []
    if 'transform' in args.what:
        rows += transform_rows(args)
    if 'step' in args.what:
        rows += step_rows(args)
    for row in rows:
        print('  '.join(f'{key}={value}' for key, value in row.items()), flush=True)
    if args.csv:
        with open(args.csv, 'w', newline='') as f:
            writer = csv.DictWriter(f, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--what', nargs='+', default=['transform', 'step'], choices=['transform', 'step'])
    parser.add_argument('--pairs', nargs='+', default=list(PAIRS), help='pairs of whole steps')
    parser.add_argument('--images', type=int, nargs='+', default=[32], help='batch sizes of whole steps')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true', help='torch.compile for teacher and student')
    parser.add_argument('--csv', default='', help='where to write the rows')
    return parser.parse_args()


def interleave(variants: Dict[str, Callable[[], None]], repeats: int, device: torch.device) -> Dict[str, List[float]]:
    """Return the durations of each variant, run in turns, after one run to warm up."""
    seconds: Dict[str, List[float]] = {name: [] for name in variants}
    for repetition in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(
        what: str,
        pair: str,
        images: int,
        seconds: Dict[str, List[float]],
        reference: str,
        memory: Dict[str, float],
) -> Iterator[Row]:
    for name, values in seconds.items():
        ratio = statistics.median(v / r for v, r in zip(values, seconds[reference]))
        yield dict(what=what, pair=pair, images=images, variant=name, seconds=f'{statistics.median(values):.4f}',
                   ratio=f'{ratio:.3f}', reference=reference, memory_mib=f'{memory.get(name, float("nan")):.0f}')


def transform_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward of transform and loss: direct form and moment form."""
    device = torch.device(args.device)
    for pair, (cs, ct, batches) in TRANSFORMS.items():
        for images in batches:
            memory = {form: transform_memory(form, cs, ct, images, device) for form in ('direct', 'moments')}
            variants = {form: create_transform(form, cs, ct, images, device) for form in ('direct', 'moments')}
            seconds = interleave(variants, args.repeats, device)
            yield from compare('transform', pair, images, seconds, 'moments', memory)


def create_transform(form: str, cs: int, ct: int, images: int, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    adapter = create_adapter('norm', cs, ct, segments=8, form=form).to(device).train()
    x = torch.randn(images, cs, 7, 7, device=device).relu().requires_grad_()
    teacher = torch.randn(images, ct, 7, 7, device=device).relu()
    cotangent = torch.randn_like(x)
    for tensor in (x, *adapter.parameters()):
        tensor.grad = torch.zeros_like(tensor)

    def _run() -> None:
        adapted = adapter(x, Match(teacher, lambda positions: positions))
        torch.autograd.backward((adapted.output, adapted.loss), (cotangent, None))

    return _run


def transform_memory(form: str, cs: int, ct: int, images: int, device: torch.device) -> float:
    """Return the peak MiB above what stood before."""
    if device.type == 'cuda':
        run = create_transform(form, cs, ct, images, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(resident_peak, (form, cs, ct, images))


def resident_peak(form: str, cs: int, ct: int, images: int) -> float:
    create_transform(form, 32, 32, 2, torch.device('cpu'))()  # libraries load their parts at the first use
    run = create_transform(form, cs, ct, images, torch.device('cpu'))
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # resets the high-water mark
    before = resident('VmRSS')
    run()
    return resident('VmHWM') - before


def resident(entry: str) -> float:
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(entry))


def step_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A whole step: the limit (teacher forward, student forward and backward, optimizer) and every method."""
    device = torch.device(args.device)
    for pair in args.pairs:
        teacher, student = PAIRS[pair]
        for images in args.images:
            variants = {'limit': create_limit(teacher, student, images, args)}
            for name, (kd, kwargs) in method_variants().items():
                variants[name] = create_step(teacher, student, images, kd, kwargs, args)
            seconds = interleave(variants, args.repeats, device)
            yield from compare('step', pair, images, seconds, 'limit', step_memory(variants, device))
            if 'kd' in seconds:
                yield from (row for row in compare('step', pair, images, seconds, 'kd', {})
                            if row['variant'].startswith('norm'))


def method_variants() -> Dict[str, Tuple[str, Dict[str, Any]]]:
    variants: Dict[str, Tuple[str, Dict[str, Any]]] = {
        name: (name, {}) for name in timm_distill.list_methods() if name != 'norm'}
    for form in ('direct', 'moments'):
        variants[f'norm {form}'] = ('norm', {'norm.form': form})
    return variants


def step_memory(variants: Dict[str, Callable[[], None]], device: torch.device) -> Dict[str, float]:
    if device.type != 'cuda':
        return {}
    memory = {}
    for name, run in variants.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    return memory


def create_batch(images: int, args: argparse.Namespace) -> Tuple[torch.Tensor, torch.Tensor]:
    batch = torch.randn(images, 3, 224, 224, device=args.device)
    if args.channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    return batch, torch.randint(1000, (images,), device=args.device)


def autocast(args: argparse.Namespace) -> Any:
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16) if args.amp else nullcontext()


def create_limit(teacher: str, student: str, images: int, args: argparse.Namespace) -> Callable[[], None]:
    """Return the least that a step with a teacher can do."""
    torch.manual_seed(0)
    models = [timm.create_model(name).to(args.device) for name in (teacher, student)]
    if args.channels_last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
    optimizer = torch.optim.SGD(models[1].parameters(), lr=1e-3, momentum=0.9)
    models[0].eval().requires_grad_(False)
    models[1].train()
    if args.compile:
        models = [torch.compile(model) for model in models]
    batch, target = create_batch(images, args)

    def _run() -> None:
        with autocast(args):
            with torch.no_grad():
                models[0](batch)
            loss = torch.nn.functional.cross_entropy(models[1](batch), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _run


def create_step(
        teacher: str,
        student: str,
        images: int,
        kd: str,
        kd_kwargs: Dict[str, Any],
        args: argparse.Namespace,
) -> Callable[[], None]:
    """Return a step of the task."""
    torch.manual_seed(0)
    task = timm_distill.create_distill_task(
        student, teacher, kd, kd_kwargs=kd_kwargs, teacher_pretrained=False, device=args.device, verbose=False)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=1e-3, momentum=0.9)
    task.trainable_module.train()
    if args.compile:
        task.compile()
    batch, target = create_batch(images, args)

    def _run() -> None:
        with autocast(args):
            loss = task(batch, target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _run


if __name__ == '__main__':
    main()
