"""The benchmarks that need no download run from end to end, and what they store hangs together. Nothing here is about how fast anything is."""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))

import baseline
import costs
import growth
import judge
import measure
import rival
import speed
import steps
import tuning
from t2i.benchmarks import speed_column, speed_tables
from t2i.core import load_preset, make_generators, randn
from t2i.costs import stage_table
from t2i.data import load_emoji
from t2i.decoder import decode, guided_denoiser, make_decoder
from t2i.diffusion import Diffusion
from t2i.experiments import REAL, VARIANTS, draw_pairs
from t2i.judge import TEMPLATES, TrainingPictures, caption_ranks, part_scores
from t2i.pipeline import TextToImage, draw_to_folder
from t2i.plots import as_pictures
from t2i.sampling import SAMPLERS
from t2i.unet import UNet


@pytest.fixture(scope='module')
def stored(repository, tmp_path_factory):
    "What the one command writes."
    path = tmp_path_factory.mktemp('results')/'tiny.json'
    done = subprocess.run([sys.executable, repository/'benchmarks/speed.py', '--tiny', '--device', 'cpu', '--out', path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())['smoke']


def tables(value):
    "All comparisons in a section."
    if not isinstance(value, dict): return
    if value and all(isinstance(v, dict) and 'runs' in v for v in value.values()): yield value
    else:
        for v in value.values(): yield from tables(v)


def test_every_section_is_there_with_its_machine(stored):
    assert set(stored) == {*speed.SECTIONS, 'machine'} and set(stored['machine']) == set(speed.SECTIONS)
    for found in stored['machine'].values():
        assert found['cores'] > 0 and found['memory'] > 0 and found['versions']['torch'] == torch.__version__
        assert found['commit'] is None or len(found['commit']) == 40


def test_ratios_follow_from_the_stored_times(stored):
    compared = [table for name in speed.SECTIONS for table in tables(stored[name])]
    assert len(compared) >= 4
    for table in compared:
        reference = next(row for row in table.values() if row['ratio'] == 1)
        for row in table.values():
            assert row['seconds'] == pytest.approx(statistics.median(row['runs'])) and row['quartiles'][0] <= row['seconds'] <= row['quartiles'][1]
            assert row['ratio'] == pytest.approx(statistics.median(a/b for a, b in zip(row['runs'], reference['runs'])))


def test_the_table_of_the_readme_says_what_is_stored(stored):
    table, = speed_tables({'here': {'smoke': stored}}).values()
    column, step, start = table.iloc[:, 0], stored['sampling']['candidates'], stored['startup']
    assert column['sampling step'] == f"{1000*step['ours']['seconds']:.1f} ms" and column['sampling step, against baseline'] == f"{step['baseline']['ratio']/step['ours']['ratio']:.2f} ×"
    assert column['training step, against baseline'] == f"{stored['training']['candidates']['baseline']['ratio']:.2f} ×" and column['first picture of a fresh process'] == f"{start['first picture']['seconds']:.2f} s"


def test_ours_and_the_baseline_do_the_same(stored):
    assert stored['agreement']['largest'] < 0.5  # grey levels
    assert abs(stored['training']['losses']['difference']) < 1e-3
    assert {'ours', 'baseline'} <= stored['sampling']['candidates'].keys() & stored['training']['candidates'].keys()


def test_the_host_never_waits_in_the_loop(stored):
    assert stored['waits'] == {name: 0 for name in SAMPLERS}


def test_a_wait_would_be_counted(pipe):
    d, y = pipe.diffusion.respace(5), torch.zeros(1, 32)
    steps = SAMPLERS['ddim'](guided_denoiser(d, pipe.decoder, y, 3.), d, randn((3, 64, 64), make_generators(0, 1)), hook=lambda x, t: x*(x.max().item() > 0))
    assert costs.host_waits(steps, 'cpu') > 0


def random_network(**settings):
    "A network in which everything matters."
    torch.manual_seed(0)
    model = UNet(32, model_channels=32, num_res_blocks=1, attention_resolutions=(8,), channel_mult=(1, 2, 2), num_head_channels=32, embedding_size=8, **settings).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.15)
    return model


@torch.no_grad()
@pytest.mark.parametrize('settings', [dict(), dict(pixel_unshuffle=2, seam_channels=8), dict(pixel_unshuffle=4, seam_channels=32, seam_unshuffle=2, seam_blocks=1), dict(dropout=0.3), dict(augmentation_size=3)])
def test_baseline_is_the_same_network(settings):
    model, x, t, y = random_network(**settings), torch.randn(2, 3, 32, 32), torch.tensor([3, 800]), torch.randn(2, 8)
    told = {'augmentation': torch.randn(2, model.augmentation_size)} if model.augmentation_size else {}
    torch.testing.assert_close(baseline.Baseline(model).eval()(x, t, y, **told), model(x, t, y, **told), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('target, thresholding', [('eps', 'dynamic'), ('v', 'static'), ('x0', 'none')])
def test_baseline_samples_as_we_do(target, thresholding):
    diffusion, y, model = Diffusion(target=target), torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), random_network()
    ours, theirs = decode(diffusion, model, y, 0, 'ddpm', 6, 3., thresholding), baseline.sample(diffusion, baseline.Baseline(model).eval(), y, 0, 6, 3., thresholding)
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    assert ours.std() > 0.05


def test_the_honest_baseline_runs_the_network_of_the_facts():
    with torch.device('meta'): table = stage_table(UNet(64, **speed.FACTS_NETWORK))
    assert table.parameters.sum() == pytest.approx(25.3e6, rel=2e-3) and table.GFLOP.sum() == pytest.approx(17.7, rel=3e-3)


@pytest.mark.parametrize('preset', ['emoji', 'thesis'])
def test_the_rival_costs_the_same(preset):
    diffusers, preset = pytest.importorskip('diffusers'), load_preset(preset)
    with torch.device('meta'): ours = stage_table(make_decoder(preset)).GFLOP.sum()
    assert rival.gflop(preset.decoder, 64, diffusers) == pytest.approx(ours, rel=0.05)


def test_paper_counts_the_operations_of_the_table(pipe):
    paper = costs.on_paper(pipe.decoder, 3)
    assert paper['flop'] == pytest.approx(3e9*stage_table(pipe.decoder).GFLOP.sum())
    assert paper['bytes'] > paper['weights'] == 4*sum(p.numel() for p in pipe.decoder.parameters())
    assert 2*paper['flop'] < costs.on_paper(pipe.decoder, 3, training=True)['flop'] <= 3*paper['flop']


def test_fitted_exponent():
    assert measure.fitted_exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert measure.fitted_exponent([1, 10, 100], [7, 7, 7]) == pytest.approx(0)


def test_streamed_pictures_take_no_memory(pipe, tmp_path):
    "480 pictures more: 24 MB of floats, if they were kept."
    def streamed(n):
        with measure.peak_memory('cpu') as memory:
            draw_to_folder(pipe, ['']*n, lambda: torch.zeros(n, 32), tmp_path/str(n), 0, batch_size=8, num_inference_steps=1)
        return memory.bytes
    streamed(8)  # what is allocated once
    more = streamed(512) - streamed(32)
    with measure.peak_memory('cpu') as kept: pipe(image_embeddings=torch.zeros(512, 32), generator=0, batch_size=8, num_inference_steps=1)
    assert more < 10e6 < 20e6 < kept.bytes


def test_growth_is_measured_on_data_of_the_right_form(tmp_path):
    from t2i.data import PreparedDataset
    growth.save_prepared(tmp_path/'train', 3, 2, 8, 16)
    data = PreparedDataset(tmp_path/'train')
    assert len(data) == 6 and data.images(torch.arange(6)).shape == (6, 16, 16, 3) and data.image_embeddings([5]).dtype == torch.float32


@pytest.fixture
def pipe():
    return TextToImage.from_preset('smoke', 'cpu')


def test_pictures_are_judged_by_every_measure(pipe, tmp_path):
    expert = TextToImage.from_preset('emoji', 'cpu').clip
    found = judge.judge_variants(pipe, expert, TrainingPictures('cpu', limit=8), draw_pairs(8, judge.SEED), tmp_path)
    assert set(found['variants']) == {*VARIANTS, REAL} and len(found['parts']) >= len(TEMPLATES) and len(found['goals']) == 9
    assert 0 < found['variants'][REAL]['recall@1'] <= found['variants'][REAL]['recall@10'] and found['variants'][REAL]['copies'] == 0
    pairs = draw_pairs(8, judge.SEED)
    ranks, alone = caption_ranks(expert, as_pictures(pairs.images), pairs.captions), [not c.endswith(('flat style', 'fluent style')) for c in pairs.captions]
    assert 0 < sum(alone) < 8 and found['variants'][REAL]['recall@1, other styles'] == pytest.approx((ranks['rank'][alone] < 1).mean())
    full, decoder = (found['variants'][name] for name in ('Full pipeline', 'Image decoder only'))
    assert found['goals']['FID of the full pipeline / image decoder only']['found'] == pytest.approx(full['fid']/decoder['fid'])


def test_what_embeddings_hold():
    clip, pairs = TextToImage.from_preset('emoji', 'cpu').clip, draw_pairs(48, judge.SEED)
    real = as_pictures(pairs.images)
    same, nearest, shifted = judge.what_embeddings_hold(clip, SimpleNamespace(clip=clip), SimpleNamespace(pictures=real[::-1]), pairs, {'of another caption': real[1:] + real[:1]}).values()
    assert 0 < same['judge'] == same['own CLIP'] < 1  # a judge that is the pipeline's own CLIP agrees with it
    assert [v for k, v in same.items() if k.startswith('judge, ')] == [0, 1]  # wrong, right
    assert nearest == same  # found again among "training" pictures in another order
    assert shifted['judge'] < 0.2 < same['judge']


def test_tuning_changes_one_setting_at_a_time(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, 'CHANGES', [{}, {'guidance_scale': pipe.preset.sampling.guidance_scale}, {'thresholding': 'none'}, {'num_inference_steps': pipe.preset.sampling.steps + 3},
                                          {'exposure_bias': 0.5}, {'exposure_bias': 0.5, 'timesteps_for': 0.}, {'timesteps_for': 0.}, {'timesteps_for': 0.5}])
    usual = dict(pipe.preset.sampling)
    same, again, without, longer, told, told_alone, usual_timesteps, timesteps_alone = tuning.tune(pipe, pipe.clip, draw_pairs(8, 0), tmp_path)['settings']
    assert dict(pipe.preset.sampling) == usual
    assert same['fid'] == again['fid'] == usual_timesteps['fid'] and len({row['fid'] for row in (same, without, longer, told)}) == 4
    assert len({row['fid'] for row in (same, told, told_alone, timesteps_alone)}) == 4  # the timesteps, what the network is told of them, and both


def test_the_study_of_steps_goes_on_where_it_stopped(pipe, tmp_path, monkeypatch):
    def run(k): return steps.study(pipe, 8, k, ['ddim'], tmp_path/'pictures', tmp_path/'steps.json')['rows']
    first = run([2])
    monkeypatch.setattr(steps, 'draw_to_folder', lambda *args, num_inference_steps, **kw: [pytest.fail('drawn again') if num_inference_steps == 2 else p for p in draw_to_folder(*args, num_inference_steps=num_inference_steps, **kw)])
    both = run([2, 3])
    assert both[0] == first[0] and [row['num_inference_steps'] for row in both] == [2, 3] and json.loads((tmp_path/'steps.json').read_text())['rows'] == both
    with pytest.raises(ValueError, match='pictures of other settings'): steps.study(pipe, 8, [2], ['ddim'], tmp_path/'pictures', tmp_path/'steps.json', guidance_scale=1.)


def test_margins_of_parts():
    class Parts:
        def encode_images(self, pictures, normalize): return torch.tensor([[1., 0.]])
        def encode_captions(self, captions, normalize): return torch.tensor([[0.5 - 0.2*('green' in c) + 0.3*('bus' in c), 0.] for c in captions])
    found = part_scores(Parts(), ['a {red|green} {car|bus}'], [Image.new('RGB', (8, 8))])
    assert found.right.tolist() == [True, False] and found.margin.tolist() == pytest.approx([0.2, -0.3])
    assert found.part.tolist() == ['red', 'car'] and found.swapped.tolist() == ['a green car', 'a red bus']


def test_a_smaller_copy_elsewhere_on_the_paper_is_a_copy():
    few = TrainingPictures('cpu', limit=24)
    small = Image.new('RGB', (192, 192), 'white')
    small.paste(few.pictures[0].resize((128, 128), Image.Resampling.BICUBIC), (0, 64))
    assert few.nearest([small])['copy'].all()


def test_a_first_run_is_left_out_unless_it_counts():
    runs = []
    assert len(measure.alternate({'a': lambda: runs.append(1)}, 'cpu', 0, rounds=2)['a']) == 2 and len(runs) == 3
    assert len(measure.alternate({'a': lambda: runs.append(1)}, 'cpu', 0, rounds=2, warm_up=False)['a']) == 2 and len(runs) == 5


def test_candidates_run_in_turn_until_the_time_is_over():
    times = measure.alternate({'a': lambda: time.sleep(0.01), 'b': lambda: None}, 'cpu', 0.1, rounds=2)
    assert len(times['a']) == len(times['b']) > 2
    assert len(measure.alternate({'a': lambda: None}, 'cpu', 0, rounds=3)['a']) == 3


def test_a_product_has_two_operations_for_each_of_its_terms_and_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(measure, 'alternate', lambda runs, *_: {name: [0.5] for name in runs})
    assert measure.matmul_rate('cpu') == 2*1024**3/0.5 and measure.copy_rate('cpu') == 2*4*2**25/0.5


def test_a_picture_is_timed_with_the_steps_of_its_preset():
    "Those that it has now, also where it had others when it was measured."
    row, steps = {'seconds': 0.1, 'runs': [0.1, 0.1]}, load_preset('emoji').sampling.steps
    sampling = {'candidates': {'ours': row, 'baseline': row}, 'default_steps': steps + 1}
    column = speed_column({'machine': {'sampling': {}}, 'sampling': sampling}, 'emoji', 'ours')
    assert column[f'picture in {steps} steps'] == f'{0.1*steps:.2f} s'


def test_a_ratio_is_the_median_over_the_rounds():
    assert measure.compare({'ours': [1., 1., 1.], 'theirs': [2., 2., 20.]}, 'ours')['theirs']['ratio'] == 2


def test_the_first_caption_may_be_right_in_concept_or_style_alone():
    held = load_emoji('test').drop_duplicates(['concept', 'style']).drop_duplicates('caption')
    whole = list(load_emoji('test').caption)
    wanted = held.iloc[0]
    concept, style = held[(held.concept == wanted.concept) & (held['style'] != wanted['style'])].iloc[0], held[(held.concept != wanted.concept) & (held['style'] == wanted['style'])].iloc[0]
    class Sees:
        def encode_images(self, pictures, normalize): return torch.eye(len(whole))[[whole.index(seen.caption) for seen in (concept, style)]]
        def encode_captions(self, captions, normalize): return torch.eye(len(whole))
    found = caption_ranks(Sees(), np.zeros((2, 8, 8, 3), np.uint8), [wanted.caption]*2)
    assert found.concept.tolist() == [True, False] and found['style'].tolist() == [False, True]


def test_what_is_known_of_training_pictures_is_of_those_and_names_them(tmp_path):
    few = TrainingPictures('cpu', limit=12, cache=tmp_path/'known.safetensors')
    near = few.nearest(few.pictures[:12])
    assert near.concept.tolist() == few.table.concept.tolist() and near['style'].tolist() == few.table['style'].tolist()
    with pytest.raises(ValueError, match='of other pictures than the training set: delete it'): TrainingPictures('cpu', limit=11, cache=tmp_path/'known.safetensors')
