"What foundation/03_download cannot show in one process: a server that misbehaves in every known way, full disks, signals, two processes."
import gzip, hashlib, io, os, resource, signal, subprocess, sys, threading, time
from collections import namedtuple
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from pcam_tp import download as dl
from pcam_tp.release import LAYOUT, SPLITS, RawFile, raw_name, served_name

os.environ['NO_PROXY'] = '127.0.0.1'
N = 8
BIG = np.random.default_rng(1).bytes(3_000_000)


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`. `server.plan[name]` is a list of faults, one for each request; the last one stays.
    A fault is a dict: status, headers (added to the usual ones; None takes one away), body,
    range_status (for requests with Range), cut (bytes sent before hanging up), ranges=False (Range is ignored), rude (If-Range is ignored), drip (seconds a block)."""
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def do_GET(self):
        s, name = self.server, self.path[1:]
        plan = s.plan.get(name, [{}])
        fault = plan.pop(0) if len(plan) > 1 else plan[0]
        asked = self.headers.get('Range')
        status = fault.get('status', 200 if name in s.files else 404)
        if asked: status = fault.get('range_status', status)
        data, start = fault.get('body', s.files[name]) if status == 200 else b'', 0
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {'ETag': etag, 'Content-Type': 'application/octet-stream', 'Last-Modified': formatdate(0, usegmt=True)} if status == 200 else {}
        if status == 200 and asked and fault.get('ranges', True) and (self.headers.get('If-Range') == etag or fault.get('rude')):
            start, status = int(asked[6:-1]), 206
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        rest = data[start:]
        headers |= {'Content-Length': len(rest), 'Connection': 'close', **fault.get('headers', {})}
        self.send_response(status)
        for k, v in headers.items():
            if v is not None: self.send_header(k, str(v))
        s.log.append(entry := [name, status, asked, 0])
        self.end_headers()
        rest = rest[:fault.get('cut', len(rest))]
        try:
            for i in range(0, len(rest), 2**16):
                entry[3] += len(block := rest[i:i + 2**16])
                self.wfile.write(block)
                time.sleep(fault.get('drip', 0))
        except OSError: pass   # the client was killed
        self.close_connection = True


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.daemon_threads = True
    s.files, s.plan, s.log, s.url = {'big': BIG}, {}, [], f'http://127.0.0.1:{s.server_port}'
    t = threading.Thread(target=s.serve_forever, args=(.05,), daemon=True); t.start()
    yield s
    s.shutdown(); s.server_close()


@pytest.fixture
def naps(monkeypatch):
    "How long each wait would have been."
    slept, real = [], time.sleep
    monkeypatch.setattr(dl.time, 'sleep', lambda s: slept.append(s) if threading.current_thread() is threading.main_thread() else real(s))
    return slept


MD5 = hashlib.md5(BIG).hexdigest()
def sent(server): return sum(n for *_, n in server.log)
def starts(server): return [int(r[6:-1]) if r else 0 for _, _, r, _ in server.log]
def visible(folder): return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')


def fails(error, what, folder, f, *args, left=(), **kw):
    "`f` ends in one sentence that holds `what`, and leaves nothing but `left` in `folder`."
    with pytest.raises(error, match=what) as e: f(*args, **kw)
    assert type(e.value) is error and '\n' not in str(e.value) and len(str(e.value)) < 500, str(e.value)
    assert visible(folder) == sorted(left)


PART = ('a.part', 'a.part.json')


# ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_plain(server, tmp_path):
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG
    assert visible(tmp_path) == ['a'] and starts(server) == [0]
    dl.fetch(f'{server.url}/big', tmp_path/'a', MD5)   # it is there: nobody is asked
    assert len(server.log) == 1


def test_cut_once_goes_on(server, tmp_path, naps):
    server.plan['big'] = [dict(cut=1_000_000), {}]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG
    assert starts(server) == [0, 1_000_000] and sent(server) == len(BIG) and naps == [0]


def test_many_cuts_with_news_do_not_use_up_the_tries(server, tmp_path, naps):
    server.plan['big'] = [dict(cut=1_100_000)]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5, tries=2).read_bytes() == BIG
    assert sent(server) == len(BIG) and len(server.log) == 3


def test_cut_always(server, tmp_path, naps):
    server.plan['big'] = [dict(cut=1_000_000), dict(cut=0)]
    fails(ConnectionError, r'was cut.*tries used up: 4\); 1.00MB are kept', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5, tries=4, left=PART)
    assert naps == [0, 2, 4]
    server.plan['big'] = [{}]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG and sent(server) == len(BIG)


def test_no_server(server, tmp_path, naps):
    server.shutdown(); server.server_close()
    fails(ConnectionError, 'no connection.*tries used up: 3', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', tries=3)


@pytest.mark.parametrize('when, low, high', [('7', 7, 7), ('date', 25, 30), ('soon', 0, 0)])
def test_429_waits_as_asked(server, tmp_path, naps, when, low, high):
    when = formatdate(time.time() + 30, usegmt=True) if when == 'date' else when
    server.plan['big'] = [dict(status=429, headers={'Retry-After': when}), {}]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG
    assert len(naps) == 1 and low <= naps[0] <= high


def test_429_for_hours(server, tmp_path, naps):
    server.plan['big'] = [dict(status=429, headers={'Retry-After': '7200'})]
    fails(ConnectionError, '429.*come back in 120 minutes', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a')
    assert naps == []


def test_503_a_few_times(server, tmp_path, naps):
    server.plan['big'] = [dict(status=503)]*4 + [{}]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG and naps == [0, 2, 4, 8]


def test_503_forever(server, tmp_path, naps):
    server.plan['big'] = [dict(status=503)]
    fails(ConnectionError, r'503.*tries used up: 6\); call again later', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a')
    assert len(server.log) == 6


def test_503_in_the_middle_keeps_the_part(server, tmp_path, naps):
    server.plan['big'] = [dict(cut=1_000_000), dict(status=503), {}]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG and sent(server) == len(BIG)


@pytest.mark.parametrize('status, error', [(404, FileNotFoundError), (403, ConnectionError)])
def test_refused(server, tmp_path, naps, status, error):
    server.plan['big'] = [dict(status=status)]
    fails(error, f'{status}.*check the address', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a')
    assert naps == []


# ── the wrong content ───────────────────────────────────────────────────────────────────────────────────────────────
def test_wrong_md5(server, tmp_path):
    server.files['big'] = wrong = BIG[:-1] + b'?'
    fails(ValueError, f'expected {MD5}.*kept as a.unverified', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5, left=['a.unverified'])
    assert (tmp_path/'a.unverified').read_bytes() == wrong
    server.files['big'] = BIG   # what the message says to do helps
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG


@pytest.mark.parametrize('md5', [MD5.upper(), f'md5:{MD5}', f'MD5:{MD5.upper()}'])
def test_a_sum_in_another_spelling(server, tmp_path, md5):
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', md5).read_bytes() == BIG
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', md5).read_bytes() == BIG and len(server.log) == 1


def test_no_sum_at_all_is_said_before_the_transfer(server, tmp_path):
    fails(ValueError, '32 hexadecimal digits', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5[:-1])
    assert not server.log


def test_a_wrong_record_does_not_cost_the_transfer(server, tmp_path):
    fails(ValueError, f'MD5 is {MD5}, expected {"0"*32}.*kept as a.unverified', tmp_path,
          dl.fetch, f'{server.url}/big', tmp_path/'a', '0'*32, left=['a.unverified'])
    assert (tmp_path/'a.unverified').read_bytes() == BIG


def test_redirects_without_an_end(server, tmp_path, naps):
    server.plan['big'] = [dict(status=302, headers={'Location': '/big'})]
    fails(ConnectionError, 'from address to address', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5)
    assert naps == []


def test_an_empty_file(server, tmp_path):
    server.files['big'] = b''
    fails(ValueError, 'big: the file is empty there', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a')


def test_an_empty_gz(tmp_path):
    (tmp_path/'a.gz').touch()
    fails(ValueError, 'a.gz is empty: delete it', tmp_path, dl.gunzip, tmp_path/'a.gz', tmp_path/'a', left=['a.gz'])


def test_wrong_md5_names_the_twin(server, tmp_path, monkeypatch):
    monkeypatch.setitem(dl.FILES, 'valid_y', RawFile(MD5))
    fails(ValueError, 'this is the sum of valid_y', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', '0'*32, left=['a.unverified'])


def test_a_file_of_the_user_is_not_replaced(server, tmp_path):
    (tmp_path/'a').write_bytes(b'mine')
    fails(ValueError, 'was there before', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5, left=['a'])
    assert (tmp_path/'a').read_bytes() == b'mine' and not server.log


@pytest.mark.parametrize('kind', ['text/html; charset=utf-8', 'application/octet-stream'])
def test_a_page_with_status_200(server, tmp_path, kind):
    page = dict(body=b'\n<!DOCTYPE html><html><title>Virus scan warning</title>', headers={'Content-Type': kind})
    server.plan['big'] = [page]
    fails(ValueError, 'web page', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a')
    server.plan['big'] = [dict(cut=1_000_000), page]   # between two halves: the first one survives
    fails(ValueError, 'web page', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', left=PART)
    assert (tmp_path/'a.part').stat().st_size == 1_000_000


def test_a_gz_declared_as_encoding_arrives_as_published(server, tmp_path):
    server.files['a.gz'] = gzip.compress(BIG[:9999])
    server.plan['a.gz'] = [dict(headers={'Content-Encoding': 'gzip'})]
    dl.fetch(f'{server.url}/a.gz', tmp_path/'a.gz', hashlib.md5(server.files['a.gz']).hexdigest())


@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b[:20], lambda b: b[:-8] + b'\0'*8, lambda b: b'no gzip'], ids='cut stub crc other'.split())
def test_truncated_gzip_with_its_right_md5(server, tmp_path, monkeypatch, damage):
    y = served_name('valid', 'y')
    server.files |= (files := release())
    server.files[y] = damage(files[y])
    monkeypatch.setattr(dl, 'FILES', table(server.files))
    with pytest.raises(ValueError, match=f'{y} is not a whole gzip file .*delete it and download it again'): dl.download(tmp_path, ['valid'], server.url)
    assert visible(tmp_path) == [raw_name('valid', 'x'), y]


# ── half files ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize('md5', [MD5, None])
def test_no_ranges(server, tmp_path, naps, capsys, md5):
    server.plan['big'] = [dict(cut=1_000_000), dict(ranges=False)]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', md5).read_bytes() == BIG
    assert 'starting from zero, because the server cannot continue' in capsys.readouterr().out


def test_no_ranges_and_always_cut_ends(server, tmp_path, naps):
    server.plan['big'] = [dict(cut=1_000_000, ranges=False)]
    fails(ConnectionError, 'tries used up: 3', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5, tries=3, left=PART)


@pytest.mark.parametrize('fault', [{}, dict(rude=True), dict(rude=True, headers={'ETag': None, 'Last-Modified': None}), dict(range_status=416)],
                         ids=['polite', 'ignores If-Range', 'and says no version', '416'])
def test_the_file_changed(server, tmp_path, naps, capsys, fault):
    "With md5=None, so that nothing but our own care prevents a glued file."
    server.plan['big'] = [dict(cut=1_000_000)]
    with pytest.raises(ConnectionError): dl.fetch(f'{server.url}/big', tmp_path/'a', tries=1)
    server.files['big'] = BIG[::-1] + b'longer'
    server.plan['big'] = [fault]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a').read_bytes() == server.files['big']
    assert 'starting from zero' in capsys.readouterr().out


def test_a_server_without_versions_is_never_continued(server, tmp_path, naps):
    bare = dict(headers={'ETag': None, 'Last-Modified': None}, rude=True)
    server.plan['big'] = [dict(cut=1_000_000, **bare), bare]
    assert dl.fetch(f'{server.url}/big', tmp_path/'a').read_bytes() == BIG and starts(server) == [0, 0]


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    "Killed between the last byte and the renaming."
    server.plan['big'] = [dict(cut=2_999_999)]
    with pytest.raises(ConnectionError): dl.fetch(f'{server.url}/big', tmp_path/'a', MD5, tries=1)
    with open(tmp_path/'a.part', 'ab') as f: f.write(BIG[-1:])
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG and len(server.log) == 1


@pytest.mark.parametrize('note', ['null', '3', '{}', '["{url}"]', '["{url}", "v", "many"]', '["{url}", "v", null]', ''])
def test_a_note_that_is_damaged_restarts(server, tmp_path, note):
    (tmp_path/'a.part').write_bytes(b'?'*1000)
    (tmp_path/'a.part.json').write_text(note.replace('{url}', f'{server.url}/big'))
    assert dl.fetch(f'{server.url}/big', tmp_path/'a').read_bytes() == BIG and starts(server) == [0]


# ── the disk ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_no_room_is_seen_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dl.shutil, 'disk_usage', lambda p: namedtuple('U', 'free')(2_900_000))
    fails(OSError, 'needs 3.00MB, and .* has 2.90MB free', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', left=['a.part.json'])
    (tmp_path/'b.gz').write_bytes(gzip.compress(b'x'))
    with pytest.raises(OSError, match='needs 5.00MB'): dl.gunzip(tmp_path/'b.gz', tmp_path/'b', 5_000_000)
    assert not (tmp_path/'b').exists()


def test_the_disk_fills_up(server, tmp_path, monkeypatch):
    "The kernel's own 'No space left on device', from /dev/full."
    (tmp_path/'b.gz').write_bytes(gzip.compress(BIG))
    monkeypatch.setattr(dl, 'open', lambda p, mode: open('/dev/full' if mode[0] in 'aw' else p, mode), raising=False)
    fails(OSError, 'disk is full', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', left=['a.part.json', 'b.gz'])
    fails(OSError, 'disk is full', tmp_path, dl.gunzip, tmp_path/'b.gz', tmp_path/'b', left=['a.part.json', 'b.gz'])


def test_a_limit_of_the_system_stops_the_writing(server, tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, old[1]))
    try: fails(OSError, 'limit is reached', tmp_path, dl.fetch, f'{server.url}/big', tmp_path/'a', MD5, left=PART)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG and starts(server) == [0, 2_000_000]


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────
CLIENT = '''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pcam_tp.download import fetch
print('ready', flush=True)
fetch(sys.argv[1], sys.argv[2], sys.argv[3])
'''
def client(server, path):
    return subprocess.Popen([sys.executable, '-c', CLIENT, f'{server.url}/big', path, MD5], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.01)


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL], ids=['SIGINT', 'SIGKILL'])
def test_stopped_and_started_again(server, tmp_path, how):
    server.plan['big'] = [dict(drip=.05), {}]
    p = client(server, tmp_path/'a')
    part = tmp_path/'a.part'
    until(lambda: part.exists() and part.stat().st_size > 600_000)
    p.send_signal(how)
    _, err = p.communicate(timeout=30)
    assert p.returncode and (how != signal.SIGINT or 'KeyboardInterrupt' in err)
    assert visible(tmp_path) == list(PART)
    kept = part.stat().st_size
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG
    assert starts(server) == [0, kept] and sent(server) < 2*len(BIG)
    print(f'{how.name}: {kept:,} bytes kept of {len(BIG):,}; served {sent(server):,}')


def test_two_processes_one_download(server, tmp_path, capsys):
    server.plan['big'] = [dict(drip=.02)]
    p = client(server, tmp_path/'a')
    until(lambda: server.log)
    assert dl.fetch(f'{server.url}/big', tmp_path/'a', MD5).read_bytes() == BIG
    assert p.wait(30) == 0 and len(server.log) == 1 and sent(server) == len(BIG)
    assert 'waiting for another process' in capsys.readouterr().out


# ── the release ─────────────────────────────────────────────────────────────────────────────────────────────────────
def release():
    "A tiny release as a server holds it: names, keys and layout of the real one."
    rng, files = np.random.default_rng(0), {}
    for split in SPLITS:
        y = rng.permutation(np.arange(N) % 2).astype('uint8').reshape(N, *LAYOUT['y'][0])
        arrays = dict(x=rng.integers(0, 256, (N, *LAYOUT['x'][0]), 'uint8'), y=y)
        if split == 'train': arrays['mask'] = np.broadcast_to(y > 0, (N, *LAYOUT['mask'][0]))
        for part, a in arrays.items():
            with h5py.File(buffer := io.BytesIO(), 'w') as f: f[part] = a
            files[served_name(split, part)] = gzip.compress(buffer.getvalue())
        meta = pd.DataFrame(dict(coord_y=0, coord_x=0, tumor_patch=True, center_tumor_patch=y.ravel() > 0, wsi='w'))
        files[served_name(split, 'meta')] = meta.to_csv().encode()
    return files


def table(files): return {k: RawFile(hashlib.md5(files[k]).hexdigest(), len(files[k]), 4_000 if k.endswith('.gz') else None) for k in dl.FILES}


@pytest.fixture
def pcam(server, monkeypatch):
    server.files |= release()
    monkeypatch.setattr(dl, 'FILES', table(server.files))
    return server


def test_the_release(pcam, tmp_path, capsys):
    from pcam_tp.data import open_split
    assert dl.download(tmp_path/'new'/'pcam', SPLITS, pcam.url + '/') == tmp_path/'new'/'pcam'
    assert visible(tmp_path/'new'/'pcam') == sorted(n.removesuffix('.gz') for n in dl.FILES)
    assert [len(open_split(s, tmp_path/'new'/'pcam')) for s in SPLITS] == [N]*3
    assert capsys.readouterr().out.startswith('10 files, about ')
    dl.download(tmp_path/'new'/'pcam', SPLITS, pcam.url)
    assert len(pcam.log) == 10 and not capsys.readouterr().out


def test_only_some_splits_and_the_gz_kept(pcam, tmp_path):
    dl.download(tmp_path, 'test', pcam.url, keep_gz=True)
    assert visible(tmp_path) == sorted({name('test', part) for name in (raw_name, served_name) for part in ('meta', 'x', 'y')})


def test_tables_of_two_splits_mixed_up(pcam, tmp_path, monkeypatch):
    test, valid = (served_name(s, 'y') for s in ('test', 'valid'))
    good = pcam.files[test]
    pcam.files[test] = pcam.files[valid]
    with pytest.raises(ValueError, match=f'{test}: MD5.*this is the sum of {valid}'): dl.download(tmp_path, ['test'], pcam.url)
    assert raw_name('test', 'y') not in visible(tmp_path)
    monkeypatch.setitem(dl.FILES, test, RawFile())
    with pytest.raises(ValueError, match='contradicts .*test_meta.csv .*the tables of two splits are mixed up'): dl.download(tmp_path, ['test'], pcam.url)
    pcam.files[test] = good
    for part in ('y', 'meta'): (tmp_path/raw_name('test', part)).unlink()
    dl.download(tmp_path, ['test'], pcam.url)   # what the message says to do helps


def test_a_gz_that_was_called_h5(pcam, tmp_path):
    (tmp_path/raw_name('test', 'y')).write_bytes(pcam.files[served_name('test', 'y')])
    with pytest.raises(ValueError, match='test_y.h5 is no HDF5 file'): dl.download(tmp_path, ['test'], pcam.url)


def test_no_room_for_the_release(pcam, tmp_path, monkeypatch):
    monkeypatch.setattr(dl.shutil, 'disk_usage', lambda p: namedtuple('U', 'free')(1000))
    fails(OSError, 'the release needs', tmp_path, dl.download, tmp_path, base=pcam.url)
    assert not pcam.log
