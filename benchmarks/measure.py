"""Measurements of the benchmarks: variants timed in turns, peak memory, rows as CSV and as a table."""
import csv
import multiprocessing
import os
import random
import statistics
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence
from unittest.mock import patch

import torch

Row = Dict[str, Any]
_MIB = 2 ** 20


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock measures work and not its launch."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def interleave(
        variants: Dict[str, Callable[[], Any]],
        repeats: int,
        device: torch.device,
        warmup: int = 1,
) -> Dict[str, List[float]]:
    """Return the durations of each variant in seconds, run in turns, after `warmup` turns that do not count.

    The order changes from turn to turn: a run finds the heap and the caches as its predecessor left them.
    """
    names = list(variants)
    seconds: Dict[str, List[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        random.Random(turn).shuffle(names)
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            variants[name]()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over turns of the quotient within a turn."""
    return statistics.median(v / r for v, r in zip(values, reference))


def spread(values: Sequence[float], reference: Sequence[float]) -> str:
    """Return the quartiles of the quotient within a turn."""
    ratios = [v / r for v, r in zip(values, reference)]
    if len(ratios) < 2:
        return ''
    low, _, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return f'{low:.3f}-{high:.3f}'


class Memory(NamedTuple):
    """MiB of a process: before it built anything, built, and at the peak of running."""
    start: float
    built: float
    peak: float


def peak_memory(
        create: Callable[..., Callable[[], Any]],
        args: Sequence[Any],
        device: torch.device,
        small: Optional[Sequence[Any]] = None,
) -> Memory:
    """Measure two runs of what `create(*args)` returns; the first one makes optimizer states.

    Resident memory on the CPU, in a process of its own, allocated memory on CUDA. The process gives large blocks back
    when they are freed: what holes an ever growing heap has depends on what ran before.

    Args:
        create: Builds a callable.
        args: Its arguments.
        device: What is measured.
        small: Arguments to build and run something small with beforehand, since libraries load parts at the first use.
    """
    if device.type == 'cuda':
        return _allocated(create, args, small)
    returned = {'MALLOC_MMAP_THRESHOLD_': str(_MIB)}  # glibc's own limit rises to 32 MiB while a process runs
    with patch.dict(os.environ, returned), multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(_resident, (create, args, small))


def _allocated(create: Callable[..., Callable[[], Any]], args: Sequence[Any], small: Optional[Sequence[Any]]) -> Memory:
    if small is not None:
        create(*small)()
    start = torch.cuda.memory_allocated()
    run = create(*args)
    built = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    run()
    return Memory(start / _MIB, built / _MIB, torch.cuda.max_memory_allocated() / _MIB)


def _resident(create: Callable[..., Callable[[], Any]], args: Sequence[Any], small: Optional[Sequence[Any]]) -> Memory:
    if small is not None:
        create(*small)()
    start = resident('VmRSS')
    run = create(*args)
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # sets the high-water mark to what is resident now
    built = resident('VmRSS')
    run()
    run()
    return Memory(start, built, resident('VmHWM'))


def resident(entry: str) -> float:
    """Return an entry of this process' status in MiB: 'VmRSS' is resident now, 'VmHWM' its peak."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(entry))


def write_csv(path: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write the rows; a column that a row lacks stays empty."""
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=columns, restval='')
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(columns: Sequence[str], rows: Iterable[Row], titles: Optional[Dict[str, str]] = None) -> str:
    """Return the rows as a table."""
    titles = titles or {}
    lines = [' | '.join(titles.get(c, c) for c in columns), ' | '.join('---' for _ in columns)]
    lines += [' | '.join(str(row.get(c, '')) for c in columns) for row in rows]
    return '\n'.join(f'| {line} |' for line in lines)
