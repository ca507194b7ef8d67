#!/usr/bin/env python
"""Study: students trained in many settings over several seeds, each run the ordinary script in its own process.

    python benchmarks/study.py benchmarks/plans/imagenette.yaml --data-root data              # runs what is missing
    python benchmarks/study.py benchmarks/plans/imagenette.yaml --data-root data --estimate   # how long that takes
    python benchmarks/study.py benchmarks/plans/imagenette.yaml --table                       # docs/results.md

It may be stopped at any moment and started again: runs resume, and a run whose row is in the CSV is not run again.
Top-1 and calibration are of the weights after the last epoch: no epoch is chosen on the validation images.
"""
import argparse
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
from study_data import check_data, link_part
from study_measure import measure_student, probe_student
from study_parts import REPO_DIR, Plan, Run
from study_plan import read_plan
from study_rows import Results, commit_id
from turns import take_turns

from timm_distill import UsageError, __version__

_GROUP = 6  # scripts that are timed in turns at once; stopped ones keep their memory
_TURNS, _UPDATES = 3, 4  # of each script, and training steps in one
_EVAL_SHARE = 0.35  # forward of an image over forward and backward, of the student alone


class Study:
    """Runs of a plan.

    Args:
        plan: What to run.
        output: Folder of the runs.
        results: Rows that there are, and where new ones go.
        jobs: Runs at a time; they share the cores.
    """

    def __init__(self, plan: Plan, output: str, results: Results, jobs: int):
        self.plan = plan
        self.output = output
        self.results = results
        self.jobs = jobs
        self.failed: List[str] = []
        self._processes: List[subprocess.Popen] = []
        self._stopping = threading.Event()

    def run(self) -> int:
        """Run what has no row yet; return the exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        todo = [run for run in self.plan.runs() if not self.results.has(run)]
        print(f'{self.plan.name}: {len(self.plan.runs()) - len(todo)} of {len(self.plan.runs())} runs are done.')
        for name in self.plan.teachers_of(todo):
            self._train_teacher(name)
        for depth in sorted({self.plan.depth(run.setting) for run in todo}):
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(self._run_one, (run for run in todo if self.plan.depth(run.setting) == depth)))
        for name in self.failed:
            print(f'failed: {name}, see {os.path.join(self.output, name + ".log")}', file=sys.stderr)
        return 1 if self.failed else 75 if self._stopping.is_set() else 0

    def _stop(self, number: int, frame: Any) -> None:
        """Let the runs save their state and end."""
        self._stopping.set()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def _train_teacher(self, name: str) -> None:
        teacher = self.plan.teachers[name]
        if self._stopping.is_set() or not teacher.trained or self._has_teacher(name):
            return
        seconds = self._start(f'teacher-{name}', teacher.command(self.output))
        if seconds is not None:
            top1, error = measure_student(teacher.checkpoint, self.plan.data_dir)
            self.results.add_teacher(name, teacher.model, top1, error, shlex.join(teacher.command(self.output)))
            open(self._mark(name), 'w').close()

    def _mark(self, teacher: str) -> str:
        """Return the file that says that a teacher is trained: its checkpoint exists from the first epoch on."""
        return os.path.join(self.output, f'teacher-{teacher}.done')

    def _has_teacher(self, name: str) -> bool:
        teacher = self.plan.teachers[name]
        return os.path.exists(teacher.checkpoint) and (not teacher.trained or os.path.exists(self._mark(name)))

    def _run_one(self, run: Run) -> None:
        if self._stopping.is_set() or run.teacher and not self._has_teacher(run.teacher):
            return
        if run.start and not self._can_start(run):
            return
        if run.labels != 1:
            link_part(self.plan.data_dir, run.labels, run.seed, run.data_dir(self.output))
        seconds = self._start(run.name, run.command(self.output))
        if seconds is not None:
            self.results.add(self._measure(run, seconds))

    def _can_start(self, run: Run) -> bool:
        """Whether the student that a run starts from is there."""
        if os.path.exists(os.path.join(self.output, run.start_name, 'hub', 'model.safetensors')):
            return True
        print(f'{run.name}: {run.start_name}, from which it starts, has not been run', file=sys.stderr)
        return False

    def _start(self, name: str, command: Sequence[str]) -> Optional[float]:
        """Run a script to its end; return its seconds, those of earlier starts included, None where it has none."""
        os.makedirs(self.output, exist_ok=True)
        clock = os.path.join(self.output, name + '.seconds')
        before = float(open(clock).read()) if os.path.exists(clock) else 0.
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        start = time.monotonic()
        with open(os.path.join(self.output, name + '.log'), 'a') as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPO_DIR, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', threads)})
            self._processes.append(process)
            if self._stopping.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
        seconds = before + time.monotonic() - start
        with open(clock, 'w') as f:
            f.write(f'{seconds:.1f}')
        if code not in (0, 75, 130, -signal.SIGTERM):
            self.failed.append(name)
        if code == 0:
            print(f'{name}: done in {seconds:.0f} s', flush=True)
        return seconds if code == 0 else None

    def _measure(self, run: Run, seconds: float) -> Dict[str, Any]:
        folder = os.path.join(self.output, run.name)
        rows = self.results.read_summary(os.path.join(folder, 'summary.csv'))
        metric = 'eval_top1' if run.classifies else 'eval_knn'
        curve = [float(row[metric]) for row in rows if row.get(metric)]
        checkpoint = os.path.join(folder, 'last.pth.tar')
        top1 = error = None
        if run.classifies:
            top1, error = measure_student(checkpoint, self.plan.data_dir)
            if abs(top1 - curve[-1]) > 0.06:
                print(f'{run.name}: the student has {top1:.2f}, its log says {curve[-1]:.2f}', file=sys.stderr)
        probes = {}
        if self.plan.probe or not run.classifies:
            probes = probe_student(run.model, checkpoint, self.plan.data_dir, os.path.join(folder, 'probes.json'))
        return {
            'student': run.student,
            'setting': run.setting,
            'seed': run.seed,
            'top1': '' if top1 is None else f'{top1:.3f}',
            'best_top1': '' if top1 is None else f'{max(curve):.3f}',
            'calibration_error': '' if error is None else f'{error:.4f}',
            'seconds': f'{seconds:.0f}',
            'epochs': len(rows),
            'curve': ' '.join(f'{value:.2f}' for value in curve),
            'torch': torch.__version__,
            'timm': timm.__version__,
            'timm_distill': __version__,
            'commit': commit_id(),
            'command': run.spelled(self.output),
            **{name: f'{float(probes[name]):.3f}' if name in probes else '' for name in ('knn', 'linear_probe')},
        }

    def estimate(self) -> Dict[str, Dict[str, float]]:
        """Time some steps of every setting, in turns, and print how long the plan takes; return the seconds."""
        seconds: Dict[str, Dict[str, float]] = {}
        for student in self.plan.students:
            names = [name for name in self.plan.settings if student in self.plan.settings[name].students]
            others = [name for name in names if name != 'alone']
            groups = [others[i:i + _GROUP - 1] for i in range(0, len(others), _GROUP - 1)] or [[]]
            for group in groups:
                seconds.setdefault(student, {}).update(self._time_settings(student, ['alone', *group]))
        self._print_estimate(seconds)
        return seconds

    def _time_settings(self, student: str, names: Sequence[str]) -> Dict[str, float]:
        batches = self.plan.train_images // self.plan.run(student, names[0], self.plan.seeds[0]).batch_size
        updates = min(_UPDATES, (batches - 2) // (_TURNS + 1))
        if updates < 1:
            raise UsageError(f'{self.plan.name} has {batches} batches in an epoch, too few to time steps of it.')
        flags = ['--log-interval', str(updates), '--epochs', '1', '--warmup-epochs', '0', '--no-teacher-eval']
        commands = {}
        for name in names:
            run = self.plan.run(student, name, self.plan.seeds[0])
            untrained = bool(run.teacher) and not self._has_teacher(run.teacher)
            command = run.command(os.path.join(self.output, 'estimate'), pretend_teacher=untrained, cached=False)
            commands[name] = [*without(command, '--resume', '--recovery-interval', '--experiment'), *flags]
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        env = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', threads)}
        durations = take_turns(commands, env, _TURNS, updates, warmup=updates)
        alone = statistics.median(durations['alone'])
        rows = {name: statistics.median(durations[name]) for name in names}
        for name, value in rows.items():
            self.results.add_cost(student, name, value, value / alone)
        return rows

    def _print_estimate(self, seconds: Dict[str, Dict[str, float]]) -> None:
        left = total = 0.
        for run in self.plan.runs():
            batches = self.plan.train_images // run.batch_size
            per_image = seconds[run.student]['alone'] / run.batch_size * _EVAL_SHARE
            duration = run.epochs * (
                batches * seconds[run.student][run.setting] + self.plan.validation_images * per_image)
            total += duration
            left += 0 if self.results.has(run) else duration
        for student, of_student in seconds.items():
            for name, value in of_student.items():
                print(f'{student:28} {name:28} {value:7.3f} s a step, {value / of_student["alone"]:.2f} of alone')
        print(
            f'{len(self.plan.runs())} runs, {total / self.jobs / 3600:.1f} hours with --jobs {self.jobs}; '
            f'{left / self.jobs / 3600:.1f} hours are left. Trained teachers come on top.')


def without(command: Sequence[str], *flags: str) -> List[str]:
    """Return a command without some flags that take one value."""
    kept = [i for i, part in enumerate(command) if part not in flags and (i == 0 or command[i - 1] not in flags)]
    return [command[i] for i in kept]


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('plan', metavar='PLAN.yaml', help='what to run')
    parser.add_argument('--data-root', default='data', help='folder of the data sets and weights that plans name')
    parser.add_argument('--output', default='output/study', help='folder of the runs')
    parser.add_argument('--results', default='', help='CSV of the rows (default: benchmarks/results/PLAN.csv)')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; they share the cores')
    parser.add_argument('--only', default='', metavar='REGEX', help='runs whose name STUDENT-SETTING-SEED matches')
    parser.add_argument('--list', action='store_true', help='print the runs with their commands, and which are done')
    parser.add_argument('--estimate', action='store_true', help='time some steps of each setting; start no run')
    parser.add_argument('--table', action='store_true', help='write docs/results.md from the rows; start no run')
    parser.add_argument('--docs', default=os.path.join(REPO_DIR, 'docs'), help='where --table writes')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = create_parser().parse_args(argv)
    if args.jobs < 1:
        raise UsageError(f'--jobs {args.jobs} must be at least 1.')
    plan = read_plan(args.plan, args.data_root, args.output)
    path = args.results or os.path.join(REPO_DIR, 'benchmarks', 'results', plan.name + '.csv')
    results = Results(path)
    if args.table:
        from study_table import write_results  # needs scipy and matplotlib
        print('\n'.join(write_results(args.plan, path, args.docs)))
        return 0
    output = os.path.join(args.output, plan.name)
    if args.only:
        plan.keep(lambda run: re.search(args.only, run.name) is not None)
    results.check(plan.runs(), output)
    if args.list:
        for run in plan.runs():
            print(f'{"done" if results.has(run) else "    "} {run.name}: {run.spelled(output)}')
        return 0
    check_data(plan)
    study = Study(plan, output, results, args.jobs)
    if args.estimate:
        study.estimate()
        return 0
    return study.run()


if __name__ == '__main__':
    try:
        sys.exit(main())
    except UsageError as e:
        print(f'study.py: error: {e}', file=sys.stderr)
        sys.exit(2)
