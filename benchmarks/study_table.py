"""Tables and figures of studies: docs/results.md from the committed rows.

Differences are paired by seed: the same seed gives two settings the same first weights and order of images. Their
interval is Student's, 95 %.
"""
import glob
import os
import statistics
from typing import Any, Dict, List, Optional, Sequence, Tuple

from matplotlib.figure import Figure
from scipy import stats
from study_parts import Plan
from study_plan import read_plan
from study_rows import Results

Values = Dict[str, float]  # by seed
_METRICS = ('top1', 'knn', 'linear_probe')
_METRIC_NAMES = {'knn': 'k-NN', 'linear_probe': 'linear probe'}


def write_results(plan_path: str, results_path: str, docs: str) -> List[str]:
    """Write results.md and a figure for each plan; return the paths.

    Args:
        plan_path: Plan whose rows are in `results_path`; other plans of its folder have theirs in results/PLAN.csv.
        results_path: CSV of that plan.
        docs: Folder to write into.
    """
    paths = {plan_path: results_path}
    results_dir = os.path.dirname(os.path.abspath(results_path))
    for other in sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(plan_path)), '*.yaml'))):
        rows = os.path.join(results_dir, os.path.splitext(os.path.basename(other))[0] + '.csv')
        if not os.path.samefile(other, plan_path) and os.path.exists(rows):
            paths[other] = rows
    os.makedirs(docs, exist_ok=True)
    sections, written = [], []
    for path in sorted(paths, key=os.path.basename):
        plan, results = read_plan(path), Results(paths[path])
        figure = os.path.join(docs, f'results-{plan.name}.png')
        if any(row['top1'] for row in results.rows):
            draw(plan, results).savefig(figure, dpi=100)
            written.append(figure)
        sections.append(describe(plan, results))
    target = os.path.join(docs, 'results.md')
    with open(target, 'w', encoding='utf-8') as f:
        f.write(_HEAD + '\n' + '\n'.join(sections))
    return [target, *written]


_HEAD = '''# Results

Written by `python benchmarks/study.py benchmarks/plans/PLAN.yaml --table` from the rows in `benchmarks/results/`,
each of which holds the command of its run. Top-1 and calibration error are those of the weights after the last epoch,
on the validation images; nothing was chosen on them. *k-NN* and *linear probe* are the top-1 of frozen features, learnt
from all training images with their labels. *against X* is the mean difference to X with the same seed, in
points, with Student's 95 % interval over the seeds: where that holds 0, these seeds do not show a difference. *step* is
the time of a training step over that of the student alone, measured in turns.
'''


def values_of(results: Results, student: str, setting: str, column: str = 'top1') -> Values:
    """Return a column by seed."""
    return {
        row['seed']: float(row[column]) for row in results.rows
        if (row['student'], row['setting']) == (student, setting) and row[column]}


def paired_difference(values: Values, baseline: Values) -> Optional[Tuple[float, float]]:
    """Return mean difference and half of its 95 % interval, over the seeds that both have; None without any."""
    seeds = sorted(set(values) & set(baseline))
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    if len(seeds) == 1:
        return differences[0], float('nan')
    spread = statistics.stdev(differences) / len(seeds) ** 0.5
    return statistics.fmean(differences), float(stats.t.ppf(0.975, len(seeds) - 1)) * spread


def describe(plan: Plan, results: Results) -> str:
    """Return the section of a plan, with what of it has not been run."""
    runs = plan.runs()
    done = sum(results.has(run) for run in runs)
    lines = [f'\n## {plan.name}\n', plan.about.replace('\n\n', '\n\n') + '\n']
    if done < len(runs):
        lines.append(f'**{done} of the {len(runs)} runs of this plan have been made**; the table shows those.\n')
    epochs = sorted({row['epochs'] for row in results.rows}, key=int)
    versions = sorted({f'torch {row["torch"]}, timm {row["timm"]}' for row in results.rows})
    for row in results.teachers:
        top1 = f'top-1 {float(row["top1"]):.2f}'
        lines.append(f'Teacher {row["teacher"]} ({row["model"]}, {plan.classes} classes): {top1}.\n')
    if results.rows:
        lines.append(f'{"/".join(epochs)} epochs; {"; ".join(versions)}.\n')
    if any(row['top1'] for row in results.rows):
        lines.append(f'![accuracy against {plan.baselines[0]}](results-{plan.name}.png)\n')
    for student in plan.students:
        lines += _table(plan, results, student)
    return '\n'.join(lines)


def _table(plan: Plan, results: Results, student: str) -> List[str]:
    names = [name for name in plan.settings if any(values_of(results, student, name, x) for x in _METRICS)]
    if not names:
        return []
    probes = [x for x in _METRICS[1:] if any(values_of(results, student, name, x) for name in names)]
    costs = {row['setting']: row['ratio_to_alone'] for row in results.costs if row['student'] == student}
    baselines = [name for name in plan.baselines if name in names]
    head = [
        'setting', 'seeds', 'top-1', *(f'against {name}' for name in baselines), 'calibration error',
        *(_METRIC_NAMES[x] for x in probes), 'step']
    lines = [f'### {student}\n', '| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for name in names:
        columns = {x: values_of(results, student, name, x) for x in (*_METRICS, 'calibration_error')}
        wanted, made = len(plan.settings[name].seeds), max(map(len, columns.values()))
        seeds = str(wanted) if made == wanted else f'{made} of {wanted}'
        differences = [
            _difference(columns['top1'], values_of(results, student, other), name == other) for other in baselines]
        errors = columns['calibration_error'].values()
        lines.append('| ' + ' | '.join([
            name, seeds, _mean(columns['top1']), *differences, f'{statistics.fmean(errors):.3f}' if errors else '',
            *(_mean(columns[x]) for x in probes), costs.get(name, '')]) + ' |')
    return [*lines, '']


def _mean(values: Values) -> str:
    if not values:
        return ''
    mean = f'{statistics.fmean(values.values()):.2f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values.values()):.2f}'


def _difference(values: Values, baseline: Values, itself: bool) -> str:
    difference = None if itself else paired_difference(values, baseline)
    if difference is None:
        return ''
    mean, half = difference
    return f'{mean:+.2f}' if half != half else f'{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]'


def draw(plan: Plan, results: Results) -> Figure:
    """Draw differences to the first baseline with their intervals, and that baseline's curve over epochs."""
    students = [s for s in plan.students if any(values_of(results, s, name) for name in plan.settings)]
    most = max(sum(bool(values_of(results, s, name)) for name in plan.settings) for s in students)
    figure = Figure(figsize=(10, len(students) * (1.2 + 0.28 * most)), layout='constrained')
    axes = figure.subplots(len(students), 2, squeeze=False, width_ratios=(2, 1))
    for (left, right), student in zip(axes, students):
        _draw_differences(left, plan, results, student)
        _draw_curve(right, plan, results, student)
    return figure


def _draw_differences(axis: Any, plan: Plan, results: Results, student: str) -> None:
    baseline = values_of(results, student, plan.baselines[0])
    points = {}
    for name in plan.settings:
        difference = paired_difference(values_of(results, student, name), baseline)
        if difference is not None and name != plan.baselines[0]:
            points[name] = difference
    for i, (mean, half) in enumerate(points.values()):
        axis.errorbar(mean, i, xerr=None if half != half else half, fmt='o', color='C0', capsize=3)
    axis.set_yticks(range(len(points)), list(points))
    axis.invert_yaxis()
    axis.axvline(0, color='0.6', linewidth=1)
    axis.set_title(f'{student}: top-1 against {plan.baselines[0]}, points, 95 %', fontsize=9)


def _draw_curve(axis: Any, plan: Plan, results: Results, student: str) -> None:
    name = plan.baselines[0]
    for row in results.rows:
        if (row['student'], row['setting']) == (student, name):
            curve: Sequence[float] = [float(value) for value in row['curve'].split()]
            axis.plot(range(1, len(curve) + 1), curve, color='C1', linewidth=1)
    axis.set_title(f'{name}: top-1 over epochs', fontsize=9)
