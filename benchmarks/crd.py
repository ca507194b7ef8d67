#!/usr/bin/env python
"""Measure CRD's loss and gradient in both forms: rows of the samples that were drawn, and products with all, counted.

    python benchmarks/crd.py --samples 9469 50000 130000

Widths are MobileNetV3's and EfficientNet's, 16,384 negatives. The forms take turns in one process; times are medians.
"""
import argparse
import statistics
from functools import partial
from typing import Any, Dict

import torch
from measure import interleave, markdown_table, median_ratio, spread

from timm_distill import create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec
from timm_distill.methods import crd

_FORMS = {'rows': 0, 'counts': 2 ** 62}
_WIDTHS = (1024, 1280)


def main() -> None:
    args = parse_args()
    rows = [measure(samples, args) for samples in args.samples]
    print(markdown_table(['samples', 'rows (s)', 'counts (s)', 'rows / counts', 'quartiles'], rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, nargs='+', default=[9469, 50000, 130000], help='training images')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    return parser.parse_args()


def measure(samples: int, args: argparse.Namespace) -> Dict[str, Any]:
    """Return a row of the table."""
    device = torch.device(args.device)
    step = create_step(samples, args.batch_size, device)
    seconds = interleave({form: partial(step, factor) for form, factor in _FORMS.items()}, args.repeats, device)
    medians = {f'{form} (s)': f'{statistics.median(values):.3f}' for form, values in seconds.items()}
    both = seconds['rows'], seconds['counts']
    return {'samples': samples, **medians, 'rows / counts': f'{median_ratio(*both):.1f}', 'quartiles': spread(*both)}


def create_step(samples: int, batch_size: int, device: torch.device) -> Any:
    """Return a forward and backward pass of the method in the form that its argument chooses."""
    specs = [FeatureSpec(10, (width, 3, 3), width, (), (3, 96, 96)) for width in _WIDTHS]
    method = create_method('crd')
    method.build(PairSpec(*specs, samples, torch.arange(samples) % 10))
    method.to(device)
    indices = torch.randperm(samples, device=device)[:batch_size]
    student, teacher = (torch.randn(batch_size, width, device=device) for width in _WIDTHS)
    target = torch.zeros(batch_size, device=device)

    def step(counted: int) -> None:
        crd._COUNTED = counted
        own = Features(pre_logits=student.clone().requires_grad_())
        method(own, Features(pre_logits=teacher, indices=indices), target)['crd_loss'].backward()

    return step


if __name__ == '__main__':
    main()
