"""Properties that hold for whatever is put in."""
import math
import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image

from t2i.clip import Vocabulary, recall
from t2i.clip_algebra import combine, hit_rates, ranks
from t2i.convolution import Conv3x3
from t2i.core import fitted, fixed_seed, from_uint8, make_generators, randn, square, to_uint8
from t2i.costs import activation_memory, stage_table
from t2i.data import Standardizer, Statistics, merge_moments, moments
from t2i.diffusion import SCHEDULES, Diffusion, PerfectDenoiser
from t2i.guidance import classifier_guidance
from t2i.image_guidance import decay_table, x_0_guidance
from t2i.sampling import SAMPLERS, sample
from t2i.train import batch_indices, learning_rate_factor
from t2i.translator import Translator
from t2i.unet import Attention, ResBlock, UNet

seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(20, 1000))
@few
def test_schedules(schedule, timesteps):
    d = Diffusion(schedule, timesteps)
    assert d.alphas_cumprod.dtype == torch.float64 and len(d.betas) == timesteps
    assert ((d.betas > 0) & (d.betas < 1)).all()
    assert (d.alphas_cumprod.diff() < 0).all() and d.alphas_cumprod[0] < 1 and d.alphas_cumprod[-1] > 0
    assert (d.posterior_variance <= d.betas).all() and d.log_posterior_variance.isfinite().all()


@given(st.integers(2, 400), st.data())
@few
def test_respace(timesteps, data):
    d = Diffusion('cosine', timesteps)
    steps = data.draw(st.integers(1, timesteps))
    r = d.respace(steps)
    assert r.timesteps == steps and r.timestep_map[-1] == timesteps - 1 and (r.timestep_map.diff() > 0).all()
    torch.testing.assert_close(r.alphas_cumprod, d.alphas_cumprod[r.timestep_map], rtol=0, atol=0)
    torch.testing.assert_close((1 - r.betas).cumprod(0), r.alphas_cumprod)
    again = r.respace(data.draw(st.integers(1, steps)))  # a subset of a subset points to the original timesteps
    torch.testing.assert_close(again.alphas_cumprod, d.alphas_cumprod[again.timestep_map], rtol=0, atol=0)


@given(st.integers(1, 1000), st.sampled_from(['eps', 'v']), seeds)
@few
def test_maps_between_what_a_network_may_predict(t, target, seed):
    d, g = Diffusion('cosine', 1000, target), torch.Generator().manual_seed(seed)
    x_0, eps, t = torch.randn(2, 3, 4, 4, generator=g).double(), torch.randn(2, 3, 4, 4, generator=g).double(), torch.tensor([t - 1, t - 1])
    x_t = d.q_sample(x_0, t, eps)
    v = d.velocity(x_0, t, eps)
    for found, expected in [(d.eps_from_x0(x_t, t, x_0), eps), (d.x0_from_eps(x_t, t, eps), x_0), (d.eps_from_v(x_t, t, v), eps),
                            (d.x0_from_v(x_t, t, v), x_0), (d.mean_from_eps(x_t, t, eps), d.q_posterior(x_0, x_t, t)[0])]:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 6), st.integers(0, 6))
@few
def test_more_pictures_do_not_change_the_noise_of_the_first(seed, n, more):
    few_, many = (randn((3,), make_generators(seed, k)) for k in (n, n + more))
    assert torch.equal(few_, many[:n])
    assert len(set(many[:, 0].tolist())) == n + more


@given(seeds)
@few
def test_images_survive_the_way_to_floats_and_back(seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    x = from_uint8(images)
    assert x.shape == (2, 3, 5, 7) and -1 <= x.min() and x.max() <= 1
    assert (to_uint8(x) == images).all()
    assert (to_uint8(x*1000) == np.where(images > 127, 255, 0)).all()  # what is out of range is clipped


@given(seeds, st.integers(1, 30), st.integers(1, 30), st.floats(-1e3, 1e3))
@few
def test_moments_of_parts_are_those_of_the_whole(seed, n, m, shift):
    x = torch.randn(n + m, 4, generator=torch.Generator().manual_seed(seed)).double() + shift
    (count, mean, squares), whole = merge_moments(moments(x[:n]), moments(x[n:])), moments(x)
    assert count == n + m
    torch.testing.assert_close(mean, whole[1])
    torch.testing.assert_close(squares, whole[2], rtol=1e-6, atol=1e-8)


@given(seeds)
@few
def test_standardising_is_undone(seed):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))*3 + 2
    s = Standardizer(x.mean(0), x.std(0))
    torch.testing.assert_close(s.restore(s.standardize(x)), x)
    torch.testing.assert_close(s.standardize(x).mean(0), torch.zeros(4), atol=1e-5, rtol=0)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 4), seeds)
@few
def test_batches_go_through_all_examples_again_and_again(n, batch_size, epochs, seed):
    steps = math.ceil(epochs*n/batch_size)
    seen = torch.cat([batch_indices(n, batch_size, step, seed) for step in range(steps)])
    assert len(seen) == steps*batch_size
    for epoch in seen[:epochs*n].split(n): assert sorted(epoch.tolist()) == list(range(n))


@given(st.integers(0, 1000), st.sampled_from(['linear', 'cosine', 'constant']), st.integers(0, 200))
@few
def test_learning_rate_stays_between_nothing_and_all(step, decay, warmup):
    assert 0 <= learning_rate_factor(step, step/1000, warmup, decay) <= 1


@pytest.fixture(scope='module')
def vocabulary(): return Vocabulary.of(['a red apple, noto style'], 16)


def test_known_and_unknown_pieces(vocabulary):
    @given(st.text(max_size=60))
    @few
    def holds(caption):
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ids = vocabulary([caption])
        assert ids.shape == (1, 16) and ids.min() >= 0 and ids.max() == vocabulary.end == len(vocabulary) - 1
        end = ids[0].argmax()
        assert ids[0, 0] == vocabulary.start and (ids[0, end + 1:] == vocabulary.padding).all() and (ids[0, 1:end] != vocabulary.padding).all()
    holds()
    assert vocabulary.unknown not in vocabulary(['a red apple, noto style'])
    assert (vocabulary(['a xylophone'])[0] == vocabulary.unknown).any()


@pytest.fixture(scope='module')
def emoji():
    from t2i.pipeline import TextToImage
    return TextToImage.from_preset('emoji', device='cpu')


def test_wide_networks_compute_what_their_literal_sums_do(emoji, monkeypatch):
    "Layers of 96 channels and more take Winograd's algorithm: forward, backward, and after the weights have changed in whatever way."
    from copy import deepcopy
    from t2i import convolution
    network, literal = deepcopy(emoji.decoder), deepcopy(emoji.decoder)
    for layer in literal.modules():
        if isinstance(layer, convolution.Conv3x3): layer.forward = partial(torch.nn.Conv2d.forward, layer)
    counted, filters = [], convolution._filters
    monkeypatch.setattr(convolution, '_filters', lambda weight: counted.append(1) or filters(weight))
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 3, 64, 64), torch.tensor([100, 900]), torch.randn(2, 512)
    def same():
        with torch.no_grad(): torch.testing.assert_close(network(x, t, y), literal(x, t, y), atol=2e-4, rtol=1e-3)
    same()
    assert len(counted) >= 19
    for model in (network, literal): model(x, t, y).square().mean().backward()
    for (name, p), q in zip(network.named_parameters(), literal.parameters()):
        if p.grad is not None: assert (p.grad - q.grad).norm() <= 1e-3*q.grad.norm() + 1e-7, name
    same()
    torch.optim.Adam(network.parameters(), 1e-3, fused=True).step()
    literal.load_state_dict(network.state_dict())
    same()
    for p, q in zip(network.parameters(), literal.parameters()): p.data.mul_(1.01); q.data.copy_(p.data)
    same()
    size = len(pickle.dumps(network))
    emoji('a red apple', generator=1, num_inference_steps=1)
    assert size < 1.1*sum(p.nbytes for p in (*network.parameters(), *(p.grad for p in network.parameters() if p.grad is not None))) and len(pickle.dumps(emoji.decoder)) < 1.1*sum(p.nbytes for p in emoji.decoder.parameters())


def test_a_compiled_pipeline_of_wide_networks_is_one_graph(emoji, monkeypatch):
    from t2i.pipeline import TextToImage
    compiled = TextToImage.from_preset('emoji', device='cpu').compile(backend='eager', fullgraph=True)
    ours = np.asarray(emoji('a red apple', generator=1)[0], int)
    monkeypatch.setattr('t2i.convolution._filters', lambda weight: 1/0)  # the compiler is given convolutions as they are
    theirs = np.asarray(compiled('a red apple', generator=1)[0], int)
    assert np.abs(ours - theirs).max() <= 1  # its convolutions are the literal sums


def test_weights_that_know_no_versions(emoji):
    from t2i.pipeline import TextToImage
    y = emoji.embed_captions(['a red apple'])
    with torch.inference_mode(): picture = TextToImage.from_preset('emoji', device='cpu')(image_embeddings=y, generator=1)
    assert picture == emoji(image_embeddings=y, generator=1)


def test_a_process_for_sampling_is_not_trained_with(emoji):
    x, t = torch.zeros(1, 3, 64, 64), torch.tensor([50])
    network = lambda x, t: torch.zeros(1, 6, 64, 64)
    for process in (emoji.diffusion, emoji.diffusion.respace(5)):
        with pytest.raises(ValueError, match=r'take expect_errors\(0\)'): process.training_losses(network, x, t[:0] + 1, x)
        with pytest.raises(ValueError, match=r'take expect_errors\(0\)'): process.bits_per_dimension(process.denoiser(network), x, make_generators(0, 1))
        assert process.expect_errors(0).training_losses(network, x, torch.tensor([1]), x)['loss'].isfinite()


def test_float16_features_do_not_overflow():
    from t2i.unet import GroupNorm32
    x, norm = (torch.randn(2, 64, 64, 64)*0.1 + 20).half(), GroupNorm32(64)
    with torch.no_grad(): torch.testing.assert_close(norm(x).float(), norm(x.float()), atol=0.02, rtol=0.01)


def test_networks_keep_float32(emoji):
    from copy import deepcopy
    with pytest.raises(ValueError, match='weights of this U-Net are torch.float16: keep them in float32'): deepcopy(emoji.decoder).half()(torch.zeros(1, 3, 64, 64), torch.tensor([1]), torch.zeros(1, 512))


def test_pictures_as_arrays_are_seen_as_pictures(emoji):
    "Whatever their shape: white paper at the sides, and no stretching."
    rng = np.random.default_rng(0)
    for h, w in ((64, 64), (128, 64), (64, 32), (50, 100)):
        array = np.kron(rng.integers(0, 256, (2, h//10, w//10, 3)), np.ones((1, 10, 10, 1))).astype(np.uint8)
        torch.testing.assert_close(emoji.embed_images(array), emoji.embed_images([Image.fromarray(i) for i in array]), atol=0.1, rtol=0)  # a square array is resized by another library
    assert torch.equal(emoji.embed_images(array[0]), emoji.embed_images(Image.fromarray(array[0])))
    for wrong in (array[..., :1], np.zeros((1, 64, 64, 4), np.uint8)):
        with pytest.raises(ValueError, match=r'give PIL pictures or uint8 \[N, H, W, 3\]'): emoji.embed_images(wrong)
    with pytest.raises(ValueError, match='give at least one'): emoji.embed_images(array[:0])


def test_a_compiled_pipeline_draws_the_same_pictures_in_one_graph(pipe):
    from t2i.pipeline import TextToImage
    compiled = TextToImage.from_preset('smoke', device='cpu').compile(backend='eager', fullgraph=True)
    assert compiled('a red apple', generator=1) == pipe('a red apple', generator=1)
    assert compiled.decoder._compiled_call_impl and compiled.fingerprints() == pipe.fingerprints()


def test_without_a_compiler_pictures_are_drawn(pipe, monkeypatch):
    from t2i.pipeline import TextToImage
    def compile(*arguments, **options): raise RuntimeError("backend='inductor' raised:\nno Triton")  # as torch 2.6 says it
    monkeypatch.setattr('torch.compile', compile)
    with pytest.warns(UserWarning, match=r'here \(no Triton\)'): drawn = TextToImage.from_preset('smoke', device='cpu').compile()
    assert drawn('a red apple', generator=1) == pipe('a red apple', generator=1) and not drawn.decoder._compiled_call_impl


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_network_may_write_every_answer_to_the_same_memory(sampler):
    "As a CUDA graph does."
    diffusion, x_T = Diffusion().respace(5), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    def denoiser(memory):
        def denoise(x_t, t):
            x_0 = (x_t*0.5 + 0.1).clamp(-1, 1)
            return (memory.copy_(x_0) if memory is not None else x_0), torch.zeros_like(x_0) - 5
        return denoise
    own, shared = (sample(sampler, denoiser(memory), diffusion, x_T, make_generators(0, 1)) for memory in (None, torch.empty_like(x_T)))
    assert torch.equal(own, shared)


def test_a_fixed_seed_leaves_the_generator_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with fixed_seed(7): inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected) and torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(7)))


def test_bfloat16_draws_nearly_the_same(pipe, monkeypatch):
    draw = lambda seed: torch.stack([torch.from_numpy(np.array(picture)).float() for picture in pipe(['a red apple', 'a cat'], generator=seed)])
    exact, other = draw(0), draw(1)
    monkeypatch.setenv('T2I_PRECISION', 'bfloat16')
    rounded = draw(0)
    assert 0 < (rounded - exact).abs().mean() < (other - exact).abs().mean()/5


@pytest.mark.parametrize('capabilities, bfloat16', [
    (dict(cpu_name='Intel Xeon', avx512_bf16=True, amx_bf16=True), True),
    (dict(cpu_name='Intel Xeon', avx512_bf16=True, amx_bf16=False), False),  # a virtual machine without AMX: its one instruction has half of float32's rate
    (dict(cpu_name='AMD EPYC', avx512_bf16=True, amx_bf16=False), True),
    (dict(cpu_name='AMD EPYC', avx512_bf16=False), False),
    (dict(architecture='aarch64', bf16=True), False), ({}, False)])
def test_a_processor_multiplies_in_what_it_is_faster_at(monkeypatch, capabilities, bfloat16):
    from t2i.core import uses_bfloat16
    monkeypatch.delenv('T2I_PRECISION')
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert uses_bfloat16('cpu') is bfloat16


def test_unknown_precision(pipe, monkeypatch):
    monkeypatch.setenv('T2I_PRECISION', 'half')
    with pytest.raises(ValueError, match="T2I_PRECISION is 'half': set it to 'float32' or 'bfloat16'"): pipe('a red apple')


@pytest.mark.parametrize('eta', [0.3, 1.])
@pytest.mark.parametrize('name', ['ddim', 'dpm_solver_pp'])
def test_a_step_adds_its_share_of_noise(name, eta):
    d, shape = Diffusion('cosine', 1000).respace([300, 600]), (1, 8, 8)
    x, perfect = torch.randn(4, *shape, dtype=torch.float64), PerfectDenoiser(d, torch.zeros(1, *shape), 0.4)
    a, a_next = d.alphas_cumprod[1], d.alphas_cumprod_prev[1]
    shrinks = (1 - a_next)/(1 - a)*a/a_next  # e^(-2h)
    variance = eta**2*d.posterior_variance[1] if name == 'ddim' else (1 - a_next)*(1 - shrinks**eta)
    one, other = (next(SAMPLERS[name](perfect, d, x, make_generators(seed, 4), eta=eta)).x for seed in (5, 6))
    noise, other_noise = (randn(shape, make_generators(seed, 4)).double() for seed in (5, 6))
    torch.testing.assert_close(one - other, variance.sqrt()*(noise - other_noise))


def test_the_second_order_is_exact_for_uneven_steps():
    "An image that moves linearly in λ is extrapolated to the middle of the step."
    d = Diffusion('cosine', 1000).respace([100, 300, 900])
    lambdas, x = d.snr.log()/2, torch.randn(1, 1, 4, 4, dtype=torch.float64)
    def line(x, t): return lambdas[t].reshape(-1, 1, 1, 1).expand_as(x), None
    first, second, _ = SAMPLERS['dpm_solver_pp'](line, d, x, None)
    a, a_next, h = d.alphas_cumprod[1], d.alphas_cumprod[0], lambdas[0] - lambdas[1]
    torch.testing.assert_close(second.x, ((1 - a_next)/(1 - a)).sqrt()*first.x + a_next.sqrt()*(1 - (-h).exp())*(lambdas[1] + h/2))


def test_attention_of_training_in_sixteen_bits_is_that_of_sampling():
    q, k, v = (2*torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    torch.testing.assert_close(Attention._attend(q, k, v).float(), F.scaled_dot_product_attention(q.float(), k.float(), v.float()), atol=0.15, rtol=0.05)  # without the scale they are 4 apart


@pytest.mark.parametrize('more', [dict(augmentation_size=8), dict(num_classes=5, embedding_size=0), dict(seam_channels=32)])
def test_the_table_of_costs_counts_all_parameters(more):
    with torch.device('meta'): model = UNet(16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=1, **({'embedding_size': 8} | more))
    assert stage_table(model).parameters.sum() == sum(p.numel() for p in model.parameters())


def test_each_picture_is_pulled_to_its_own_base_image(pipe):
    bases = [Image.new('RGB', (64, 64), c) for c in ('red', 'blue', 'lime')]
    together, apart = (pipe(['a dog']*3, batch_size=n, num_inference_steps=4, generator=1, base_image=bases, image_guidance_scale=0.05) for n in (3, 2))
    for a, b in zip(together, apart): assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_inputs_of_an_analogy_do_not_count():
    table, questions = pd.DataFrame({'style': ['noto']*4}), pd.DataFrame([('r', 'noto', 0, 1, 2, 3)], columns=['relation', 'style', 'a', 'b', 'c', 'd'])
    embeddings = torch.tensor([[1., 0.], [1., 0.1], [1., 0.2], [1., 0.5]])
    assert ranks(table, questions, embeddings[:1], embeddings).tolist() == [1] and ranks(table, questions, embeddings[:1], embeddings, exclude_inputs=False).tolist() == [4]
    assert hit_rates(np.array([1, 5, 9]), 'xyz')['hits@5'] == 2/3


def small_unet(**settings):
    return UNet(16, model_channels=32, num_res_blocks=1, attention_resolutions=(8,), channel_mult=(1, 2), num_heads=1, embedding_size=8, **settings)


def test_seams_mend_what_was_drawn_beside_what_was_seen():
    model, seen, x = small_unet(seam_channels=8).eval(), [], torch.randn(2, 3, 16, 16)
    model.seams[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    torch.nn.init.normal_(model.out[-1].weight)
    others = torch.tensor([0, 999]), torch.randn(2, 8)
    with torch.no_grad():
        mended, model.seams = model(x, *others), None
        plain = model(x, *others)
    assert torch.equal(seen[0], torch.cat([plain, x], 1))
    assert torch.equal(mended, plain) and plain.any()  # fresh seams change nothing


def test_what_is_added_to_a_resblock_is_normalised():
    "Figure 4.3."
    block, x, emb = ResBlock(32, 32, 128, scale_shift=False), torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    torch.nn.init.normal_(block.out_layers[3].weight)
    h = block.in_layers(x) + block.emb_layers(emb)[..., None, None]
    torch.testing.assert_close(block(x, emb) - x, block.out_layers(h), rtol=1e-4, atol=1e-4)


def test_every_block_of_a_unet_has_its_dropout():
    model = small_unet(dropout=0.3, seam_channels=32, seam_blocks=1)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_guidance_leaves_out_the_steps_without_a_picture_only():
    diffusion, x = Diffusion(), torch.zeros(1, 3, 2, 2)
    def moves(t): return classifier_guidance(lambda x, t: (x, x), diffusion, lambda x, t: x.sum((1, 2, 3)), 1., 'score')(x, t)[0].any()
    assert moves((diffusion.alphas_cumprod < 5e-3).nonzero()[0]) and not moves(torch.tensor([999]))


def test_a_needle_keeps_a_pixel():
    assert fitted((1000, 1), 64) == (64, 1) and square(Image.new('RGB', (1000, 1)), 64).size == (64, 64)


def test_the_digest_of_statistics_tells_means_and_deviations():
    def of(mean, std): return Statistics(Standardizer(torch.full((4,), mean), torch.full((4,), std))).digest()
    assert len({of(0., 1.), of(1., 1.), of(0., 2.)}) == 3 and of(0., 1.) == of(0., 1.)


def test_the_pull_on_the_image_fades_with_the_timestep_whatever_the_number_of_steps():
    d, x = Diffusion().respace([0, 899]), torch.zeros(1, 3, 2, 2)
    pulled, _ = x_0_guidance(lambda x, t: (x, None), d, x + 1, 1.)(x, torch.tensor([1]))
    assert pulled.unique().item() == pytest.approx(0.899)


def test_the_cosine_decay_goes_from_nothing_to_all():
    d = decay_table('cosine', 100)
    assert d[0] == 0 and d[50] == pytest.approx(0.5) and (d.diff() > 0).all()


def test_a_decay_above_one_is_refused():
    with pytest.raises(ValueError, match='from 0 to 1'): decay_table(lambda time: 2*time, 10)


def test_both_linear_maps_of_a_translators_layer_have_dropout():
    assert [m.p for m in Translator(8, width=8, layers=2, dropout=0.3).modules() if isinstance(m, torch.nn.Dropout)] == [0.3]*4


def test_concepts_of_different_sizes_count_with_their_sizes():
    assert hit_rates(np.ones(5, int), 'aaaab')['±'] == 0


def test_only_emoji_of_the_same_style_are_candidates():
    table, asked = pd.DataFrame({'style': ['fluent', 'noto', 'noto', 'noto']}), pd.DataFrame([('r', 'noto', 1, 2, 3)], columns=['relation', 'style', 'a', 'b', 'c'])
    embeddings = torch.tensor([[1., 0.], [0., 1.], [0., -1.], [1., 0.1]])
    assert ranks(table, asked, embeddings[:1], embeddings).tolist() == [1]


def test_weights_of_a_composition_sum_to_one():
    asked = pd.DataFrame([('r', 'noto', 0, 1, 2)], columns=['relation', 'style', 'a', 'b', 'c'])
    assert combine(asked, torch.eye(4)).tolist() == [[0.5, 0.5, 0, 0]]


def test_memory_without_checkpointing_is_counted_for_a_network_that_has_it():
    plain, checkpointed = (UNet(16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=1, embedding_size=8, gradient_checkpointing=on) for on in (False, True))
    assert activation_memory(checkpointed) == activation_memory(plain)


def test_memory_is_counted_as_under_autocast():
    model = UNet(16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=1, embedding_size=8)
    assert activation_memory(model) == activation_memory(model, torch.bfloat16) < activation_memory(model, torch.float32)


@torch.no_grad()
def test_a_width_that_four_does_not_divide_takes_the_literal_sum():
    layer, x = Conv3x3(96, 96), torch.randn(1, 96, 8, 10)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), rtol=1e-4, atol=1e-4)


def test_a_first_layer_learns_though_its_input_does_not():
    layer, x = Conv3x3(96, 96), torch.randn(1, 96, 8, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()


def test_a_wide_layer_keeps_the_precision_of_autocast():
    layer, x = Conv3x3(96, 96), torch.randn(1, 96, 8, 8)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_the_shorter_side_of_a_picture_is_rounded():
    assert fitted((100, 51), 64) == (64, 33)


def test_a_recall_tells_pictures_from_captions():
    images, texts = torch.tensor([[1., 0.], [0.8, 0.6]]), torch.eye(2)
    assert recall(images, texts, ['a', 'b']) == {'image_to_text': 0.5, 'text_to_image': 1.}


def test_what_clip_shrinks_is_smoothed(pipe, monkeypatch):
    seen, size = [], pipe.clip.image_size
    monkeypatch.setattr(pipe.clip.model, 'encode_image', lambda x: seen.append(x) or torch.zeros(1, 32))
    noise = 2*torch.randint(2, (1, 3, 4*size, 4*size), generator=torch.Generator().manual_seed(0)) - 1.
    pipe.clip.encode_pixels(noise)
    assert (seen[0]*pipe.clip.std + pipe.clip.mean).std() < 0.2


def test_what_is_left_in_the_noisiest_latent_is_counted_in_bits():
    diffusion, x = Diffusion('linear', 1000).respace([300]), torch.tensor([[[[0.5]]]]).double()
    a = diffusion.alphas_cumprod[0]
    nats = torch.distributions.kl_divergence(torch.distributions.Normal(a.sqrt()*0.5, (1 - a).sqrt()), torch.distributions.Normal(0., 1.))
    assert diffusion.prior_bits(x).item() == pytest.approx(nats.item()/np.log(2))
