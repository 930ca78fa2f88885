"""Two emoji in one picture: what is put together, what never is, and who learns from it."""
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from shell import shell
from t2i import composed as module, data
from t2i.clip import CLIP, TextTask
from t2i.composed import GLASSES, HATS, asked_together, composed, composed_emoji, cut_out, put_together
from t2i.core import load_weights
from t2i.data import PreparedDataset, decode_image, load_emoji, write_shards
from t2i.decoder import DecoderTask
from t2i.train import step_generator
from t2i.translator import TranslatorTask


@pytest.fixture(scope='module')
def table(): return load_emoji('train')


@pytest.fixture(scope='module')
def rows(table): return composed(table, table, 300)


def test_rows_name_what_they_show(table, rows):
    by_key = table.set_index('key')
    assert len(rows) == 300 and rows.key.is_unique and set(rows.way) == {'eyes', 'head', 'corner', 'side'}
    for row in rows.itertuples():
        first, way, second, _ = row.key.rsplit('/', 3)
        assert row.name == f"{by_key.name[first]} {'and' if way == 'side' else 'with'} {second}" and row.style == by_key['style'][first] and way == row.way
        assert second in {'eyes': GLASSES, 'head': HATS}.get(way, [second]) and all(second in c and row.style in c for c in row.captions if ' style' in c)
        shown, alone = (np.asarray(decode_image(d)).astype(int) for d in (row.image, by_key.image[first]))
        assert shown.shape == (64, 64, 3) and abs(shown - alone).mean() > 2
    assert composed(table, table, 5).equals(rows[:5]) and not composed(table, table, 5, seed=1).equals(rows[:5])


def test_what_the_judge_asks_for_is_never_put_together(table):
    cats = table[table.keywords.map(lambda k: 'cat' in k) & ~table.name.str.contains('cat')]
    assert 'tiger face' in set(cats.name)
    rows = pd.concat([composed(table, table, 150), composed(cats, table, 100)])
    apart = asked_together()
    assert {('cat', 'sunglasses'), ('dog', 'sunglasses'), ('cat', 'hat'), ('heart', 'arrow'), ('robot', 'top hat')} <= apart
    for row in rows.itertuples():
        first, _, second, _ = row.key.rsplit('/', 3)
        for words in (row.name, row.captions[-1]):  # the last one says a keyword in the place of the name
            thing = words.split(f' {second}')[0]
            assert not [pair for pair in apart if all(w in thing for w in pair[0].split()) and all(w in second for w in pair[1].split())], row.captions


def test_it_is_the_second_that_differs(table):
    "Glasses change a face where its eyes are, a hat what is above it, and what is held its corner."
    def cut(name): return cut_out(decode_image(table.image[(table.name == name) & (table['style'] == 'noto')].iloc[0]))
    face = cut('grinning face')
    nothing = face.resize((1, 1))
    nothing.putalpha(0)
    for way, worn, where in (('eyes', 'sunglasses', (slice(16, 40), slice(8, 56))), ('head', 'crown', (slice(0, 34), slice(8, 56))), ('corner', 'red apple', (slice(28, 64), slice(28, 64)))):
        changed = (np.asarray(put_together(way, face, cut(worn))) != np.asarray(put_together(way, face, nothing))).any(2)
        outside = changed.copy()
        outside[where] = False
        assert changed.sum() > 150 and not outside.any(), way
    with pytest.raises(ValueError, match="no way 'nose'.*use 'eyes'"): put_together('nose', face, face)


def test_few_pictures_that_go_together(table):
    assert len(composed(table[:0], table, 10)) == 0 and len(composed(table[table.subgroup == 'face-smiling'], table[:0], 10)) == 0


@pytest.fixture
def few(table, tmp_path, monkeypatch, ship):
    "Some emoji in the place of the shipped ones."
    faces = table[table.name.isin(['grinning face', 'fox', 'cat face', 'sunglasses', 'glasses', 'crown', 'top hat', 'red apple', 'banana', 'beetle']) & table['style'].isin(['noto', 'twemoji'])]
    others = load_emoji('validation')
    others = others[others.subgroup.isin(['face-smiling', 'face-concerned', 'food-fruit', 'clothing'])][:12]
    write_shards(pd.concat([faces, others, load_emoji('test')[:2]], ignore_index=True), tmp_path/'shards')
    ship(tmp_path/'shards')
    monkeypatch.setattr(module, 'PICTURES', 40)
    monkeypatch.setattr(module, 'PART', 25)
    monkeypatch.setattr(module, 'HELD_OUT', 2)
    monkeypatch.chdir(tmp_path)
    return composed_emoji()


def test_shards_are_made_once_from_their_own_split(few):
    training, validation = (load_emoji(split) for split in ('train', 'validation'))
    made = load_emoji(folder=few)
    assert (made['split'] == 'train').sum() == 40 and (made['split'] != 'test').all() and made.key.is_unique
    for row in made.itertuples():
        first, _, second, _ = row.key.rsplit('/', 3)
        assert first in set((training if row.split == 'train' else validation).key) and second in set(training.name)
    before = {p: p.stat().st_mtime_ns for p in few.iterdir()}
    assert composed_emoji() == few and before == {p: p.stat().st_mtime_ns for p in few.iterdir()}


def test_every_stage_takes_its_share(few, tmp_path):
    text = (data.ASSETS.parent/'presets/smoke.toml').read_text(encoding='utf-8')
    preset = tmp_path/'composed.toml'
    preset.write_text(text.replace('[data]\n', '[data]\ncomposed = 0.5\n').replace('[decoder]\n', '[decoder]\ncomposed = 0.25\n'), encoding='utf-8')
    for stage in ('clip', 'text', 'translator', 'decoder'):
        done = shell('train', stage, '--preset', preset, '--out', 'run', '--device', 'cpu')
        assert done.exit_code == 0, done.output
        assert load_weights(f'run/{stage}/weights.safetensors')[0]
    log = pd.read_csv('run/text/log.csv')
    assert log.validation_composed_image_to_text.dropna().between(0, 1).all() and log.validation_composed_image_to_text.notna().any()
    generators = [step_generator(0, i) for i in range(8)]
    task = TextTask(CLIP.from_preset('emoji', 'cpu'), preset, {'composed': few})
    known = {tuple(t.tolist()) for t in task.invented['composed'].tokens.flatten(0, 1)}
    _, tokens, which = task.batch(torch.arange(8), generators)
    assert 0 < which.sum() < 8 and [tuple(t.tolist()) in known for t in tokens] == (which == 0).tolist()
    taught = TextTask(CLIP.from_preset('emoji', 'cpu'), preset, {'composed': few}, teacher=task.clip)
    batch = taught.batch(torch.arange(8), generators)
    assert taught.loss(taught.model, batch)['kept'].item() == pytest.approx(0, abs=1e-5)
    torch.nn.init.normal_(taught.model.text_projection)
    losses = taught.loss(taught.model, batch)
    assert taught.loss(taught.model, [*batch[:2], torch.zeros(8, dtype=torch.long)])['kept'] == 0  # none but composed pictures
    own = batch[1][batch[2] == 1]
    cosine = torch.cosine_similarity(taught.model.encode_text(own), task.model.encode_text(own)).mean()
    assert 0 < (batch[2] == 0).sum() < 8 and losses['kept'].item() == pytest.approx(1 - cosine.item(), abs=1e-4) and losses['kept'] > 0.1
    assert losses['loss'].item() == pytest.approx((TextTask.contrasted(taught, taught.model(*batch[:2]))['loss'] + 20*losses['kept']).item(), rel=1e-4)
    made = PreparedDataset('run/composed/train')
    task = DecoderTask(preset, 'run/prepared', composed='run/composed')
    x, y, own, *_ = task.batch(torch.arange(8), generators)
    assert 0 < own.sum() < 8
    for pictures, embeddings, rows in ((x[~own], y[~own], made), (x[own], y[own], task.data)):
        all_x, all_y = task.examples(rows, torch.arange(len(rows)))
        same = (pictures[:, None] == all_x).flatten(2).all(2)
        assert same.any(1).all() and torch.allclose(embeddings, all_y[same.float().argmax(1)])
    pairs = TranslatorTask(preset, 'run/prepared', {'composed': 'run/composed'})
    _, image, which = pairs.batch(torch.arange(8), generators)
    known = pairs.statistics.image.standardize(made.image_embeddings(torch.arange(len(made))))
    assert 0 < which.sum() < 8 and (image[which == 0][:, None] == known).all(2).any(1).all()
    assert shell('pack', '--preset', preset, '--runs', 'run', '--out', 'packed').exit_code == 0
    shutil.copytree('run/clip', 'kept/clip')
    for stage in ('text', 'translator', 'decoder'):  # the first weights teach all but composed pictures
        kept = shell('train', stage, '--preset', preset, '--out', 'kept', '--device', 'cpu', '--initial', 'packed', '--keep')
        assert kept.exit_code == 0, kept.output
    assert pd.read_csv('kept/text/log.csv').kept.dropna().between(0, 2).all()
    other = shell('train', 'decoder', '--preset', preset, '--out', 'other', '--prepared', 'run/prepared', '--device', 'cpu')
    assert other.exit_code == 0 and not (tmp_path/'other/composed').exists(), other.output  # own pictures are not mixed with emoji


def test_glasses_sit_lower_on_animals(monkeypatch):
    ways, put, table = [], module.put_together, load_emoji('train')
    monkeypatch.setattr(module, 'put_together', lambda way, *others: ways.append(way) or put(way, *others))
    composed(table[table.subgroup == 'cat-face'], table, 20)
    assert {way for way in ways if way.startswith('eyes')} == {'eyes of an animal'}


def test_faces_that_wear_something_get_nothing_more():
    table = load_emoji('train')
    wearing = table[table.name.isin(['face with medical mask'])]
    assert set(composed(wearing, table[table.name.isin(['sunglasses', 'glasses', 'crown', 'top hat'])], 10).way) == {'side'}  # of things


def test_nothing_is_put_beside_itself():
    grapes = load_emoji('train').query("name == 'grapes'")
    assert len(grapes) and not len(composed(grapes, grapes, 5))


def test_hats_and_glasses_are_worn_and_not_held():
    table = load_emoji('train')
    added = table[table.name.isin([*HATS, *GLASSES])]
    assert 'corner' not in set(composed(table, added, 30).get('way', []))


def test_what_is_added_moves_a_little_from_picture_to_picture(monkeypatch):
    table, put, places = load_emoji('train'), module.put_together, []
    monkeypatch.setattr(module, 'put_together', lambda way, a, b, vary=(0.5, 0.5): places.append(tuple(vary)) or put(way, a, b, vary))
    module.composed(table, table, 10)
    assert len(set(places)) == 10
