"""summary.csv, also as somebody else left it."""
from pathlib import Path

import pytest

from timm_distill.report.trackers import Summary, read_summary

ROWS = 'epoch,train_loss,eval_top1,lr\n0,2.5,10.0,0.1\n1,1.5,20.0,0.05\n2,1.0,30.0,0.01\n'


def continued(path: Path, start_epoch: int = 2) -> str:
    Summary(str(path), start_epoch).add({'epoch': 2, 'train_loss': 0.5, 'eval_top1': 40., 'lr': 0.02})
    return path.read_text()


def test_rows_of_a_stopped_run_are_taken_over_as_they_are(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text(ROWS)
    assert continued(path).splitlines() == [*ROWS.splitlines()[:3], '2,0.5,40.0,0.02']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('delimiter, point', [(',', '.'), (';', ','), (';', '.'), ('\t', '.')])
@pytest.mark.parametrize('newline', ['\n', '\r\n'])
def test_file_that_a_spreadsheet_saved_is_read(tmp_path, caplog, encoding, delimiter, point, newline):
    path = tmp_path / 'summary.csv'
    text = ROWS.replace(',', delimiter).replace('.', point).replace('\n', newline)
    path.write_bytes(text.encode(encoding))
    assert [row['train_loss'] for row in read_summary(str(path))] == [2.5, 1.5, 1.]
    assert [line.split(',') for line in continued(path).splitlines()][1:] == [
        ['0', '2.5', '10.0', '0.1'], ['1', '1.5', '20.0', '0.05'], ['2', '0.5', '40.0', '0.02']]
    assert not caplog.records and not (tmp_path / 'summary.csv.edited').exists()


def test_columns_that_were_added_removed_or_moved_and_rows_that_were_sorted_are_no_loss(tmp_path, caplog):
    path = tmp_path / 'summary.csv'
    path.write_text('lr,epoch,note\n0.05,1.0,good\n0.1,0,\n')
    assert continued(path).splitlines() == [
        'lr,epoch,note,train_loss,eval_top1', '0.1,0,,,', '0.05,1,good,,', '0.02,2,,0.5,40.0']
    assert not caplog.records
    assert read_summary(str(path))[1] == {'lr': 0.05, 'epoch': 1.}


@pytest.mark.parametrize('content, reason, rows', [
    (ROWS + 'mean,1.7,20.0,\n', 'line 5 is not the row of an epoch', 3),
    (ROWS.replace('1,1.5,20.0,0.05', '1,1.5,20.0,0.05,oops'), 'line 3', 2),
    (ROWS.replace('epoch', 'Epoche'), 'no column "epoch"', 1),
    (b'\x89PNG\r\n\x00\xff', 'cannot be read', 1),
    ('\0\0\0', '', 1),
], ids=['sum', 'comma', 'renamed', 'binary', 'zeros'])
def test_what_cannot_be_read_is_named_and_kept_beside_and_the_run_goes_on(tmp_path, caplog, content, reason, rows):
    path = tmp_path / 'summary.csv'
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
    assert len(continued(path).splitlines()) == rows + 1
    assert reason in caplog.text and 'summary.csv.edited' in caplog.text
    assert (tmp_path / 'summary.csv.edited').read_bytes() == data


def test_empty_file_and_a_folder_in_its_place_do_not_stop_a_run(tmp_path, caplog):
    path = tmp_path / 'summary.csv'
    path.write_text('')
    assert len(continued(path).splitlines()) == 2
    assert read_summary(str(path))[0]['epoch'] == 2.
    path.unlink()
    path.mkdir()
    Summary(str(path), 2).add({'epoch': 2})
    assert 'cannot be read' in caplog.text and 'could not be written' in caplog.text
