"""`t2i prepare`: whole or not at all, the same from any number of processes, with statistics as of a single pass."""
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from shell import says, shell
from test_readers import Stub, own_pictures, pairs, picture, write_tar

from t2i import data
from t2i.core import Preset, load_preset, load_weights, save_weights, square
from t2i.data import PreparedDataset, Statistics, merged_statistics, moments, prepare, training_statistics


def raw_shards(folder, shards=6, n=40):
    "Tars with rectangular pictures of noise; one picture in ten is spoiled."
    rng = np.random.default_rng(0)
    for s in range(shards):
        members = []
        for i in range(n):
            jpeg = picture('white', format='JPEG')[:40] if i % 10 == 3 else encoded(rng.integers(0, 256, (int(rng.integers(20, 60)), 40, 3), np.uint8))
            members += [(f'{s:05}{i:04}.jpg', jpeg), (f'{s:05}{i:04}.txt', f'a picture of {"a"*int(rng.integers(0, 9))}'.encode())]
        write_tar(folder/f'{s:05}.tar', members)
    return folder


def encoded(pixels):
    import io
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG')
    return buffer.getvalue()


def contents(out):
    "What a prepared folder holds: the hash of every file by its name."
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def raw(tmp_path_factory): return raw_shards(tmp_path_factory.mktemp('raw')/'cc')


@pytest.fixture(scope='module')
def whole(raw, tmp_path_factory):
    "The raw shards prepared at one go."
    out = tmp_path_factory.mktemp('whole')/'prepared'
    prepare(Stub(), raw, out, progress=False, batch_size=16)
    return out


def test_what_is_prepared(raw, whole):
    report = json.loads((whole/'report.json').read_text())
    assert report['samples'] == 240 and report['prepared'] == 216 and report['skipped'] == {'undecodable image': 24}
    assert report['shards']['cc-00002']['skipped'] == {'undecodable image': [f'00002{i:04}' for i in (3, 13, 23, 33)]}
    train, validation = (PreparedDataset(whole/s) for s in ('train', 'validation'))
    assert len(train) + len(validation) == 216 and not set(train.keys) & set(validation.keys) and 2 < len(validation) < 25
    from t2i.readers import find_shards
    samples = {s.key: s for shard in find_shards(raw) for s in shard}
    for i in (0, 50, len(train) - 1):
        image = data.decode_image(samples[train.keys[i]].image)
        assert (train.images([i])[0].numpy() == np.asarray(square(image, 64))).all()
        assert torch.equal(train.image_embeddings([i]), Stub().encode_images([image]).half().float())  # of the original, not of the 64×64
        assert torch.equal(train.text_embeddings([i])[0], Stub().encode_captions(samples[train.keys[i]].captions).half().float())
    with safe_open(train.paths[0], 'pt') as f: assert {k: (f.get_slice(k).get_dtype(), f.get_slice(k).get_shape()[1:]) for k in f.keys()} == {
        'images': ('U8', [64, 64, 3]), 'image_embeddings': ('F16', [2]), 'text_embeddings': ('F16', [1, 3])}


def test_a_shard_that_was_cut_off_is_made_again(raw, whole, tmp_path):
    out = tmp_path/'out'
    shutil.copytree(whole, out)
    cut = out/'train/cc-00001.safetensors'
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r'cc-00001.safetensors cannot be read .*let `t2i prepare` make it again'): PreparedDataset(out/'train')
    prepare(Stub(), raw, out, progress=False, batch_size=16)
    assert contents(out) == contents(whole)


def test_what_never_varies_is_left_as_it_is():
    still, lively = torch.ones(5), torch.arange(5.)
    statistics = merged_statistics([{'image': moments(torch.stack([still, lively], 1)), 'text': moments(still[:, None])}])
    y = statistics.image.standardize(torch.tensor([[1., 2.], [3., 2.]]))
    assert torch.equal(y, torch.tensor([[0., 0.], [2., 0.]]))


def test_padding_is_white_and_in_the_middle(tmp_path):
    Image.new('RGB', (128, 64), 'black').save(tmp_path/'wide.png')
    out = np.asarray(square(Image.open(tmp_path/'wide.png'), 64))
    assert (out[:16] == 255).all() and (out[16:48] == 0).all() and (out[48:] == 255).all()


def test_the_encoder_is_given_pictures_of_its_size_made_from_the_original(raw, tmp_path):
    seen = []
    class Sized(Stub):
        image_size = 30
        def encode_images(self, images): seen.append(images); return super().encode_images(images)
    prepare(Sized(), raw, tmp_path/'out', progress=False)
    from t2i.readers import find_shards
    first = data.decode_image(next(iter(find_shards(raw)[0])).image)
    assert all(isinstance(s, np.ndarray) and s.shape[1:] == (30, 30, 3) for s in seen) and (seen[0][0] == np.asarray(square(first, 30))).all()


def test_statistics_are_those_of_a_single_pass(whole):
    saved = load_weights(whole/'statistics.safetensors', None)[0]
    shards = [load_weights(p, None)[0] for p in sorted((whole/'train').glob('*.safetensors'))]
    assert len(shards) == 6
    for kind in ('image', 'text'):
        x = torch.cat([s[f'{kind}_embeddings'].flatten(0, -2) for s in shards]).numpy().astype(np.float64)
        assert saved[f'{kind}_mean'].dtype == torch.float64
        np.testing.assert_allclose(saved[f'{kind}_mean'], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(saved[f'{kind}_std'], np.where(x.std(0) > 0, x.std(0), 1), rtol=1e-12)
    again = training_statistics(whole/'train')
    assert torch.equal(again.image.mean, saved['image_mean']) and torch.equal(again.text.std, saved['text_std'])
    y = Statistics.load(whole/'statistics.safetensors').image.standardize(PreparedDataset(whole/'train').image_embeddings(torch.arange(100)))
    assert y.dtype == torch.float32 and y.abs().max() < 10


def test_what_is_done_is_not_done_again(raw, whole, tmp_path):
    class Broken(Stub):
        name = 'Stub'
        def encode_images(self, images): raise AssertionError('encoded again')
    before = {p: p.stat().st_mtime_ns for p in whole.glob('*/*.safetensors')}
    prepare(Broken(), raw, whole, progress=False)
    assert before == {p: p.stat().st_mtime_ns for p in whole.glob('*/*.safetensors')}


def test_a_changed_raw_shard_a_lost_file_and_a_damaged_record_are_done_again(tmp_path):
    raw, out = raw_shards(tmp_path/'raw', 4, 10), tmp_path/'out'
    prepare(Stub(), raw, out, progress=False)
    before = contents(out)
    write_tar(raw/'00000.tar', [('new.png', picture()), ('new.txt', b'x')])
    (out/'train/raw-00001.safetensors').unlink()
    record = out/'records/raw-00002.safetensors'
    record.write_bytes(record.read_bytes()[:50])
    untouched = (out/'records/raw-00003.safetensors').stat().st_mtime_ns
    report = prepare(Stub(), raw, out, progress=False)
    after = contents(out)
    assert report['shards']['raw-00000'] == {'samples': 1, 'prepared': 1, 'skipped': {}}
    assert {k for k in before if 'raw-00000' not in k} <= after.keys()
    assert {k for k in before.keys() & after.keys() if before[k] != after[k]} == {'train/raw-00000.safetensors', 'records/raw-00000.safetensors', 'statistics.safetensors', 'report.json'}
    assert (out/'records/raw-00003.safetensors').stat().st_mtime_ns == untouched and 'new' in PreparedDataset(out/'train').keys


def test_captions_that_were_rewritten_in_a_file_of_the_same_size_are_read_again(tmp_path):
    def write(word): return write_tar(tmp_path/'raw/0.tar', [member for i in range(3) for member in ((f'{i}.png', picture()), (f'{i}.txt', word))])
    write(b'aaaa')
    size, out = (tmp_path/'raw/0.tar').stat().st_size, tmp_path/'out'
    embedding = lambda: prepare(Stub(), tmp_path/'raw', out, progress=False) and PreparedDataset(out/'train').text_embeddings([0])[0, 0, 1]
    assert embedding() == 4
    assert write(b'abab').stat().st_size == size and embedding() == 2


def test_pictures_of_coco_that_were_missing_are_read_when_they_are_there(tmp_path):
    (tmp_path/'coco/annotations').mkdir(parents=True); (tmp_path/'coco/train2014').mkdir()
    (tmp_path/'coco/annotations/captions_train2014.json').write_text(json.dumps({'annotations': [{'id': i, 'image_id': i, 'caption': 'a picture'} for i in range(4)]}))
    def unzip(numbers):
        for i in numbers: (tmp_path/f'coco/train2014/COCO_train2014_{i:012}.jpg').write_bytes(picture(format='JPEG'))
        return prepare(Stub(), tmp_path/'coco', tmp_path/'out', progress=False)
    assert unzip([0, 3])['skipped'] == {'no image': 2}
    assert unzip([1, 2])['prepared'] == 4


# -- killed ---------------------------------------------------------------------------------------------------------
def start(raw, out): prepare(Stub(), raw, out, progress=False, batch_size=16, workers=1)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # fork
def test_killed_at_any_moment_it_goes_on_and_the_result_is_the_same(raw, whole, tmp_path):
    fork, rng, kills = multiprocessing.get_context('fork'), random.Random(0), 0
    begun = time.time()
    start(raw, tmp_path/'timed')
    needs = time.time() - begun
    out = tmp_path/'out'
    for _ in range(30):
        process = fork.Process(target=start, args=(raw, out))
        process.start()
        process.join(rng.uniform(0.05, 0.35)*needs)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0 and kills >= 3: break
        if process.exitcode == 0:  # the machine has become faster
            shutil.rmtree(out)
            kills, needs = 0, needs/2
        data_there = [p for p in out.glob('train/*.safetensors') if not p.name.startswith('.')]
        if data_there: PreparedDataset(out/'train').images([0])  # what is there is whole
    start(raw, out)
    assert kills >= 3 and contents(out) == contents(whole)  # nothing is left behind either


@pytest.mark.parametrize('point', ['before_record', 'while_writing'])
def test_killed_at_the_worst_moments(raw, whole, tmp_path, point, monkeypatch):
    "Between a shard and its record; and in the middle of a file."
    out, real = tmp_path/'out', data.save_weights
    class Killed(BaseException): pass
    def dying(path, *args, **kwargs):
        if path.parent.name == 'records' and path.stem == 'cc-00003' and point == 'before_record': raise Killed
        if path.parent.name == 'train' and path.stem == 'cc-00003' and point == 'while_writing':
            (path.parent/f'.{path.name}.abc.safetensors').write_bytes(b'half a file')
            (folder := path.parent/f'.{path.name}.abc.safetensors.def').mkdir()
            (folder/'.tmpXYZ').write_bytes(b'what safetensors had written of it')
            for name in ('.statistics.safetensors.abc.safetensors', '.report.json.abc'): (out/name).write_bytes(b'of another time')
            raise Killed
        return real(path, *args, **kwargs)
    monkeypatch.setattr(data, 'save_weights', dying)
    with pytest.raises(Killed): start(raw, out)
    monkeypatch.undo()
    assert len(PreparedDataset(out/'train')) > 0 and not (out/'records/cc-00003.safetensors').exists()
    start(raw, out)
    assert contents(out) == contents(whole)


def test_a_full_disk_is_told_and_leaves_what_is_done(raw, whole, tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        if path.stem == 'cc-00004': raise OSError(28, 'No space left on device')
        return real(path, *args, **kwargs)
    real = data.save_weights
    monkeypatch.setattr(data, 'save_weights', full)
    with pytest.raises(OSError, match='No space'): start(raw, tmp_path/'out')
    monkeypatch.undo()
    start(raw, tmp_path/'out')
    assert contents(tmp_path/'out') == contents(whole)


# -- many processes -------------------------------------------------------------------------------------------------
def test_two_processes_make_what_one_makes(raw, whole, tmp_path, repository):
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(f'''
        import os, sys
        sys.path.insert(0, {str(repository/'tests')!r})
        from test_readers import Stub
        from t2i import data
        real, written = data.save_weights, []
        def note(path, *args): written.append(path.stem); return real(path, *args)
        data.save_weights = note
        report = data.prepare(Stub(), {str(raw)!r}, {str(tmp_path/'out')!r}, progress=False, batch_size=16)
        assert report['prepared'] == 216
        open({str(tmp_path)!r} + '/rank' + os.environ['RANK'], 'w').write(' '.join(sorted(set(written))))
    '''))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path/'out') == contents(whole)
    assert (tmp_path/'rank1').read_text() == 'cc-00001 cc-00003 cc-00005' and (tmp_path/'rank0').read_text() == 'cc-00000 cc-00002 cc-00004 statistics'


def test_processes_leave_each_other_before_python_ends(tmp_path):
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(f'''
        import atexit, os
        import torch.distributed as dist
        from t2i.core import process_state
        atexit.register(lambda: open({str(tmp_path)!r} + '/left' + os.environ['RANK'], 'w').write(str(dist.is_initialized())))  # runs after what is registered later
        for _ in range(2): process_state('cpu')
        assert dist.is_initialized()
    '''))
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path/f'left{rank}').read_text() for rank in range(2)] == ['False', 'False']


def test_memory_does_not_grow_with_the_data(tmp_path):
    "The peak of a process that prepares two shards, and of one that prepares twenty."
    def peak(shards):
        raw = raw_shards(tmp_path/f'raw{shards}', shards, 120)
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            try:
                start(raw, tmp_path/f'out{shards}')
                os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())
            finally: os._exit(0)
        os.waitpid(pid, 0)
        os.close(writer)
        with os.fdopen(reader) as f: return int(f.read())/1024  # MB
    few, many = peak(2), peak(20)
    assert sum(p.stat().st_size for p in (tmp_path/'out20').rglob('*') if p.is_file())/2**20 > 20 and many < few + 8, (few, many)


# -- sources together, and without captions ------------------------------------------------------------------------
@pytest.fixture
def imagenet(tmp_path):
    for name in ('n01440764', 'n01443537'):
        (tmp_path/'imagenet'/name).mkdir(parents=True)
        for i in range(30): (tmp_path/'imagenet'/name/f'{i}.JPEG').write_bytes(picture((7*i, 0, 0), format='JPEG'))
    return tmp_path/'imagenet'


def test_pictures_without_captions_train_the_decoder_only(imagenet, tmp_path):
    from t2i.translator import TranslatorTask
    prepare(Stub(), imagenet, tmp_path/'out', progress=False)
    train = PreparedDataset(tmp_path/'out/train')
    assert train.images([0, 5]).shape == (2, 64, 64, 3) and train.image_embeddings([5]).shape == (1, 2)
    statistics = Statistics.load(tmp_path/'out/statistics.safetensors')
    assert statistics.text is None and statistics.image.mean.shape == (2,)
    with pytest.raises(ValueError, match='no captions'): train.text_embeddings([0])
    with pytest.raises(ValueError, match='no captions, and the translator learns from captions'): TranslatorTask('smoke', tmp_path/'out')


def test_samples_are_drawn_from_captions_where_there_are_some(raw, imagenet, tmp_path):
    "Beside pictures without, as with the thesis's data."
    from t2i.decoder import DecoderTask, make_decoder
    prepare(Stub(), [imagenet, raw], tmp_path/'out', progress=False, image_size=64)
    preset = Preset.nest(load_preset('smoke') | {'clip': {'embedding_size': 2}})
    asked, translator = [], lambda text: (asked.append(text.shape), text[:, :2])[1]
    task = DecoderTask(preset, tmp_path/'out', translator)
    grid, alone = task.samples(make_decoder(preset).eval(), 4), DecoderTask(preset, tmp_path/'out').samples(make_decoder(preset).eval(), 4)
    assert asked == [(4, 3)] and grid.height > 1.3*alone.height


def test_sources_are_prepared_together(raw, imagenet, tmp_path):
    own_pictures(tmp_path/'own')
    (tmp_path/'own/c.jsonl').write_text(''.join(json.dumps({'file': f'cats/{i}.png', 'caption': [f'cat {i}', f'kitten {i}', f'{i}']}) + '\n' for i in range(6)))
    sources = [imagenet, raw, tmp_path/'own']
    report = prepare(Stub(), sources, tmp_path/'out', progress=False)
    assert report['prepared'] == 60 + 216 + 6
    everything, captioned = PreparedDataset(tmp_path/'out/train'), PreparedDataset(tmp_path/'out/train', captions=True)
    assert len(everything) - len(captioned) == sum(k.startswith('n0') for k in everything.keys) and captioned.captions_per_image == 3
    own = captioned.keys.index(next(k for k in captioned.keys if k.startswith('cats')))
    texts = captioned.text_embeddings([own, 0])
    assert texts.shape == (2, 3, 3) and not torch.equal(texts[0, 0], texts[0, 1]) and torch.equal(texts[1, 0], texts[1, 2])  # one caption: repeated
    with pytest.raises(ValueError, match='captions=True'): everything.text_embeddings(torch.arange(len(everything)))
    with pytest.raises(ValueError, match='other sources'): prepare(Stub(), imagenet, tmp_path/'out', progress=False)
    with pytest.raises(ValueError, match='different names'): prepare(Stub(), [raw, raw], tmp_path/'twice', progress=False)


def test_another_size_or_encoder_needs_another_folder(raw, whole):
    with pytest.raises(ValueError, match="'image_size': 64.*'image_size': 32"): prepare(Stub(), raw, whole, 32, progress=False)
    class Other(Stub): pass
    with pytest.raises(ValueError, match='Other'): prepare(Other(), raw, whole, progress=False)
    class Retrained(Stub):
        name, factor = 'Stub', 1.02
        def encode_captions(self, captions): return self.factor*super().encode_captions(captions)
    prepare(Retrained(), raw, whole, progress=False)  # as near as another device
    Retrained.factor = 1.5
    with pytest.raises(ValueError, match='other weights of CLIP Stub'): prepare(Retrained(), raw, whole, progress=False)


def test_embeddings_that_are_not_finite_are_skipped(raw, tmp_path):
    class Hot(Stub):
        def encode_images(self, images): return torch.where(torch.arange(len(images))[:, None] == 2, 1e6, super().encode_images(images))
    report = prepare(Hot(), raw, tmp_path/'out', progress=False)
    assert report['skipped']['embedding is not finite'] == 6 and report['prepared'] == 210
    assert all(v.isfinite().all() for v in load_weights(tmp_path/'out/statistics.safetensors', None)[0].values())


def test_keys_that_several_shards_have_are_counted(tmp_path):
    for name, first in (('0', 0), ('1', 3)): write_tar(tmp_path/f'raw/{name}.tar', pairs(5, first))
    report = prepare(Stub(), tmp_path/'raw', tmp_path/'out', progress=False)
    assert report['keys_in_several_shards'] == 2 and report['prepared'] == 10


def test_nothing_that_can_be_used(tmp_path):
    write_tar(tmp_path/'raw/0.tar', [('a.jpg', b'x'), ('a.txt', b'y')])
    with pytest.raises(ValueError, match='none of the 1 samples'): prepare(Stub(), tmp_path/'raw', tmp_path/'out', progress=False)
    assert json.loads((tmp_path/'out/report.json').read_text())['skipped'] == {'undecodable image': 1}


# -- the command ----------------------------------------------------------------------------------------------------
def test_command(tmp_path):
    own_pictures(tmp_path/'mine', 30)
    (tmp_path/'mine/c.csv').write_text('file,caption\n' + ''.join(f'cats/{i}.png,cat {i}\n' for i in range(29)))
    prepare_command = lambda *words: shell('prepare', '--preset', 'smoke', '--device', 'cpu', *words)
    result = prepare_command('--source', tmp_path/'mine', '--out', tmp_path/'out')
    assert result.exit_code == 0 and '29 of 30 pictures are prepared; 1 picture was skipped (1 × no caption)' in result.output, result.output
    assert PreparedDataset(tmp_path/'out/train').text_embeddings([0]).shape == (1, 1, 32)
    says(prepare_command('--source', tmp_path/'nowhere', '--out', tmp_path/'out'), 'there is no folder', 'name one')
    says(prepare_command('--source', tmp_path/'mine/c.csv', '--out', tmp_path/'out'), 'there is no folder', 'name the folder of this file')


def test_emoji_are_prepared_like_everything_else(tmp_path):
    data.write_shards(data.load_emoji().head(60), tmp_path/'raw', 40)
    report = prepare(Stub(), tmp_path/'raw', tmp_path/'out', progress=False)
    assert report['prepared'] == 60 and report['splits'] == data.load_emoji().head(60)['split'].value_counts().to_dict()
    train = PreparedDataset(tmp_path/'out/train')
    assert train.captions_per_image == 5 and train.keys == list(data.load_emoji().head(60).query("split == 'train'").key)


def test_captions_are_repeated_until_all_pictures_have_as_many(tmp_path):
    (tmp_path/'raw').mkdir()
    for i in range(40): (tmp_path/f'raw/{i}.png').write_bytes(picture((i, 0, 0)))
    (tmp_path/'raw/t.jsonl').write_text(''.join(json.dumps({'file': f'{i}.png', 'captions': [str(i)*(k + 1) for k in range(5 if i % 2 else 2)]}) + '\n' for i in range(40)))
    prepare(Stub(), tmp_path/'raw', tmp_path/'out', progress=False)
    prepared = PreparedDataset(tmp_path/'out/train')
    for i, key in enumerate(prepared.keys):
        if int(key.split('.')[0]) % 2: continue
        text = prepared.text_embeddings([i])[0]
        assert torch.equal(text, text[[0, 1, 0, 1, 0]]) and not torch.equal(text[0], text[1])


def test_a_split_that_a_raw_shard_no_longer_has_is_gone(tmp_path):
    raw, out = tmp_path/'raw', tmp_path/'out'
    raw.mkdir()
    members = [(f'{i}.{e}', d) for i in range(200) for e, d in (('png', picture((i, 0, 0))), ('txt', b'a'))]
    write_tar(raw/'0.tar', members)
    prepare(Stub(), raw, out, progress=False)
    held_out = set(PreparedDataset(out/'validation').keys)
    assert held_out
    write_tar(raw/'0.tar', [(n, d) for n, d in members if n.split('.')[0] not in held_out])
    report = prepare(Stub(), raw, out, progress=False)
    assert set(report['splits']) == {'train'} and not list((out/'validation').glob('*.safetensors'))


def test_what_is_still_being_written_is_not_read(tmp_path):
    "Beside finished shards of emoji, what a kill or another process has left."
    data.write_shards(data.load_emoji().head(20), tmp_path)
    done, = tmp_path.glob('*.parquet')
    shutil.copy(done, tmp_path/'.00000.parquet.abcdefgh.parquet')
    (tmp_path/'.00001.parquet.abcdefgh.parquet').write_bytes(b'PAR1')
    assert len(data.load_emoji(folder=tmp_path)) == 20


def test_pictures_without_a_split_for_validation(tmp_path):
    "`prepare` says so, and training says it again, with another remedy than to prepare the same once more."
    data.write_shards(data.load_emoji('train').head(20), tmp_path/'raw')
    done = shell('prepare', '--preset', 'smoke', '--source', tmp_path/'raw', '--out', tmp_path/'out', '--device', 'cpu')
    assert done.exit_code == 0 and 'none of them is for validation, and training needs some' in done.output, done.output
    with pytest.raises(FileNotFoundError, match='though the other splits do: prepare more pictures'): PreparedDataset(tmp_path/'out/validation')
    with pytest.raises(FileNotFoundError, match='make them with `t2i prepare`'): PreparedDataset(tmp_path/'nothing/validation')


def test_some_pictures_of_many_are_of_all_shards(tmp_path):
    "And a picture with fewer captions than another has each of its own in turn."
    for i in range(4): save_weights(tmp_path/f'{i}.safetensors', {'images': torch.full((10, 2, 2, 3), i, dtype=torch.uint8), 'image_embeddings': torch.zeros(10, 4).half(),
                                                                   'text_embeddings': torch.arange(3 - i % 2)[None, :, None].expand(10, -1, 4).half().contiguous()}, {'keys': []})
    shards = PreparedDataset(tmp_path)
    assert shards.spread(8).tolist() == [0, 5, 10, 15, 20, 25, 30, 35] and shards.spread(100).tolist() == list(range(40))
    assert shards.images(shards.spread(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert shards.text_embeddings(torch.tensor([0, 10]))[..., 0].tolist() == [[0, 1, 2], [0, 1, 0]]
    for name, shape in (('images', (0, 2, 2, 3)), ('image_embeddings', (0, 4)), ('text_embeddings', (0, 3, 4))): assert getattr(shards, name)(torch.tensor([], dtype=torch.long)).shape == shape


def test_captions_that_are_left_out_are_counted(tmp_path):
    raw = tmp_path/'raw'
    raw.mkdir()
    for i in range(40): Image.new('RGB', (8, 8), (i, 0, 0)).save(raw/f'{i}.png')
    (raw/'t.jsonl').write_text(''.join(json.dumps({'file': f'{i}.png', 'captions': ['a', ' ']}) + '\n' for i in range(40)))
    assert prepare(Stub(), raw, tmp_path/'out', progress=False)['captions_dropped'] == 40
