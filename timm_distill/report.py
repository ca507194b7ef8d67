"""The report of a run: one HTML file that needs nothing else, and the same figures as one PNG."""
import base64
import html
import importlib.util
import io
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .analysis import Predictions, agreement, calibrate

_STYLE = '''
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
.sub { color: #666; margin-top: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #ddd; border-radius: 8px; padding: .6rem 1rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; } .tile span { color: #666; font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1.2rem; }
section { border: 1px solid #e4e4e4; border-radius: 8px; padding: 1rem; overflow-x: auto; }
section img { max-width: 100%; height: auto; display: block; margin: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; }
section.wide { grid-column: 1 / -1; margin-top: 1.2rem; }
@media (max-width: 520px) { .figures { grid-template-columns: 1fr; } }
'''
_DPI = 110


@dataclass
class ReportData:
    """What a report shows.

    Attributes:
        title: Headline.
        rows: Rows of `summary.csv`.
        student: Predictions of the released student on the validation set.
        teacher: Predictions of the teacher, None without one on the same classes.
        class_names: Name of every class.
        times: Seconds of a training step by part: 'teacher', 'student', 'data'.
        facts: What else there is to know, in tables by heading.
    """
    title: str
    rows: List[Dict[str, float]]
    student: Optional[Predictions] = None
    teacher: Optional[Predictions] = None
    class_names: Sequence[str] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def can_draw() -> bool:
    """Whether matplotlib is installed (the extra `report`)."""
    return importlib.util.find_spec('matplotlib') is not None


def write_report(data: ReportData, folder: str) -> List[str]:
    """Write `report.html` and `report.png`.

    Returns:
        Their paths.
    """
    from .report_figures import draw_figures  # matplotlib is an extra
    figures = draw_figures(data.rows, data.student, data.teacher, data.class_names, data.times)
    images = {title: _png(figure) for title, figure in figures.items()}
    paths = [os.path.join(folder, name) for name in ('report.html', 'report.png')]
    with open(paths[0], 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(render_html(data, images))
    with open(paths[1], 'wb') as f:
        f.write(_tile(images))
    return paths


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=_DPI)
    return buffer.getvalue()


def _tile(images: Mapping[str, bytes]) -> bytes:
    """Return all figures on one page, two in a row."""
    from PIL import Image
    pages = [Image.open(io.BytesIO(data)).convert('RGB') for data in images.values()]
    rows = [pages[i:i + 2] for i in range(0, len(pages), 2)]
    width = max(sum(page.width for page in row) for row in rows)
    sheet = Image.new('RGB', (width, sum(max(page.height for page in row) for row in rows)), 'white')
    top = 0
    for row in rows:
        left = 0
        for page in row:
            sheet.paste(page, (left, top))
            left += page.width
        top += max(page.height for page in row)
    buffer = io.BytesIO()
    sheet.save(buffer, format='PNG')
    return buffer.getvalue()


def render_html(data: ReportData, images: Mapping[str, bytes]) -> str:
    """Return the report as a page; the figures are in it as they are."""
    tiles = ''.join(f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
                    for name, value in headline(data).items())
    figures = ''.join(
        f'<section><h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}"></section>' for title, image in images.items())
    tables = ''.join(_facts_table(heading, facts) for heading, facts in data.facts.items() if facts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(data.title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body>'
        f'<h1>{html.escape(data.title)}</h1><p class="sub">timm_distill report</p><div class="tiles">{tiles}</div>\n'
        f'<div class="figures">{figures}{_rows_table(data.rows)}{tables}</div>\n</body></html>\n')


def headline(data: ReportData) -> Dict[str, str]:
    """Return the few numbers that matter most, by what they are."""
    numbers: Dict[str, str] = {}
    if data.student is not None:
        numbers['student top-1, %'] = f'{data.student.top1:.2f}'
    if data.teacher is not None:
        numbers['teacher top-1, %'] = f'{data.teacher.top1:.2f}'
    if data.student is not None and data.teacher is not None:
        numbers['same prediction, %'] = f'{agreement(data.student.classes, data.teacher.classes):.2f}'
    if data.student is not None:
        numbers['calibration error, %'] = f'{100 * calibrate(data.student).error:.1f}'
    numbers['epochs'] = str(len(data.rows))
    return numbers


def _facts_table(heading: str, facts: Mapping[str, Any]) -> str:
    rows = ''.join(f'<tr><td>{html.escape(str(name))}</td><td class="text">{html.escape(str(value))}</td></tr>'
                   for name, value in facts.items() if value not in (None, '', {}, []))
    return f'<section><h2>{html.escape(heading.capitalize())}</h2><table>{rows}</table></section>' if rows else ''


def _rows_table(rows: Sequence[Mapping[str, float]]) -> str:
    if not rows:
        return ''
    names = list(rows[0])
    head = ''.join(f'<th>{html.escape(name.replace("_", " "))}</th>' for name in names)
    body = ''.join('<tr>' + ''.join(f'<td>{row[name]:.6g}</td>' if name in row else '<td></td>' for name in names)
                   + '</tr>' for row in rows)
    return f'<section class="wide"><h2>Epochs</h2><table><tr>{head}</tr>{body}</table></section>'
