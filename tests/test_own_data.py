"A user's own pictures: from a folder to a pipeline, in one process and in two."
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runs import finish, launch
from shell import shell
from t2i.checkpoints import load_statistics
from t2i.core import ASSETS, Preset, load_preset, load_weights, save_weights
from t2i.data import PreparedDataset
from t2i.own_data import GENTLE, train_on
from t2i.pipeline import TextToImage
from t2i.train import make_config
from t2i.translator import TranslatorTask


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "40 pictures with captions."
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(40):
        Image.new('RGB', (20 + i, 30), (6*i, 255 - 6*i, 128)).save(folder/f'{i}.jpg')
        (folder/f'{i}.txt').write_text(f'colour number {i}')
    return folder


def run(*words): return shell('train', *words)


def test_a_folder_of_pictures_becomes_a_pipeline(pictures, tmp_path):
    done = run('--data', pictures, '--out', tmp_path/'run', '--hours', 0.0003, '--device', 'cpu')
    assert done.exit_code == 0, done.output
    pipe = TextToImage.from_pretrained(tmp_path/'run', 'cpu')
    assert pipe('colour number 3', num_inference_steps=1)[0].size == (64, 64) and pipe('colour number 3', num_inference_steps=1, upsample=True)[0].size == (256, 256)
    for stage in ('translator', 'decoder'):  # it started from the weights that ship, and went on
        shipped, trained = (load_weights(folder/f'{stage}.safetensors')[0] for folder in (ASSETS/'emoji', tmp_path/'run'))
        change = torch.cat([(shipped[k] - trained[k]).flatten() for k in shipped])
        assert 0 < change.norm() < 0.5*torch.cat([v.flatten() for v in shipped.values()]).norm(), stage
    own, shipped = (load_statistics(folder, 512).image.mean for folder in (tmp_path/'run', ASSETS/'emoji'))
    assert torch.equal(own, shipped), 'the decoder must get its embeddings standardised as before'
    before = (tmp_path/'run/decoder.safetensors').read_bytes()
    assert run('--data', pictures, '--out', tmp_path/'run', '--hours', 0.0003, '--device', 'cpu').exit_code == 0
    assert (tmp_path/'run/decoder.safetensors').read_bytes() == before, 'what is done is kept'
    done = shell('pack', '--runs', tmp_path/'run')
    assert done.exit_code == 0 and load_weights(tmp_path/'run/packed/upsampler.safetensors')[0].keys() == load_weights(ASSETS/'emoji/upsampler.safetensors')[0].keys(), done.output


def test_a_run_within_the_pictures_is_refused(pictures):
    "What it draws would be read as pictures."
    for out in (pictures/'run', pictures):
        with pytest.raises(ValueError, match='name a folder outside of it'): train_on(pictures, out, device='cpu', progress=False)
    assert not (pictures/'run').exists()


def test_a_run_that_began_within_the_pictures_goes_on(tmp_path, monkeypatch):
    class Enough(Exception): pass
    def prepare(*_, **__): raise Enough
    monkeypatch.setattr('t2i.own_data.prepare', prepare)
    (tmp_path/'run').mkdir()
    (tmp_path/'run/start.json').write_text('{"scratch": false}')
    with pytest.raises(Enough): train_on(tmp_path, tmp_path/'run', device='cpu', progress=False)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_weights_that_can_draw_go_on_gently(pictures, tmp_path, monkeypatch, device):
    class Enough(Exception): pass
    found = {}
    def train(task, config, out, **others):
        found[out.name] = make_config(config, torch.device(device)).learning_rate
        if out.name == 'decoder': raise Enough
        return ASSETS/'emoji/translator.safetensors'
    monkeypatch.setattr('t2i.own_data.train', train)
    with pytest.raises(Enough): train_on(pictures, tmp_path, device='cpu', progress=False)
    preset = load_preset('emoji')
    assert found == {stage: pytest.approx(GENTLE*make_config(preset.train[stage], torch.device(device)).learning_rate) for stage in ('translator', 'decoder')}


def test_pictures_that_are_skipped_are_told(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path/'pictures')
    (tmp_path/'pictures/3.jpg').write_bytes(b'not a picture')
    done = run('--data', tmp_path/'pictures', '--out', tmp_path/'run', '--preset', 'smoke', '--device', 'cpu')
    assert done.exit_code == 0 and '39 of 40 pictures are prepared; 1 picture was skipped (1 × undecodable image)' in done.output, done.output
    unknown = json.loads((tmp_path/'run/prepared/report.json').read_text())['unknown_words']
    assert unknown['number'] == 39 and f'never read {len(unknown)} of' in done.output, done.output


def test_going_on_in_another_way_is_refused(pictures, tmp_path):
    assert run('--data', pictures, '--out', tmp_path/'run', '--preset', 'smoke', '--device', 'cpu', '--scratch').exit_code == 0
    begun = json.loads((tmp_path/'run/start.json').read_text())
    (tmp_path/'run/start.json').write_text(json.dumps({'scratch': False}))
    done = run('--data', pictures, '--out', tmp_path/'run', '--preset', 'smoke', '--device', 'cpu', '--scratch')
    assert begun == {'scratch': True} and done.exit_code == 1 and 'began from the weights that ship: go on in the same way' in ' '.join(done.output.split())


def test_added_pictures_leave_embeddings_as_the_weights_know_them(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path/'pictures')
    pipes, held_out = [], []
    for added in (0, 20):
        for i in range(added): Image.new('RGB', (9, 9), 'red').save(tmp_path/f'pictures/more{i}.png'); (tmp_path/f'pictures/more{i}.txt').write_text('red')
        pipes.append(TextToImage.from_pretrained(train_on(tmp_path/'pictures', tmp_path/'run', 'smoke', scratch=True, device='cpu', progress=False), 'cpu'))
        held_out += [TranslatorTask('smoke', tmp_path/'run/prepared').held_out_examples() for _ in range(2)]
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(PreparedDataset(tmp_path/'run/prepared/train')) > 50
    first, second = (p.embed_images(Image.new('RGB', (9, 9), 'blue')) for p in pipes)
    assert torch.equal(first, second)


def test_who_is_skipped_is_told_where_nothing_is_for_validation(tmp_path, monkeypatch):
    folder = tmp_path/'pictures'
    folder.mkdir()
    for i in range(3):
        Image.new('RGB', (9, 9), (90*i, 0, 0)).save(folder/f'{i}.png')
        (folder/f'{i}.txt').write_bytes(b'a square')
    (folder/'picked.png').write_bytes(b'not a picture'); (folder/'picked.txt').write_bytes(b'a square')
    monkeypatch.setattr('t2i.readers.hash_fraction', lambda key: 'picked' not in key)
    with pytest.raises(ValueError, match='none of the 3 pictures is for validation: give more pictures, or mend those of .*report.json'): train_on(folder, tmp_path/'run', 'smoke', device='cpu', progress=False)


def test_few_described_pictures_among_many_have_a_validation_split(tmp_path):
    from t2i.readers import find_shards
    for i in range(100): Image.new('RGB', (8, 8)).save(tmp_path/f'{i}.png')
    for i in range(20): (tmp_path/f'{i}.txt').write_text('a square')
    assert sum(getattr(s, 'split', '') == 'validation' for shard in find_shards(tmp_path) for s in shard) == 1


@pytest.mark.parametrize('scratch', [True, False])
def test_pictures_without_captions_are_told_so(tmp_path, scratch):
    for i in range(40):
        path = tmp_path/f'data/{"ab"[i % 2]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (6*i, 0, 0)).save(path)
    with pytest.raises(ValueError, match='none of the pictures has a caption, .* put a .txt beside each'): train_on(tmp_path/'data', tmp_path/'run', 'smoke', scratch=scratch, device='cpu', progress=False)


def test_two_processes_prepare_and_train(pictures, tmp_path):
    "Prepare, train both stages, load: all of it shared by two processes."
    assert finish(launch(2, train_on, pictures, tmp_path, 'smoke', 0.5, True, 0, 'cpu', False)) == [0, 0]
    assert load_weights(tmp_path/'decoder/weights.safetensors')[1]['step'] == 3
    pictures_drawn = TextToImage.from_pretrained(tmp_path, 'cpu')(['a', 'b'], num_inference_steps=1)
    assert len(pictures_drawn) == 2


def test_a_preset_that_does_not_train_is_refused_early(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"'smoke' does not train a decoder: add a \[train.decoder\]"):
        train_on(pictures, tmp_path/'run', Preset({**load_preset('smoke'), 'train': {'translator': {'steps': 1}}}), device='cpu')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('words, sentence', [
    (['--data', 'EMPTY', '--out', 'RUN'], 'EMPTY'), (['--data', 'EMPTY'], 'name it with --out'),
    (['decoder', '--data', 'EMPTY', '--out', 'RUN'], 'leave out the stage'), (['--scratch'], 'without --data')])
def test_bad_calls(words, sentence, tmp_path):
    (tmp_path/'EMPTY').mkdir()
    done = run(*(str(tmp_path/w) if w.isupper() else w for w in words))
    assert done.exit_code == 1 and sentence in done.output and 'Traceback' not in done.output and not (tmp_path/'RUN').exists()


def test_the_decoder_gets_most_of_the_time_and_both_stages_the_seed(pictures, tmp_path, monkeypatch):
    class Enough(Exception): pass
    found = {}
    def train(task, config, out, seed=0, hours=None, **others):
        found[out.name] = pytest.approx(hours), seed, torch.initial_seed()
        if out.name == 'decoder': raise Enough
        return ASSETS/'emoji/translator.safetensors'
    monkeypatch.setattr('t2i.own_data.train', train)
    with pytest.raises(Enough): train_on(pictures, tmp_path, hours=2., seed=7, device='cpu', progress=False)
    assert found == {'translator': (0.2, 7, 7), 'decoder': (1.8, 7, 7)}


def test_own_pictures_can_be_learned_from_scratch(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr('t2i.own_data.train_on', lambda *_, **settings: given.update(settings) or tmp_path)
    assert shell('train', '--data', tmp_path, '--out', tmp_path/'run', '--scratch', '--seed', 3, '--device', 'cpu').exit_code == 0
    assert given['scratch'] is True and given['seed'] == 3


def test_what_was_learned_from_own_pictures_is_kept_in_sixteen_bits(tmp_path, monkeypatch):
    (tmp_path/'pictures').mkdir()
    for i in range(40):
        Image.new('RGB', (9, 9), (6*i, 0, 0)).save(tmp_path/f'pictures/{i}.png')
        (tmp_path/f'pictures/{i}.txt').write_text('a red square')
    monkeypatch.setattr('t2i.own_data.train', lambda task, config, out, **_: save_weights(out/'weights.safetensors', task.model.state_dict(), task.metadata()))
    out = train_on(tmp_path/'pictures', tmp_path/'run', 'smoke', scratch=True, device='cpu', progress=False)
    assert {v.dtype for v in load_file(out/'decoder.safetensors').values() if v.is_floating_point()} == {torch.float16}
