"""Bad input gets one clear sentence, from Python and from the shell."""
import io
import re
import shutil

import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from t2i import data
from t2i.cli import app
from t2i.core import load_preset, load_weights, save_weights
from t2i.data import load_emoji, prepare
from t2i.pipeline import TextToImage

LONG = 'a red apple beside ' + 'a very large yellow umbrella and '*12 + 'a pear'


def shell(*arguments): return CliRunner().invoke(app, list(map(str, arguments)))


def says(result, *words):
    "The command failed with one sentence that has the words."
    assert result.exit_code == 1 and 'Traceback' not in result.output, result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    for word in words: assert word in lines[0]


@pytest.fixture(scope='module')
def weights(pipe, tmp_path_factory):
    "A complete folder of weights for `smoke`."
    folder = tmp_path_factory.mktemp('weights')
    save_weights(folder/'clip.safetensors', pipe.clip.model.state_dict(), {'pieces': pipe.clip.tokenize.pieces})
    save_weights(folder/'translator.safetensors', pipe.translator.state_dict())
    save_weights(folder/'decoder.safetensors', pipe.decoder.state_dict())
    pipe.statistics.save(folder/'statistics.safetensors')
    return folder


@pytest.fixture
def broken(weights, tmp_path): return shutil.copytree(weights, tmp_path/'weights')


@pytest.fixture
def generate(tmp_path):
    "`t2i generate` with the preset `smoke`; nothing may be written when it fails."
    def run(*arguments):
        out = tmp_path/'out.png'
        result = shell('generate', '--preset', 'smoke', '--seed', 1, '--out', out, *arguments)
        assert out.exists() == (result.exit_code == 0)
        return result
    return run


def test_good_input(generate, weights, pipe):
    "So that the tests below fail for their own reason."
    assert generate('a red apple', '-n', 2, '--steps', 2).exit_code == 0
    assert generate('a red apple', '--steps', 2, '--folder', weights).exit_code == 0
    pictures = [p('a red apple', generator=1) for p in (pipe, TextToImage.from_preset('smoke', 'cpu', weights))]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize('captions, words', [([], 'empty'), (['a red apple', ' '], 'caption 1')])
def test_no_caption(pipe, generate, captions, words):
    with pytest.raises(ValueError, match=words): pipe(captions)
    says(generate(*captions), words)


def test_empty_file_of_captions(generate, tmp_path):
    (tmp_path/'captions.txt').write_text('\n\n')
    says(generate('--file', tmp_path/'captions.txt'), 'empty')
    says(generate('--file', tmp_path/'nothing.txt'), 'nothing.txt')


def test_long_caption(pipe, generate):
    "It is cut, and the warning shows after which words."
    with pytest.warns(UserWarning) as caught: pipe(LONG, num_inference_steps=1)
    found = re.search(r"cut after '(.+)'", next(str(w.message) for w in caught if 'word pieces' in str(w.message)))
    assert found and found[1] in LONG
    with pytest.warns(UserWarning, match='cut after'): assert generate(LONG, '--steps', 1).exit_code == 0


def test_wrong_preset(tmp_path):
    for wrong in ('emojis', str(tmp_path/'none.toml')):
        with pytest.raises(ValueError, match='emoji, smoke, thesis'): load_preset(wrong)
        says(shell('generate', 'a red apple', '--preset', wrong, '--out', tmp_path/'x.png'), wrong, 'emoji, smoke, thesis')
    (tmp_path/'bad.toml').write_text('name = ')
    says(shell('generate', 'a red apple', '--preset', tmp_path/'bad.toml'), 'bad.toml', 'TOML')


@pytest.mark.parametrize('name', ['clip', 'statistics', 'translator', 'decoder'])
def test_missing_weights(broken, generate, name):
    path = broken/f'{name}.safetensors'
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name): TextToImage.from_preset('smoke', 'cpu', broken)
    says(generate('a red apple', '--folder', broken), path.name, 'missing')


@pytest.mark.parametrize('keep', [0, 5, 0.5, 0.99])
@pytest.mark.parametrize('name', ['clip', 'decoder'])
def test_truncated_weights(broken, generate, name, keep):
    path = broken/f'{name}.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:keep if isinstance(keep, int) else int(keep*len(whole))])
    with pytest.raises(ValueError, match=path.name): TextToImage.from_preset('smoke', 'cpu', broken)
    says(generate('a red apple', '--folder', broken), path.name, 'complete')


def test_weights_of_another_model(broken, generate):
    shutil.copy(broken/'translator.safetensors', broken/'decoder.safetensors')
    says(generate('a red apple', '--folder', broken), 'decoder.safetensors')


def test_weights_that_do_not_ship(tmp_path):
    says(shell('generate', 'a red apple', '--preset', 'thesis', '--out', tmp_path/'x.png'), 'thesis', 'folder')


@pytest.fixture
def shards(tmp_path):
    "A shard with a picture cut short, one that is text and one that is empty, among good ones."
    table = pd.concat([load_emoji(s)[:n] for s, n in [('train', 24), ('validation', 6), ('test', 2)]], ignore_index=True)
    table.at[3, 'image'] = table.image[3][:100]
    table.at[5, 'image'] = b'not a picture'
    table.at[25, 'image'] = b''
    data.write_shards(table, tmp_path/'shards')
    return tmp_path/'shards', set(table.key[[3, 5, 25]])


def test_undecodable_pictures_are_skipped_and_named(pipe, shards, tmp_path):
    folder, bad = shards
    report = prepare(pipe.clip, folder, tmp_path/'prepared', progress=False)
    skipped = report['shards']['shards-00000']['skipped']
    assert {reason: len(keys) for reason, keys in skipped.items()} == report['skipped'] == {'undecodable image': 2, 'empty file': 1}
    assert {key for keys in skipped.values() for key in keys} == bad and report['prepared'] == 29
    prepared = data.PreparedDataset(tmp_path/'prepared/train')
    assert len(prepared) == len(prepared.keys) == 22 and not bad & set(prepared.keys)


def test_undecodable_pictures_in_training(shards, tmp_path, monkeypatch):
    folder, bad = shards
    monkeypatch.setattr(data, 'SHARDS', folder)
    result = shell('train', 'translator', '--preset', 'smoke', '--out', tmp_path/'run')
    assert result.exit_code == 0 and '3 pictures were skipped' in result.output, result.output
    report = (tmp_path/'run/prepared/report.json').read_text()
    assert all(key in report for key in bad)


def test_training_starts_from_weights_that_it_is_given(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'SHARDS', shards[0])
    train = lambda out, *options: shell('train', 'translator', '--preset', 'smoke', '--out', tmp_path/out, *options)
    packed, weights = tmp_path/'packed', lambda path: torch.cat([v.flatten() for v in load_weights(path)[0].values()])
    assert train('random').exit_code == 0 and shell('pack', '--preset', 'smoke', '--runs', tmp_path/'random', '--out', packed).exit_code == 0
    given = weights(packed/'translator.safetensors')
    distance = {}
    for out, options in {'other random': (), 'given': ('--initial', packed)}.items():
        done = train(out, '--seed', 1, *options)
        assert done.exit_code == 0, done.output
        distance[out] = (weights(tmp_path/out/'translator/weights.safetensors') - given).norm()
    assert 0 < distance['given'] < 0.3*distance['other random']
    says(train('none', '--initial', tmp_path/'nowhere'), 'there is no folder', 'nowhere')
    says(train('none', '--initial', shards[0]), 'has no translator.safetensors')


@pytest.mark.parametrize('stage', ['clip', 'classifier'])
def test_undecodable_pictures_in_training_from_raw_shards(stage, shards, tmp_path, monkeypatch):
    folder, bad = shards
    monkeypatch.setattr(data, 'SHARDS', folder)
    with pytest.warns(UserWarning, match='cannot be decoded and are skipped') as warned:
        result = shell('train', stage, '--preset', 'smoke', '--out', tmp_path/'run')
    assert result.exit_code == 0 and (tmp_path/'run'/stage/'weights.safetensors').exists(), result.output
    said = ' '.join(str(w.message) for w in warned)
    assert all(key in said for key in bad)


def test_packing_a_preset_without_a_place_for_weights(tmp_path):
    says(shell('pack', '--preset', 'thesis', '--runs', tmp_path), "'thesis'", '--out')


def test_bytes_that_are_no_picture():
    picture = io.BytesIO()
    Image.new('RGB', (8, 8)).save(picture, 'PNG')
    for wrong in (b'', b'text', picture.getvalue()[:40]):
        with pytest.raises(ValueError, match='not a picture'): data.decode_image(wrong)


@pytest.mark.parametrize('steps', [0, -1, 1001])
def test_steps(pipe, generate, steps):
    with pytest.raises(ValueError, match=f'{steps} steps.*1 to 1000'): pipe('a red apple', num_inference_steps=steps)
    says(generate('a red apple', '--steps', steps), f'{steps} steps', '1 to 1000')


@pytest.mark.parametrize('n', [0, -1])
def test_number_of_pictures(pipe, generate, n):
    with pytest.raises(ValueError, match=f'is {n}'): pipe('a red apple', num_images_per_prompt=n)
    says(generate('a red apple', '-n', n), f'is {n}', 'at least 1')


def test_kind_of_picture_file(tmp_path):
    says(shell('generate', 'a red apple', '--preset', 'smoke', '--out', tmp_path/'x.txt'), 'x.txt', '.png')


def test_stage(tmp_path):
    says(shell('train', 'decode', '--preset', 'smoke', '--out', tmp_path), 'decode', 'clip, translator, decoder, classifier')
    says(shell('train', 'clip', '--preset', 'smoke5', '--out', tmp_path), 'smoke5')
