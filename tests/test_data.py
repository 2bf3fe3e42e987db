"What foundation/10_data cannot show: names that look like numbers, files that change under a split, a copy that is stopped."
import h5py
import numpy as np
import pandas as pd
import pytest

from pcam_tp import data
from pcam_tp.data import cut, open_split, split_id, write_split
from pcam_tp.release import SPLITS, raw_file


def raw(folder, n=12, value=1, slides=None, splits=SPLITS, seed=0):
    "Raw files of three classes, 8×8 pixels."
    folder.mkdir()
    for s in splits:
        with h5py.File(raw_file(folder, s, 'x'), 'w') as f:
            f['x'] = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), 'uint8')
        with h5py.File(raw_file(folder, s, 'y'), 'w') as f: f['y'] = (np.arange(n) % 3).astype('uint8').reshape(-1, 1, 1, 1)
        with h5py.File(raw_file(folder, s, 'mask'), 'w') as f: f['mask'] = np.zeros((n, 8, 8, 1), bool)
        if slides: raw_file(folder, s, 'meta').write_text('\n'.join(['wsi,file', *(f'{slides[i % len(slides)]},{i:03}' for i in range(n))]) + '\n')
    (folder/'classes.txt').write_text('u\nv\nw\n')
    return folder


@pytest.mark.parametrize('names', [('1.1', '1.10'), ('01', '1'), ('NA', 'nan', 'None', 'null', 'B'), ('1e3', '1000'), ('True', 'true')])
def test_slides_are_names(tmp_path, names):
    "Neither numbers nor gaps: what a table calls its slides and files is taken by the letter, also from a copy."
    split = open_split('train', raw(tmp_path/'a', slides=names))
    assert split.slides.tolist() == [names[i % len(names)] for i in range(12)] and split.meta.file.tolist()[:2] == ['000', '001']
    parts = cut(split, (6, 6))
    assert not set(parts[0].slides) & set(parts[1].slides)
    write_split(split, tmp_path/'b')
    assert open_split('train', tmp_path/'b').slides.tolist() == split.slides.tolist()


def test_slides_that_are_missing(tmp_path, capsys):
    "One empty name: the slides are unknown, and that is said; not a slide called nan."
    split = open_split('train', raw(tmp_path/'a', slides=('p1', 'p2', '')))
    assert split.slides is None and 'no wsi in 4 of 12 rows' in capsys.readouterr().out
    assert [len(p) for p in cut(split, (6, 6))] == [6, 6]


def change(path, key, rows):
    with h5py.File(path, 'r+') as f:
        for i in rows: f[key][i] = 255 - f[key][i] if key == 'x' else 1


@pytest.mark.parametrize('row', [0, 1, 77, 198, 199])
def test_every_patch_counts(tmp_path, row):
    "One patch in use changes the name; one that is not used does not; nor does the place of the files."
    folder = raw(tmp_path/'a', 200)
    split = open_split('test', folder)
    before, even = split_id(split), split_id(data.replace(split, rows=split.rows[row % 2::2]))
    odd = split_id(data.replace(split, rows=split.rows[1 - row % 2::2]))
    change(raw_file(folder, 'test', 'x'), 'x', [row])
    split = open_split('test', folder)
    assert split_id(split) != before and split_id(data.replace(split, rows=split.rows[row % 2::2])) != even
    assert split_id(data.replace(split, rows=split.rows[1 - row % 2::2])) == odd
    now = split_id(split)
    folder.rename(tmp_path/'b')
    assert split_id(open_split('test', tmp_path/'b')) == now


def test_bytes_are_hashed_once(tmp_path, monkeypatch):
    split, read = open_split('test', raw(tmp_path/'a', 200)), []
    fill = data.FileRows.fill
    monkeypatch.setattr(data.FileRows, 'fill', lambda self, rows, out: read.append(len(rows)*(self.key == 'x')) or fill(self, rows, out))
    first = split_id(split)
    assert sum(read) == 200
    assert split_id(open_split('test', tmp_path/'a')) == first and sum(read) == 200


def content(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize('other', [dict(seed=1), dict(slides=None), dict(slides=('P', 'Q')), dict(n=9)])
def test_copies_are_not_mixed(tmp_path, other):
    "A folder with other patches, slides or masks is refused before anything is written; the same split is found there."
    a, b = raw(tmp_path/'a', slides=('A', 'B')), raw(tmp_path/'b', **dict(slides=('A', 'B')) | other)
    for s in SPLITS: write_split(open_split(s, a), tmp_path/'out')
    before = content(tmp_path/'out')
    write_split(open_split('train', a), tmp_path/'out')
    for s in SPLITS:
        with pytest.raises(ValueError, match='another place'): write_split(open_split(s, b), tmp_path/'out')
    assert content(tmp_path/'out') == before


def test_copies_with_other_masks_or_classes(tmp_path):
    a, b, c = (raw(tmp_path/k) for k in 'abc')
    change(raw_file(b, 'test', 'mask'), 'mask', [3])
    (c/'classes.txt').write_text('u\nv\nz\n')
    write_split(open_split('test', a), tmp_path/'out')
    for folder, s in ((b, 'test'), (c, 'test'), (c, 'train')):
        with pytest.raises(ValueError, match='another place'): write_split(open_split(s, folder), tmp_path/'out')
    write_split(open_split('train', b), tmp_path/'out')
    assert open_split('train', tmp_path/'out').classes == ('u', 'v', 'w')


@pytest.mark.parametrize('at', ['x', 'mask', 'meta'])
def test_a_stopped_copy_leaves_nothing(tmp_path, monkeypatch, at):
    "Ctrl-C in the second split: the first is whole, of the second nothing is there, and the call can be given again."
    folder, out, real = raw(tmp_path/'a', slides=('A', 'B')), tmp_path/'out', data.write_subset
    write_split(open_split('train', folder), out)
    before = content(out)
    def stop(source, path, *args):
        if f'_{at}.' in path.name: raise KeyboardInterrupt
        return real(source, path, *args)
    def stop_table(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(data, 'write_subset', stop)
    if at == 'meta': monkeypatch.setattr(pd.DataFrame, 'to_csv', stop_table)
    with pytest.raises(KeyboardInterrupt): write_split(open_split('valid', folder), out)
    monkeypatch.undo()
    assert content(out) == before
    write_split(open_split('valid', folder), out)
    assert (open_split('valid', out).slides == open_split('valid', folder).slides).all()


def test_a_folder_of_copies_is_whole_or_absent(tmp_path, monkeypatch):
    folder, out, real = raw(tmp_path/'a', slides=('A', 'B')), tmp_path/'out', data.write_subset
    splits = [open_split(s, folder) for s in SPLITS]
    def stop(source, path, *args):
        if 'test_x' in path.name: raise KeyboardInterrupt
        return real(source, path, *args)
    monkeypatch.setattr(data, 'write_subset', stop)
    with pytest.raises(KeyboardInterrupt): data.write_splits(splits, out)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir() if p.suffix != '.lock'] == ['a']
    before = content(data.write_splits(splits, out))
    assert content(data.write_splits(splits, out)) == before and len(before) == 13
    other = [open_split(s, raw(tmp_path/'b', seed=1) if s == 'train' else folder) for s in SPLITS]
    with pytest.raises(ValueError, match='another place'): data.write_splits(other, out)
    assert content(out) == before
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('precious')
    with pytest.raises(ValueError, match='another place'): data.write_splits(splits, tmp_path/'mine')
    assert list(content(tmp_path/'mine')) == ['thesis.txt']


def test_patches_in_memory(tmp_path):
    "A split whose patches are an array counts every byte, too."
    from dataclasses import replace
    split = open_split('train', raw(tmp_path/'a'))
    held = np.array(split.patches())
    other = held.copy()
    other[5, 3, 3, 1] ^= 1
    a, b, c = (split_id(replace(split, raw=v)) for v in (held, held.copy(), other))
    assert a == b != c
