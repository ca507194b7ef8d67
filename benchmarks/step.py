#!/usr/bin/env python
"""Time and memory of the N-to-one transform and of whole training steps, side by side in one run.

    python benchmarks/step.py --what step --pairs 'resnet34 -> resnet18' --images 32 --csv step.csv

A step is compared with the limit: the bare folded teacher's forward, the bare student's forward and backward, and the
optimizer, on the same fixed batch. All variants run in turns, so that whatever else the machine does meets all of
them; what is reported is the median over turns of each variant's time divided by the reference's in the same turn.
Memory is resident on the CPU (each variant in a process of its own) and allocated on CUDA: for the transform the peak
above what stood before the call, gradients allocated already, for a step the peak of models, optimizer and step.
"""
import argparse
import itertools
import logging
import statistics
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import timm
import torch
from measure import Row, interleave, markdown_table, median_ratio, peak_memory, spread, write_csv
from timm.optim import create_optimizer_v2

import timm_distill
from timm_distill.adapters import Match, create_adapter
from timm_distill.teacher.teacher import create_teacher

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
FORMS = ('direct', 'moments')
SAMPLES = 50000  # of an imagined training set, for methods that keep something of each
COLUMNS = (
    'what', 'pair', 'images', 'mode', 'variant', 'seconds', 'images_per_second', 'reference', 'ratio',
    'quartiles', 'over_kd', 'memory_mib')


class Setting(NamedTuple):
    """Settings that one table holds fixed."""
    teacher: str
    student: str
    images: int
    size: int
    device: str
    amp: bool
    compile: bool
    channels_last: bool


def main() -> None:
    args = parse_args()
    logging.disable(logging.WARNING)
    rows: List[Row] = []
    if 'transform' in args.what:
        rows += show(transform_rows(args))
    if 'step' in args.what:
        for pair, images, compiled, amp in itertools.product(args.pairs, args.images, args.compile, args.amp):
            rows += show(step_rows(args, pair, images, compiled, amp))
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


def show(rows: Iterator[Row]) -> List[Row]:
    """Print rows as a table."""
    collected = list(rows)
    columns = [c for c in COLUMNS if any(row.get(c, '') != '' for row in collected)]
    print(markdown_table(columns, collected), flush=True)
    return collected


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--what', nargs='+', default=['transform', 'step'], choices=['transform', 'step'])
    parser.add_argument('--pairs', nargs='+', default=list(PAIRS), choices=list(PAIRS), help='pairs of whole steps')
    parser.add_argument('--images', type=int, nargs='+', default=[8, 32], help='batch sizes of whole steps')
    parser.add_argument('--size', type=int, default=224, help='height and width of their images')
    parser.add_argument(
        '--amp', type=int, nargs='+', default=[0], choices=[0, 1],
        help='0: float32, 1: bfloat16 autocast')
    parser.add_argument(
        '--compile', type=int, nargs='+', default=[0], choices=[0, 1],
        help='0: eager, 1: torch.compile for teacher and student')
    parser.add_argument(
        '--variants', nargs='+', default=[],
        help='limit, names of methods, "norm direct", "norm moments"; all by default')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--no-memory', action='store_true', help='leave out the memory of whole steps')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--csv', default='', help='where to write the rows')
    return parser.parse_args()


def transform_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward of transform and loss: direct form and moment form."""
    device = torch.device(args.device)
    for pair, (cs, ct, batches) in TRANSFORMS.items():
        for images in batches:
            memory = {form: transform_memory(form, cs, ct, images, device) for form in FORMS}
            variants = {form: create_transform(form, cs, ct, images, device) for form in FORMS}
            seconds = interleave(variants, args.repeats, device)
            yield from compare(dict(what='transform', pair=pair, images=images), seconds, 'moments', memory)


def compare(labels: Row, seconds: Dict[str, List[float]], reference: str, memory: Dict[str, float]) -> Iterator[Row]:
    """Yield a row for each variant."""
    for name, values in seconds.items():
        median = statistics.median(values)
        row = dict(labels, variant=name, seconds=f'{median:.4f}', images_per_second=f'{labels["images"] / median:.1f}')
        if reference in seconds:
            row.update(
                reference=reference,
                ratio=f'{median_ratio(values, seconds[reference]):.3f}',
                quartiles=spread(values, seconds[reference]),
            )
        if 'kd' in seconds:
            row['over_kd'] = f'{median_ratio(values, seconds["kd"]):.3f}'
        if name in memory:
            row['memory_mib'] = f'{memory[name]:.0f}'
        yield row


def transform_memory(form: str, cs: int, ct: int, images: int, device: torch.device) -> float:
    """Return the peak MiB above what stood before the call."""
    memory = peak_memory(create_transform, (form, cs, ct, images, device), device, small=(form, 32, 32, 2, device))
    return memory.peak - memory.built


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


def step_rows(args: argparse.Namespace, pair: str, images: int, compiled: int, amp: int) -> Iterator[Row]:
    """A whole step: the limit and every method that takes the pair."""
    device = torch.device(args.device)
    setting = Setting(*PAIRS[pair], images, args.size, args.device, bool(amp), bool(compiled), args.channels_last)
    labels = dict(what='step', pair=pair, images=images, mode=describe(setting))
    variants: Dict[str, Callable[[], None]] = {}
    for name in args.variants or ['limit', *method_variants()]:
        try:
            variants[name] = create_variant(name, setting)
        except timm_distill.UsageError as error:
            print(f'{pair}: {name} is left out: {error}', flush=True)
    seconds, names = interleave(variants, args.repeats, device), list(variants)
    variants.clear()  # their memory is measured one at a time
    memory = {} if args.no_memory else {name: step_memory(name, setting, device) for name in names}
    yield from compare(labels, seconds, 'limit', memory)


def step_memory(name: str, setting: Setting, device: torch.device) -> float:
    """Return the peak MiB of models, optimizer and step together."""
    memory = peak_memory(create_variant, (name, setting), device)
    return memory.peak - memory.start


def describe(setting: Setting) -> str:
    words = ['compiled' if setting.compile else 'eager', 'bfloat16' if setting.amp else 'float32']
    return ' '.join(words + ['channels-last'] * setting.channels_last)


def method_variants() -> Dict[str, Tuple[str, Dict[str, Any]]]:
    """Return methods and options by the name of the variant."""
    variants: Dict[str, Tuple[str, Dict[str, Any]]] = {
        name: (name, {}) for name in timm_distill.list_methods() if name not in ('norm', 'sdd')}
    variants.update({name: (name, {}) for name in ('sdd:kd', 'sdd:dkd', 'sdd:nkd')})
    for form in FORMS:
        variants[f'norm {form}'] = ('norm', {'norm.form': form})
    return variants


def create_variant(name: str, setting: Setting) -> Callable[[], None]:
    """Return a step of the limit or of a method."""
    torch.manual_seed(0)
    return create_limit(setting) if name == 'limit' else create_step(*method_variants()[name], setting)


def create_batch(setting: Setting) -> Tuple[torch.Tensor, torch.Tensor]:
    batch = torch.randn(setting.images, 3, setting.size, setting.size, device=setting.device)
    if setting.channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    return batch, torch.randint(1000, (setting.images,), device=setting.device)


def create_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(module, 'sgd', lr=1e-3, momentum=0.9, weight_decay=2e-5)


def autocast(setting: Setting) -> Any:
    device_type = torch.device(setting.device).type
    return torch.autocast(device_type, dtype=torch.bfloat16) if setting.amp else nullcontext()


def create_limit(setting: Setting) -> Callable[[], None]:
    """Return the least that a step with a teacher can do."""
    size = (3, setting.size, setting.size)
    teacher = create_teacher(setting.teacher, size, 1000, pretrained=False, verbose=False).model
    models = [teacher.to(setting.device).eval(), timm.create_model(setting.student).to(setting.device).train()]
    if setting.channels_last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
    optimizer = create_optimizer(models[1])
    if setting.compile:
        models = [torch.compile(model) for model in models]  # type: ignore[misc]
    batch, target = create_batch(setting)

    def _run() -> None:
        with autocast(setting):
            with torch.no_grad():
                models[0](batch)
            loss = torch.nn.functional.cross_entropy(models[1](batch), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _run


def create_step(kd: str, kd_kwargs: Dict[str, Any], setting: Setting) -> Callable[[], None]:
    """Return a step of the task."""
    task = timm_distill.create_distill_task(
        setting.student, setting.teacher, kd, kd_kwargs=kd_kwargs, teacher_pretrained=False,
        sample_labels=torch.arange(SAMPLES) % 1000, input_size=(3, setting.size, setting.size), device=setting.device,
        verbose=False)
    if task.class_means_shape is not None:
        task.set_class_means(torch.randn(task.class_means_shape, device=setting.device))
    if task.needs_target_statistics:
        task.standardize_targets([create_batch(setting)])
    if setting.channels_last:
        task.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(task.trainable_module)
    task.trainable_module.train()
    if setting.compile:
        task.compile()
    batch, target = create_batch(setting)
    if task.needs_indices:
        target = torch.stack([target, torch.arange(len(target), device=target.device)], 1)

    def _run() -> None:
        with autocast(setting):
            loss = task(batch, target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _run


if __name__ == '__main__':
    main()
