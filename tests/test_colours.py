"""What is learned from recoloured pictures: the text encoder alone, and the translator on a share of its pairs."""
import math

import numpy as np
import pandas as pd
import pytest
import torch

from shell import shell
from t2i import clip, data
from t2i.clip import CLIP, TextTask, colour_recall
from t2i.colours import COLOURS, colour_name, coloured, main_hue, turn_hue
from t2i.core import from_uint8, load_preset, load_weights
from t2i.data import load_emoji, write_shards
from t2i.train import step_generator, train
from t2i.translator import TranslatorTask


@pytest.fixture
def emoji(tmp_path, monkeypatch, ship):
    "A few emoji in the place of the shipped ones, and a folder of the recoloured ones that is the working folder's."
    table = pd.concat([load_emoji(s)[:n] for s, n in [('train', 30), ('validation', 12), ('test', 2)]], ignore_index=True)
    write_shards(table, tmp_path/'shards')
    ship(tmp_path/'shards')
    monkeypatch.chdir(tmp_path)
    return data.recoloured_emoji()


@pytest.fixture
def preset(tmp_path):
    "`smoke`, with half of the pairs recoloured."
    text = (data.ASSETS.parent/'presets/smoke.toml').read_text(encoding='utf-8')
    path = tmp_path/'coloured.toml'
    path.write_text(text.replace('[data]\n', '[data]\nrecoloured = 0.5\n'), encoding='utf-8')
    return path


def test_recoloured_pictures_have_the_colour_that_they_are_named_after(emoji):
    table, originals = load_emoji(folder=emoji), load_emoji().set_index('key')
    assert len(table) > 30 and set(table.colour) == set(COLOURS)
    hues = main_hue(from_uint8(np.stack([data.decode_image(i) for i in table['image']])))
    assert [colour_name(h) for h in hues.tolist()] == list(table.colour)
    for row in table.itertuples():
        original = originals.loc[row.key.rsplit('/', 1)[0]]
        assert (row.split, row.style, row.concept) == (original['split'], original['style'], original.concept) and not original.tone
        assert all(row.colour in c for c in row.captions[:4])
        said = row.captions[4].removesuffix(f', {row.style} style').split(', ')
        assert not [k for k in original.keywords if data.is_test_keyword(row.concept, k) and k not in row.name and f'{row.colour} {k}' in said]


def test_recoloured_shards_are_made_once(emoji):
    before = {p: p.stat().st_mtime_ns for p in emoji.iterdir()}
    assert data.recoloured_emoji() == emoji and before == {p: p.stat().st_mtime_ns for p in emoji.iterdir()}
    (emoji/'complete').unlink()  # a kill came before the end
    data.recoloured_emoji()
    assert before.keys() == {*emoji.iterdir()} and before != {p: p.stat().st_mtime_ns for p in emoji.iterdir()}


def test_only_the_text_encoder_learns(emoji, preset, tmp_path):
    task = TextTask(CLIP.from_preset('emoji', 'cpu'), preset, {'recoloured': emoji})
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    after, _ = load_weights(train(task, {'batch_size': 8, 'steps': 2, 'learning_rate': 1e-3, 'optimizer': 'adamw', 'weight_decay': 0.1, 'validate_every': 2}, tmp_path/'text', device='cpu', progress=False))
    changed = {k for k in before if not torch.equal(before[k].float(), after[k].float())}
    assert not [k for k in changed if k.startswith('visual.')] and {'token_embedding.weight', 'text_projection', 'logit_scale'} <= changed
    log = pd.read_csv(tmp_path/'text/log.csv')
    assert log.validation_colour.dropna().between(0, 1).all() and log.validation_image_to_text.notna().any()


def test_a_share_of_the_pairs_is_recoloured(emoji, preset, monkeypatch):
    task, generators = TextTask(CLIP.from_preset('emoji', 'cpu'), preset, {'recoloured': emoji}), [step_generator(0, i) for i in range(8)]
    changes, augment = [], clip.augment
    monkeypatch.setattr('t2i.clip.augment', lambda x, generators, **changed: changes.append(changed) or augment(x, generators, **changed))
    x, tokens, which = task.batch(torch.arange(8), generators)
    assert sorted(changes, key=len) == [{}, {'tint': 0.}]  # captions of recoloured pictures name the colour
    known, turned = ({tuple(t.tolist()) for t in pairs.tokens.flatten(0, 1)} for pairs in (task.pairs, task.invented['recoloured']))
    assert x.shape == (8, 3, 64, 64)
    assert 0 < which.sum() < 8  # some of each
    assert [tuple(t.tolist()) in turned for t in tokens] == (which == 0).tolist() and [tuple(t.tolist()) in known for t in tokens] == (which == 1).tolist()
    without = TextTask(CLIP.from_preset('emoji', 'cpu'), preset)
    assert all(tuple(t.tolist()) in known for t in without.batch(torch.arange(8), generators)[1])


def test_colour_recall_counts_the_right_colour(emoji):
    table = load_emoji(folder=emoji)[:21]
    class Knows:
        "Embeds a picture and a caption as the one colour of both; `wrong` shifts that of the captions."
        def __init__(self, wrong=0): self.wrong, self.eye = wrong, torch.eye(len(COLOURS))
        def encode_images(self, images, normalize): return self.eye[[list(COLOURS).index(c) for c in table.colour]]
        def encode_captions(self, captions, normalize): return self.eye[[(next(i for i, c in enumerate(COLOURS) if c in words) + self.wrong) % len(COLOURS) for words in captions]]
    assert colour_recall(Knows(), table) == 1 and colour_recall(Knows(wrong=1), table) == 0


def test_the_stages_of_a_run(emoji, preset, tmp_path):
    "The text stage goes on from the run's CLIP; what follows uses it, and it is what is packed."
    for stage in ('clip', 'text', 'translator'):
        done = shell('train', stage, '--preset', preset, '--out', 'run', '--device', 'cpu')
        assert done.exit_code == 0, done.output
    (clip, _), (text, metadata) = (load_weights(tmp_path/f'run/{stage}/weights.safetensors') for stage in ('clip', 'text'))
    visual = [k for k in clip if k.startswith('visual.')]
    assert visual and all(torch.equal(clip[k], text[k]) for k in visual) and not torch.equal(clip['token_embedding.weight'], text['token_embedding.weight'])
    ours = CLIP.load(load_preset(preset).clip, tmp_path/'run/text/weights.safetensors', 'cpu')
    for folder, table in (('prepared', load_emoji('train')), ('recoloured', load_emoji('train', folder=emoji))):
        prepared = data.PreparedDataset(tmp_path/'run'/folder/'train', captions=True)
        assert sorted(prepared.keys) == sorted(table.key)
        expected = ours.encode_captions(list(table.set_index('key').loc[prepared.keys].caption)).half().float()
        assert torch.allclose(prepared.text_embeddings(torch.arange(len(prepared)))[:, 0], expected, atol=2e-3)
    task, generators = TranslatorTask(preset, tmp_path/'run/prepared', {'recoloured': tmp_path/'run/recoloured'}), [step_generator(0, i) for i in range(6)]
    _, image, which = task.batch(torch.arange(6), generators)
    turned, plain = (task.statistics.image.standardize(d.image_embeddings(torch.arange(len(d)))) for d in (task.invented['recoloured'], task.data))
    assert 0 < which.sum() < 6 and (torch.cdist(image[which == 0], turned, compute_mode='donot_use_mm_for_euclid_dist').amin(1) < 1e-4).all() and ((image - plain[:6])[which == 1].norm(dim=1) < 1e-4).all()
    assert shell('pack', '--preset', preset, '--runs', 'run', '--out', 'packed').exit_code == 0
    packed, header = load_weights(tmp_path/'packed/clip.safetensors')
    assert torch.equal(packed['token_embedding.weight'], text['token_embedding.weight'].half()) and header['pieces'] == metadata['pieces']
    assert (tmp_path/'packed/logs/text_log.csv').exists() and not (tmp_path/'packed/text.safetensors').exists()


def test_own_pictures_are_not_mixed_with_recoloured_emoji(emoji, preset, tmp_path):
    assert shell('train', 'translator', '--preset', preset, '--out', 'run', '--device', 'cpu').exit_code == 0
    done = shell('train', 'translator', '--preset', preset, '--out', 'other', '--prepared', 'run/prepared', '--device', 'cpu')
    assert done.exit_code == 0 and (tmp_path/'run/recoloured').exists() and not (tmp_path/'other/recoloured').exists(), done.output


def test_no_colour_has_no_name(): assert colour_name(math.nan) is None and colour_name(0.) == 'red'


def test_hues_turn_in_the_precision_of_the_pictures():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)*2 - 1
    assert turn_hue(x, torch.tensor([0., 1.])).dtype == torch.float64 and torch.allclose(turn_hue(x, torch.zeros(2)), x)


def test_dark_and_pale_pictures_have_no_one_colour():
    def hue(*rgb): return main_hue(torch.tensor(rgb).reshape(1, 3, 1, 1)*2 - 1)
    assert hue(0.8, 0.2, 0.2) == 0 and hue(0.3, 0., 0.).isnan(), 'dark red is brown'
    assert hue(0.9, 0.75, 0.75).isnan(), 'pale red is nearly grey'


def test_golden_things_and_rainbows_are_given_no_other_colour():
    assert [coloured(words, 'blue') for words in ('gold medal', 'golden key', 'silver medal', 'rainbow', 'gray cat')] == [None]*5
