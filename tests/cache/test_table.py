"""Rows on disk: kills, damage, several writers, full disks and read-only folders."""
import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from timm_distill.cache import table as table_module
from timm_distill.cache.codecs import HalfCodec
from timm_distill.cache.table import DamagedRowsError, Table
from timm_distill.cache.targets import CachedTargets
from timm_distill.data.views import ViewGrid


def rows_of(slots: Any, row_bytes: int = 20) -> np.ndarray:
    return np.stack([np.random.default_rng(slot).integers(0, 256, row_bytes, dtype=np.uint8) for slot in slots])


def create(tmp_path: Path, **kwargs: Any) -> Table:
    return Table(str(tmp_path / 'rows'), 20, 100, **kwargs)


def assert_holds(table: Table, slots: Any) -> None:
    rows, found = table.read(range(100))
    assert np.flatnonzero(found).tolist() == sorted(slots)
    assert (rows[found] == rows_of(sorted(slots))).all()
    assert table.count() == len(slots)
    assert table.missing().tolist() == [slot for slot in range(100) if slot not in set(slots)]


def test_rows_are_read_in_any_order_and_by_later_processes(tmp_path: Path) -> None:
    table = create(tmp_path)
    for slots in ([5, 3, 99], [0], [50, 49]):
        table.write(slots, rows_of(slots))
    assert_holds(table, [0, 3, 5, 49, 50, 99])
    table.close()
    assert_holds(create(tmp_path, writable=False), [0, 3, 5, 49, 50, 99])
    later = create(tmp_path)
    later.write([1], rows_of([1]))
    assert_holds(later, [0, 1, 3, 5, 49, 50, 99])


def test_a_killed_writer_leaves_what_it_had_written(tmp_path: Path) -> None:
    table = create(tmp_path)
    table.write([1, 2], rows_of([1, 2]))
    os.remove(tmp_path / 'rows' / 'index.bin')  # neither index nor the number of rows came to disk
    path = tmp_path / 'rows' / '000001.rows'
    os.truncate(path, path.stat().st_size - 7)  # and the last row is cut short
    again = create(tmp_path)
    assert_holds(again, [1])
    again.write([2, 3], rows_of([2, 3]))
    assert_holds(again, [1, 2, 3])


def test_an_index_that_knows_more_than_the_shards_misleads_nobody(tmp_path: Path) -> None:
    table = create(tmp_path)
    table.write([1, 2, 3], rows_of([1, 2, 3]))
    table.close()
    path = tmp_path / 'rows' / '000001.rows'
    os.truncate(path, path.stat().st_size - 40)
    assert_holds(create(tmp_path, writable=False), [1])
    os.remove(tmp_path / 'rows' / 'index.json')
    assert create(tmp_path).read([1, 2, 3])[1].tolist() == [True, False, False]
    os.remove(path)
    assert create(tmp_path).count() == 0


def test_two_writers_share_a_table(tmp_path: Path) -> None:
    one, other = create(tmp_path), create(tmp_path)
    one.write([1, 2], rows_of([1, 2]))
    other.write([2, 3], rows_of([2, 3]))
    one.write([4], rows_of([4]))
    assert_holds(other, [1, 2, 3, 4])
    one.close()
    other.close()
    assert_holds(create(tmp_path), [1, 2, 3, 4])


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('at', [3, 130, 145, 165])
def test_a_damaged_shard_is_dropped_with_a_warning_and_filled_again(
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        at: int,
) -> None:
    table = create(tmp_path)
    table.write([1, 2], rows_of([1, 2]))
    table.close()
    table = create(tmp_path)
    table.write([7], rows_of([7]))
    table.close()
    damage(tmp_path / 'rows' / '000001.rows', at)
    table = create(tmp_path)
    rows, found = table.read([1, 2, 7])
    assert found[2] and not found[:2].all() and (rows[found] == rows_of(np.array([1, 2, 7])[found])).all()
    assert_holds(table, [7])
    assert '000001.rows is damaged' in caplog.text
    table.write([1, 2], rows_of([1, 2]))
    assert_holds(table, [1, 2, 7])


def test_damage_in_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    table = create(tmp_path)
    table.write([1, 2], rows_of([1, 2]))
    table.close()
    damage(tmp_path / 'rows' / '000001.rows', 145)
    reader = create(tmp_path, writable=False)
    with pytest.raises(DamagedRowsError, match='verify --drop'):
        reader.read([1])
    assert reader.verify()[1] == [str(tmp_path / 'rows' / '000001.rows')]


def test_a_reader_needs_neither_index_nor_a_folder_that_can_be_written(tmp_path: Path) -> None:
    table = create(tmp_path)
    table.write([1, 2], rows_of([1, 2]))
    table.close()
    before = sorted(os.listdir(tmp_path / 'rows'))
    assert_holds(create(tmp_path, writable=False), [1, 2])
    os.remove(tmp_path / 'rows' / 'index.json')
    assert_holds(create(tmp_path, writable=False), [1, 2])
    assert sorted(os.listdir(tmp_path / 'rows')) == [name for name in before if name != 'index.json']


def test_a_full_disk_leaves_what_was_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = create(tmp_path)
    table.write([1, 2], rows_of([1, 2]))

    def write_half(file: Any, data: bytes) -> None:
        file.write(data[:len(data) // 2 + 3])
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(table_module, '_write_all', write_half)
        with pytest.raises(OSError):
            table.write([3, 4], rows_of([3, 4]))
    assert_holds(table, [1, 2])
    table.write([4, 5], rows_of([4, 5]))
    assert_holds(table, [1, 2, 4, 5])
    assert_holds(create(tmp_path / '.'), [1, 2, 3, 4, 5])  # the row that was whole is found by the next process


def test_few_files_of_a_table_are_open_however_many_shards_it_has(
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table_module, '_SHARD_BYTES', 1)
    table = create(tmp_path)
    for slot in range(100):
        table.write([slot], rows_of([slot]))
    assert len(table.shards()) == 100
    assert_holds(table, range(100))
    assert len(table._shards._files) == 64
    assert_holds(table, range(100))  # those that were closed are opened again


def test_memory_of_what_is_missing_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    def peak(num_views: int) -> float:
        targets = CachedTargets(
            str(tmp_path / str(num_views)), ViewGrid(100_000, num_views), {'logits': HalfCodec('logits', (4,))})
        tracemalloc.start()
        assert targets.count_missing(num_views) == 100_000 * num_views
        assert len(targets.missing(0)) == 100_000
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        targets.close()
        return used

    assert peak(80) < 1.2 * peak(20)


def test_shards_end_at_a_size_and_tables_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, '_SHARD_BYTES', 100)
    one, other = create(tmp_path / 'a'), create(tmp_path / 'b')
    for slot in range(12):
        one.write([slot], rows_of([slot]))
    other.write([3, 50], rows_of([3, 50]))
    assert len(one.shards()) > 1
    assert other.copy_from(one) == 11
    assert_holds(other, [*range(12), 50])
    assert other.verify() == (13, [])
