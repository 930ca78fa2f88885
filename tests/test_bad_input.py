"""Bad input gets one clear sentence, from Python and from the shell."""
import copy
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

import t2i
from shell import says, shell
from t2i import data
from t2i.cli import _grid, _trained, app, main
from t2i.checkpoints import check_clip, load_config, load_statistics
from t2i.clip import CLIP, TextTask
from t2i.core import ASSETS, PRESETS, Preset, image_seeds, load_preset, load_weights, save_weights
from t2i.data import load_emoji, prepare
from t2i.decoder import DecoderTask, decoder_loss
from t2i.diffusion import Diffusion
from t2i.guidance import classifier_free
from t2i.pipeline import TextToImage, draw_to_folder
from t2i.plots import image_grid
from t2i.translator import TranslatorTask

LONG = 'a red apple beside ' + 'a very large yellow umbrella and '*12 + 'a pear'


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


def test_file_of_captions_in_other_encodings(generate, tmp_path):
    (tmp_path/'latin.txt').write_bytes('une pomme dorée'.encode('latin-1'))
    says(generate('--file', tmp_path/'latin.txt'), 'latin.txt', 'UTF-8')
    (tmp_path/'bom.txt').write_bytes('a red apple'.encode('utf-8-sig'))
    done = shell('generate', '--preset', 'smoke', '--file', tmp_path/'bom.txt', '--steps', 1, '--out', tmp_path/'pictures')
    assert done.exit_code == 0 and json.loads((tmp_path/'pictures/settings.json').read_text())['captions'] == ['a red apple']


def test_long_caption(pipe, generate):
    "It is cut, and the warning shows after which words."
    with pytest.warns(UserWarning) as caught: pipe(LONG, num_inference_steps=1)
    found = re.search(r"cut after '(.+)'", next(str(w.message) for w in caught if 'word pieces' in str(w.message)))
    assert found and found[1] in pipe.clip.tokenize.spell(LONG)
    done = generate(LONG, '--steps', 1)
    assert done.exit_code == 0 and found[0] in done.output and 'Warning' not in done.output, done.output


def test_words_that_were_never_read_are_named(generate, pipe):
    done = generate('a red lighthouse', 'a corgi, noto style', '--steps', 1)
    assert done.exit_code == 0 and 'leaves them out: lighthouse, corgi' in done.output.splitlines()[0] and 'Warning' not in done.output, done.output
    assert 'never read' not in generate('a red apple, noto style', '--steps', 1).output
    with pytest.warns(UserWarning, match='w0, .*, w9 and 3 more'): pipe.embed_captions([f'a red w{i} apple' for i in range(13)])


def test_wrong_preset(tmp_path):
    for wrong in ('emojis', str(tmp_path/'none.toml')):
        with pytest.raises(ValueError, match='emoji, smoke, thesis'): load_preset(wrong)
        says(shell('generate', 'a red apple', '--preset', wrong, '--out', tmp_path/'x.png'), wrong, 'emoji, smoke, thesis')
    (tmp_path/'bad.toml').write_text('name = ')
    says(shell('generate', 'a red apple', '--preset', tmp_path/'bad.toml'), 'bad.toml', 'TOML')


@pytest.mark.parametrize('start, word', [('[decoder]', 'decoder'), ('[translator]', 'translator'), ('[clip]', 'clip'), ('\nsteps = 3', 'steps')])
def test_a_preset_that_lacks_something(tmp_path, start, word):
    mine, whole = tmp_path/'mine.toml', (PRESETS/'smoke.toml').read_text()
    before, after = whole.rsplit(start, 1)
    mine.write_text(before + (after[after.index('\n['):] if start[0] == '[' else after))
    says(shell('generate', 'a red apple', '--preset', mine, '--out', tmp_path/'x.png'), f"has no '{word}'", 'add it')


@pytest.mark.parametrize('section, key', [('decoder', 'crop'), ('classifier', 'drop'), ('upsampler', 'augment'), ('upsampler', 'mirror'), ('decoder', 'image_size'), ('classifier', 'num_classes')])
def test_keys_of_another_network(section, key):
    "What every U-Net knows may stand in any of the three sections, what one of them trains with only there."
    preset = copy.deepcopy(load_preset('emoji'))
    preset[section] = preset[section] | {'gradient_checkpointing': True}
    load_preset(dict(preset))
    preset[section] = preset[section] | {key: 1}
    with pytest.raises(ValueError, match=rf"in \[{section}\] the key '{key}'"): load_preset(dict(preset))


def test_what_is_wrong_in_a_later_stage_is_told_first(tmp_path):
    mine = tmp_path/'mine.toml'
    mine.write_text((PRESETS/'smoke.toml').read_text().replace('[train.decoder]', '[train.decoder]\nlearning_rat = 0.1'))
    says(shell('train', '--preset', mine, '--out', tmp_path/'run'), "a training has no setting 'learning_rat'")
    save_pictures = tmp_path/'pictures'
    save_pictures.mkdir()
    says(shell('train', '--data', save_pictures, '--preset', mine, '--out', tmp_path/'own'), "a training has no setting 'learning_rat'")
    assert not (tmp_path/'run').exists() and not (tmp_path/'own').exists()


def test_a_teacher_without_what_it_teaches(tmp_path):
    with pytest.raises(ValueError, match="give invented={'composed': folder}"): TranslatorTask('smoke', tmp_path, teacher=torch.nn.Identity())
    with pytest.raises(ValueError, match="give invented={'composed': folder}"): TextTask(CLIP.from_preset('smoke', 'cpu'), 'smoke', teacher=torch.nn.Identity())


def test_a_preset_with_values_of_other_kinds(tmp_path):
    mine, thesis = tmp_path/'mine.toml', (PRESETS/'thesis.toml').read_text(encoding='utf-8')
    mine.write_text(thesis.replace('label = "zero-shot"', 'label = 436'), encoding='utf-8')
    assert load_preset(mine).upsampler.sampling.label == 436, 'a class of ImageNet for all, as the released script has it'
    for text, words in [(thesis.replace('label = "zero-shot"', 'label = 4.36'), 'upsampler.sampling.label is 4.36: it should be a text or a whole number'), ('decoder = 5', 'decoder is 5: it should be a section'),
                        (thesis.replace('guidance_scale = 6.0', 'guidance_scale = { s = 6.0 }'), "sampling.guidance_scale is {'s': 6.0}: it should be a number or a whole number"),
                        (thesis.replace('[upsampler.diffusion]', '[classifier.diffusion]'), "in [classifier] the key 'diffusion'")]:
        mine.write_text(text, encoding='utf-8')
        says(shell('generate', 'a red apple', '--preset', mine, '--out', tmp_path/'x.png'), words)


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
    says(shell('generate', 'a red apple', '--preset', 'thesis', '--out', tmp_path/'x.png'), 'thesis', '--folder')


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


def test_undecodable_pictures_in_training(shards, tmp_path, ship):
    folder, bad = shards
    ship(folder)
    result = shell('train', 'translator', '--preset', 'smoke', '--out', tmp_path/'run')
    assert result.exit_code == 0 and '3 pictures were skipped' in result.output, result.output
    report = (tmp_path/'run/prepared/report.json').read_text()
    assert all(key in report for key in bad)


def test_training_starts_from_weights_that_it_is_given(shards, tmp_path, ship):
    ship(shards[0])
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


def test_a_clip_that_learned_on_leaves_nothing_of_the_one_before(shards, tmp_path, ship):
    "Embeddings are made again; a text encoder that learned against it is not trained on."
    ship(shards[0])
    mine = tmp_path/'mine.toml'
    training, sampling = (PRESETS/'smoke.toml').read_text().replace('learning_rate = 1e-3', 'learning_rate = 1e-2').split('[sampling]')
    def train(stage, steps):
        mine.write_text(re.sub(r'(?m)^(steps|validate_every|sample_every) = .*', rf'\1 = {steps}', training) + '[sampling]' + sampling)
        return shell('train', stage, '--preset', mine, '--out', tmp_path/'run')
    probe = lambda: np.array(load_weights(tmp_path/'run/prepared/records/shards-00000.safetensors', None)[1]['settings']['probe'])
    for stage in ('clip', 'text', 'translator'): assert train(stage, 5).exit_code == 0, stage
    before = probe()
    assert 'prepared again' not in train('translator', 6).output and np.array_equal(probe(), before)
    assert train('text', 40).exit_code == 0
    says(train('translator', 8), 'run/translator had learned from it: delete')
    assert np.array_equal(probe(), before), 'nothing is lost'
    shutil.rmtree(tmp_path/'run/translator')
    done = train('translator', 8)
    assert done.exit_code == 0 and 'run/prepared is of the run\'s CLIP as it was before, and is prepared again' in done.output, done.output
    assert np.linalg.norm(probe() - before) > 0.1*np.linalg.norm(before)
    before = probe()
    assert shell('train', 'translator', '--preset', 'emoji', '--out', tmp_path/'run').exit_code == 1 and np.array_equal(probe(), before), 'another preset is no reason to delete anything'
    weights = (tmp_path/'run/clip/weights.safetensors').read_bytes()
    done = train('all', 50)
    assert done.exit_code == 0 and 'run/clip stays as it is, because' in done.output and (tmp_path/'run/clip/weights.safetensors').read_bytes() == weights
    assert train('clip', 90).exit_code == 0
    says(train('text', 90), 'run/clip was trained on after', 'delete')
    other = shell('train', 'decoder', '--preset', mine, '--out', tmp_path/'run', '--prepared', tmp_path/'run/prepared')
    assert other.exit_code == 0, other.output  # the text encoder is still the one that it was prepared with
    shutil.rmtree(tmp_path/'run/text')
    says(shell('train', 'decoder', '--preset', mine, '--out', tmp_path/'run', '--prepared', tmp_path/'run/prepared'), 'was prepared with another CLIP')


def test_embeddings_of_another_clip(tmp_path, no_models): says(shell('train', '--preset', 'smoke', '--prepared', tmp_path, '--out', tmp_path/'run'), 'name the stage')


@pytest.mark.parametrize('stage', ['clip', 'classifier'])
def test_undecodable_pictures_in_training_from_raw_shards(stage, shards, tmp_path, ship):
    folder, bad = shards
    ship(folder)
    result = shell('train', stage, '--preset', 'smoke', '--out', tmp_path/'run')
    assert result.exit_code == 0 and (tmp_path/'run'/stage/'weights.safetensors').exists(), result.output
    said = ' '.join(line for line in result.output.splitlines() if 'cannot be decoded and are skipped' in line)
    assert all(key in said for key in bad)


def test_what_was_packed_draws(shards, tmp_path, ship, generate):
    "Also if the run had no CLIP of its own."
    ship(shards[0])
    for stage in ('translator', 'decoder'): assert shell('train', stage, '--preset', 'smoke', '--out', tmp_path/'run').exit_code == 0
    done = shell('pack', '--preset', 'smoke', '--runs', tmp_path/'run', '--out', tmp_path/'packed')
    assert done.exit_code == 0 and 'clip.safetensors' in done.output, done.output
    assert generate('a red apple', '--folder', tmp_path/'packed').exit_code == 0


def test_packing_without_statistics(shards, tmp_path, ship, generate):
    "They lie where the pictures were prepared."
    ship(shards[0])
    prepare(CLIP.from_preset('smoke', 'cpu'), shards[0], tmp_path/'elsewhere', progress=False)
    assert shell('train', 'translator', '--preset', 'smoke', '--out', tmp_path/'run', '--prepared', tmp_path/'elsewhere').exit_code == 0
    pack = ['pack', '--preset', 'smoke', '--runs', tmp_path/'run', '--out', tmp_path/'packed']
    done = shell(*pack)
    assert done.exit_code == 0 and 'packed has no statistics yet, and nothing can be drawn without: name the folder' in done.output, done.output
    says(shell(*pack, '--prepared', tmp_path/'elsewere'), 'there is no', 'elsewere', '--prepared')
    done = shell(*pack, '--prepared', tmp_path/'elsewhere')
    assert done.exit_code == 0 and 'no statistics' not in done.output and (tmp_path/'packed/statistics.safetensors').exists(), done.output


@pytest.mark.parametrize('words, sentence', [
    ('classifier --prepared X', 'the classifier learns from the emoji and not from'), ('clip --prepared X', 'leave --prepared out'), ('text --prepared X', 'leave --prepared out'),
    ('decoder --large X', 'the decoder does not learn from'), ('--keep', 'one stage at a time'), ('clip --keep --initial X', '--keep is for text, translator and decoder'),
    ('decoder --keep', 'name their folder with --initial'), ('translator --keep --initial X', 'there are none'), ('decoder --preset emoji --keep --initial X --prepared X', 'there are none')])
def test_options_that_would_change_nothing(words, sentence, weights, tmp_path):
    assert weights.is_dir()
    says(shell('train', '--preset', 'smoke', '--out', tmp_path/'run', *(weights if w == 'X' else w for w in words.split())), sentence)


def test_a_terminal_without_a_sign(monkeypatch, tmp_path):
    "Where its code page lacks one that a sentence has, a question mark will do."
    out = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(out, 'cp1251'))
    monkeypatch.setattr('sys.stderr', io.TextIOWrapper(io.BytesIO(), 'cp1251'))
    def told(*words):
        monkeypatch.setattr('sys.argv', ['t2i', *words])
        with pytest.raises(SystemExit): main()
    told('convert', str(tmp_path/'no 3 × 3.pt'), str(tmp_path/'x.safetensors'))
    print('3 × 3', flush=True)
    assert out.getvalue() == b'3 ? 3\n'
    told('upsample', '--help')
    assert b'64?64' in out.getvalue()


def test_long_names_of_files(tmp_path):
    "As long as a file's name may be, with a temporary one that is no longer; and one that is too long."
    from t2i.core import atomic_path
    for name in ('a'*251 + '.png', 'ä'*120 + '.png', 'a'*10 + '.' + 'x'*220):
        with atomic_path(tmp_path/name) as tmp: tmp.write_bytes(b'x')
    assert sorted(p.read_bytes() for p in tmp_path.iterdir()) == [b'x']*3
    says(shell('generate', 'a red apple', '--preset', 'smoke', '--out', tmp_path/('a'*252 + '.png')), 'give it a shorter name', alone=False)


@pytest.mark.parametrize('given, words', [({'guidance_scale': '3'}, "guidance_scale is '3': give a number"), ({'exposure_bias': 'a'}, "exposure_bias is 'a'"), ({'num_images_per_prompt': '2'}, "per_prompt is '2': it is a whole number"), ({'num_images_per_prompt': True}, 'per_prompt is True')])
def test_settings_of_another_kind(pipe, given, words):
    with pytest.raises(ValueError, match=words): pipe('a red apple', **given)


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
    says(shell('train', 'decode', '--preset', 'smoke', '--out', tmp_path), 'decode', 'clip, text, translator, decoder, classifier')
    says(shell('train', 'clip', '--preset', 'smoke5', '--out', tmp_path), 'smoke5')


# -- places that are none -----------------------------------------------------------------------------------------
@pytest.fixture
def no_models(monkeypatch):
    "Whatever loads a model, or runs a chapter, fails without a sentence."
    def fail(*arguments, **options): raise AssertionError('too early')
    for name in ('t2i.pipeline.TextToImage.from_preset', 't2i.clip.CLIP.from_preset', 't2i.clip.CLIP.load', 't2i.data.build_emoji', 'papermill.execute_notebook'): monkeypatch.setattr(name, fail)


@pytest.mark.parametrize('words', [
    'generate a --out FILE/x.png', 'generate a --out FILE/x', 'generate a --out FILE', 'generate a --out FOLDER.png', 'sample FILE', 'sample FILE/x', 'prepare --source . --out FILE',
    'train clip --preset smoke --out FILE', 'train --data . --out FILE', 'pack --out FILE', 'figures --out FILE', 'build-emoji --out FILE'])
def test_target_that_is_of_the_other_kind(words, tmp_path, no_models):
    (tmp_path/'FILE').write_text('precious')
    (tmp_path/'FOLDER.png').mkdir()
    says(shell(*(str(tmp_path/w) if w.startswith(('FILE', 'FOLDER')) else w for w in words.split())), str(tmp_path), 'name a')
    assert (tmp_path/'FILE').read_text() == 'precious'


def test_target_without_permission(tmp_path, monkeypatch, no_models):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    says(shell('generate', 'a', '--out', tmp_path/'x.png'), str(tmp_path), 'permissions')


@pytest.mark.parametrize('command', ['pack', 'figures'])
def test_wrong_preset_of_other_commands(command, no_models): says(shell(command, '--preset', 'nope'), "'nope'", 'emoji, smoke, thesis')


@pytest.mark.parametrize('name', ['x.png', 'x'])
def test_full_disk(monkeypatch, tmp_path, name):
    def save(*arguments, **options): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Image.Image, 'save', save)
    result = shell('generate', 'a', '--preset', 'smoke', '--steps', 1, '--out', tmp_path/name)
    assert result.exit_code == 1 and str(tmp_path/name) in result.output and 'No space left' in result.output and 'make room' in result.output.splitlines()[-1]


def test_full_disk_for_weights(weights, monkeypatch, tmp_path):
    def save_file(*arguments, **options): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr('safetensors.torch.save_file', save_file)
    says(shell('convert', weights/'decoder.safetensors', tmp_path/'x.safetensors'), str(tmp_path/'x.safetensors'), 'No space left', 'make room')


def test_single_pictures_are_not_overwritten(tmp_path):
    (tmp_path/'00001.png').write_text('precious')
    says(shell('generate', 'a', '-n', 2, '--preset', 'smoke', '--out', tmp_path), str(tmp_path), 'another folder')
    assert [p.name for p in tmp_path.iterdir()] == ['00001.png'] and (tmp_path/'00001.png').read_text() == 'precious'


def test_single_pictures_beside_other_files(tmp_path):
    (tmp_path/'notes.txt').write_text('precious')
    assert shell('generate', 'a', '--preset', 'smoke', '--steps', 1, '--out', tmp_path).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000.png', 'notes.txt', 'settings.json']


def test_a_stopped_folder_of_single_pictures_goes_on(tmp_path):
    "With the seed that it began with; pictures that are there stay, and other captions are refused."
    draw = lambda *captions: shell('generate', *captions, '--preset', 'smoke', '--steps', 1, '--batch-size', 1, '--out', tmp_path)
    assert draw('a', 'b', 'c').exit_code == 0
    whole, first = [(tmp_path/f'{i:05}.png').read_bytes() for i in range(3)], (tmp_path/'00000.png').stat().st_mtime_ns
    for i in (1, 2): (tmp_path/f'{i:05}.png').unlink()
    assert draw('a', 'b', 'c').exit_code == 0
    assert [(tmp_path/f'{i:05}.png').read_bytes() for i in range(3)] == whole and (tmp_path/'00000.png').stat().st_mtime_ns == first
    says(draw('a', 'd', 'c'), 'captions', 'another folder')


# -- numbers that are none, or too many ---------------------------------------------------------------------------
@pytest.mark.parametrize('words', [
    f'generate a --seed {2**64}', 'generate a --seed -1', 'generate a --batch-size 0', 'sample x --seed -1', 'sample x --batch-size -1', 'prepare --source . --out x --workers 0',
    f'train clip --seed {2**64}', 'build-emoji --out x --size 0'])
def test_options_out_of_range(words, no_models):
    result = shell(*words.split())
    assert result.exit_code == 2 and words.split()[-2] in result.output and 'Traceback' not in result.output, result.output


@pytest.mark.parametrize('device', ['abacus', 'meta', 'cpu:x'])
@pytest.mark.parametrize('words', ['generate a', 'sample x', 'prepare --source . --out x', 'train', 'figures'])
def test_device(words, device, no_models): says(shell(*words.split(), '--device', device), device, 'take cpu')


@pytest.mark.parametrize('hours', ['0', '-1', 'nan', 'inf'])
def test_hours(hours, tmp_path):
    for words in (['train', 'clip', '--preset', 'smoke'], ['train', '--data', tmp_path]): says(shell(*words, '--out', tmp_path/'run', '--hours', hours), 'hours is', 'more than 0')
    from t2i.own_data import train_on
    with pytest.raises(ValueError, match='hours is.*more than 0'): train_on(tmp_path, tmp_path/'run', 'smoke', float(hours))


@pytest.mark.parametrize('scale', [math.nan, math.inf])
def test_numbers_that_are_not_finite(pipe, generate, scale, tmp_path):
    with pytest.raises(ValueError, match=f'guidance_scale is {scale}'): pipe('a', guidance_scale=scale)
    with pytest.raises(ValueError, match='not finite'): pipe(image_embeddings=torch.full((1, 32), scale))
    says(generate('a', '--guidance-scale', scale), f'guidance_scale is {scale}')
    says(shell('sample', tmp_path/'s', '-n', 1, '--preset', 'smoke', '--guidance-scale', scale), f'guidance_scale is {scale}')
    assert not (tmp_path/'s').exists()


def test_pictures_at_once(pipe):
    with pytest.raises(ValueError, match='batch_size is 0'): pipe('a', batch_size=0)


def test_many_pictures_of_a_caption_in_a_grid(generate, tmp_path):
    assert generate('a', 'b', '-n', 12, '--steps', 1).exit_code == 0
    with Image.open(tmp_path/'out.png') as grid: assert grid.width == 6*136 and grid.height > 4*136


@pytest.mark.parametrize('n, kind, most', [(1200, 'webp', 16383), (4500, 'jpg', 65500)])
def test_grid_that_is_too_large_for_its_kind(n, kind, most, tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImage, '__call__', lambda *arguments, **options: pytest.fail('too early'))
    says(shell('generate', 'a', '-n', n, '--preset', 'smoke', '--out', tmp_path/f'x.{kind}'), f'x.{kind}', str(most), '.png')


# -- a folder of pictures that was begun wrongly ------------------------------------------------------------------
def test_a_refused_call_leaves_no_settings(pipe, tmp_path):
    draw = lambda **settings: draw_to_folder(pipe, ['a'], lambda: pipe.embed_captions(['a']), tmp_path/'x', 1, **settings)
    for wrong in ({'sampler': 'euler'}, {'num_inference_steps': 0}, {'batch_size': 0}):
        with pytest.raises(ValueError): draw(**wrong)
        assert not (tmp_path/'x').exists()
    with pytest.raises(ZeroDivisionError): draw_to_folder(pipe, ['a'], lambda: 1/0, tmp_path/'x', 1, num_inference_steps=2)  # later than that
    assert (tmp_path/'x/settings.json').exists() and len(draw(num_inference_steps=1)) == 1
    with pytest.raises(ValueError, match='num_inference_steps is 1 there and 2 now'): draw(num_inference_steps=2)
    assert len(draw(num_inference_steps=np.int64(1))) == 1  # a number, whoever counted it


@pytest.mark.parametrize('content', ['', '{}', '{"captions": ["a"', '[]', '{"captions": 3}'])
def test_settings_that_are_incomplete(pipe, content, tmp_path):
    draw = lambda: draw_to_folder(pipe, ['a'], lambda: pipe.embed_captions(['a']), tmp_path, 1, num_inference_steps=1)
    draw()
    (tmp_path/'settings.json').write_text(content)
    with pytest.raises(ValueError, match='settings.json is incomplete.*another folder'): draw()


# -- pictures that are none ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('given', [{'images': ['x.png']}, {'images': 'x.png'}, {'images': []}, {'images': 3}, {'captions': 'a', 'base_image': 3}, {'captions': 'a', 'base_image': 'x.png'}, {'captions': 'a', 'base_image': [np.zeros((8, 8, 3))]}, {'captions': 'a', 'base_image': torch.zeros(1, 3, 8, 8)}, {'images': Image.new('F', (8, 8))}])
def test_something_else_than_pictures(pipe, given):
    with pytest.raises(ValueError, match='(images|base_image) holds (str|int|nothing|8×8×3 of float64|3×8×8 of float32|a picture of floating-point numbers) .*PIL'): pipe(**given)


def test_pictures_of_other_numbers(pipe):
    with pytest.raises(ValueError, match='of float64: .*uint8'): pipe(images=np.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize('settings, words', [
    (dict(mask=np.ones((64, 64))), 'mask would change nothing without a base_image'), (dict(image_guidance_scale=1., decay='cosine'), 'image_guidance_scale and decay would'),
    (dict(upsampler_noise=0.1), 'upsampler_noise would change nothing without upsample=True'), (dict(num_inference_steps='50'), "steps is '50'"), (dict(num_inference_steps=10.5), 'steps is 10.5'),
    (dict(num_inference_steps=[1.7, 3.2]), 'give a whole number, or the timesteps'), (dict(num_images_per_prompt=2.), 'num_images_per_prompt is 2.0'), (dict(generator=np.array(-5)), 'the seed is -5'), (dict(generator=np.arange(3)), '3 generators were given for 1 images'), (dict(exposure_bias=-1), 'exposure_bias is -1')])
def test_settings_that_would_change_nothing_or_make_no_sense(pipe, settings, words):
    with pytest.raises(ValueError, match=words): pipe('a red apple', **settings)


def test_embeddings_that_are_none(pipe):
    with pytest.raises(ValueError, match='image_embeddings are a str of what are no numbers'): pipe(image_embeddings='x')


def test_captions_that_are_none(pipe):
    with pytest.raises(ValueError, match='the captions are 5: give a text'): pipe(5)
    assert pipe('a', generator=np.array(5)) == pipe('a', generator=5)


def test_a_folder_of_pictures_knows_no_base_image(pipe, tmp_path):
    for name, value in (('base_image', Image.new('RGB', (8, 8))), ('latents', torch.zeros(1, 3, 64, 64)), ('guide', lambda *of: of[0])):
        with pytest.raises(ValueError, match=f'without {name}'): draw_to_folder(pipe, ['a'], lambda: None, tmp_path, 0, **{name: value})


def test_emoji_in_a_caption_are_words():
    pipe = TextToImage.from_preset('emoji', 'cpu')
    assert pipe('🍎', generator=1) == pipe('red apple', generator=1) != pipe('🚗', generator=1)


def test_symbols_that_were_never_read_are_named():
    clip = TextToImage.from_preset('emoji', 'cpu').clip
    assert clip.unknown_words(['a 🚗, red!', '€ (5)', '🜁', 'a red apple; noto style']) == ['€', 'alchemical']


def test_mask(pipe):
    base, left = Image.new('RGB', (64, 64), 'red'), np.zeros((64, 64), np.float32)
    left[:, :32] = 1
    draw = lambda mask: pipe('a', base_image=base, mask=mask, image_guidance_scale=0.05, generator=1)
    drawn = draw(Image.fromarray((255*left).astype(np.uint8)))
    assert drawn == draw(left) == draw(left > 0) == draw(torch.tensor(left)[None, None]) != draw(None)
    for wrong in ('x.png', left[:8], 255*left, left*math.nan, left[None], [], [left]):
        with pytest.raises(ValueError, match='the mask is a .*L, or a tensor'): draw(wrong)
    painted = Image.new('RGBA', (64, 64), (255, 255, 255, 0))  # white on a paper that is transparent, and white under it
    painted.paste((255, 255, 255, 255), (0, 0, 32, 64))
    grey = Image.fromarray((255*left).astype(np.uint8))
    assert drawn == draw(painted) == draw(grey.convert('P')) == draw(grey.convert('1')) == draw(grey.convert('RGB'))
    labels, black = Image.fromarray(left.astype(np.uint8)), Image.new('RGBA', (64, 64))
    black.paste((0, 0, 0, 255), (0, 0, 32, 64))
    for wrong in (labels, black):
        with pytest.raises(ValueError, match='lightest grey is [01] of 255: paint white where'): draw(wrong)
    with pytest.raises(ValueError, match='mask has 64×32 pixels and a base image 64×64'): draw(Image.new('L', (64, 32), 'white'))
    with pytest.raises(ValueError, match='2 masks were given for 1 pictures'): draw([labels, labels])


def test_a_mask_that_lies_on_its_side(pipe, tmp_path):
    "As a camera saves it, and an editor the mask of its picture."
    upright = Image.new('L', (32, 64))
    upright.paste(255, (0, 0, 32, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, size in (('L', (32, 64)), ('RGBA', (64, 64))):
        mask = upright.resize(size).convert(mode)
        if mode == 'RGBA': mask.putalpha(upright.resize(size))
        mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path/f'{mode}.png', exif=exif)
        draw = lambda m: pipe('a', base_image=Image.new('RGB', size, 'red'), mask=m, image_guidance_scale=0.05, generator=1)
        assert draw(Image.open(tmp_path/f'{mode}.png'))[0].tobytes() == draw(mask)[0].tobytes()


@pytest.mark.parametrize('settings, words', [(dict(pull='x_1'), "there is no pull 'x_1': use 'x_t'.*or 'x_0'"), (dict(pull='x_0'), 'image_guidance_scale is missing.*from 0 to 1'),
                                             (dict(pull='x_0', image_guidance_scale=2.), 'from 0 .* to 1')])
def test_a_pull_that_is_none(pipe, settings, words):
    with pytest.raises(ValueError, match=words): pipe('a', base_image=Image.new('RGB', (64, 64)), **settings)
    with pytest.raises(ValueError, match='pull would change nothing without a base_image'): pipe('a', pull='x_0')


# -- presets of one's own -----------------------------------------------------------------------------------------
def own_preset(tmp_path, source='smoke', **keys):
    "A copy of a preset with other values of keys."
    text = (PRESETS/f'{source}.toml').read_text()
    for key, value in keys.items():
        text, n = re.subn(rf'(?m)^{key} = \S+', f'{key} = {value}' if value is not None else '', text, count=1)
        assert n == 1, key
    (tmp_path/'mine.toml').write_text(text)
    return tmp_path/'mine.toml'


def test_what_is_packed_leaves_the_weights_that_ship(tmp_path):
    "It goes to a folder in the run, with its configuration."
    before = (ASSETS/'emoji/translator.safetensors').read_bytes()
    save_weights(tmp_path/'translator/weights.safetensors', load_weights(ASSETS/'emoji/translator.safetensors')[0])
    done = shell('pack', '--preset', 'emoji', '--runs', tmp_path)
    assert done.exit_code == 0 and (ASSETS/'emoji/translator.safetensors').read_bytes() == before, done.output
    assert (tmp_path/'packed/translator.safetensors').exists() and load_config(tmp_path/'packed').sampling == load_preset('emoji').sampling


def test_weights_of_another_target(tmp_path):
    mine = own_preset(tmp_path, 'emoji', target='"eps"')
    with pytest.raises(ValueError, match="decoder.safetensors is of a network that was trained with the target 'x0', and the preset's is 'eps'"): TextToImage.from_preset(mine, 'cpu')


def test_a_folder_brings_its_own_preset(pipe, tmp_path):
    "What draws from it on the command line draws as the pipeline that was saved there; a preset that is named goes first."
    pipe.save_pretrained(tmp_path/'saved')
    config = json.loads((tmp_path/'saved/config.json').read_text())
    config['sampling'] |= {'guidance_scale': 1.25, 'steps': 3}
    (tmp_path/'saved/config.json').write_text(json.dumps(config))
    scales = []
    for i, options in enumerate([(), ('--preset', 'smoke')]):
        done = shell('generate', 'a red apple', '--folder', tmp_path/'saved', '--seed', 1, '--out', tmp_path/f'{i}', *options)
        assert done.exit_code == 0, done.output
        scales.append(json.loads((tmp_path/f'{i}/settings.json').read_text())['sampling']['guidance_scale'])
    assert scales == [1.25, load_preset('smoke').sampling.guidance_scale]


def test_stages_that_learned_with_other_statistics_are_not_packed_together(shards, tmp_path):
    "Embeddings that are standardised in another way shift what a decoder draws, and nothing else would tell."
    few = tmp_path/'few'
    data.write_shards(load_emoji()[:200], few)
    for name, source in (('one', shards[0]), ('other', few)): prepare(CLIP.from_preset('smoke', 'cpu'), source, tmp_path/name, load_preset('smoke').data.image_size, progress=False)
    assert shell('train', 'translator', '--preset', 'smoke', '--prepared', tmp_path/'one', '--out', tmp_path/'run').exit_code == 0
    pack = lambda prepared: shell('pack', '--preset', 'smoke', '--runs', tmp_path/'run', '--prepared', tmp_path/prepared, '--out', tmp_path/'packed')
    says(pack('other'), 'the translator in', 'other statistics', '--prepared')
    assert not (tmp_path/'packed/translator.safetensors').exists() and pack('one').exit_code == 0


def test_a_shorter_table_leaves_no_shard_of_a_longer_one(tmp_path):
    table = load_emoji()[:30]
    data.write_shards(table, tmp_path, 10)
    data.write_shards(table[:12], tmp_path, 10)
    assert list(load_emoji(folder=tmp_path).key) == list(table.key[:12])


def test_a_source_whose_name_begins_with_a_dot(pipe, shards, tmp_path):
    shards[0].rename(tmp_path/'.shards')
    prepare(pipe.clip, tmp_path/'.shards', tmp_path/'prepared', progress=False)
    assert len(data.PreparedDataset(tmp_path/'prepared/train')) == 22


def test_captions_of_classes_where_there_are_none(shards, tmp_path):
    says(shell('prepare', '--preset', 'smoke', '--source', shards[0], '--out', tmp_path/'out', '--class-captions'), "--class-captions is for ImageNet's classes", 'leave it out')
    assert not (tmp_path/'out').exists()


def test_a_first_weight_that_is_missing_is_told_of_before_anything_is_trained(weights, tmp_path):
    mine = tmp_path/'mine.toml'
    mine.write_text((PRESETS/'smoke.toml').read_text())
    (tmp_path/'some').mkdir(); shutil.copy(weights/'clip.safetensors', tmp_path/'some')
    says(shell('train', '--preset', mine, '--initial', tmp_path/'some', '--out', tmp_path/'run'), 'has no translator.safetensors')
    assert not (tmp_path/'run').exists()


def test_a_seed_that_nobody_named_is_told(tmp_path):
    "On the error output and in the file, so that a picture that one likes can be drawn again."
    draw = lambda out, *options: shell('generate', 'a red apple', '--preset', 'smoke', '--steps', 1, '--out', tmp_path/out, *options)
    done = draw('a.png')
    info = Image.open(tmp_path/'a.png').info
    assert f"seed {info['seed']}" in done.output and 'a red apple' in info['captions']
    draw('b.png', '--seed', info['seed'])
    assert Image.open(tmp_path/'a.png') == Image.open(tmp_path/'b.png') and draw('c.png') and Image.open(tmp_path/'a.png') != Image.open(tmp_path/'c.png')
    draw('folder', '--seed', 5)
    assert Image.open(tmp_path/'folder/00000.png').info == {'caption': 'a red apple', 'seed': '5', 'number': '0', 'own_seed': str(image_seeds(5, 1)[0])}


def test_variations_and_image_guidance_on_the_command_line(tmp_path):
    pipe = TextToImage.from_preset('smoke', 'cpu')
    picture, base = (Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(2))
    for name, p in (('a', picture), ('base', base)): p.save(tmp_path/f'{name}.png')
    draw = lambda out, *options: shell('generate', '--preset', 'smoke', '--seed', 1, '--steps', 2, '--out', tmp_path/out, *options)
    cell = lambda name: Image.open(tmp_path/name).convert('RGB')
    assert draw('folder', '--image', tmp_path/'a.png', '-n', 2, '--sampler', 'ddim').exit_code == 0
    for i, expected in enumerate(pipe(images=picture, num_images_per_prompt=2, generator=1, num_inference_steps=2, sampler='ddim')): assert cell(f'folder/{i:05}.png').tobytes() == expected.tobytes(), i
    base.save(tmp_path/'a.png')
    says(draw('folder', '--image', tmp_path/'a.png', '-n', 2, '--sampler', 'ddim'), 'holds pictures of other settings (made_of')
    for out, options in (('free.png', ()), ('pulled.png', ('--base-image', tmp_path/'base.png', '--image-guidance-scale', 0.01))): assert draw(out, 'a red apple', *options).exit_code == 0
    assert np.abs(np.subtract(cell('free.png'), cell('pulled.png'), dtype=int)).max() > 20
    mask = Image.new('RGBA', (64, 64))
    mask.paste('white', (0, 0, 64, 32)); mask.save(tmp_path/'mask.png')
    assert draw('half.png', 'a red apple', '--base-image', tmp_path/'base.png', '--mask', tmp_path/'mask.png').exit_code == 0
    new, = pipe.inpaint('a red apple', base_image=base, mask=mask, generator=1, num_inference_steps=2)
    assert np.abs(np.subtract(new, base, dtype=int))[:32].max() <= 1 < np.abs(np.subtract(new, base, dtype=int))[32:].max()
    assert cell('half.png').tobytes() == _grid([new], ['a red apple'], 1).convert('RGB').tobytes()
    says(draw('x.png', 'a', '--mask', tmp_path/'mask.png'), 'name it with --base-image')
    says(draw('x.png', 'a', '--base-image', tmp_path/'base.png', '--mask', tmp_path/'mask.png', '--image-guidance-scale', 0.1), 'leave out --image-guidance-scale')
    with pytest.raises(ValueError, match='the mask is None'): pipe.inpaint('a', base_image=base, mask=None)
    says(draw('x.png', 'a red apple', '--image', tmp_path/'a.png'), 'give one of the two')
    says(draw('other', 'a red apple', '--base-image', tmp_path/'a.png'), 'image guidance is for a grid')
    says(draw('other', 'a red apple', '--mask', tmp_path/'mask.png'), 'image guidance is for a grid')
    says(draw('x.png', '--image', tmp_path/'none.png'), 'there is no picture')
    (tmp_path/'text.png').write_text('none')
    says(draw('x.png', '--image', tmp_path/'text.png'), 'text.png is damaged, or no picture')


def test_pictures_are_enlarged_on_the_command_line(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path/'a.png')
    done = shell('upsample', tmp_path/'a.png', '--out', tmp_path/'large', '--seed', 3)
    expected, = TextToImage.from_preset('emoji', 'cpu').upsample(picture, noise=0., generator=3)
    assert done.exit_code == 0 and Image.open(tmp_path/'large/a.png').tobytes() == expected.tobytes(), done.output
    (tmp_path/'b').mkdir(); picture.save(tmp_path/'b/a.png')
    says(shell('upsample', tmp_path/'a.png', tmp_path/'b/a.png', '--out', tmp_path/'large'), 'would become a.png')


def test_ctrl_c_tells_what_is_kept(tmp_path, monkeypatch):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr('t2i.pipeline.decode', stop)
    for out, sentence in (('a.png', 'nothing was written'), ('folder', 'the same command goes on')):
        assert sentence in shell('generate', 'a red apple', '--preset', 'smoke', '--out', tmp_path/out).output


def test_embeddings_in_a_list(pipe):
    "As they come about: rows of one tensor, sums of them, and pairs."
    y = pipe.embed_captions(['a red apple', 'a green heart'])
    drawn = [pipe(image_embeddings=given, generator=1, num_inference_steps=1) for given in (torch.stack([(y[0] + y[1])/2, *y]), [(y[0] + y[1])/2, y])]
    assert drawn[0] == drawn[1]


def test_a_picture_is_found_by_its_name_or_as_an_emoji():
    expected = data.find_picture('red heart, noto style')
    assert data.find_picture('red heart') == expected == data.find_picture('❤️')
    with pytest.raises(ValueError, match="no picture is called 'red hart'"): data.find_picture('red hart')


def test_nothing_prepared_is_told_with_the_reasons(pipe, tmp_path):
    for i in range(3): Image.new('RGB', (8, 8)).save(tmp_path/f'{i}.png')
    (tmp_path/'captions.csv').write_bytes('file,caption\n0.png,grün\n1.png,grün\n2.png,grün\n'.encode('cp1252'))
    with pytest.raises(ValueError, match='none of the 3 samples is for training: 3 × caption is not UTF-8; .*report.json names them'): prepare(pipe.clip, tmp_path, tmp_path/'out', progress=False)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_a_caption_means_the_same_alone_and_among_others(precision, monkeypatch):
    monkeypatch.setenv('T2I_PRECISION', precision)
    clip, captions = CLIP.from_preset('emoji', 'cpu'), ['a smiling cat wearing sunglasses, noto style', 'a red apple', 'dog']
    assert torch.equal(torch.cat([clip.encode_captions([c]) for c in captions]), clip.encode_captions(captions))


def test_a_classifier_of_a_preset_that_ships_none_is_not_made_up():
    from t2i.classifier import NoisyClassifier
    with pytest.raises(FileNotFoundError, match="ships no classifier: name the folder"): NoisyClassifier.from_preset(Preset({k: v for k, v in load_preset('emoji').items() if k != 'weights'}), 'cpu')


def test_pictures_in_a_tensor(pipe):
    "Of bytes, as prepared shards hold them; other kinds are told what to be."
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert torch.equal(pipe.embed_images(torch.from_numpy(pictures)), pipe.embed_images(pictures))
    with pytest.raises(ValueError, match=r'an array \[2, 3, 64, 64\] of float32: give PIL'): pipe.embed_images(torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize('name, content', [('a.pt', b'hello'), ('b.pt', b'\x80\x02]q\x00.'), ('c.npy', b'\x93NUMPY\x01\x00v\x00{('), ('d.safetensors', b'\x08' + bytes(7) + b'{"a": 1}')])
def test_files_of_weights_that_are_none(name, content, tmp_path):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{name} is not a complete {name[2:]} file'): load_weights(tmp_path/name)


@pytest.mark.parametrize('section, key, value', [('train.clip', 'cpu', '5'), ('decoder', 'pixel_unshuffle', '0'), ('decoder', 'channel_mult', '[0]'), ('decoder', 'num_res_blocks', '-1'), ('decoder', 'num_head_channels', '0'), ('clip', 'context_length', '0')])
def test_values_that_no_network_could_have(section, key, value, tmp_path):
    text = re.sub(rf'(?m)(^\[{section}\]$(?:\n(?!\[).*)*?)\n{key} = .*', r'\1', (PRESETS/'emoji.toml').read_text())
    (tmp_path/'mine.toml').write_text(text.replace(f'[{section}]\n', f'[{section}]\n{key} = {value}\n'))
    with pytest.raises(ValueError, match=rf'in .*mine.toml, {section}.{key} is'): load_preset(tmp_path/'mine.toml')


@pytest.mark.parametrize('bounds', [[1], [], [1, 2, 3], ['a', 'b'], 5])
def test_bounds_of_the_weight_that_are_none(bounds):
    with pytest.raises(ValueError, match='give two numbers, 0 ≤ low < high'): Diffusion(snr_range=bounds)


def test_a_decoder_of_another_target_teaches_no_upsampler(tmp_path):
    with pytest.raises(ValueError, match="decoder.safetensors is of a network that was trained with the target 'x0', and the preset's is 'v'"): _trained('decoder', load_preset(own_preset(tmp_path, 'emoji', target='"v"')), tmp_path)


@pytest.mark.parametrize('name', ['decoder', 'upsampler'])
@pytest.mark.parametrize('key, was, now', [('target', 'x0', 'v'), ('schedule', 'cosine', 'linear'), ('timesteps', 1000, 500)])
def test_the_process_is_kept_with_a_saved_pipeline(name, key, was, now, tmp_path):
    "And compared when it is loaded."
    TextToImage.from_preset('emoji', 'cpu').save_pretrained(tmp_path, torch.float16)
    config = json.loads((tmp_path/'config.json').read_text())
    (config if name == 'decoder' else config['upsampler'])['diffusion'][key] = now
    (tmp_path/'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name}.safetensors is of a network that was trained with the {key} {was!r}, and the preset's is {now!r}: set {key} .* \\[upsampler.diffusion\\]"): TextToImage.from_pretrained(tmp_path, 'cpu')


def test_prepared_with_another_clip_than_the_presets(pipe, shards, tmp_path):
    "Found before a translator has learned from it."
    emoji = load_preset('emoji')
    torch.manual_seed(1)
    prepare(CLIP.small(emoji.clip, pipe.clip.tokenize.pieces, 'cpu'), shards[0], tmp_path/'prepared', 64, progress=False)
    says(shell('train', 'translator', '--prepared', tmp_path/'prepared', '--out', tmp_path/'run'), 'another CLIP than that of the preset', '--folder')
    assert not (tmp_path/'run/translator').exists()


def test_a_preset_that_names_no_clip(tmp_path, shards):
    mine = own_preset(tmp_path, weights=None)
    says(shell('prepare', '--preset', mine, '--source', shards[0], '--out', tmp_path/'prepared'), "'mine' ships no CLIP", '--folder')
    assert not (tmp_path/'prepared').exists()


@pytest.mark.parametrize('Stage, section, key, value, words', [
    (DecoderTask, 'data', 'image_size', 32, 'the images in'), (DecoderTask, 'clip', 'embedding_size', 16, 'the image embeddings in'), (TranslatorTask, 'clip', 'embedding_size', 16, 'the image embeddings in')])
def test_prepared_at_another_size(Stage, section, key, value, words, pipe, shards, tmp_path):
    "Found before the training, not after it."
    prepare(pipe.clip, shards[0], tmp_path/'prepared', 64, progress=False)
    preset = load_preset('smoke')
    with pytest.raises(ValueError, match=rf"{words} .* {section}.{key} of the preset is {value}"): Stage(Preset.nest(preset | {section: preset[section] | {key: value}}), tmp_path/'prepared')


def test_statistics_know_their_clip(pipe, shards, tmp_path):
    "By a probe, whatever the captions are that they were computed from; it survives saving."
    prepare(pipe.clip, shards[0], tmp_path/'prepared', 64, progress=False)
    statistics = data.Statistics.load(tmp_path/'prepared/statistics.safetensors')
    far = replace(statistics, text=data.Standardizer(torch.full_like(statistics.text.mean, 100.), statistics.text.std))  # as of captions that are all alike
    far.save(tmp_path/'statistics.safetensors')
    check_clip(pipe.clip, load_statistics(tmp_path, 32), tmp_path)
    with pytest.raises(ValueError, match='cosine of the means'): check_clip(pipe.clip, replace(far, probe=None), tmp_path)
    other = load_preset('smoke').clip
    torch.manual_seed(5)
    other = type(pipe.clip).small(other, pipe.clip.tokenize.pieces, 'cpu')
    with pytest.raises(ValueError, match='of another one'): check_clip(other, statistics, tmp_path)


def test_classes_are_no_embeddings(pipe):
    "The zero vector would be class 0."
    y = torch.tensor([3])
    with pytest.raises(ValueError, match='not classes'): classifier_free(pipe.diffusion, pipe.decoder, y, 2.)
    with pytest.raises(ValueError, match='not classes'): decoder_loss(pipe.diffusion, pipe.decoder, torch.zeros(1, 3, 64, 64), y, torch.tensor([5]), torch.zeros(1, 3, 64, 64), torch.tensor([False]))


def test_packing_without_a_clip(published, shards, tmp_path, ship):
    "A preset that names none says what is missing; one whose CLIP is a file takes it along."
    ship(shards[0])
    assert shell('train', 'translator', '--preset', 'smoke', '--out', tmp_path/'run').exit_code == 0
    done = shell('pack', '--preset', own_preset(tmp_path, weights=None), '--runs', tmp_path/'run', '--out', tmp_path/'none')
    assert done.exit_code == 0 and 'none has no CLIP yet: copy' in done.output, done.output
    text = (tmp_path/'mine.toml').read_text()
    (tmp_path/'mine.toml').write_text(re.sub(r'(?s)\[clip\].*?\n\n', f'[clip]\nmodel = "t2i-tiny-quickgelu"\nweights = "{published/"t2i-tiny.pt"}"\nembedding_size = 32\n\n', text))
    done = shell('pack', '--preset', tmp_path/'mine.toml', '--runs', tmp_path/'run', '--out', tmp_path/'file')
    assert done.exit_code == 0 and (tmp_path/'file/clip.safetensors').exists(), done.output
    CLIP.from_preset(tmp_path/'mine.toml', 'cpu', tmp_path/'file')


# -- captions and places as the shell gives them -------------------------------------------------------------------
def test_captions_come_through_a_pipe_too(tmp_path, monkeypatch):
    text = '\ufeffred apple\r\n\r\nblue\u2028car\x0bfast\rgreen tree\n'
    (tmp_path/'captions.txt').write_bytes(text.encode())
    os.mkfifo(tmp_path/'fifo.txt')
    threading.Thread(target=lambda: (tmp_path/'fifo.txt').write_bytes(text.encode()), daemon=True).start()
    for name, given, file in (('file', None, tmp_path/'captions.txt'), ('pipe', text.encode(), '-'), ('fifo', None, tmp_path/'fifo.txt')):
        done = CliRunner().invoke(app, ['generate', '--preset', 'smoke', '--steps', '1', '--seed', '1', '-f', str(file), '--out', str(tmp_path/name)], input=given)
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path/name/'settings.json').read_text())['captions'] == ['red apple', 'blue\u2028car\x0bfast', 'green tree']
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '0')
    says(shell('generate', '-f', '-', '--preset', 'smoke', '--seed', '1', '--out', tmp_path/'several'), 'one process only can read a pipe')
    monkeypatch.undo()
    says(shell('generate', '-f', tmp_path), 'is a folder')
    says(shell('generate', '-f', tmp_path/'nothing.txt'), 'is no file')


def test_places_with_a_dot(tmp_path):
    (tmp_path/'v1.0').mkdir()
    draw = lambda out: shell('generate', 'cat', '--preset', 'smoke', '--steps', 1, '--seed', 1, '--out', tmp_path/out)
    assert draw('v1.0').exit_code == 0 and (tmp_path/'v1.0/00000.png').exists()
    says(draw('v2.0'), 'v2.0 is neither a picture file nor a folder that is there')
    says(draw('.png'), 'is an ending without a name')


def test_pictures_that_cannot_be_read_are_told_why(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    Image.new('RGB', (15, 10)).save(tmp_path/'large.png')
    (tmp_path/'empty.png').touch()
    (tmp_path/'damaged.png').write_bytes((tmp_path/'large.png').read_bytes()[:40])
    for name, words in (('large.png', 'has more than 100 pixels: make it smaller'), ('empty.png', 'is empty'), ('damaged.png', 'is damaged'), ('none.png', 'correct the path'), ('.', 'is a folder')):
        if name != '.': says(shell('upsample', tmp_path/name, '--out', tmp_path/'out'), words)
        says(shell('generate', '--image', tmp_path/name, '--out', tmp_path/'out.png'), words)
    for name in 'ab': (tmp_path/name).mkdir()
    says(shell('upsample', tmp_path/'a', '--out', tmp_path/'out'), 'no pictures in the folder')
    says(shell('upsample', tmp_path/'a/x.png', tmp_path/'b/x.jpg', '--out', tmp_path/'out'), 'would become x.png')


def test_what_can_be_checked_is_checked_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImage, 'from_preset', lambda *_: 1/0)
    says(shell('generate', 'cat', '--base-image', tmp_path/'none.png', '--out', tmp_path/'x.png'), 'none.png')
    says(shell('generate', 'cat', '--base-image', tmp_path/'none.png', '--out', tmp_path/'folder'), '--base-image')


def test_a_long_caption_does_not_fill_the_grid():
    picture = Image.new('RGB', (64, 64))
    short, long = (image_grid([picture], [caption]) for caption in ('apple '*12, 'apple '*5000))
    assert long.height < 2*short.height and image_grid([picture], ['苹果']).height == image_grid([picture], ['a']).height


def test_a_command_that_is_stopped_while_it_begins(monkeypatch):
    def stopped(): raise KeyboardInterrupt
    monkeypatch.setattr('t2i.cli.main', stopped)
    with pytest.raises(SystemExit) as e: t2i.command()
    assert e.value.code == 130


def test_a_shell_that_has_closed_its_outputs(tmp_path):
    for i, closed in enumerate(('2>&-', '>&- 2>&-')):
        done = subprocess.run(f'"{sys.executable}" -m t2i.cli generate cat --preset smoke --steps 1 --seed 1 --out {i}.png {closed}', shell=True, cwd=tmp_path)
        assert done.returncode == 0 and Image.open(tmp_path/f'{i}.png')


# -- runs that are looked for in the wrong place -------------------------------------------------------------------
def test_a_training_that_has_not_ended_is_told_as_such(weights, tmp_path):
    (tmp_path/'own').mkdir()
    (tmp_path/'own/start.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='its training has not ended: give the same `t2i train --data` again'): TextToImage.from_preset('smoke', 'cpu', tmp_path/'own')
    (tmp_path/'own/config.json').write_text('{}')  # it has
    with pytest.raises(FileNotFoundError, match='the decoder is missing: '): TextToImage.from_preset('smoke', 'cpu', tmp_path/'own')
    (tmp_path/'run/decoder').mkdir(parents=True)
    shutil.copy(weights/'decoder.safetensors', tmp_path/'run/decoder/weights.safetensors')
    with pytest.raises(FileNotFoundError, match='t2i pack --preset … --runs'): TextToImage.from_preset('smoke', 'cpu', tmp_path/'run')
    done = shell('pack', '--preset', 'smoke', '--runs', tmp_path/'run')
    assert done.exit_code == 0 and 'has no translator yet' in done.output and 'no decoder' not in done.output
    (tmp_path/'run/prepared').mkdir()
    data.Statistics(data.Statistics.unit(32).image).save(tmp_path/'run/prepared/statistics.safetensors')  # of pictures without captions
    done = shell('pack', '--preset', 'smoke', '--runs', tmp_path/'run')
    assert done.exit_code == 0 and 'translator' not in done.output
    says(shell('pack', '--preset', 'smoke', '--runs', tmp_path/'empty'), 'holds no trained weights')


def test_a_large_clip_never_learns_from_emoji_by_mistake(no_network, tmp_path):
    for stage in ('translator', 'decoder'): says(shell('train', stage, '--preset', 'thesis', '--out', tmp_path/'run'), 'there are no prepared pictures in', 't2i prepare', '--prepared')
    assert not (tmp_path/'run').exists()


def test_a_run_does_not_go_on_with_other_statistics(shards, tmp_path, ship):
    few = tmp_path/'few'
    data.write_shards(load_emoji()[:200], few)
    for name, source in (('one', shards[0]), ('other', few)): prepare(CLIP.from_preset('smoke', 'cpu'), source, tmp_path/name, load_preset('smoke').data.image_size, progress=False)
    train = lambda prepared: shell('train', 'decoder', '--preset', 'smoke', '--prepared', tmp_path/prepared, '--out', tmp_path/'run')
    assert train('one').exit_code == 0
    before = (tmp_path/'run/decoder/checkpoint.pt').read_bytes()
    says(train('other'), 'has learned from embeddings that were standardised with other statistics', '--initial', alone=False)
    assert (tmp_path/'run/decoder/checkpoint.pt').read_bytes() == before and train('one').exit_code == 0
