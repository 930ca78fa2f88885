"""Every kind of raw data is read, and whatever is wrong with it is skipped and counted under its reason."""
import io
import itertools
import json
import math
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from t2i.data import Undecodable, decode_image, prepare
from t2i.readers import CocoCaptions, Sample, Skipped, _content, _members, find_shards


class Stub:
    "An encoder that costs nothing."
    def encode_images(self, images): return torch.tensor([[np.asarray(i).mean() + 100, np.asarray(i).std()] for i in images], dtype=torch.float32)
    def encode_captions(self, captions): return torch.tensor([[float(len(c)), float(c.count('a')), 7.] for c in captions])


def picture(colour='red', size=(12, 8), mode='RGB', format='PNG', **options):
    buffer = io.BytesIO()
    Image.new('RGB', size, colour).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, 'w') as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(n, first=0):
    "What img2dataset writes for `n` pictures."
    return [member for i in range(first, first + n) for member in (
        (f'{i:05}.jpg', picture((i % 256, 9, 9), format='JPEG')), (f'{i:05}.txt', f'picture {i}'.encode()), (f'{i:05}.json', b'{"caption": "json"}'))]


def read(folder, **options): return [s for shard in find_shards(folder, **options) for s in shard]
def reasons(samples): return {s.key: s.reason for s in samples if isinstance(s, Skipped)}
def good(samples): return {s.key: s.captions for s in samples if isinstance(s, Sample)}


# -- formats ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('table', [False, True])
def test_names_that_a_mac_writes_in_another_way(tmp_path, table):
    "The letter é is one character or two; on a Mac both name one file."
    composed, decomposed = 'caf\u00e9', 'cafe\u0301'
    for i, name in enumerate((composed + '1', decomposed + '2')): (tmp_path/f'{name}.png').write_bytes(picture(size=(12, 8 + i)))
    if table: (tmp_path/'captions.csv').write_text(f'file,caption\n{decomposed}1.png,one\n{composed}2.png,two\n', encoding='utf-8')
    else:
        for name, text in ((decomposed + '1', 'one'), (composed + '2', 'two'), ('alone', 'none')): (tmp_path/f'{name}.txt').write_text(text)
    samples = read(tmp_path)
    assert good(samples) == {f'{composed}1.png': ('one',), f'{decomposed}2.png': ('two',)}
    assert reasons(samples) == ({} if table else {'alone.txt': 'no image'})


@pytest.mark.parametrize('table', [False, True])
def test_names_that_are_two_elsewhere(tmp_path, table):
    "Each has its own caption."
    names = 'caf\u00e9', 'cafe\u0301'
    for name in names: (tmp_path/f'{name}.png').write_bytes(picture())
    if table: (tmp_path/'captions.csv').write_text(''.join(f'{name}.png,{len(name)}\n' for name in ('file', *names)).replace('file.png,4', 'file,caption'), encoding='utf-8')
    else:
        for name in names: (tmp_path/f'{name}.txt').write_text(str(len(name)))
    samples = read(tmp_path)
    assert good(samples) == {f'{name}.png': (str(len(name)),) for name in names} and not reasons(samples)


def test_a_text_is_seen_beside_a_name_that_a_mac_wrote(tmp_path):
    (tmp_path/'cafe\u0301.png').write_bytes(picture())
    (tmp_path/'caf\u00e9.txt').write_text('one')
    assert good(read(tmp_path)) == {'cafe\u0301.png': ('one',)}


def test_a_table_that_was_written_on_windows(tmp_path):
    (tmp_path/'a').mkdir()
    for name in ('a/1.png', 'a/2.png', 'b\\3.png'): (tmp_path/name).write_bytes(picture())
    (tmp_path/'captions.csv').write_text('file,caption\na\\1.png,one\na/2.png,two\nb\\3.png,three\na\\4.png,four\n')
    samples = read(tmp_path)
    assert good(samples) == {'a/1.png': ('one',), 'a/2.png': ('two',), 'b\\3.png': ('three',)} and reasons(samples) == {'a/4.png': 'no image'}


def test_captions_are_found_in_whatever_folder_they_are(tmp_path):
    for name in ('a/1', 'b/2', 'b/3'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/f'{name}.png').write_bytes(picture())
    (tmp_path/'b/2.txt').write_text('a red square')
    (tmp_path/'a/notes.txt').write_text('about no picture')
    assert [s.captions for shard in find_shards(tmp_path) for s in shard if isinstance(s, Sample) and s.captions] == [('a red square',)]


def test_tar_of_img2dataset(tmp_path):
    write_tar(tmp_path/'00000.tar', pairs(3))
    write_tar(tmp_path/'00001.tar', [('./sub/a.PNG', picture()), ('./sub/a.cls', b'3'), ('./sub/a.json', b'{"caption": "from json"}'), ('._a.png', b'of macOS'), ('b.c.png', picture())])
    (tmp_path/'00000_stats.json').write_text('{}')
    (tmp_path/'00000.parquet').write_bytes(b'metadata of img2dataset, not read')
    assert [s.name for s in find_shards(tmp_path)] == ['00000', '00001']
    samples = read(tmp_path)
    assert good(samples) == {'00000': ('picture 0',), '00001': ('picture 1',), '00002': ('picture 2',), 'sub/a': ('from json',)}
    assert reasons(samples) == {'b': 'no image'}  # by WebDataset's rule the name ends at the first dot


def test_tar_with_long_names(tmp_path):
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        name = 'a'*90 + '/' + 'b'*60
        with tarfile.open(tmp_path/'0.tar', 'w', format=format) as tar:
            for ending, data in (('jpg', picture(format='JPEG')), ('txt', 'grüße'.encode())):
                info = tarfile.TarInfo(f'{name}.{ending}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert good(read(tmp_path)) == {name: ('grüße',)}


def test_parquet(tmp_path):
    pd.DataFrame({'key': ['a', 'b', 'c', 'd'], 'jpg': [picture('red'), None, b'', picture('blue')], 'caption': ['one', 'two', 'three', None]}).to_parquet(tmp_path/'0.parquet')
    samples = read(tmp_path)
    assert good(samples) == {'a': ('one',)} and reasons(samples) == {'b': 'no image', 'c': 'empty file', 'd': 'no caption'}


def test_parquet_of_hugging_face(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    captions = pa.Array.from_buffers(pa.string(), 2, pa.array([b'fine', b'\xff\xfe'], pa.binary()).buffers())  # one is not UTF-8
    pq.write_table(pa.table({'image': pa.array([{'bytes': picture(), 'path': 'x'}]*2), 'text': captions}), tmp_path/'train.parquet')
    samples = read(tmp_path)
    assert good(samples) == {'train-000000000': ('fine',)} and reasons(samples) == {'train-000000001': 'caption is not UTF-8'}


@pytest.mark.parametrize('kind', ['string', 'string_view', 'category'])
def test_parquet_knows_its_splits_in_whatever_kind_of_text(tmp_path, kind):
    import pyarrow as pa, pyarrow.parquet as pq
    split = pa.array(['train', 'test', 'validation', 'other'])
    split = split.dictionary_encode() if kind == 'category' else split.cast(getattr(pa, kind)())
    try: pq.write_table(pa.table({'image': [picture()]*4, 'text': ['a picture']*4, 'split': split}), tmp_path/'0.parquet')
    except pa.ArrowNotImplementedError as e: pytest.skip(f'this pyarrow writes no such file: {e}')
    assert [s.split for s in read(tmp_path)] == ['train', 'test', 'validation', '']


def test_names_of_classes_that_come_later_are_read(tmp_path):
    (tmp_path/'n01440764').mkdir()
    (tmp_path/'n01440764/a.png').write_bytes(picture())
    before, = find_shards(tmp_path, class_captions=True)
    (tmp_path/'LOC_synset_mapping.txt').write_text('n01440764 tench, Tinca tinca')
    after, = find_shards(tmp_path, class_captions=True)
    assert before.signature != after.signature and next(iter(after)).captions == ('tench',)
    np.savez(tmp_path/'train.npz', data=np.zeros((2, 12), np.uint8), labels=np.array([1, 2]))
    with pytest.raises(ValueError, match='map_clsloc.txt'): find_shards(tmp_path, class_captions=True)


def test_a_copy_of_a_shard_is_the_same_shard(tmp_path):
    write_tar(tmp_path/'a/0.tar', [('0.png', picture()), ('0.txt', b'a')])
    (tmp_path/'b').mkdir()
    (tmp_path/'b/0.tar').write_bytes((tmp_path/'a/0.tar').read_bytes())
    os.utime(tmp_path/'b/0.tar', (1, 1))
    (a,), (b,) = find_shards(tmp_path/'a'), find_shards(tmp_path/'b')
    assert a.signature == b.signature


def test_years_of_coco_are_not_mixed(tmp_path):
    (tmp_path/'annotations').mkdir()
    for split in ('train2017', 'val2014'):
        (tmp_path/split).mkdir()
        (tmp_path/f'annotations/captions_{split}.json').write_text(json.dumps({'annotations': []}))
    with pytest.raises(ValueError, match='several years, which share pictures'): find_shards(tmp_path)


def test_a_picture_keeps_sixteen_captions(tmp_path):
    (tmp_path/'one.png').write_bytes(picture())
    (tmp_path/'all.jsonl').write_text(json.dumps({'file': 'one.png', 'captions': [f'caption {i}' for i in range(2000)]}))
    sample, = read(tmp_path)
    assert sample.captions == tuple(f'caption {i}' for i in range(16)) and sample.dropped == 1984


@pytest.mark.parametrize('compressed', [False, True])
def test_imagenet_arrays(tmp_path, monkeypatch, compressed):
    monkeypatch.setattr('t2i.readers.PER_SHARD', 4)
    data = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), np.uint8)
    (np.savez_compressed if compressed else np.savez)(tmp_path/'train_data_batch_1.npz', data=data.reshape(10, -1), labels=np.arange(1, 11), mean=np.zeros(192))
    (tmp_path/'map_clsloc.txt').write_text('n02119789 1 kit_fox\nn02100735 2 English_setter\n')
    assert [len(list(s)) for s in find_shards(tmp_path)] == [4, 4, 2]
    samples = read(tmp_path)
    assert all(s.captions == () and (s.image == data[i].transpose(1, 2, 0)).all() for i, s in enumerate(samples))
    assert good(read(tmp_path, class_captions=True)) == {'train_data_batch_1-000000': ('kit fox',), 'train_data_batch_1-000001': ('English setter',)}


def test_imagenet_arrays_never_unpickle(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'sprung'),)
    np.savez(tmp_path/'a.npz', data=np.array([Trap()], dtype=object))
    assert [s.reason for s in read(tmp_path)] == ['damaged shard'] and not (tmp_path/'sprung').exists()
    np.savez(tmp_path/'a.npz', data=np.zeros((2, 12), np.uint8), labels=np.array([Trap(), 1], dtype=object))
    (tmp_path/'map_clsloc.txt').write_text('n02119789 1 kit_fox')
    assert [(s.reason, s.count) for s in read(tmp_path, class_captions=True)] == [('damaged shard', 2)] and not (tmp_path/'sprung').exists()


def test_imagenet_folders(tmp_path, monkeypatch):
    monkeypatch.setattr('t2i.readers.PER_SHARD', 2)
    for name in ('n01440764', 'n01443537'):
        (tmp_path/'train'/name).mkdir(parents=True)
        for i in range(3): (tmp_path/'train'/name/f'{name}_{i}.JPEG').write_bytes(picture(format='JPEG'))
    (tmp_path/'train/LOC_synset_mapping.txt').write_text('n01440764 tench, Tinca tinca\n')
    samples = read(tmp_path/'train')
    assert len(samples) == 6 and len(find_shards(tmp_path/'train')) == 4 and samples[0].key == 'n01440764/n01440764_0.JPEG' and samples[0].captions == ()
    assert {s.captions for s in read(tmp_path/'train', class_captions=True)} == {('tench',), ('n01443537',)}


def test_imagenet_as_a_tar_for_each_class(tmp_path):
    "As ILSVRC2012_img_train.tar holds it; tars of pairs beside them keep their captions, and names change nothing for those."
    for name in ('n01440764', 'n01443537'): write_tar(tmp_path/f'{name}.tar', [(f'{name}_{i}.JPEG', picture(format='JPEG')) for i in range(3)])
    pairs_only, = [s.signature for s in find_shards(write_tar(tmp_path/'pairs/00000.tar', pairs(2)).parent)]
    samples = read(tmp_path)
    assert {s.key: s.captions for s in samples} == {f'{name}_{i}': () for name in ('n01440764', 'n01443537') for i in range(3)}
    write_tar(tmp_path/'one/n01440764.tar', [('._n01440764_0.JPEG', b'of a Mac'), ('n01440764_0.JPEG', picture(format='JPEG'))])
    assert good(read(tmp_path/'one')) == {'n01440764_0': ()}
    (tmp_path/'LOC_synset_mapping.txt').write_text('n01440764 tench, Tinca tinca\n')
    assert {s.captions for s in read(tmp_path, class_captions=True)} == {('tench',), ('n01443537',)}
    assert [s.signature for s in find_shards(tmp_path)] != [s.signature for s in find_shards(tmp_path, class_captions=True)]
    assert [s.signature for s in find_shards(tmp_path/'pairs', class_captions=True)] == [pairs_only]


def test_tars_of_pairs_are_never_taken_for_a_class(tmp_path):
    "However they begin."
    jpg, text = picture(format='JPEG'), lambda i: f'cap {i}'.encode()
    tars = {'mac': [(f'{hidden}{i}.{e}', jpg if e == 'jpg' else text(i)) for i in range(2) for e in ('jpg', 'txt') for hidden in ('._', '')],
            'views': [m for i in range(2) for m in ((f'{i}.left.jpg', jpg), (f'{i}.jpg', jpg), (f'{i}.txt', text(i)))],
            'first': [('x.jpg', jpg), *(m for i in range(2) for m in ((f'{i}.jpg', jpg), (f'{i}.txt', text(i))))],
            'unsorted': [('0.jpg', jpg), ('1.jpg', jpg), ('0.txt', text(0)), ('1.txt', text(1))], 'numbers': [('0.jpg', jpg), ('0.cls', b'3')]}
    found = {}
    for name, members in tars.items():
        write_tar(tmp_path/name/'00000.tar', members)
        for options in ({}, {'class_captions': True}): found[(name, *options)] = list(good(read(tmp_path/name, **options)).values())
    both = [('cap 0',), ('cap 1',)]
    for options in ((), ('class_captions',)): assert {name: found[(name, *options)] for name in tars} == {'mac': both, 'views': both, 'first': both, 'unsorted': [], 'numbers': []}


@pytest.mark.parametrize('year', [2014, 2017])
def test_coco(tmp_path, year):
    with pytest.raises(FileNotFoundError, match=f'annotations_trainval{year}.zip'): CocoCaptions(tmp_path, year=year)
    (tmp_path/'annotations').mkdir()
    rows = [{'image_id': i, 'id': 100*i - k, 'caption': f' {i} {k}\n'} for i in (9, 3) for k in range(6)]
    (tmp_path/f'annotations/captions_val{year}.json').write_text(json.dumps({'annotations': rows}))
    with pytest.raises(FileNotFoundError, match=f'val{year}.zip'): CocoCaptions(tmp_path, year=year)
    (tmp_path/f'val{year}').mkdir()
    for i in (3, 9): (tmp_path/f'val{year}'/(f'COCO_val2014_{i:012}.jpg' if year == 2014 else f'{i:012}.jpg')).write_bytes(picture(format='JPEG'))
    coco = CocoCaptions(tmp_path, year=year)
    assert list(coco.table.key) == ['3', '9'] and coco.table.captions[0] == ['3 5', '3 4', '3 3', '3 2', '3 1'] and all(map(os.path.isfile, coco.table.path))
    picks = [coco.one_caption(seed) for seed in range(20)]
    assert all(c in cs for p in picks for c, cs in zip(p, coco.table.captions)) and len({p[0] for p in picks}) == 5
    assert (coco.one_caption(3) == coco.one_caption(3)).all() and coco.one_caption(0)[1:].tolist() == picks[0][1:].tolist()
    (tmp_path/f'annotations/captions_train{year}.json').write_text('its pictures were not downloaded')
    samples = read(tmp_path)
    assert [len(s.captions) for s in samples] == [5, 5] and {s.split for s in samples} == {'validation'}
    (tmp_path/f'annotations/captions_val{year}.json').write_text('{"annotations": [{}]}')
    with pytest.raises(ValueError, match='is not MS-COCO'): CocoCaptions(tmp_path, year=year).table


def own_pictures(folder, n=6):
    (folder/'cats').mkdir(parents=True)
    for i in range(n): (folder/f'cats/{i}.png').write_bytes(picture((i, 0, 0)))
    return [f'cats/{i}.png' for i in range(n)]


def test_pictures_with_text_files(tmp_path):
    files = own_pictures(tmp_path)
    for i, f in enumerate(files[:4]): (tmp_path/f).with_suffix('.txt').write_bytes([b'a cat', '\ufeffein grüner Kater\n'.encode(), b' \n\t', b'\xff\xff'][i])
    (tmp_path/'cats/alone.txt').write_text('no picture')
    samples = read(tmp_path)
    assert good(samples) == {files[0]: ('a cat',), files[1]: ('ein grüner Kater',)}
    assert reasons(samples) == {files[2]: 'no caption', files[3]: 'caption is not UTF-8', files[4]: 'no caption', files[5]: 'no caption', 'cats/alone.txt': 'no image'}


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl'])
def test_pictures_with_a_table(tmp_path, kind):
    files = own_pictures(tmp_path)
    rows = [(files[0], 'one, "two"'), (files[1], 'first'), (files[1], 'second'), (files[2], ''), ('cats/gone.png', 'x'), ('', 'nothing'), (files[3], '\udcff')]
    if kind == 'jsonl': text = ''.join(json.dumps({'file_name': f, 'text': c}) + '\n' for f, c in rows) + '\n[1]\n{broken\n'
    else:
        quote = lambda c: '"' + c.replace('"', '""') + '"'
        text = ('\t' if kind == 'tsv' else ',').join(['file', 'caption']) + '\n' + ''.join(('\t' if kind == 'tsv' else ',').join(map(quote, r)) + '\n' for r in rows)
    (tmp_path/f'captions.{kind}').write_bytes(text.encode('utf-8', 'surrogateescape'))
    samples = read(tmp_path)
    assert good(samples) == {files[0]: ('one, "two"',), files[1]: ('first', 'second')}
    bad = {files[2]: 'no caption', 'cats/gone.png': 'no image', files[3]: 'caption is not UTF-8', files[4]: 'no caption', files[5]: 'no caption', f'captions.{kind} row 6': 'malformed row'}
    assert reasons(samples) == bad | ({f'captions.jsonl row {i}': 'malformed row' for i in (9, 10)} if kind == 'jsonl' else {})


@pytest.mark.parametrize('text', ['file, caption\n{}, "a cat, asleep"\n', 'File;Caption\n{};a cat, asleep\n', '\ufeffFILE , CAPTION\n{},"a cat, asleep"\n'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_tables_as_people_and_their_programs_write_them(tmp_path, text, encoding):
    (tmp_path/'captions.csv').write_text(text.removeprefix('\ufeff' if encoding == 'utf-16' else '').format(own_pictures(tmp_path, 1)[0]), encoding=encoding)
    assert list(good(read(tmp_path)).values()) == [('a cat, asleep',)]


def test_a_caption_cut_by_its_own_comma_is_skipped(tmp_path):
    "What stands before the comma is another caption. Empty fields at the end of a row, as spreadsheets write them, are none."
    first, second, third = own_pictures(tmp_path, 3)
    (tmp_path/'captions.csv').write_text(f'file,caption\n{first},a red, shiny apple\n{second},"a red, shiny apple"\n{third},an apple,,\n')
    samples = read(tmp_path)
    assert good(samples) == {second: ('a red, shiny apple',), third: ('an apple',)}
    assert reasons(samples)['captions.csv row 1'].startswith('more fields than columns: quote')


def test_files_of_img2dataset_are_found_beside_its_table(tmp_path):
    "Its default writes single files, and a Parquet file without pictures."
    (tmp_path/'00000').mkdir()
    for i in range(2): (tmp_path/f'00000/{i:09}.jpg').write_bytes(picture(format='JPEG')); (tmp_path/f'00000/{i:09}.txt').write_text(f'number {i}')
    pd.DataFrame({'url': ['a', 'b'], 'caption': ['number 0', 'number 1']}).to_parquet(tmp_path/'00000.parquet')
    assert good(read(tmp_path)) == {f'00000/{i:09}.jpg': (f'number {i}',) for i in range(2)}


def test_linked_folders_are_read_and_do_not_lead_in_circles(tmp_path):
    (tmp_path/'all/cats').mkdir(parents=True); (tmp_path/'some').mkdir()
    (tmp_path/'all/cats/1.png').write_bytes(picture()); (tmp_path/'all/cats/1.txt').write_text('a cat')
    (tmp_path/'some/cats').symlink_to(tmp_path/'all/cats'); (tmp_path/'all/cats/up').symlink_to(tmp_path/'all')
    assert good(read(tmp_path/'some')) == {'cats/1.png': ('a cat',)}


def test_an_empty_caption_takes_no_place_in_the_validation_split(tmp_path, monkeypatch):
    monkeypatch.setattr('t2i.readers.hash_fraction', lambda key: 'empty' not in key)
    for name in ('one', 'two', 'empty'): (tmp_path/f'{name}.png').write_bytes(picture()); (tmp_path/f'{name}.txt').write_text('a square'*(name != 'empty'))
    assert Counter(s.split for s in read(tmp_path) if isinstance(s, Sample)) == {'train': 1, 'validation': 1}


def test_pictures_are_cut_in_shards_of_a_fixed_size_and_always_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr('t2i.readers.PER_SHARD', 4)
    for f in own_pictures(tmp_path, 10): (tmp_path/f).with_suffix('.txt').write_text(f)
    first, again = find_shards(tmp_path), find_shards(tmp_path)
    assert [(s.name, s.signature) for s in first] == [(s.name, s.signature) for s in again] and [len(list(s)) for s in first] == [4, 4, 2]
    (tmp_path/'cats/5.txt').write_text('changed')
    assert [a.signature != b.signature for a, b in zip(first, find_shards(tmp_path))] == [False, True, False]


@pytest.mark.parametrize('n', [1, 7, 40, 100])
def test_a_few_pictures_have_a_validation_split(tmp_path, n):
    for f in own_pictures(tmp_path, n): (tmp_path/f).with_suffix('.txt').write_text(f)
    assert Counter(s.split for s in read(tmp_path))['validation'] == math.ceil(0.05*n)


def test_what_cannot_be_a_source_gets_one_sentence(tmp_path):
    for make, kind, words in [(lambda: None, ValueError, 'nothing that can be read'), (lambda: (tmp_path/'a.png').write_bytes(picture()), ValueError, 'without captions'),
                              (lambda: (tmp_path/'a.csv').write_text('x,y\n1,2\n'), ValueError, 'columns x, y'), (lambda: (tmp_path/'b.csv').write_text(''), ValueError, 'a.csv, b.csv')]:
        make()
        with pytest.raises(kind, match=words) as e: find_shards(tmp_path)
        assert '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='no folder'): find_shards(tmp_path/'missing')


# -- what is wrong with archives ------------------------------------------------------------------------------------
def test_broken_tars(tmp_path):
    whole = write_tar(tmp_path/'x/0.tar', pairs(4)).read_bytes()
    ends = whole.rindex(b'{"caption"') + 1024  # of the last member
    def after(data):
        (tmp_path/'x/0.tar').write_bytes(data)
        samples = read(tmp_path/'x')
        return len(good(samples)), list(reasons(samples).items())
    assert after(whole) == (4, [])
    assert after(b'') == (0, [('0.tar', 'empty file')])
    for cut in range(0, ends, 512):  # at every block there is a complaint, and at most the picture that was cut is lost
        n, bad = after(whole[:cut] or b'x')
        assert [r for _, r in bad] == ['truncated archive'] and n >= whole[:cut].count(b'.json\0') - 1
    header = whole.index(b'00002.jpg')
    n, bad = after(whole[:header + 30] + b'garbage' + whole[header + 37:])  # tarfile would end here in silence
    assert n == 2 and bad == [('00001 and after', 'truncated archive')]
    assert after(b'this is not a tar'*100) == (0, [('0.tar', 'truncated archive')])


def test_what_is_wrong_with_a_sample_in_a_tar(tmp_path):
    write_tar(tmp_path/'0.tar', [*pairs(2), *pairs(1), ('a.txt', b'no picture'), ('b.jpg', picture()), ('c.jpg', b''), ('c.txt', b'empty'), ('d.jpg', picture()), ('d.txt', b'  '),
                                 ('e.jpg', picture()), ('e.txt', b'\xc3('), ('f.jpg', picture()), ('f.json', b'{"caption": null}'), ('g.jpg', picture()), ('g.json', b'{"caption": "\\ud800"}'),
                                 ('h.jpg', picture()), ('h.json', b'{'), ('i.jpg', picture()), ('i.txt', b'two'), ('i.jpg', picture()), ('i.txt', b'twice')])
    samples = read(tmp_path)
    assert [s.key for s in samples if isinstance(s, Sample)] == ['00000', '00001', 'i']
    assert reasons(samples) == {'00000': 'duplicate key', 'a': 'no image', 'b': 'no caption', 'c': 'empty file', 'd': 'no caption', 'e': 'caption is not UTF-8', 'f': 'no caption',
                                'g': 'caption is not UTF-8', 'h': 'no caption', 'i': 'duplicate key'}


def test_broken_parquet_and_npz(tmp_path):
    for name, write in (('0.parquet', lambda p: pd.DataFrame({'jpg': [picture()]*9, 'caption': ['x']*9}).to_parquet(p)), ('0.npz', lambda p: np.savez(p, data=np.zeros((9, 12), np.uint8)))):
        folder = tmp_path/name[2:]
        folder.mkdir()
        write(folder/name)
        whole = (folder/name).read_bytes()
        assert len(good(read(folder))) == 9
        for data, reason in ((b'', 'empty file'), (whole[:-20], 'damaged shard'), (b'garbage'*9, 'damaged shard')):
            (folder/name).write_bytes(data)
            assert [s.reason for s in read(folder)] == [reason]
    with zipfile.ZipFile(tmp_path/'npz/0.npz', 'w') as archive:  # claims rows that are not there
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {'descr': '|u1', 'fortran_order': False, 'shape': (10**12, 12)})
        archive.writestr('data.npy', header.getvalue() + bytes(60))
    assert [s.reason for s in read(tmp_path/'npz')] == ['damaged shard']


# -- pictures -------------------------------------------------------------------------------------------------------
def sixteen_bit(value, format='PNG'):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6), value, np.uint16)).save(buffer, format)
    return buffer.getvalue()


def animated(format):
    frames, buffer = [Image.new('RGB', (6, 6), c) for c in ('lime', 'red')], io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def clear(mode, format='PNG', **options):
    buffer = io.BytesIO()
    image = Image.new('RGBA', (6, 4), (0, 0, 0, 0)).convert(mode)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned():
    image, exif, buffer = Image.new('RGB', (4, 8), 'red'), Image.Exif(), io.BytesIO()
    exif[274] = 6
    image.save(buffer, 'JPEG', exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize('data, size, colour', [
    (picture('red', mode='CMYK', format='JPEG'), (12, 8), (254, 0, 0)), (picture('red', mode='CMYK', format='TIFF'), (12, 8), (255, 0, 0)),
    (picture('red', mode='P'), (12, 8), (255, 0, 0)), (picture('white', mode='1'), (12, 8), (255, 255, 255)), (picture('grey', mode='L'), (12, 8), (128, 128, 128)),
    (picture('red', mode='YCbCr', format='JPEG'), (12, 8), (254, 0, 0)), (sixteen_bit(32896), (6, 6), (128, 128, 128)), (sixteen_bit(257*40, 'TIFF'), (6, 6), (40, 40, 40)),
    (animated('GIF'), (6, 6), (0, 255, 0)), (animated('PNG'), (6, 6), (0, 255, 0)), (animated('WEBP'), (6, 6), (0, 255, 0)),
    (clear('RGBA'), (6, 4), (255, 255, 255)), (clear('LA'), (6, 4), (255, 255, 255)), (clear('RGBA', 'WEBP', lossless=True), (6, 4), (255, 255, 255)),
    (picture('black', mode='P', transparency=0), (12, 8), (255, 255, 255)), (picture('black', transparency=(0, 0, 0)), (12, 8), (255, 255, 255)), (turned(), (8, 4), (254, 0, 0))],
    ids='CMYK-JPEG CMYK-TIFF P 1 L YCbCr 16-PNG 16-TIFF GIF APNG WEBP RGBA LA RGBA-WEBP P-clear RGB-clear turned'.split())
def test_modes(data, size, colour):
    image = decode_image(data)
    assert image.mode == 'RGB' and image.size == size
    assert np.abs(np.asarray(image).reshape(-1, 3).astype(int) - colour).max() <= 2


def bomb(width=30000, height=30000):
    "A PNG of a few bytes whose header claims a huge picture."
    data = bytearray(picture())
    data[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
    import zlib
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    return bytes(data)


@pytest.mark.parametrize('data, reason', [(bomb(), 'decompression bomb'), (bomb(9500, 9500), 'decompression bomb'), (picture()[:50], 'undecodable image'), (b'text', 'undecodable image'),
                                          (picture(format='JPEG')[:-50], 'undecodable image')], ids=['bomb', 'a little too large', 'cut', 'text', 'JPEG cut'])
def test_what_is_not_decoded(data, reason):
    with pytest.raises(Undecodable, match='not a picture') as e: decode_image(data)
    assert e.value.reason == reason


def test_no_program_is_run_for_a_picture(monkeypatch):
    ran = []
    monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', lambda *args, **kwargs: ran.append(args))
    with pytest.raises(Undecodable): decode_image(picture(format='EPS'))
    assert not ran


def test_every_reason_is_counted_with_its_shard_and_key(tmp_path):
    strip = picture(size=(60000, 1))  # padded to a square it would be a bomb
    write_tar(tmp_path/'raw/00000.tar', [*pairs(2), ('strip.png', strip), ('strip.txt', b'long'), ('cmyk.jpg', picture(mode='CMYK', format='JPEG')), ('cmyk.txt', b'ink'),
                                         ('bomb.png', bomb()), ('bomb.txt', b'x'), ('cut.png', picture()[:50]), ('cut.txt', b'x'), ('blank.png', picture()), ('blank.txt', b''), *pairs(1)])
    write_tar(tmp_path/'raw/00001.tar', pairs(3, first=50))
    data = (tmp_path/'raw/00001.tar').read_bytes()
    (tmp_path/'raw/00001.tar').write_bytes(data[:data.index(b'00052.txt') + 100])
    report = prepare(Stub(), tmp_path/'raw', tmp_path/'out', progress=False)
    assert report['shards'] == {'raw-00000': {'samples': 8, 'prepared': 4, 'skipped': {
                                    'decompression bomb': ['bomb'], 'undecodable image': ['cut'], 'no caption': ['blank'], 'duplicate key': ['00000']}},
                                'raw-00001': {'samples': 3, 'prepared': 2, 'skipped': {'truncated archive': ['00052']}}}
    assert report['skipped'] == {'decompression bomb': 1, 'undecodable image': 1, 'no caption': 1, 'duplicate key': 1, 'truncated archive': 1}
    assert report['samples'] == 11 == report['prepared'] + sum(report['skipped'].values())


def test_empty_missing_and_oversized_files(tmp_path, monkeypatch):
    monkeypatch.setattr('t2i.data.MAX_BYTES', 5000)
    files = own_pictures(tmp_path/'raw')
    for f in files: (tmp_path/'raw'/f).with_suffix('.txt').write_text('a cat')
    (tmp_path/'raw'/files[0]).write_bytes(b'')
    (tmp_path/'raw'/files[1]).write_bytes(bytes(6000))
    (tmp_path/'raw'/files[2]).unlink()
    (tmp_path/'raw'/files[2]).symlink_to('nowhere.png')
    (tmp_path/'raw'/files[3]).unlink()
    (tmp_path/'raw'/files[3]).mkdir()
    report = prepare(Stub(), tmp_path/'raw', tmp_path/'out', progress=False)
    assert report['shards']['raw-00000']['skipped'] == {'empty file': [files[0]], 'file too large': [files[1]], 'no image': [files[2]], 'unreadable file': [files[3]]}


# -- fuzz -----------------------------------------------------------------------------------------------------------
FUZZ = int(os.environ.get('T2I_FUZZ', 60))  # T2I_FUZZ=1000 pytest tests/test_readers.py -k malformed

def mutated(data, rng):
    "Some bytes changed, cut out, repeated, or the end lost."
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        i, n = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 40))
        match rng.integers(0, 5):
            case 0: data[i:i + n] = rng.bytes(n)
            case 1: del data[i:i + n]
            case 2: data[i:i] = data[i:i + 20*n]
            case 3: data[i:i + 1] = bytes([rng.choice([0, 255, 128, 1])])
            case 4: del data[max(i, 1 if rng.random() < 0.9 else 0):]
    return bytes(data)


def any_picture(rng):
    mode, format = 'RGB-JPEG CMYK-JPEG RGB-PNG P-PNG RGBA-PNG P-GIF RGB-WEBP RGB-TIFF RGB-BMP 1-TIFF'.split()[rng.integers(0, 10)].split('-')
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (int(rng.integers(1, 40)), int(rng.integers(1, 40)), 3), np.uint8)).convert(mode).save(buffer, format)
    return buffer.getvalue()


def any_caption(rng): return [b'a caption', b'', b' \n', b'\xff\xfe\x00', '漢字 🙂'.encode(), b'\0', rng.bytes(30), b'a'*5000, '\ufeff'.encode(), b'{"caption": 1}'][rng.integers(0, 10)]


def malformed(folder, seed):
    "A source with something wrong with it → how many samples it has at least."
    rng = np.random.default_rng(seed)
    folder.mkdir()
    spoil = lambda data, often=0.5: mutated(data, rng) if rng.random() < often else data
    n = int(rng.integers(1, 6))
    match seed % 6:
        case 0:
            for i in range(n):
                (folder/f'{i}.png').write_bytes(spoil(any_picture(rng), 0.8))
                (folder/f'{i}.txt').write_bytes(any_caption(rng))
            return n
        case 1:
            members = [m for i in range(n) for m in (
                (f'{i % 4}.{rng.choice(["jpg", "png"])}', spoil(any_picture(rng))), (f'{i % 4}.txt', any_caption(rng)), (f'{i % 4}.json', spoil(b'{"caption": "c"}')))]
            path = write_tar(folder/'0.tar', members)
            path.write_bytes(spoil(path.read_bytes(), 0.6))
        case 2:
            columns = {'key': lambda i: f'{i % 4}', 'image': lambda i: spoil(any_picture(rng)), 'caption': lambda i: any_caption(rng)}
            pd.DataFrame({name: [column(i) for i in range(n)] for name, column in columns.items()}).to_parquet(folder/'0.parquet')
            (folder/'0.parquet').write_bytes(spoil((folder/'0.parquet').read_bytes(), 0.6))
        case 3:
            (np.savez if rng.random() < 0.5 else np.savez_compressed)(folder/'0.npz', data=rng.integers(0, 256, (n, 192), np.uint8), labels=np.arange(n))
            (folder/'0.npz').write_bytes(spoil((folder/'0.npz').read_bytes(), 0.9))
        case 4 | 5:
            kind = 'csv' if seed % 6 == 4 else 'jsonl'
            for i in range(n): (folder/f'{i}.jpg').write_bytes(spoil(any_picture(rng), 0.3))
            rows = [(f'{i}.jpg'.encode(), any_caption(rng)) for i in range(n)]
            line = lambda f, c: json.dumps({'file': f.decode(), 'caption': c.decode('utf-8', 'surrogateescape')}).encode()
            text = b'file,caption\n' + b''.join(f + b',' + c + b'\n' for f, c in rows) if kind == 'csv' else b''.join(line(f, c) + b'\n' for f, c in rows)
            (folder/f'captions.{kind}').write_bytes(spoil(text, 0.7))
            return n
    return 1


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('part', range(10))
def test_malformed_sources_never_stop_us_and_nothing_is_lost(tmp_path, part):
    for seed in range(part*FUZZ//10, (part + 1)*FUZZ//10):
        at_least = malformed(tmp_path/str(seed), seed)
        try: prepare(Stub(), tmp_path/str(seed), tmp_path/f'{seed}.out', progress=False, workers=1)
        except ValueError as e:
            assert 'none of the' in str(e) or 'columns' in str(e), (seed, e)  # nothing was good, or the table has lost its head
            if 'columns' in str(e): continue
        report = json.loads((tmp_path/f'{seed}.out/report.json').read_text())
        assert report['samples'] == report['prepared'] + sum(report['skipped'].values()) >= at_least, (seed, report)
        assert all(sum(map(len, s['skipped'].values())) >= 1 for s in report['shards'].values() if s['samples'] > s['prepared']), (seed, report)


def test_a_tar_does_not_lead_back():
    info = tarfile.TarInfo('0.png')
    info.size = -512  # the next header would be this one
    with pytest.raises(tarfile.TarError, match='negative size|invalid offset'): list(itertools.islice(_members(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))), 9))


@pytest.mark.parametrize('size', [10, 5000, 2**20])
def test_a_change_at_the_end_of_a_shard_is_noticed(tmp_path, size):
    (tmp_path/'x').write_bytes(bytes(size))
    before = _content(tmp_path/'x')
    (tmp_path/'x').write_bytes(bytes(size - 1) + b'1')
    assert _content(tmp_path/'x') != before


def test_a_caption_that_is_given_twice_counts_once(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    (tmp_path/'captions.csv').write_text('file,caption\na.png,a cat\na.png,a cat\na.png,my cat\n')
    sample, = [sample for shard in find_shards(tmp_path) for sample in shard]
    assert sample.captions == ('a cat', 'my cat')


def test_pictures_that_come_later_move_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr('t2i.readers.PER_SHARD', 2)
    (tmp_path/'cats').mkdir()
    for name in 'bcdef': Image.new('RGB', (8, 8)).save(tmp_path/f'cats/{name}.png')
    shards = find_shards(tmp_path)
    Image.new('RGB', (8, 8)).save(tmp_path/'cats/a.png')
    assert [[sample.key for sample in shard] for shard in shards] == [['cats/b.png', 'cats/c.png'], ['cats/d.png', 'cats/e.png'], ['cats/f.png']]


def test_classes_with_other_names_are_read_again(tmp_path):
    (tmp_path/'n01440764').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'n01440764/0.png')
    def signatures(name):
        (tmp_path/'LOC_synset_mapping.txt').write_text(f'n01440764 {name}\n')
        return [s.signature for s in find_shards(tmp_path, class_captions=True)]
    assert signatures('tench') == signatures('tench') != signatures('goldfish')


def test_a_table_in_either_order_of_bytes_is_read(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'0.png')
    for encoding in ('utf-16-le', 'utf-16-be'):
        (tmp_path/'t.csv').write_text('\ufefffile,caption\n0.png,a cat\n', encoding=encoding)
        assert [s.captions for shard in find_shards(tmp_path) for s in shard] == [('a cat',)], encoding


def test_hidden_texts_of_a_mac_are_no_captions(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'0.png')
    for name in ('0.txt', '._0.txt'): (tmp_path/name).write_text('a cat')
    assert [s.key for shard in find_shards(tmp_path) for s in shard] == ['0.png']


def test_a_name_of_a_column_may_have_a_semicolon(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'0.png')
    (tmp_path/'t.csv').write_text('file,caption,width;height\n0.png,a cat,8;8\n')
    assert [s.captions for shard in find_shards(tmp_path) for s in shard] == [('a cat',)]


def test_an_empty_column_gives_way_to_one_that_tells(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'0.png')
    (tmp_path/'t.jsonl').write_text('{"file": null, "file_name": "0.png", "caption": null, "text": "a cat"}\n')
    assert [s.captions for shard in find_shards(tmp_path) for s in shard] == [('a cat',)]
