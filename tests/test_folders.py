"Folders, tables, rows: every format and refusal, a stop in the middle, and real samples where there are some."
import io, json, os, signal, subprocess, sys, time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT
from pcam_tp import folders
from pcam_tp.data import open_splits, to_float
from pcam_tp.folders import import_any, import_folder, import_parquet, import_table, read_image, read_import, split_groups
from pcam_tp.methods import explain
from pcam_tp.models import build
from pcam_tp.plots import compare_maps, plot_confusion, plot_roc
from pcam_tp.training import evaluate, probabilities, results, train

SAMPLES = ROOT.parent/'shared'/'data'
RNG = np.random.default_rng(0)
GREY = np.linspace(0, 255, 40*60).reshape(40, 60).round().astype('uint8')
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], -1)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def tiny(folder, classes=('a', 'b', 'c'), groups=8, each=2, side=40):
    "A folder of class folders: noise of another brightness for each class, names with a group."
    for k, c in enumerate(classes):
        for i in range(groups*each):
            a = (RNG.normal(60 + 60*k, 20, (side, side, 3))).clip(0, 255).astype('uint8')
            save(folder/c/f'p{i//each}_{i}.png', Image.fromarray(a))
    return folder


def turned():
    exif = Image.Exif()
    exif[0x112] = 6   # turn by 90° clockwise to see it
    return exif


DEEP = Image.fromarray(GREY.astype('uint16')*257)
FORMATS = {
    'plain.png': (Image.fromarray(RGB), {}, RGB, ''),
    'plain.bmp': (Image.fromarray(RGB), {}, RGB, ''),
    'plain.tif': (Image.fromarray(RGB), {}, RGB, ''),
    'CAPITALS.TIFF': (Image.fromarray(RGB), {}, RGB, ''),
    'packed.tif': (Image.fromarray(RGB), dict(compression='tiff_lzw'), RGB, ''),
    'grey.png': (Image.fromarray(GREY), {}, np.stack([GREY]*3, -1), 'grey'),
    'deep.png': (DEEP, {}, np.stack([GREY]*3, -1), 'deep'),
    'deep.tif': (DEEP, {}, np.stack([GREY]*3, -1), 'deep'),
    'dim.png': (Image.fromarray((GREY//4).astype('uint16')*257), {}, np.stack([GREY//4]*3, -1), 'deep'),
    'float.tif': (Image.fromarray((GREY/255).astype('float32')), {}, np.stack([GREY]*3, -1), 'deep'),
    'bits.png': (Image.fromarray(GREY).point(lambda v: 255*(v > 99)).convert('1'), {}, np.stack([255*(GREY > 99)]*3, -1), 'grey'),
    'palette.png': (Image.fromarray(GREY).convert('P'), {}, np.stack([GREY]*3, -1), 'palette'),
    'alpha.png': (Image.fromarray(np.dstack([RGB, np.full_like(GREY, 0)])), {}, np.full_like(RGB, 255), 'transparent'),
    'pages.tif': (Image.fromarray(RGB), dict(save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB, 'page 1 of 2'),
    'turned.png': (Image.fromarray(RGB), dict(exif=turned()), np.rot90(RGB, -1), 'EXIF'),
}


@pytest.mark.parametrize('name', FORMATS)
def test_formats(tmp_path, name):
    image, options, expected, note = FORMATS[name]
    save(tmp_path/name, image, **options)
    got = (read_image(tmp_path/name)[0].permute(1, 2, 0).cpu()*255).round().numpy()
    np.testing.assert_array_equal(got, expected)
    notes = folders._decoded(tmp_path/name)[1]
    assert note in ', '.join(notes) and bool(note) == bool(notes)


def test_lossy_formats_and_inks(tmp_path):
    "JPEG in colour, grey and with four inks, and WebP: near the picture, of its shape."
    for name, mode in (('a.jpg', 'RGB'), ('b.jpeg', 'L'), ('c.jpg', 'CMYK'), ('d.webp', 'RGB')):
        save(tmp_path/name, Image.fromarray(RGB).convert(mode), quality=95)
        got = read_image(tmp_path/name)[0].permute(1, 2, 0).cpu()*255
        near = Image.fromarray(RGB).convert('L').convert('RGB') if mode == 'L' else Image.fromarray(RGB)
        assert abs(got.numpy() - np.asarray(near, float)).mean() < 6, name
    assert 'CMYK' in folders._decoded(tmp_path/'c.jpg')[1]


def test_one_image_from_anything(tmp_path):
    "Path, bytes, file, PIL, array, tensor: the same numbers; and a network takes them."
    save(tmp_path/'x.png', Image.fromarray(RGB))
    x = torch.from_numpy(RGB.copy()).permute(2, 0, 1)[None].float().cpu()/255
    given = tmp_path/'x.png', str(tmp_path/'x.png'), (tmp_path/'x.png').read_bytes(), Image.fromarray(RGB), RGB, x, x[0], RGB/255
    for one in given: torch.testing.assert_close(read_image(one), x, rtol=0, atol=1e-6)
    with open(tmp_path/'x.png', 'rb') as f: torch.testing.assert_close(read_image(f), x)
    model = build('small_cnn', width=.1)
    assert explain(model, read_image(RGB, 96, device=model.device), methods=['gradcam'])['gradcam'].shape == (1, 96, 96)
    for wrong in ({'a.png': b''}, np.zeros((2, 8, 8, 3), 'uint8'), RGB.astype(float), np.zeros((0, 3, 3), 'uint8'), np.zeros((8, 8, 2), 'uint8')):
        with pytest.raises(ValueError, match='expected'): read_image(wrong)


def test_nothing_is_lost_silently(tmp_path):
    "Every file is kept, or has a line that says why not."
    root = tiny(tmp_path/'in')
    (root/'a'/'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 no more')
    save(root/'a'/'cut.png', Image.fromarray(RGB))
    whole = (root/'a'/'cut.png').read_bytes()
    (root/'a'/'cut.png').write_bytes(whole[:len(whole)//2])
    (root/'b'/'Thumbs.db').write_bytes(b'x')
    (root/'b'/'.ipynb_checkpoints').mkdir()
    save(root/'loose.png', Image.fromarray(RGB))
    save(root/'c'/'range.tif', Image.fromarray(np.full((9, 9), 300, 'float32')))
    made = import_folder(root, tmp_path/'out', size=32)
    files = sum(p.is_file() for p in root.rglob('*'))
    why = dict(zip(made.skipped.file, made.skipped.why))
    assert made.counts['all'].sum() + len(why) == files + 1   # the hidden folder has one line
    assert 'not a readable image' in why['a/broken.jpg'] and 'not a readable image' in why['a/cut.png']
    assert why['b/Thumbs.db'] == 'not an image (.db)' and why['b/.ipynb_checkpoints'] == 'hidden'
    assert why['loose.png'] == 'in no class folder' and 'expected bytes, or floats in [0, 1]' in why['c/range.tif']
    said = repr(made)
    for word in ('skipped: not a readable image', 'no slides or patients are known', 'test is small'): assert word in said, said
    assert str(root) not in (tmp_path/'out'/'skipped.csv').read_text()


def test_the_files_are_the_releases(tmp_path):
    "Each patch is the image that its line names; the way stands in the attributes; groups are slides."
    root = tiny(tmp_path/'in')
    made = import_folder(root, tmp_path/'out', size=24, fit='pad', group=r'/(?P<group>p\d+)_', split=(.5, .25, .25))
    parts = open_splits(made.folder, n=(99, 99, 99))
    groups = [set(s.slides) for s in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    for s in parts:
        assert set(s.y) == {0, 1, 2}, 'every split has every class'
        for k in range(len(s)):
            again = read_image(root/s.meta.file[k], 24, 'pad')[0].permute(1, 2, 0)*255
            np.testing.assert_array_equal(again.round().numpy(), s.patches([k])[0])
            assert s.meta.file[k].split('/')[0] == s.classes[s.y[k]]
    with h5py.File(made.folder/'camelyonpatch_level_2_split_train_x.h5') as f:
        assert (f.attrs['fit'], f.attrs['size'], f['x'].dtype) == ('pad', 24, 'uint8') and 'filled up' in f.attrs['way']
    assert read_import(made.folder).words == made.words


def test_copies_stay_together(tmp_path):
    "The same picture under many names and formats, in groups of its own each, lies in one split."
    root = tiny(tmp_path/'in', each=1)
    for i in range(6): save(root/'a'/f'copy{i}.{("png", "bmp", "tif")[i % 3]}', Image.fromarray(RGB))
    for seed in range(4):
        made = import_folder(root, tmp_path/f'out{seed}', size=32, seed=seed)
        rows = pd.concat([pd.read_csv(made.folder/f'camelyonpatch_level_2_split_{s}_meta.csv').assign(split=s) for s in ('train', 'valid', 'test')])
        assert rows[rows.file.str.contains('copy')].split.nunique() == 1
    assert 'copies of an earlier image, byte for byte: 5' in repr(made)
    save(root/'b'/'copy.png', Image.fromarray(RGB))
    assert 'two classes (which is true?): 1' in repr(import_folder(root, tmp_path/'two', size=32))


def test_splits_that_are_given(tmp_path):
    "Kept as they are; a leak between them is said; validation is cut from training where it is missing."
    tiny(tmp_path/'in'/'Training', groups=6)
    tiny(tmp_path/'in'/'testing', groups=3)
    save(tmp_path/'in'/'Training'/'a'/'twin.png', Image.fromarray(RGB))
    save(tmp_path/'in'/'testing'/'a'/'twin.png', Image.fromarray(RGB))
    made = import_folder(tmp_path/'in', tmp_path/'out', size=32)
    assert made.counts.test.sum() == 19 and made.counts.valid.min() >= 2
    assert '2 images are copies of images in another split' in repr(made)
    made = import_folder(tmp_path/'in', tmp_path/'out2', size=32, group=r'(?P<group>p\d+)_')
    assert 'share their group with images in another split' in repr(made)


def test_nested_folders_and_patients(tmp_path):
    "BreakHis: class/kind/patient/magnification/file; the patient is in the name, `only` takes one magnification."
    for c, letter in (('benign', 'B'), ('malignant', 'M')):
        for patient in range(6):
            for zoom in (40, 400):
                name = f'SOB_{letter}_A-14-{patient}{c[0]}AB-{zoom}-001.png'
                save(tmp_path/'in'/c/'SOB'/'adenosis'/f'{patient}'/f'{zoom}X'/name, Image.fromarray(RNG.integers(0, 256, (46, 70, 3), 'uint8')))
    pattern = r'-(?P<group>\d+-\d+[bm])'
    made = import_folder(tmp_path/'in', tmp_path/'out', size=32, group=pattern)
    assert made.counts['all'].tolist() == [12, 12] and '12 groups' in repr(made)
    assert '34 % of the area' in repr(made)
    zoomed = import_folder(tmp_path/'in', tmp_path/'zoom', size=32, group=pattern, only='-400-')
    assert zoomed.counts['all'].tolist() == [6, 6] and set(zoomed.skipped.why) == {'not matched by `only`'}


REFUSED = {
    'one class only': dict(only='^a/'),
    'no image has a group': dict(group=r'(?P<group>slide\d+)'),
    'a part called group': dict(group=r'p\d+'),
    'is no regular expression': dict(group='('),
    'groups .* for 3 splits': dict(group=r'(?P<group>png)'),
    'expected three shares': dict(split=(.8, .2)),
    'expected one of': dict(fit='stretch'),
    'expected pixels along a side': dict(size=0),
}


@pytest.mark.parametrize('words', REFUSED)
def test_refusals_leave_nothing(tmp_path, words):
    root = tiny(tmp_path/'in', groups=4)
    with pytest.raises(ValueError, match=words): import_folder(root, tmp_path/'out', **REFUSED[words])
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != '.lock') == ['in']


def test_groups_that_copies_join(tmp_path):
    "Three groups, two of which share a picture, are two: refused after the images were read, and nothing is left."
    for c in 'ab':
        for g in range(3): save(tmp_path/'in'/c/f'p{g}.png', Image.fromarray(RGB if g else 255 - RGB))
    with pytest.raises(ValueError, match=r'3 groups, .*copies leave 2, such as a/p1.png and a/p2.png.* for 3 splits.*remove'):
        import_folder(tmp_path/'in', tmp_path/'out', size=8, group=r'(?P<group>p\d)')
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != '.lock') == ['in']


def test_images_of_one_colour_join_nothing(tmp_path):
    "A white tile in each patient: the patients stay apart, the tiles are counted, and no leak is told of them."
    root = tiny(tmp_path/'in', groups=9)
    for g in range(9): save(root/'a'/f'p{g}_blank.png', Image.new('RGB', (40, 40), 'white'))
    made = import_folder(root, tmp_path/'out', size=32, group=r'(?P<group>p\d+)_')
    said = repr(made)
    assert (made.counts[['train', 'valid', 'test']].sum() > 0).all() and '9 of one colour' in said
    assert '9 groups by' in said and 'each in one split' in said and 'it leaks' not in said
    alone = import_folder(root, tmp_path/'alone', size=32)   # without patients they still lie together
    files = [set(s.meta.file) for s in open_splits(alone.folder, n=(99, 99, 99))]
    assert sorted(sum('blank' in f for f in part) for part in files) == [0, 0, 9]


def test_two_imports_at_once(tmp_path, monkeypatch):
    "The one that comes second finds other settings under its name, and does not return the first one's folder as its own."
    root, once = tiny(tmp_path/'in'), folders.make_once
    def late(*args):
        monkeypatch.setattr(folders, 'make_once', once)
        import_folder(root, tmp_path/'out', size=32, seed=2)
        return once(*args)
    monkeypatch.setattr(folders, 'make_once', late)
    with pytest.raises(ValueError, match='holds something else'): import_folder(root, tmp_path/'out', size=32, seed=1)
    assert read_import(tmp_path/'out').card['seed'] == 2 and import_folder(root, tmp_path/'out', size=32, seed=2)


def test_nothing_is_overwritten(tmp_path):
    root = tiny(tmp_path/'in')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('precious')
    with pytest.raises(ValueError, match='holds something else'): import_folder(root, tmp_path/'mine')
    with pytest.raises(ValueError, match='lies in the source'): import_folder(root, root/'out')
    (tmp_path/'empty').mkdir()
    first = import_folder(root, tmp_path/'empty', size=32)
    stamp = (first.folder/'import.json').stat().st_mtime_ns
    assert import_folder(root, tmp_path/'empty', size=32).words == first.words
    assert (first.folder/'import.json').stat().st_mtime_ns == stamp
    save(root/'a'/'new_1.png', Image.fromarray(RGB))
    with pytest.raises(ValueError, match='holds something else'): import_folder(root, tmp_path/'empty', size=32)


def test_a_killed_import_goes_on(tmp_path):
    "SIGKILL in the middle: no folder under the final name; the same command decodes only what is missing."
    root = tiny(tmp_path/'in', groups=50, each=2)
    slow = ('import time, sys; from pcam_tp import folders; old = folders._square\n'
            'def slowly(*a): time.sleep(.02); return old(*a)\n'
            'folders._square = slowly; folders.import_folder(sys.argv[1], sys.argv[2], size=32)')
    p = subprocess.Popen([sys.executable, '-c', slow, root, tmp_path/'out'], stderr=subprocess.DEVNULL, cwd=ROOT)
    journal = lambda: next(iter(tmp_path.glob('.out.part-*/journal.jsonl')), None)
    wait = time.time() + 60
    while not (journal() and journal().stat().st_size > 5000) and time.time() < wait: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = journal().read_bytes().count(b'\n')
    assert 0 < done < 300 and not (tmp_path/'out').exists()
    read = []
    old, folders._decoded = folders._decoded, lambda data: read.append(data) or old(data)
    try: made = import_folder(root, tmp_path/'out', size=32)
    finally: folders._decoded = old
    assert len(read) == 300 - done and made.counts['all'].sum() == 300
    fresh = import_folder(root, tmp_path/'fresh', size=32)
    assert fresh.card['fingerprint'] == made.card['fingerprint'] and not list(tmp_path.glob('.*part*'))


def test_names_that_pcam_owns(tmp_path):
    "Other images called normal and tumour are not taken for PCam: no box, no size, no slide table is asked of them."
    root = tiny(tmp_path/'in', ('normal', 'tumour'))
    made = import_folder(root, tmp_path/'out', size=64)
    assert made.classes == ('normal image', 'tumour image')
    assert open_splits(made.folder, n=(9, 9, 9))[0].side == 64


def test_tables(tmp_path):
    "Columns by role, folders together, paths and bare names, a split column, and a word for each row that is left out."
    for i in range(24): save(tmp_path/f'part{i % 2}'/f'im{i}.jpg', Image.fromarray(RNG.integers(0, 256, (40, 40, 3), 'uint8')))
    save(tmp_path/'part0'/'unnamed.jpg', Image.fromarray(RGB))
    rows = [dict(file=f'im{i}' + '.jpg'*(i % 2), dx='xyz'[i % 3], who=f'w{i//3}', fold=('train', 'val', 'test')[i//3 % 3]) for i in range(24)]
    rows += [dict(file='im0', dx='x', who='w0', fold='train'), dict(file='gone', dx='x', who='w0', fold='train'),
             dict(file='im1', dx='', who='w0', fold='train')]
    pd.DataFrame(rows).to_csv(tmp_path/'t.csv', index=False)
    roles = dict(image='file', label='dx', group='who', split='fold')
    made = import_table(tmp_path/'t.csv', [tmp_path/'part0', tmp_path/'part1'], tmp_path/'out', columns=roles, size=32)
    assert made.counts['all'].sum() == 24 and made.counts.test.sum() == 6
    assert sorted(made.skipped.why) == sorted(['a second row names it', 'in the table and not in the folder', 'no label',
                                               'in the folder and not in the table'])
    with pytest.raises(ValueError, match='which is which'): import_table(tmp_path/'t.csv', tmp_path/'part0', tmp_path/'no')
    with pytest.raises(ValueError, match='for class folders only'): import_any(tmp_path/'part0', tmp_path/'no', tmp_path/'t.csv', group='x')


def listed(rows, path, columns=('file', 'dx')): pd.DataFrame(rows, columns=columns).to_csv(path, index=False)


def kept(made):
    "Class of each file that was kept."
    return {f: s.classes[y] for s in open_splits(made.folder, n=(999,)*3) for f, y in zip(s.meta.file, s.y)}


def test_a_row_takes_its_own_file(tmp_path):
    "A row with a folder in its name takes the file of that folder or none; an ending may be missing."
    noise = lambda: Image.fromarray(RNG.integers(0, 256, (40, 40, 3), 'uint8'))
    names = [f'p{p}/{i}.png' for p in range(2, 7) for i in range(3)] + ['p7/unique.png', 'p1/bare.png', 'p2/bare.png']
    for n in names: save(tmp_path/'in'/n, noise())
    rows = [('p1/unique.png', 'benign'), ('p9/0.png', 'benign'), ('p7/unique.png', 'malignant'), ('p1/bare', 'benign'), ('p2/bare', 'malignant')]
    rows += [(n, 'ab'[int(n[1]) % 2]) for n in names[:15]]
    listed(rows, tmp_path/'t.csv')
    made = import_table(tmp_path/'t.csv', tmp_path/'in', tmp_path/'out', columns=dict(image='file', label='dx'), size=32)
    assert dict(zip(made.skipped.file, made.skipped.why)) == dict.fromkeys(('p1/unique.png', 'p9/0.png'), 'in the table and not in the folder')
    found = kept(made)
    assert len(found) == 18 and found['p7/unique.png'] == found['p2/bare.png'] == 'malignant' and found['p1/bare.png'] == 'benign'
    listed([('in/' + n, c) for n, c in rows[2:]], tmp_path/'above.csv')   # the table names the folder itself
    made = import_table(tmp_path/'above.csv', tmp_path/'in', tmp_path/'out2', columns=dict(image='file', label='dx'), size=32)
    assert len(kept(made)) == 18 and made.skipped.empty


def test_two_files_of_one_name(tmp_path):
    "Two folders with equal names: a bare name means neither, and each has its line; one with its folder is clear."
    for d in 'AB':
        for i in range(8): save(tmp_path/d/f'{i}.png', Image.fromarray(RNG.integers(0, 256, (40, 40, 3), 'uint8')))
    both, roles = [tmp_path/'A', tmp_path/'B'], dict(image='file', label='dx')
    save(tmp_path/'A'/'only.png', Image.fromarray(RGB)); save(tmp_path/'B'/'lone.png', Image.fromarray(255 - RGB))
    listed([('0.png', 'x'), ('1', 'y'), ('only.png', 'x'), ('lone.png', 'y')] + [(f'{d}/{i}.png', 'xy'[d == 'B']) for d in 'AB' for i in range(2, 8)], tmp_path/'t.csv')
    made = import_table(tmp_path/'t.csv', both, tmp_path/'out', columns=roles, size=32)
    assert made.skipped.why.tolist().count('two files have this name') == 6 == len(made.skipped)
    found = kept(made)
    assert len(found) == 14 and found['A/2.png'] == 'x' and found['B/2.png'] == 'y'
    again = import_table(tmp_path/'t.csv', [tmp_path/'A', tmp_path/'A', tmp_path/'B'], tmp_path/'out2', columns=roles, size=32)
    assert kept(again) == found


def test_texts_that_are_not_utf8(tmp_path):
    "A table or a file name in Latin-1: named with a remedy, before an image is read."
    root = tiny(tmp_path/'in')
    os.rename(root/'a'/'p0_0.png', os.fsencode(root/'a') + b'/gr\xf6n.png')
    with pytest.raises(ValueError, match=r'gr.*n.png.*not UTF-8.*rename'): import_folder(root, tmp_path/'out', size=32)
    assert not list(tmp_path.glob('.out*part*'))
    os.rename(os.fsencode(root/'a') + b'/gr\xf6n.png', os.fsencode(root/'a') + b'/gr\xf6n.txt')
    assert len(import_folder(root, tmp_path/'out', size=32).skipped) == 1
    listed([(f'a/p{i}_{2*i}.png', ('böse', 'gut')[i % 2]) for i in range(8)], tmp_path/'t.csv')
    (tmp_path/'t.csv').write_bytes((tmp_path/'t.csv').read_text().encode('latin-1'))
    with pytest.raises(ValueError, match=r't.csv is not UTF-8.*save it'):
        import_table(tmp_path/'t.csv', root, tmp_path/'no', columns=dict(image='file', label='dx'))


def test_splits_that_lack_train(tmp_path):
    "A column that names valid and test only has nothing to learn from: said before an image is read."
    root = tiny(tmp_path/'in')
    listed([(f'{c}/p{i}_{2*i}.png', c, 'test' if i % 3 else 'val') for i in range(8) for c in 'ab'], tmp_path/'t.csv', ('file', 'dx', 'fold'))
    with pytest.raises(ValueError, match='train.*found test, valid'):
        import_table(tmp_path/'t.csv', root, tmp_path/'no', columns=dict(image='file', label='dx', split='fold'))
    assert not list(tmp_path.glob('.no*part*'))


def test_groups_that_the_source_shares(tmp_path):
    "Its own split cuts through groups: the leak is said, and not its contrary."
    for part in ('train', 'test'): tiny(tmp_path/'in'/part)
    said = repr(import_folder(tmp_path/'in', tmp_path/'out', size=32, group=r'(?P<group>p\d+)_'))
    assert 'share their group' in said and 'each in one split' not in said and '8 groups by' in said


@pytest.mark.parametrize('place', ['default/{}/0000.parquet', '{}/part/{}-00000-of-00001.parquet', '{}-00000-of-00001.parquet'])
def test_splits_of_parquet_files(tmp_path, place):
    "Train, validation and test as Hugging Face puts them, in names of files or of folders; also by the one call for all."
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    for name, n in (('train', 24), ('validation', 6), ('test', 12)):
        path = tmp_path/'hub'/place.format(name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(n):
            Image.fromarray(RNG.integers(0, 256, (40, 40, 3), 'uint8')).save(b := io.BytesIO(), 'png')
            rows.append(dict(image=dict(bytes=b.getvalue(), path=None), label=i % 2))
        pq.write_table(pa.Table.from_pylist(rows), path)
    for made in (import_any(tmp_path/'hub', tmp_path/'out', size=32), import_parquet(sorted((tmp_path/'hub').rglob('*.parquet')), tmp_path/'out2', size=32)):
        assert made.counts[['train', 'valid', 'test']].sum().tolist() == [24, 6, 12]
        assert len(kept(made)) == 42


def test_integers_of_any_width(tmp_path):
    "Bytes stay bytes in wider integers; 16 bits that hold no more than 255 are refused; the largest value is named."
    for dtype in ('int16', 'int32', 'int64', 'uint32', 'uint64'): assert (read_image(RGB.astype(dtype)) == read_image(RGB)).all(), dtype
    assert (read_image(torch.from_numpy(RGB.astype('int64')).permute(2, 0, 1)) == read_image(RGB)).all()
    assert (read_image(RGB.astype('int64')*257) == read_image(RGB)).all() and not read_image(np.zeros((9, 9), 'uint16')).any()
    with pytest.raises(ValueError, match="up to 255 in 16 bits.*astype.'uint8'"): read_image(RGB.astype('uint16'))
    save(tmp_path/'wide.tif', Image.fromarray(GREY.astype('int32')))
    assert (read_image(tmp_path/'wide.tif') == read_image(GREY)).all()
    root = tiny(tmp_path/'in', ('a', 'b'))
    for c in 'ab':
        for i in range(3): save(root/c/f'p9_{i}.png', Image.fromarray(RNG.integers(0, 4090 + i, (40, 40)).astype('uint16')))
        save(root/c/'p9_most.png', Image.fromarray(np.full((40, 40), 4095, 'uint16')))
        save(root/c/'p9_bytes.png', Image.fromarray(GREY.astype('uint16')))
    made = import_folder(root, tmp_path/'out', size=32)
    assert '8 deep: white is the largest value of the type, and the largest found is 4,095' in repr(made)
    assert made.skipped.why.str.contains('up to 255 in 16 bits').tolist() == [True, True]


def test_dealing_is_fair_and_whole():
    "Groups of many sizes: whole, near the shares, another seed another deal; large groups do not all go one way."
    y = RNG.integers(0, 4, 3000)
    groups = RNG.choice(120, 3000, p=(w := 1/np.arange(1, 121))/w.sum())
    part = split_groups(y, groups, (.6, .2, .2))
    assert all(len(np.unique(part[groups == g])) == 1 for g in range(120) if (groups == g).any())
    for k in range(4): assert abs(np.bincount(part[y == k], minlength=3)/(y == k).sum() - [.6, .2, .2]).max() < .05
    pairs = split_groups(np.arange(60) % 2, np.r_[np.repeat(np.arange(20), 2), np.arange(20, 40)], (.6, .2, .2))
    assert all((pairs[:40] == p).any() for p in range(3)), 'each part has groups of two'
    with pytest.raises(ValueError, match='2 groups'): split_groups([0, 1, 1], [5, 6, 6], (1, 1, 1))


def follow(folder, epochs):
    "Train, judge, explain and draw what an import wrote, with nothing said about the data set."
    learn, watch, test = open_splits(folder, n=(200, 100, 100))
    model = build('small_cnn', n_classes=len(learn.classes), classes=learn.classes, width=.1)
    train(model, learn, watch, epochs, batch_size=4, precision='no', device='cpu')
    predicted = evaluate(model, test)
    table = results(predicted, 50).set_index('metric')
    x = to_float(test.patches(slice(2)), model.device)
    maps = explain(model, x, methods=['gradcam', 'saliency'])
    assert all(m.shape == (2, test.side, test.side) and m.isfinite().all() for m in maps.values())
    part = predicted.head(2)
    compare_maps(x, maps, y=test.y[:2], pred=part.pred, prob=probabilities(part), names=test.classes)
    plot_confusion(predicted.y, predicted.pred, names=test.classes)
    plot_roc(predicted.y, probabilities(predicted), names=test.classes)
    return table.estimate


def test_what_comes_after_knows_no_data_set(tmp_path, capsys):
    "Four classes, one of which the test lacks: judged on those that are there, and said."
    root = tiny(tmp_path/'in', tuple('abcd'), groups=6)
    for p in list((root/'d').iterdir())[1:]: p.unlink()
    found = follow(import_folder(root, tmp_path/'out', size=32).folder, 2)
    assert 0 <= found.auc <= 1 and 0 <= found.accuracy <= 1
    assert 'the mean of 3 of 4 classes' in capsys.readouterr().out


REAL = dict(sipakmed=(5, r'(?P<group>[^/]+/\d+)_\d+\.'), crc_nct_he=(9, None), breakhis=(2, r'-(?P<group>\d+-\d+)'),
            covid19_radiography=(4, None))


@pytest.mark.parametrize('name', REAL)
def test_real_samples(tmp_path, name):
    archive = SAMPLES/f'{name}_sample.zip'
    if not archive.exists(): pytest.skip(f'no {archive}: real samples are not part of the repository')
    import zipfile
    zipfile.ZipFile(archive).extractall(tmp_path/'in')
    n_classes, group = REAL[name]
    made = import_folder(tmp_path/'in', tmp_path/'out', group=group)
    assert len(made.classes) == n_classes and made.skipped.empty
    assert made.counts['all'].sum() == sum(p.is_file() for p in (tmp_path/'in').rglob('*'))
    assert 0 <= follow(made.folder, 1 if made.counts['all'].sum() > 30 else 3).auc <= 1
