"""The emoji shards, how they are built, and their split: no test picture is in training, in no disguise."""
import json

import numpy as np
import pytest

from t2i import data
from t2i.data import KEPT_TONES, NEAR_DUPLICATE, SHARDS, STYLES, build_emoji, decode_image, distances, fingerprints, is_test_keyword, load_emoji, split_emoji
from t2i.readers import hash_fraction


@pytest.fixture(scope='module')
def table():
    table = load_emoji()
    table['pair'] = table.concept + '/' + table['style']
    return table


@pytest.fixture(scope='module')
def marks(table): return fingerprints(map(decode_image, table.image))


def test_size():
    assert sum(p.stat().st_size for p in SHARDS.glob('*.parquet')) <= 18e6


def test_rows(table):
    assert table.key.is_unique and set(table['style']) == set(STYLES) and (table['split'] == 'test').sum() == 1000
    assert set(table.license) == {'Apache-2.0', 'MIT', 'CC-BY-4.0'} and (table.author != '').all() and table.source.str.startswith('npm:').all()
    assert (table.captions.map(lambda c: c[0]) == table.caption).all() and table.caption.str.strip().all()


def test_split_is_what_the_code_makes(table, marks):
    assert (split_emoji(table, marks) == table['split']).all()


def test_all_tones_of_a_pair_are_on_one_side(table):
    assert (table.groupby('pair')['split'].nunique() == 1).all()


def test_a_test_concept_is_in_training_in_two_other_styles(table):
    training = table[table['split'] == 'train'].groupby('concept')['style'].agg(set).to_dict()
    pairs = table[table['split'] == 'test'][['concept', 'style']].drop_duplicates().itertuples(index=False)
    assert not [(c, s) for c, s in pairs if len(training.get(c, set()) - {s}) < 2]


def test_no_test_picture_or_near_duplicate_is_in_training(table, marks):
    test = (table['split'] == 'test').to_numpy()
    assert not set(table.image[test]) & set(table.image[~test])
    for mark in marks:
        nearest = distances(mark[test], mark[~test]).min(1)
        assert nearest.min() >= NEAR_DUPLICATE, table.key[test].iloc[nearest.argmin()]


def test_the_distance_finds_what_it_should():
    "A picture that is shifted, enlarged or saved badly is the same picture; another style of the same thing is not."
    from PIL import Image
    table = load_emoji()
    by_key = dict(zip(table.key, table.image))
    apple, other = decode_image(by_key['noto/red-apple']), decode_image(by_key['twemoji/red-apple'])
    smaller = Image.new('RGB', (64, 64), 'white')
    smaller.paste(apple.resize((48, 48), Image.Resampling.BICUBIC), (3, 9))
    plain, cropped = fingerprints([apple, smaller, other])
    near = np.minimum(distances(plain, plain), distances(cropped, cropped))
    assert near[0, 1] < NEAR_DUPLICATE < near[0, 2]


def test_captions_keep_the_test_keywords_out(table):
    for row in table.sample(500, random_state=0).itertuples():
        words = row.captions[-1].removesuffix(f', {row.style} style').split(', ')
        assert not [w for w in words if w in row.keywords and w != row.name and is_test_keyword(row.concept, w)]


def test_shards_are_built_from_the_packages(tmp_path, monkeypatch):
    "Names, captions and licences come from where they should; letters, two tones in one picture, white on white and icons that nobody can name stay out."
    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding='utf-8')
    def square(colour): return {'body': f'<rect x="2" y="2" width="12" height="12" fill="{colour}"/>'}
    monkeypatch.setattr(data, 'EMOJI_SETS', {'@some/one': ('noto', '1'), '@some/two': ('blob', '2')})
    monkeypatch.setattr(data, 'EMOJI_NAMES', ('names', '3'))
    monkeypatch.setattr('shutil.which', lambda name: pytest.fail('nothing has to be fetched'))
    def emoji(label, hexcode, subgroup, group=0, **more): return {'label': label, 'hexcode': hexcode, 'group': group, 'subgroup': subgroup, 'tags': ['fruit', 'red', 'ripe'], **more}
    tones = [{'label': f'wave: {tone} skin tone', 'hexcode': f'1F44C-{code}'} for code, tone in data.TONES.items()]
    pair = [{'label': 'hug: medium-light skin tone, medium-dark skin tone', 'hexcode': '1FAC2-1F3FC-1F3FE'}]
    write(tmp_path/'names-3/en/messages.json', {'groups': [{'order': 0, 'key': 'things'}], 'subgroups': [{'order': 0, 'key': 'food'}, {'order': 1, 'key': 'keycap'}]})
    write(tmp_path/'names-3/en/data.json', [emoji('red apple', '1F34E', 0), emoji('Mrs. Claus’ hat', '0023-FE0F', 0), emoji('wave', '1F44C', 0, skins=tones), emoji('hug', '1FAC2', 0, skins=pair),
                                            emoji('keycap: 1', '0031', 1), emoji('dove', '1F54A', 0), emoji('part', '1F9B0', 0, group=None)])
    for folder, icons in (('one-1', {'red-apple': square('red'), 'mrs-claus-hat': square('blue'), 'hug-medium-light-skin-tone-medium-dark-skin-tone': square('tan'), 'keycap-1': square('blue'), 'dove': square('white'), 'part': square('red'),
                                     'unheard-of': square('red'), **{f'wave-{tone}-skin-tone': square('tan') for tone in data.TONES.values()}}),
                          ('two-2', {'red-app-le': square('#800000'), 'redapple': square('maroon'), 'bonnet': square('navy'), 'wave-1': square('gold'), 'hello': square('gold'), 'turned': square('gold')})):
        write(tmp_path/folder/'icons.json', {'width': 16, 'height': 16, 'icons': icons, 'aliases': {'hello': {'parent': 'wave'}, 'turned': {'parent': 'wave', 'rotate': 1}}})
        write(tmp_path/folder/'info.json', {'license': {'spdx': 'MIT'}, 'author': {'name': f'author of {folder}'}})
    write(tmp_path/'two-2/chars.json', {'0023': 'bonnet'})  # the set's own table of names

    table = build_emoji(tmp_path/'out', tmp_path, size=32, progress=False).set_index('key')
    kept = [f'noto/wave-{tone}-skin-tone' for code, tone in data.TONES.items() if hash_fraction(f'tone/noto/1F44C-{code}') < KEPT_TONES]
    assert 0 < len(kept) < len(data.TONES)
    names = {'noto/red-apple': 'red apple', 'noto/mrs-claus-hat': "Mrs. Claus' hat", 'blob/red-app-le': 'red apple', 'blob/redapple': 'red apple', 'blob/bonnet': "Mrs. Claus' hat", 'blob/wave-1': 'wave', 'blob/hello': 'wave'}
    assert {key: name for key, name in table['name'].items() if key not in kept} == names and set(kept) <= set(table.index)
    assert (table.concept[kept] == 'wave').all() and all(tone in name for tone, name in zip(table.tone[kept], table['name'][kept]))
    apple = table.loc['noto/red-apple']
    assert apple.captions[:3] == ['red apple, noto style', 'a red apple', 'noto style red apple'] and (apple.license, apple.author, apple.source) == ('MIT', 'author of one-1', 'npm:@some/one@1')
    pixels = np.asarray(decode_image(apple.image))
    assert pixels.shape == (32, 32, 3) and tuple(pixels[16, 16]) == (255, 0, 0) and tuple(pixels[1, 1]) == (255, 255, 255)

    written = load_emoji(folder=tmp_path/'out')
    assert list(written.key) == list(table.index) and list(written.image) == list(table.image)
