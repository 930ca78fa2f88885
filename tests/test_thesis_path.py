"""From the authors' seven files and MS-COCO to Table 5.1, on tiny stand-ins; and pictures on disk, whoever draws them and however often he is stopped."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stand_ins
from shell import says, shell
from t2i.core import get_device, process_state, uses_bfloat16
from t2i.data import load_emoji
from t2i.experiments import THESIS_TABLE, VARIANTS, draw_pairs, draw_variant, held_out, measure, sample_variants, table_5_1
from t2i.pipeline import TextToImage, draw_to_folder, process_share
from t2i.train import _Run

pytestmark = [pytest.mark.usefixtures('no_network'), pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')]
FOLDERS = ['full_pipeline_42', 'full_pipeline_43', 'image_decoder_only_42', 'no_clip_translator_42', 'real_42']
SETTINGS = dict(num_inference_steps=2, batch_size=1)


def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    stand_ins.save_coco(folder)
    return folder


@pytest.fixture
def arguments(published, small, coco): return ['-n', 8, '--preset', small, '--folder', published, '--data', coco, '--upsample', '--device', 'cpu']


# -- MS-COCO -----------------------------------------------------------------------------------------------------
def test_pairs_of_coco(coco):
    pairs = draw_pairs(8, 42, coco)
    assert pairs.images.shape == (8, 256, 256, 3) and pairs.images.dtype == np.uint8 and len(set(pairs.captions)) == 8
    assert draw_pairs(3, 42, coco).captions == pairs.captions[:3] and (draw_pairs(3, 42, coco).images == pairs.images[:3]).all()
    assert draw_pairs(8, 43, coco).captions != pairs.captions
    captions = {c for seed in range(20) for c in draw_pairs(20, seed, coco).captions}
    assert {c.split()[-1] for c in captions} == {f'{k}.' for k in range(5)}  # one of the first five
    table = held_out(coco)
    number = int(re.search(r'\d+', pairs.captions[0])[0])
    assert f'{7*number + 1:012}' in table.image[number] and pairs.captions[0].startswith(f'Picture {number} ')
    corners = pairs.images[:, 0, 0]  # wide and high pictures have white borders
    assert 0 < (corners == 255).all(1).sum() < 8
    with pytest.raises(ValueError, match='n_images is 21: there are 20'): draw_pairs(21, 42, coco)


def test_coco_that_is_almost_right(coco, tmp_path, arguments):
    says(shell('sample', tmp_path/'x', *arguments, '--data', tmp_path), tmp_path/'annotations/captions_val2014.json', 'get http://')
    stand_ins.save_coco(tmp_path)
    for path in (tmp_path/'val2014').glob('*'): path.write_bytes(path.read_bytes()[:100])
    says(shell('sample', tmp_path/'x', *arguments, '--data', tmp_path), 'COCO_val2014_', 'cannot be read', 'unzip it again')


# -- the way of `thesis` -----------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def walked(published, small, coco, tmp_path_factory):
    "`t2i sample`, then the chapter by papermill on its folder, in a kernel that knows the tiny CLIP → where they wrote, and what the first left."
    top = tmp_path_factory.mktemp('walk')
    drawn = shell('sample', top/'samples', '-n', 8, '--preset', small, '--folder', published, '--data', coco, '--upsample', '--device', 'cpu')
    assert drawn.exit_code == 0, drawn.output
    startup, configs = top/'ipython/profile_default/startup', top/'configs'
    startup.mkdir(parents=True)
    configs.mkdir()
    (startup/'tiny.py').write_text(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
                                   f'import pathlib, stand_ins; stand_ins.register_clips(pathlib.Path({str(configs)!r}))')
    before = contents(top/'samples')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        patch.setenv('IPYTHONDIR', str(top/'ipython'))
        patch.setenv('HF_HUB_OFFLINE', '1')
        papermill.execute_notebook(
            str(Path(__file__).parents[1]/'nbs/05_experiments.ipynb'), str(top/'table.ipynb'), progress_bar=False,
            parameters=dict(preset=str(small), folder=str(published), data=str(coco), samples=str(top/'samples'), n_images=8, n_samples=2, upsample=True, device='cpu', out_dir=str(top/'figures')))
    return top, before


def test_the_chapter_reads_the_pictures_that_were_drawn(walked):
    top, before = walked
    assert sorted(p.name for p in (top/'samples').iterdir()) == FOLDERS
    assert sorted(k for k in before if k.endswith('.png')) == [f'{f}/{i:05}.png' for f in FOLDERS for i in range(8)]
    assert {Image.open(top/'samples'/k).size for k in before if k.endswith('.png')} == {(64, 64)}
    after = contents(top/'samples')
    assert before == after and len({before[f'{f}/00000.png'] for f in FOLDERS}) == len(FOLDERS)


def test_table_5_1(walked, small):
    top, _ = walked
    table = pd.read_csv(top/'figures/small/table_5_1.csv').set_index('Variant')
    assert list(table.index) == [*VARIANTS, 'Full pipeline, other noise', 'Real against real']
    assert (table.Pictures == 8).all() and np.isfinite(table['FID ↓']).all()
    assert dict(table['thesis FID'].dropna()) == {k: v['fid'] for k, v in THESIS_TABLE.items()}
    assert 'MS-COCO: 8 pictures' in (top/'figures/small/table_5_1.md').read_text(encoding='utf-8')
    assert 'upsampler (64×64)' in Image.open(top/'figures/small/fig_5_6_upsampling.png').text['Description']


def test_table_5_1_is_what_torch_fidelity_computes_on_the_folders(walked, fidelity):
    table = pd.read_csv(walked[0]/'figures/small/table_5_1.csv').set_index('Variant')
    for variant, folder in {'Full pipeline': 'full_pipeline_42', 'No CLIP translator': 'no_clip_translator_42'}.items():
        theirs = fidelity('--input1', walked[0]/'samples'/folder, '--input2', walked[0]/'samples/real_42', '--feature-extractor', 'efficientnet-lite0', '--kid-subset-size', 4)
        row = table.loc[variant]
        assert row['FID ↓'] == pytest.approx(theirs['frechet_inception_distance'], abs=0.051)
        assert row['IS ↑'] == pytest.approx(theirs['inception_score_mean'], abs=0.0051)
        assert (row['Precision ↑'], row['Recall ↑']) == pytest.approx((theirs['precision'], theirs['recall']), abs=0.00051)


# -- pictures on disk --------------------------------------------------------------------------------------------
QUICK = ['sample', '-n', '3', '--preset', 'smoke', '--steps', '10', '--batch-size', '1', '--device', 'cpu']
ENVIRONMENT = os.environ | {'OMP_NUM_THREADS': '1'}  # sums in one order


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "What one process draws in one go: three pictures of each variant."
    folder, threads = tmp_path_factory.mktemp('undisturbed')/'samples', torch.get_num_threads()
    torch.set_num_threads(1)
    try: assert shell(*QUICK, folder).exit_code == 0
    finally: torch.set_num_threads(threads)
    return contents(folder)


def test_sample_compiles_if_it_is_told_to(undisturbed, tmp_path, monkeypatch):
    done, compiled = TextToImage.compile, []
    monkeypatch.setattr(TextToImage, 'compile', lambda self: compiled.append(self) or done(self, backend='eager'))
    for flags, times in (([], 0), (['--compile'], 1)):
        assert shell(*QUICK[:2], '1', *QUICK[3:], '--steps', 2, tmp_path/f'samples{times}', *flags).exit_code == 0
        assert len(compiled) == times
    assert contents(tmp_path/'samples1').keys() == contents(tmp_path/'samples0').keys()


def test_two_processes_draw_what_one_draws(undisturbed, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '-m', 't2i.cli', *QUICK, str(tmp_path/'samples')]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path/'samples') == undisturbed


def test_a_killed_run_goes_on(undisturbed, tmp_path):
    folder, command = tmp_path/'samples', [sys.executable, '-m', 't2i.cli', *QUICK, str(tmp_path/'samples')]
    def drawn(): return {p: p.stat().st_mtime_ns for p in folder.glob('[fin]*/[0-9]*.png')}
    run = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and len(drawn()) < 5: time.sleep(0.001)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    there = drawn()
    assert 5 <= len(there) < 12
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 0
    assert contents(folder) == undisturbed
    assert drawn().items() >= there.items()  # nothing was drawn twice


def test_shares_batches_and_numbers_of_pictures(pipe, tmp_path):
    "Every way to the same pictures, in memory too; a batch may move a grey level by rounding."
    pairs = draw_pairs(7, 1)
    whole = [np.asarray(p, int) for p in draw_variant('Full pipeline', pipe, pairs, 1, **SETTINGS)]
    for p in (2, 0): list(sample_variants(pipe, pairs, tmp_path, 1, (p, 3), **SETTINGS))
    for n in (3, 7, 5):  # more and fewer of the same
        drawn = [np.asarray(p, int) for p in draw_variant('Full pipeline', pipe, pairs.first(n), 1, tmp_path, **SETTINGS | {'batch_size': 3})]
        assert len(drawn) == n and max(np.abs(a - b).max() for a, b in zip(drawn, whole)) <= 1
    assert len(json.loads((tmp_path/'full_pipeline_1/settings.json').read_text())['captions']) == 7


def test_each_picture_has_a_seed_of_its_own(pipe, tmp_path):
    "Told in its file; with a list of them pictures are drawn again, also one by one and in another order."
    captions = ['a', 'b', 'c']
    def draw(name, seed, captions=captions): return draw_to_folder(pipe, captions, lambda: pipe.embed_captions(captions), tmp_path/name, seed, **SETTINGS)
    first = [Image.open(p) for p in draw('first', 5)]
    seeds = [int(p.info['own_seed']) for p in first]
    again = [Image.open(p) for p in draw('again', seeds[::-1], captions[::-1])][::-1]
    alone, = pipe('b', generator=[seeds[1]], **SETTINGS)
    for one, other in [*zip(first, again), (first[1], alone)]: assert np.abs(np.subtract(one.convert('RGB'), other.convert('RGB'), dtype=int)).max() <= 1
    assert 'seed' in first[0].info and 'seed' not in again[0].info
    assert len(draw('again', [*seeds[::-1], 1], captions[::-1] + ['d'])) == 4
    with pytest.raises(ValueError, match='other settings .seed'): draw('again', [1, 2, 3], captions[::-1])
    with pytest.raises(ValueError, match='2 seeds were given for 3 captions'): draw('x', [1, 2])
    with pytest.raises(ValueError, match="the seed is 'a'"): draw('x', [1, 'a', 3])


def test_a_picture_that_was_cut_short_by_a_kill_is_not_kept(pipe, tmp_path):
    pairs = draw_pairs(4, 1)
    draw_variant('Full pipeline', pipe, pairs, 1, tmp_path, **SETTINGS)
    folder = tmp_path/'full_pipeline_1'
    (folder/'00002.png').unlink()
    for i in (2, 3): (folder/f'.{i:05}.png.x1y2.png').write_bytes(b'half')
    draw_to_folder(pipe, pairs.captions, lambda: pipe.embed_captions(pairs.captions), folder, 1, share=(2, 4), **SETTINGS)
    assert sorted(p.name for p in folder.glob('[0-9]*.png')) == [f'{i:05}.png' for i in range(4)]
    assert [p.name for p in folder.glob('.*')] == ['.00003.png.x1y2.png']  # it may be of a process that is at work


def test_a_complete_folder_needs_no_embeddings(pipe, tmp_path):
    pairs = draw_pairs(2, 1)
    first = draw_variant('Full pipeline', pipe, pairs, 1, tmp_path, **SETTINGS)
    assert draw_to_folder(pipe, pairs.captions, pytest.fail, tmp_path/'full_pipeline_1', 1, **SETTINGS) and first[0].size == (64, 64)


@pytest.mark.parametrize('change, words', [
    (['--seed', 42, '--steps', 3], ['sampling.num_inference_steps is 2 there and 3 now']),
    (['--steps', 2, '--guidance-scale', 5], ['sampling.guidance_scale is 3.0 there and 5.0 now']),
    (['--steps', 2, '--sampler', 'ddim'], ["sampling.sampler is 'dpm_solver_pp' there and 'ddim' now"])])
def test_a_folder_of_other_settings_is_refused(pipe, tmp_path, change, words):
    quick = ['-n', 3, '--preset', 'smoke', '--device', 'cpu']
    assert shell('sample', tmp_path, *quick, '--steps', 2).exit_code == 0
    before = contents(tmp_path)
    says(shell('sample', tmp_path, *quick, *change), tmp_path/'full_pipeline_42', 'another folder', *words)
    assert contents(tmp_path) == before


def test_what_is_drawn_from_other_pictures_is_not_returned(pipe, tmp_path):
    pairs = draw_pairs(3, 1)
    draw = lambda pairs: draw_variant('Image decoder only', pipe, pairs, 1, tmp_path, **SETTINGS)
    assert draw(pairs.first(2)) == draw(pairs)[:2]
    pairs.images[1] = 255 - pairs.images[1]
    with pytest.raises(ValueError, match='made_of.1 is .* there and .* now'): draw(pairs)


def test_pictures_of_other_weights_captions_or_no_settings_are_refused(pipe, tmp_path):
    pairs = draw_pairs(3, 1)
    draw_variant('Full pipeline', pipe, pairs, 1, tmp_path, **SETTINGS)
    other = TextToImage.from_preset('smoke', 'cpu')
    other.preset.sampling['image_guidance_scale'] = 7.  # asked for by base images only
    assert draw_variant('Full pipeline', other, pairs, 1, tmp_path, **SETTINGS)
    with torch.no_grad(): next(other.decoder.parameters()).view(-1)[5] += 1e-6
    with pytest.raises(ValueError, match="weights.decoder is '.*' there and '.*' now"): draw_variant('Full pipeline', other, pairs, 1, tmp_path, **SETTINGS)
    pairs.captions[2] = 'something else'
    with pytest.raises(ValueError, match="captions.2 is .* and 'something else' now"): draw_variant('Full pipeline', pipe, pairs, 1, tmp_path, **SETTINGS)
    (tmp_path/'full_pipeline_1/settings.json').unlink()
    with pytest.raises(ValueError, match='no settings.json'): draw_variant('Full pipeline', pipe, pairs, 1, tmp_path, **SETTINGS)


def test_two_runs_that_begin_in_one_empty_folder(pipe, tmp_path):
    "The later one's settings stand in the place of the first one's until the first picture is there: one of them is refused, and the folder is of one kind."
    def embed_while_another_begins():
        drawn = draw_to_folder(pipe, ['a blue car']*2, lambda: pipe.embed_captions(['a blue car']*2), tmp_path, 5, **SETTINGS)
        assert len(drawn) == 2
        return pipe.embed_captions(['a red apple']*2)
    with pytest.raises(ValueError, match='holds pictures of other settings'): draw_to_folder(pipe, ['a red apple']*2, embed_while_another_begins, tmp_path, 5, **SETTINGS)
    assert draw_to_folder(pipe, ['a blue car']*2, pytest.fail, tmp_path, 5, **SETTINGS)


def test_processes_are_numbered_by_their_launcher(monkeypatch):
    assert process_share() == (0, 1)
    for k, v in dict(RANK='3', WORLD_SIZE='8').items(): monkeypatch.setenv(k, v)
    assert process_share() == (3, 8)


# -- machines that are almost right ------------------------------------------------------------------------------
def test_upsampled_from_the_shell(published, small, tmp_path):
    result = shell('generate', 'a dog', 'a red bus', '--preset', small, '--folder', published, '--upsample', '--batch-size', 1, '--seed', 1, '--device', 'cpu', '--out', tmp_path/'out')
    assert result.exit_code == 0, result.output
    drawn = [Image.open(tmp_path/f'out/{i:05}.png') for i in range(2)]
    assert all(picture.size == (64, 64) and picture.info['label'] for picture in drawn)  # the class of each
    says(shell('generate', 'a dog', '--preset', 'smoke', '--upsample', '--device', 'cpu', '--out', tmp_path/'x.png'), 'no upsampler')
    says(shell('sample', tmp_path/'s', '-n', 1, '--preset', 'smoke', '--upsample', '--device', 'cpu'), 'no upsampler')
    assert not (tmp_path/'s').exists()


@pytest.mark.parametrize('n, device, found', [(0, 'cuda', 'finds no CUDA GPU'), (2, 'cuda:2', 'finds only 2 CUDA GPU')])
def test_no_cuda(monkeypatch, tmp_path, n, device, found):
    monkeypatch.setattr('torch.cuda.device_count', lambda: n)
    says(shell('generate', 'a dog', '--preset', 'smoke', '--device', device, '--out', tmp_path/'x.png'), found, device, "device='cpu'", 'nvidia-smi')
    with pytest.raises(ValueError, match=found): TextToImage.from_preset('smoke', device)


@pytest.fixture
def four_gpus(monkeypatch):
    "Volta, Turing, Ampere and Hopper, and a torch with kernels for the last three."
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    monkeypatch.setattr('torch.cuda.get_arch_list', lambda: ['sm_75', 'sm_80', 'sm_90'])
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda device: [(7, 0), (7, 5), (8, 0), (9, 0)][torch.device(device).index])
    monkeypatch.setattr('torch.cuda.get_device_name', lambda device: 'Tesla V100')


def test_each_process_of_a_machine_has_its_own_gpu(four_gpus, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert get_device('cuda') == torch.device('cuda:3') and get_device('cuda:1') == torch.device('cuda:1')


def test_a_gpu_that_is_asked_for_float32_gives_all_its_bits(four_gpus, monkeypatch):
    import torch.backends.cudnn as cudnn
    monkeypatch.setattr(cudnn, 'allow_tf32', True)
    for precision, allowed in (('bfloat16', True), ('float32', False)):
        monkeypatch.setenv('T2I_PRECISION', precision)
        get_device('cuda:2')
        assert cudnn.allow_tf32 == allowed


def test_a_gpu_without_kernels(four_gpus, monkeypatch):
    "It is refused where it was asked for, and left aside where it was not."
    with pytest.raises(ValueError, match=r"no kernels for Tesla V100 \(sm_70; it has sm_75, .*cu126.*device='cpu'"): get_device('cuda:0')
    with pytest.warns(UserWarning, match='Tesla V100.*the CPU is used'): assert get_device() == torch.device('cpu')
    monkeypatch.setattr('torch.cuda.get_arch_list', lambda: ['sm_60', 'sm_80'])
    with pytest.raises(ValueError, match=r'sm_90; it has sm_60, sm_80\): install a newer one'): get_device('cuda:3')
    for kernels in (['sm_75', 'sm_90a'], ['sm_80', 'compute_80'], ['sm_100', 'sm_120', 'compute_70']):  # its own, or text that the driver compiles for newer ones
        monkeypatch.setattr('torch.cuda.get_arch_list', lambda: kernels)
        assert get_device('cuda:3') == torch.device('cuda:3')
    monkeypatch.setattr('torch.cuda.get_arch_list', lambda: ['gfx90a'])  # AMD
    assert get_device() == torch.device('cuda:0')


def test_each_gpu_is_asked_for_its_own_precision(four_gpus, monkeypatch):
    entered = []
    class on:
        def __init__(self, device): entered.append(torch.device(device).index)
        def __enter__(self): pass
        def __exit__(self, *_): entered.append(None)
    monkeypatch.setattr('torch.cuda.device', on)
    monkeypatch.delenv('T2I_PRECISION', raising=False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation: entered[-1] == 2)
    assert [uses_bfloat16(f'cuda:{i}') for i in (1, 2)] == [False, True]


@pytest.mark.parametrize('visible, processes, gpus', [(None, 1, [2]), ('5,6,7', 1, ['7']), (None, 2, [0, 1]), ('5,6,7', 2, ['5', '6'])])
def test_energy_is_that_of_the_gpus_that_train(four_gpus, monkeypatch, visible, processes, gpus):
    monkeypatch.setattr('torch.cuda.current_device', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert _Run.gpus(SimpleNamespace(gpu=True, processes=processes)) == gpus


def out_of_memory(*arguments, **options):
    raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free.\nSee the documentation.')


@pytest.mark.parametrize('batch, words', [(6, ['6 pictures of 64×64 pixels at once', 'batch_size=3', '--batch-size 3']), (3, ['3 pictures', '--batch-size 1']), (1, ['a picture of 64×64', 'cpu'])])
def test_too_little_memory_for_the_batch(pipe, monkeypatch, tmp_path, batch, words):
    monkeypatch.setattr('t2i.pipeline.decode', out_of_memory)
    says(shell('generate', 'a dog', '-n', 6, '--batch-size', batch, '--preset', 'smoke', '--device', 'cpu', '--out', tmp_path/'x.png'), 'too little memory', *words, alone=False)
    with pytest.raises(torch.cuda.OutOfMemoryError, match='too little memory') as caught: pipe('a dog', num_images_per_prompt=6, batch_size=batch)
    assert '\n' not in str(caught.value)
    if batch < 6: return
    says(shell('sample', tmp_path/'s', '-n', 6, '--preset', 'smoke', '--device', 'cpu'), *words, alone=False)


def test_too_little_memory_for_the_upsampler_or_the_models(published, small, monkeypatch, tmp_path):
    generate = ['generate', 'a dog', '-n', 3, '--preset', small, '--folder', published, '--upsample', '--device', 'cpu', '--out', tmp_path/'x.png']
    with monkeypatch.context() as patch:
        patch.setattr('t2i.pipeline.super_resolve', out_of_memory)
        says(shell(*generate), '2 pictures of 64×64 pixels', '--batch-size 1', alone=False)
        says(shell(*generate, '--batch-size', 1), 'a picture of 64×64 pixels', alone=False)
    for model in ('t2i.unet.UNet.to', 't2i.clip.CLIP.__init__'):
        with monkeypatch.context() as patch:
            patch.setattr(model, out_of_memory)
            says(shell(*generate), "the models of the preset 'small'", 'more memory', alone=False)


@pytest.mark.parametrize('processes, gpus', [({}, ['cuda:1', 'cuda:0']), ({'WORLD_SIZE': '1'}, ['cuda:1', 'cuda:0']), ({'WORLD_SIZE': '2'}, [])])
def test_a_process_alone_works_on_the_gpu_that_it_was_given(four_gpus, monkeypatch, processes, gpus):
    "Also if that is the first one and it worked on another before; of several processes accelerate gives each its own."
    chosen = []
    monkeypatch.setattr('torch.cuda.set_device', lambda device: chosen.append(str(device)))
    monkeypatch.setattr('accelerate.PartialState', lambda cpu: SimpleNamespace(wait_for_everyone=lambda: None))
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    for k, v in processes.items(): monkeypatch.setenv(k, v)
    for device in ('cuda:1', 'cuda:0', 'cpu'): process_state(device)
    assert chosen == gpus


def test_processes_share_the_pictures_of_captions(tmp_path, monkeypatch):
    "With one seed, which has to be named."
    def draw(*options): return shell('generate', 'a', 'b', 'c', '--preset', 'smoke', '--steps', 1, '--device', 'cpu', '--out', tmp_path, *options)
    for k, v in dict(RANK='1', WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    says(draw(), '2 processes', '--seed')
    result = draw('--seed', 1)
    assert result.exit_code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ['00001.png', 'settings.json'], result.output


@pytest.mark.parametrize('other', ['{"python.linting": true}', '{"seed": "abc"}', '[1]', 'nothing'])
def test_settings_of_something_else_are_left_alone(tmp_path, other):
    (tmp_path/'settings.json').write_text(other)
    for options in ([], ['--seed', 1]):
        says(shell('generate', 'a', '--preset', 'smoke', '--steps', 1, '--device', 'cpu', '--out', tmp_path, *options), 'settings.json', 'something else', 'another folder')
    assert (tmp_path/'settings.json').read_text() == other and len(list(tmp_path.iterdir())) == 1


def test_each_number_of_table_5_1_is_in_its_column():
    numbers = pd.DataFrame({v: dict(fid=1.1, kid=0.1, kid_std=0.01, precision=0.2, recall=0.3, n=8, n_real=8, features='f', clip_score=40., **{'is': 5.}) for v in VARIANTS}).T
    row = table_5_1(numbers).iloc[0]
    assert (row['FID ↓'], row['IS ↑'], row['Precision ↑'], row['Recall ↑'], row['CLIP score ↑']) == ('1.1', '5.00', '0.200', '0.300', '40.0')
    assert (row['thesis FID'], row['thesis IS'], row['thesis precision'], row['thesis recall']) == ('65.9', '11.6', '0.804', '0.307')


def test_all_of_a_pipeline_is_saved_in_the_precision_that_was_asked_for(tmp_path):
    TextToImage.from_preset('smoke', 'cpu').save_pretrained(tmp_path, torch.float16)
    for name in ('clip', 'translator', 'decoder'):
        assert {v.dtype for v in load_file(tmp_path/f'{name}.safetensors').values() if v.is_floating_point()} == {torch.float16}, name


def test_the_kernel_distance_of_table_5_1_stands_before_its_error():
    numbers = pd.DataFrame({'Full pipeline': dict(fid=1.1, kid=0.1, kid_std=0.01, precision=0.2, recall=0.3, n=8, n_real=8, features='f', clip_score=40., **{'is': 5.})}).T
    assert table_5_1(numbers)['KID ↓'][0] == '0.1000 ± 0.0100'


def test_all_held_out_pictures_can_be_asked_for(monkeypatch):
    monkeypatch.setattr('t2i.experiments.held_out', lambda data, seed: load_emoji('test', ['image', 'caption'])[:3])
    assert len(draw_pairs(3)) == len(draw_pairs()) == 3


def test_the_seed_of_the_numbers_is_that_of_every_row(monkeypatch):
    seeds = []
    monkeypatch.setattr('t2i.experiments.extract_features', lambda *_: None)
    monkeypatch.setattr('t2i.experiments.evaluate', lambda pictures, real, features, seed, device: seeds.append(seed) or {})
    monkeypatch.setattr('t2i.experiments.real_vs_real', lambda floor, features, seed, device: seeds.append(seed) or {})
    monkeypatch.setattr('t2i.experiments.clip_score', lambda *_: np.ones(1))
    measure({'a': []}, SimpleNamespace(images=[], captions=[]), None, None, seed=5)
    assert seeds == [5, 5]


def test_pictures_of_a_caption_come_together_in_a_folder(pipe, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr('t2i.pipeline.draw_to_folder', lambda pipe, captions, embed, *_, **__: given.append((captions, embed())) or [])
    assert shell('generate', 'a red apple', 'a', '-n', 2, '--preset', 'smoke', '--seed', 1, '--device', 'cpu', '--out', tmp_path).exit_code == 0
    (captions, y), = given
    assert captions == ['a red apple']*2 + ['a']*2
    torch.testing.assert_close(y, pipe.embed_captions(captions))


def test_the_seed_of_a_sample_draws_its_captions(tmp_path):
    assert shell('sample', tmp_path, '-n', 2, '--seed', 5, '--preset', 'smoke', '--steps', 1, '--device', 'cpu').exit_code == 0
    assert json.loads((tmp_path/'full_pipeline_5/settings.json').read_text())['captions'] == draw_pairs(2, 5).captions
