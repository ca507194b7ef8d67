"""The benchmarks run as the documentation says, and their scripts really take turns."""
import csv
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'
SCRIPT = '''
import sys, time
for update in range(10000):
    time.sleep(0.01)
    with open(sys.argv[2], 'a') as f:
        f.write(sys.argv[1] + '\\n')
    print(f'Train: 0 [{update:>4d}/10000 (  1%)]', flush=True)
'''


def run_benchmark(script, tmp_path, *flags):
    path = tmp_path / 'rows.csv'
    env = {**os.environ, 'PYTHONPATH': str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / script), *flags, '--device', 'cpu', '--csv', str(path)]
    subprocess.run(command, check=True, env=env, capture_output=True, timeout=500)
    with open(path) as f:
        return {row['variant']: row for row in csv.DictReader(f)}


def test_loop_is_compared_with_its_step_and_its_loader(tmp_path):
    rows = run_benchmark(
        'loop.py', tmp_path, '--teacher', 'test_resnet', '--student', 'test_efficientnet',
        '--size', '32', '--batch-size', '4', '--updates', '2', '--repeats', '1')
    assert list(rows) == ['step', 'loop', 'loop and loader', 'loader alone']
    assert all(float(row['seconds_per_update']) > 0 for row in rows.values())


def test_step_is_compared_with_the_limit(tmp_path):
    rows = run_benchmark(
        'step.py', tmp_path, '--what', 'step', '--pairs', 'resnet34 -> resnet18', '--images', '2',
        '--size', '32', '--repeats', '1', '--no-memory', '--variants', 'limit', 'kd', 'norm moments')
    assert list(rows) == ['limit', 'kd', 'norm moments']
    assert all(float(row['ratio']) > 0.1 for row in rows.values())


@pytest.mark.skipif(sys.platform == 'win32', reason='needs signals that stop a process')
def test_scripts_take_turns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from turns import take_turns
    script, log = tmp_path / 'script.py', tmp_path / 'log'
    script.write_text(SCRIPT)
    seconds = take_turns({name: [str(script), name, str(log)] for name in 'ab'}, {}, turns=3, updates=5, warmup=5)
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert min(min(values) for values in seconds.values()) >= 0.007  # one sleep of five may go on while stopped
    names = log.read_text().split()
    assert [name for name, _ in groupby(names)][:8] == list('abababab')  # start, or start and warmup, and the turns
    assert min(names.count(name) for name in 'ab') >= 1 + 5 + 3 * 5
