"""What the chapter on metrics leaves out: properties, files on disk, and weights that are missing or wrong."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given, settings, strategies as st
from PIL import Image

from t2i import metrics
from t2i.metrics import Features, evaluate, extract_features, frechet_distance, inception_score, kernel_distance, precision_recall, real_vs_real

seeds = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None)


def normal(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_extractor_kept():
    "The extractor is kept between calls; a test that replaces it must not leave its own behind."
    yield
    metrics._extractor.cache_clear()


@given(seeds, st.integers(8, 24), st.integers(8, 24), st.integers(2, 80))
@few
def test_frechet_distance_is_a_symmetric_distance_whatever_the_sizes(seed, n, m, d):
    a, b = normal(seed, n, d), normal(seed + 1, m, d) + 0.5
    ab = frechet_distance(a, b)
    assert ab == pytest.approx(frechet_distance(b, a), rel=1e-3, abs=1e-4)
    assert ab >= (a.mean(0) - b.mean(0)).square().sum().item() - 1e-3
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)


@given(seeds, st.integers(8, 20), st.integers(41, 80))
@few
def test_rotating_features_into_their_span_changes_no_frechet_distance(seed, n, d):
    a, b = normal(seed, n, d), 2*normal(seed + 1, n, d)
    direct = metrics.fid_statistics_to_metric(*map(metrics.fid_features_to_statistics, (a.double(), b.double())), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(direct['frechet_inception_distance'], rel=1e-4)


@given(seeds, st.integers(8, 40), st.integers(2, 20))
@few
def test_scores_stay_in_their_ranges(seed, n, classes):
    assert 1 - 1e-6 <= inception_score(normal(seed, n, classes)) <= min(n, classes) + 1e-6
    precision, recall = precision_recall(normal(seed, n, 4), 1 + normal(seed + 1, n, 4))
    assert 0 <= precision <= 1 and 0 <= recall <= 1


@given(seeds, st.integers(8, 30))
@few
def test_the_order_of_images_does_not_matter(seed, n):
    a, b = normal(seed, n, 6), normal(seed + 1, n, 6)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert frechet_distance(a[order], b) == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert precision_recall(a[order], b) == precision_recall(a, b)
    assert inception_score(a[order]) == pytest.approx(inception_score(a))


def test_precision_and_recall_change_places_with_the_sets():
    a, b = normal(0, 100, 4), 0.3*normal(1, 100, 4)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]
    assert precision_recall(b, a)[0] > precision_recall(b, a)[1]


def test_kernel_distance_uses_half_of_the_smaller_set_and_repeats_with_its_seed():
    a, b = normal(0, 21, 4), normal(1, 50, 4)
    assert kernel_distance(a, b, seed=3) == kernel_distance(a, b, seed=3) != kernel_distance(a, b, seed=4)
    theirs = metrics.kid_features_to_metric(a, b, kid_subset_size=10, rng_seed=3, verbose=False)
    assert kernel_distance(a, b, seed=3) == (theirs['kernel_inception_distance_mean'], theirs['kernel_inception_distance_std'])


def test_halves_of_the_real_images_are_disjoint_and_follow_the_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, 'evaluate', lambda a, b, seed: seen.append((a.pooled[:, 0], b.pooled[:, 0])))
    real = Features('efficientnet-lite0', torch.arange(33.)[:, None], torch.zeros(33, 2))
    for seed in (0, 0, 1): real_vs_real(real, seed=seed)
    (a, b), again, other = seen
    assert len(a) == 16 and sorted(torch.cat([a, b]).tolist()) == list(range(33))
    assert a.equal(again[0]) and not a.equal(other[0])


@pytest.fixture(scope='module')
def pictures():
    "Two sets of 16 pictures: noise, and smooth colours."
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 64, 64, 3), np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(i[:4, :4]).resize((64, 64), Image.Resampling.BICUBIC)) for i in noise])
    return noise, smooth


@pytest.mark.parametrize('network', ['efficientnet-lite0', 'inception'])
def test_folders_get_the_same_numbers_from_torch_fidelity_s_command_line(network, pictures, fidelity, monkeypatch, tmp_path):
    "With Inception as users have it, but for its weights: those are random, because the real ones are a download."
    noise, smooth = pictures
    mixed = np.concatenate([noise[:6], smooth[:10]]), np.concatenate([smooth[4:], noise[4:8]])
    for name, images in zip('ab', mixed):
        (tmp_path/name).mkdir()
        for i, image in enumerate(images): Image.fromarray(image).save(tmp_path/name/f'{i:05}.png')
    weights = tmp_path/'inception.pth'
    if network == 'inception': random_inception(monkeypatch, weights)
    extractor = ['inception-v3-compat', '--feature-extractor-weights-path', weights] if network == 'inception' else [network]
    theirs = fidelity('--input1', tmp_path/'a', '--input2', tmp_path/'b', '--kid-subset-size', 8, '--rng-seed', 5, '--feature-extractor', *extractor)
    ours = evaluate(*mixed, features=weights if network == 'inception' else network, seed=5)
    assert ours['features'] == network and ours['n'] == ours['n_real'] == 16
    assert ours['fid'] > 1 and ours['is'] > 1.05 and abs(ours['kid']) > 1e-4 and 0 < ours['recall'] < 1  # there is something to compare
    for key, name in {'fid': 'frechet_inception_distance', 'is': 'inception_score_mean', 'kid': 'kernel_inception_distance_mean',
                      'kid_std': 'kernel_inception_distance_std', 'precision': 'precision', 'recall': 'recall'}.items():
        assert ours[key] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), key


def test_features_of_an_image_do_not_depend_on_its_batch(pictures):
    whole, single = (extract_features(pictures[1][:5], batch_size=size) for size in (5, 1))
    torch.testing.assert_close(whole.pooled, single.pooled, atol=1e-4, rtol=1e-4)
    assert extract_features(whole) is whole


def test_features_of_two_kinds_are_not_compared():
    a = Features('efficientnet-lite0', normal(0, 10, 4), normal(0, 10, 3))
    b = Features('inception', normal(0, 10, 4), normal(0, 10, 3))
    with pytest.raises(ValueError, match='efficientnet-lite0 features, the real ones inception'): evaluate(a, b)


def random_inception(monkeypatch, path=None):
    "Inception with random weights; saved, or in place of the download."
    extractor = torch_fidelity.FeatureExtractorInceptionV3
    source = torch_fidelity.feature_extractor_inceptionv3
    with monkeypatch.context() as patch:
        patch.setattr(source, 'load_state_dict_from_url', lambda *a, **k: {})
        patch.setattr(extractor, 'load_state_dict', lambda self, state: None)
        network = extractor('inception-v3-compat', ['2048'])
    torch.manual_seed(0)
    for p in network.parameters():  # as wide as their inputs want it: what an image says shall arrive at the end
        if p.dim() > 1: torch.nn.init.kaiming_normal_(p)
    torch.nn.init.normal_(network.fc.weight)
    state = network.state_dict()
    if path: torch.save(state, path)
    else: monkeypatch.setattr(source, 'load_state_dict_from_url', lambda *a, **k: state)


def test_inception_weights_from_a_path(monkeypatch, tmp_path, pictures):
    random_inception(monkeypatch, tmp_path/'inception.pth')
    found = extract_features(pictures[0][:2], features=tmp_path/'inception.pth')
    assert (found.name, found.pooled.shape, found.logits.shape) == ('inception', (2, 2048), (2, 1008))


def test_inception_weights_that_cannot_be_downloaded_are_told_in_one_sentence(monkeypatch, pictures):
    def refused(*args, **kwargs): raise OSError('connection refused')
    monkeypatch.setattr('torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url', refused)
    with pytest.raises(FileNotFoundError, match=r"connection refused.*weights-inception.*path.*efficientnet-lite0") as e:
        extract_features(pictures[0], features='inception')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', None])
def test_a_file_that_is_not_inception(content, tmp_path, pictures):
    path = tmp_path/'weights.pth'
    if content is None: torch.save({'conv.weight': torch.zeros(3)}, path)
    else: path.write_bytes(content)
    with pytest.raises(ValueError, match='does not hold the Inception weights') as e: extract_features(pictures[0], features=str(path))
    assert '\n' not in str(e.value)


def test_distances_of_too_few_pictures():
    from t2i.metrics import clip_score, frechet_distance, kernel_distance, precision_recall
    features = torch.randn(3, 5)
    for function, few in ((frechet_distance, 1), (kernel_distance, 3), (precision_recall, 3)):
        with pytest.raises(ValueError, match=f'{few} and {few} images are too few'): function(features[:few], features[:few])
    with pytest.raises(ValueError, match='3 images and 1 captions'): clip_score(None, [Image.new('RGB', (8, 8))]*3, 'abc')


def test_features_are_extracted_with_all_bits(monkeypatch):
    "And what else was asked of cuDNN is as it was."
    import torch.backends.cudnn as cudnn
    from t2i import metrics
    monkeypatch.setattr(cudnn, 'allow_tf32', True)
    monkeypatch.setattr(cudnn, 'deterministic', True)
    seen = []
    def extractor(images):
        seen.append((cudnn.allow_tf32, cudnn.deterministic))
        return torch.zeros(len(images), 2), torch.zeros(len(images), 2)
    monkeypatch.setattr(metrics, '_extractor', lambda features, device: ('stub', extractor))
    extract_features([Image.new('RGB', (8, 8))], device='cpu')
    assert seen == [(False, True)] and cudnn.allow_tf32 and cudnn.deterministic


def test_the_error_of_few_pairs():
    "Each pair is a group then, and none is empty."
    from t2i.judge import fid_error
    a, b = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    assert fid_error(a, b, groups=10) == fid_error(a, b, groups=6) > 0


def test_what_is_transparent_is_white():
    clear, white = ([Image.new(mode, (64, 64), colour)] for mode, colour in (('RGBA', (0, 0, 0, 0)), ('RGB', 'white')))
    assert torch.equal(extract_features(clear, device='cpu').pooled, extract_features(white, device='cpu').pooled)


def test_paths_are_no_pictures():
    with pytest.raises(ValueError, match='holds str and should hold PIL pictures'): extract_features(['a.png', 'b.png'], device='cpu')


def test_a_folder_of_pictures(pictures, tmp_path):
    _, pictures = pictures
    for i, picture in enumerate(pictures[:9]): Image.fromarray(picture).save(tmp_path/f'{i}.png')
    (tmp_path/'settings.json').write_text('{}')
    (tmp_path/'.half.png').write_bytes(b'half')
    assert torch.equal(extract_features(tmp_path, device='cpu').pooled, extract_features(pictures[:9], device='cpu').pooled)
    assert evaluate(str(tmp_path), pictures[:9], device='cpu')['fid'] == pytest.approx(0, abs=1e-3)
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere'): extract_features(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='empty holds no pictures'): extract_features(tmp_path/'empty')
    with pytest.raises(TypeError, match="clip is a list: give a CLIP"): metrics.clip_score([], pictures[:1], ['a'])


def test_a_picture_that_lies_on_its_side_is_upright(tmp_path):
    "As a camera saves it; its size is that of the upright one."
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new('RGB', (64, 32), 'red').save(tmp_path/'side.png', exif=exif)
    pictures = [Image.open(tmp_path/'side.png'), Image.new('RGB', (32, 64), 'red')]
    first, second = extract_features(pictures, device='cpu').pooled
    assert torch.allclose(first, second, atol=1e-5)


def test_a_score_is_never_below_zero():
    clip = SimpleNamespace(encode_images=lambda images, normalize: torch.tensor([[1., 0.]]), encode_captions=lambda captions, normalize: torch.tensor([[-1., 0.]]))
    assert metrics.clip_score(clip, np.zeros((1, 8, 8, 3), np.uint8), ['the opposite']).tolist() == [0.]


def test_a_kernel_distance_is_over_halves(monkeypatch):
    "Of the smaller set, and of a thousand at most."
    asked = []
    monkeypatch.setattr(metrics, 'kid_features_to_metric', lambda a, b, **options: asked.append(options['kid_subset_size']) or {'kernel_inception_distance_mean': 0., 'kernel_inception_distance_std': 0.})
    for n, m in ((10, 30), (300, 500), (3000, 2500)): kernel_distance(torch.zeros(n, 2), torch.zeros(m, 2))
    assert asked == [5, 150, 1000]


@torch.no_grad()
@pytest.mark.parametrize('pixels, within', [
    (lambda g: torch.randint(256, (1, 3, 448, 448), dtype=torch.uint8, generator=g), lambda x: x.std() < 0.3),  # grey as the mean of its pixels
    (lambda g: 255*torch.randint(2, (1, 3, 64, 64), dtype=torch.uint8, generator=g), lambda x: x.abs().max() <= 1)])  # nothing beyond black and white
def test_pictures_are_resized_without_artefacts(pixels, within):
    extractor, seen = metrics.EfficientNetLite0('x', ['1280']), []
    extractor.network.conv_stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    extractor(pixels(torch.Generator().manual_seed(0)))
    assert within(seen[0])
