"""The emoji shards and their split: no test picture is in training, in no disguise."""
import numpy as np
import pytest

from t2i.data import NEAR_DUPLICATE, SHARDS, STYLES, decode_image, distances, fingerprints, is_test_keyword, load_emoji, split_emoji


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
