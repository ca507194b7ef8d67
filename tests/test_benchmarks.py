"""The benchmarks run as the documentation says, and their scripts really take turns."""
import csv
import sys
from itertools import groupby
from pathlib import Path

import pytest
from kill_runs import start_program

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
    path, log = tmp_path / 'rows.csv', tmp_path / 'log'
    process = start_program([BENCHMARKS / script, *flags, '--device', 'cpu', '--csv', path], log, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return read_rows(path)


def read_rows(path):
    with open(path) as f:
        return {row['variant']: row for row in csv.DictReader(f)}


def test_loop_is_compared_with_its_step_and_its_loader(tmp_path):
    rows = run_benchmark(
        'loop.py', tmp_path, '--teacher', 'test_resnet', '--student', 'test_efficientnet',
        '--size', '32', '--batch-size', '4', '--updates', '2', '--repeats', '1')
    assert list(rows) == ['step', 'loop', 'loop and loader', 'loader alone']
    assert all(float(row['seconds_per_update']) > 0 for row in rows.values())


def test_step_is_compared_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step
    monkeypatch.setattr(step, 'PAIRS', {'small': ('test_resnet', 'test_efficientnet')})
    monkeypatch.setattr(step.logging, 'disable', lambda level: None)  # it is of the whole process
    monkeypatch.setattr(sys, 'argv', [
        'step.py', '--what', 'step', '--images', '2', '--size', '32', '--repeats', '1', '--no-memory', '--device',
        'cpu', '--variants', 'limit', 'kd', 'norm moments', '--csv', str(tmp_path / 'rows.csv')])
    step.main()
    rows = read_rows(tmp_path / 'rows.csv')
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
