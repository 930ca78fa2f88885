"""The published files: tiny stand-ins in exactly their formats walk the way of `thesis`, and every file that is almost right gets one sentence."""
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from shell import says, shell
from stand_ins import URL, make_clip, save_statistics, save_torchscript, save_training_checkpoint
from t2i.checkpoints import PUBLISHED, PUBLISHED_STATISTICS, convert, find_checkpoint
from t2i.clip import CLIP
from t2i.core import load_preset, load_weights, save_weights
from t2i.decoder import make_decoder
from t2i.pipeline import TextToImage
from t2i.translator import make_translator

pytestmark = [pytest.mark.usefixtures('no_network'), pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')]  # TorchScript is on its way out; OpenAI's files remain


@pytest.fixture
def folder(published, tmp_path): return shutil.copytree(published, tmp_path/'checkpoints')


@pytest.fixture(scope='module')
def drawn(published, small): return draw(TextToImage.from_preset(small, 'cpu', folder=published))


def draw(pipe): return [np.asarray(p) for p in pipe(['a dog', 'a red bus'], generator=1, upsample=True)]


def same(pictures, others): return len(pictures) == len(others) and all((a == b).all() for a, b in zip(pictures, others))


def test_small_preset_has_the_structure_of_thesis(small):
    small, thesis = load_preset(small), load_preset('thesis')
    assert set(small) == set(thesis)
    for section in ('clip', 'data', 'diffusion', 'translator', 'upsampler', 'sampling'): assert set(small[section]) == set(thesis[section])
    assert set(small.decoder) == set(thesis.decoder) - {'gradient_checkpointing', 'mirror'}


# -- the way of `thesis` -----------------------------------------------------------------------------------------
def test_published_files_draw_pictures(drawn):
    assert [p.shape for p in drawn] == [(64, 64, 3)]*2 and not (drawn[0] == drawn[1]).all()


def test_formats_draw_the_same_pictures(published, folder, small, drawn, tmp_path):
    "The authors' folder, the same converted to ours and back, one that mixes both, and one that was saved."
    ours, theirs = tmp_path/'ours', tmp_path/'theirs'
    assert {p.name for p in convert(folder, ours)} == {'translator.safetensors', 'decoder.safetensors', 'upsampler.safetensors', 'statistics.safetensors'}
    convert(published/'t2i-tiny.pt', ours/'clip.safetensors')
    pipe = TextToImage.from_preset(small, 'cpu', ours)
    assert same(draw(pipe), drawn)
    assert {p.name for p in convert(ours, theirs)} == {*PUBLISHED_STATISTICS.values(), *(names[0] for names in PUBLISHED.values())}
    for path in theirs.iterdir():
        before, after = (load_weights(p, dtype=None)[0] for p in (published/path.name, path))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    (folder/'image_decoder.pt').unlink()
    shutil.copy(ours/'decoder.safetensors', folder)
    assert same(draw(TextToImage.from_preset(small, 'cpu', folder)), drawn)
    saved = pipe.save_pretrained(tmp_path/'saved')
    assert {p.suffix for p in saved.iterdir()} == {'.json', '.safetensors'}
    json.loads((saved/'config.json').read_text(), parse_constant=pytest.fail)
    assert same(draw(TextToImage.from_pretrained(saved, 'cpu')), drawn)
    assert same(draw(TextToImage.from_pretrained(pipe.save_pretrained(tmp_path/'half', torch.float16), 'cpu')), drawn) is False
    assert {v.dtype for path in (tmp_path/'half').glob('*.safetensors') if path.stem != 'statistics' for v in load_weights(path, None)[0].values() if v.is_floating_point()} == {torch.float16}


def test_convert_from_the_shell(published, tmp_path):
    for source, target in [('image_decoder.pt', 'decoder.safetensors'), ('image_embedding_mean.npy', 'mean.safetensors'), ('t2i-tiny.pt', 'clip.safetensors')]:
        result = shell('convert', published/source, tmp_path/target)
        assert result.exit_code == 0 and result.output.strip() == str(tmp_path/target)
        result = shell('convert', tmp_path/target, tmp_path/f'back{Path(source).suffix}')
        before, after = (list(load_weights(p)[0].values()) for p in (published/source, tmp_path/f'back{Path(source).suffix}'))
        assert len(before) == len(after) and {v.sum().item() for v in before} == {v.sum().item() for v in after}
    result = shell('convert', published, tmp_path/'ours')
    assert result.exit_code == 0 and len(result.output.split()) == 4


def test_upsampler_is_optional(folder, small):
    (folder/'upsampler.pt').rename(folder/'64_256_upsampler.pt')  # OpenAI's name for it
    assert TextToImage.from_preset(small, 'cpu', folder).upsampler
    (folder/'64_256_upsampler.pt').unlink()
    pipe = TextToImage.from_preset(small, 'cpu', folder)
    assert pipe('a dog', generator=1)[0].size == (16, 16)
    told(lambda: pipe('a dog', upsample=True), 'no upsampler.safetensors and no upsampler.pt')


# -- CLIP --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('save, name', [(save_torchscript, 'clip.pt'), (save_training_checkpoint, 'epoch_32.pt'), (lambda path, state: torch.save(state, path), 'open_clip_pytorch_model.bin'),
                                        (lambda path, state: save_file(state, path), 'open_clip_model.safetensors')])
def test_clip_by_path(save, name, tmp_path):
    reference = make_clip().half().float().eval()
    save(tmp_path/name, reference.state_dict())
    clip = CLIP.pretrained('t2i-tiny-quickgelu', tmp_path/name, 'cpu')
    assert clip.embedding_size == 32
    with torch.no_grad(): torch.testing.assert_close(clip.encode_captions(['a dog']), reference.encode_text(open_clip.tokenize(['a dog'])))


def test_clip_is_looked_for_in_the_folder_first(published, folder):
    for name in ('t2i-tiny.pt', 'open_clip_model.safetensors', 'clip.safetensors'):
        shutil.move(folder/'t2i-tiny.pt', folder/'kept.pt')
        convert(published/'t2i-tiny.pt', folder/name) if name.endswith('.safetensors') else shutil.copy(published/'t2i-tiny.pt', folder/name)
        assert CLIP.pretrained('t2i-tiny-quickgelu', 'openai', 'cpu', folder).embedding_size == 32
        (folder/name).unlink()
        shutil.move(folder/'kept.pt', folder/'t2i-tiny.pt')


def test_embedding_size_goes_through_the_pipeline(small, tmp_path):
    "Another CLIP by two keys of the preset, as ViT-L/14 is."
    preset = rewrite(small, tmp_path, ('t2i-tiny-quickgelu', 't2i-large-quickgelu'), ('embedding_size = 32', 'embedding_size = 48'))
    save_torchscript(tmp_path/'t2i-tiny.pt', make_clip(embed_dim=48).state_dict())
    for name, make in dict(CLIP_translator=make_translator, image_decoder=make_decoder).items(): torch.save(make(preset).state_dict(), tmp_path/f'{name}.pt')
    save_statistics(tmp_path, CLIP.from_preset(preset, 'cpu', tmp_path))
    pipe = TextToImage.from_preset(preset, 'cpu', tmp_path)
    assert pipe.embed_captions(['a dog']).shape == (1, 48) and pipe('a dog', generator=1)[0].size == (16, 16)


def test_sizes_of_open_clip():
    assert [(open_clip.get_model_config(m)['embed_dim']) for m in ('ViT-B-32-quickgelu', 'ViT-L-14-quickgelu')] == [512, 768]
    thesis = load_preset('thesis').clip
    assert (thesis.model, thesis.weights, thesis.embedding_size) == ('ViT-B-32-quickgelu', 'openai', 512)


# -- what goes wrong ---------------------------------------------------------------------------------------------
def told(action, *words):
    "`action` fails with one sentence that has the words."
    with pytest.raises((ValueError, FileNotFoundError)) as caught: action()
    text = str(caught.value)
    assert '\n' not in text and 30 < len(text) < 600 and not re.search(r'[.!] [A-Z]', text), text
    for word in words: assert str(word) in text, text
    return text


def rewrite(preset, folder, *changes):
    text = Path(preset).read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder/'other.toml').write_text(text)
    return folder/'other.toml'


@pytest.fixture
def load(small, folder): return lambda preset=small, folder=folder: TextToImage.from_preset(preset, 'cpu', folder)


def test_one_sentence_in_the_shell(folder, small, tmp_path):
    (folder/'image_decoder.pt').unlink()
    says(shell('generate', 'a dog', '--preset', small, '--folder', folder, '--out', tmp_path/'x.png'), 'image_decoder.pt')
    assert not (tmp_path/'x.png').exists()


def test_no_folder(load, tmp_path): told(lambda: load(folder=tmp_path/'nowhere'), 'no folder', tmp_path/'nowhere')


def test_folder_above(load, folder): told(lambda: load(folder=folder.parent), f'is in {folder}', 'name that folder')


def test_folder_of_something_else(load, tmp_path):
    (tmp_path/'holiday').mkdir()
    (tmp_path/'holiday/beach.jpg').touch()
    told(lambda: load(folder=tmp_path/'holiday'), 'decoder.safetensors', 'image_decoder.pt', 'beach.jpg', 'github.com/epfml')


@pytest.mark.parametrize('name', ['CLIP_translator.pt', 'image_decoder.pt', 'image_embedding_std.npy', 'caption_embedding_mean.npy'])
def test_missing_file(load, folder, name):
    (folder/name).unlink()
    told(load, 'missing', folder, f'no {name}')


@pytest.mark.parametrize('keep', [0, 20, 0.5, 0.999])
@pytest.mark.parametrize('name', ['image_decoder.pt', 'upsampler.pt', 'image_embedding_mean.npy', 't2i-tiny.pt'])
def test_half_downloaded_file(load, folder, name, keep):
    whole = (folder/name).read_bytes()
    (folder/name).write_bytes(whole[:keep if isinstance(keep, int) else int(keep*len(whole))])
    told(load, name, 'not a complete', 'download it again')


def test_web_page_instead_of_a_file(load, folder):
    for name in ('CLIP_translator.pt', 'image_embedding_mean.npy'):  # the second is read first
        (folder/name).write_text('<!DOCTYPE html><html><head><title>Sign in</title></head></html>')
        told(load, name, 'not a complete', 'download it again')


class Attack:
    "A pickle that writes a file when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize('name, save', [
    ('image_decoder.pt', torch.save), ('image_decoder.pt', lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)),
    ('t2i-tiny.pt', torch.save), ('image_embedding_mean.npy', lambda value, path: np.save(path, np.array([value]), allow_pickle=True)),
    ('image_embedding_mean.npy', lambda value, path: path.write_bytes(pickle.dumps(value)))])
def test_pickle_that_runs_code(load, folder, tmp_path, name, save):
    save(Attack(tmp_path/'owned'), folder/name)
    told(load, name, 'again')
    told(lambda: convert(folder/name, tmp_path/'x.safetensors'), name, 'again')
    assert not (tmp_path/'owned').exists() and not (tmp_path/'x.safetensors').exists()


def test_pickled_model_instead_of_a_state_dict(load, folder):
    torch.save(torch.nn.Linear(2, 2), folder/'image_decoder.pt')
    told(load, 'image_decoder.pt', 'asks for torch.nn.modules.linear.Linear', 'state_dict()')
    torch.save([torch.zeros(2)], folder/'image_decoder.pt')
    told(load, 'image_decoder.pt', 'no state dict')


@pytest.mark.parametrize('change, file, key, set_key', [
    (('[decoder]\nmodel_channels = 32', '[decoder]\nmodel_channels = 64'), 'image_decoder.pt', 'time_embed.0.weight', 'decoder.model_channels'),
    (('channel_mult = [1, 2]', 'channel_mult = [1, 3]'), 'image_decoder.pt', 'input_blocks.4.0', 'decoder.channel_mult'),
    (('num_res_blocks = 2', 'num_res_blocks = 3'), 'image_decoder.pt', 'blocks', 'decoder.num_res_blocks'),
    (('attention_resolutions = [8]', 'attention_resolutions = [16, 8]'), 'image_decoder.pt', 'input_blocks.1.1.norm.weight', 'decoder.attention_resolutions'),
    (('attention_resolutions = [8]', 'attention_resolutions = [8]\npixel_unshuffle = 2'), 'image_decoder.pt', 'input_blocks.0.0.weight', 'decoder.pixel_unshuffle'),
    (('width = 24', 'width = 32'), 'CLIP_translator.pt', 'layers.0.weight', 'translator.width'),
    (('layers = 3', 'layers = 4'), 'CLIP_translator.pt', 'layers.4', 'translator.layers'),
    (('layers = 3', 'layers = 2'), 'CLIP_translator.pt', 'layers.3', 'translator.layers'),
    (('expansion = 2', 'expansion = 4'), 'CLIP_translator.pt', 'layers.1.fn.0.weight', 'translator.expansion'),
    (('num_classes = 1000', 'num_classes = 10'), 'upsampler.pt', 'label_emb.weight', 'upsampler.num_classes'),
    (('model_channels = 32\nchannel_mult = [1, 1]', 'model_channels = 64\nchannel_mult = [1, 1]'), 'upsampler.pt', 'time_embed.0.weight', 'upsampler.model_channels')])
def test_checkpoint_of_another_width(load, small, folder, tmp_path, change, file, key, set_key):
    text = told(lambda: load(rewrite(small, tmp_path, change)), folder/file, key, set_key, 'in the file', 'in the model')
    assert re.search(r'of shape \[\d+', text)


def test_decoder_of_another_clip(load, small, folder, tmp_path):
    torch.save(make_decoder(rewrite(small, tmp_path, ('embedding_size = 32', 'embedding_size = 48'))).state_dict(), folder/'image_decoder.pt')
    told(load, folder/'image_decoder.pt', 'img_emb_proj.0.weight', '48]', '32]', 'clip.embedding_size')


def test_file_of_another_model(load, folder):
    shutil.copy(folder/'CLIP_translator.pt', folder/'image_decoder.pt')
    told(load, folder/'image_decoder.pt', 'another model', 'time_embed')


def test_statistics_of_another_clip(load, folder):
    np.save(folder/'caption_embedding_std.npy', np.ones(768))
    told(load, 'caption_embedding_std.npy', '[768]', '[32]', 'clip.embedding_size')
    save_weights(folder/'statistics.safetensors', {'mean': torch.zeros(32)})
    told(load, 'statistics.safetensors', 'text_mean')


def test_wrong_clip(load, small, folder, tmp_path):
    "Another size, another architecture, the same with other weights, another activation function, a name that nobody has."
    told(lambda: load(rewrite(small, tmp_path, ('t2i-tiny-quickgelu', 't2i-large-quickgelu'))), '48', '32', 'clip.embedding_size = 48')
    told(lambda: load(rewrite(small, tmp_path, ('t2i-tiny-quickgelu', 't2i-wide-quickgelu'))), 't2i-tiny.pt', 'visual.', 'clip.model')
    told(lambda: load(rewrite(small, tmp_path, ('t2i-tiny-quickgelu', 't2i-tiny'))), 'QuickGELU', "clip.model = 't2i-tiny-quickgelu'")
    told(lambda: load(rewrite(small, tmp_path, ('t2i-tiny-quickgelu', 't2i-tiny'), ('"openai"', f'"{folder}/t2i-tiny.pt"'))), 'QuickGELU')
    told(lambda: load(rewrite(small, tmp_path, ('t2i-tiny-quickgelu', 'ViT-B/23'))), 'ViT-B/23', 'ViT-B-32')
    save_torchscript(folder/'t2i-tiny.pt', make_clip(seed=1).state_dict())
    told(load, 'cosine', str(folder), 'clip.weights')


def test_no_network(load, small, folder, tmp_path):
    (folder/'t2i-tiny.pt').unlink()
    told(load, URL, f'put it into {folder}')
    told(lambda: CLIP.pretrained('t2i-tiny-quickgelu', 'openai', 'cpu'), URL, 'clip.weights')
    told(lambda: CLIP.from_preset('thesis', 'cpu'), 'ViT-B-32.pt', 'clip.weights')
    told(lambda: load(rewrite(small, tmp_path, ('"openai"', '"my-clip.pt"'))), 'no file my-clip.pt', 'clip.weights')
    told(lambda: TextToImage.from_pretrained('somebody/emoji'), 'somebody/emoji', 'network')


def test_the_hub_is_not_asked_for_a_folder(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.snapshot_download', pytest.fail)
    assert TextToImage.from_pretrained(pipe.save_pretrained(tmp_path), 'cpu')('a dog', generator=1) == pipe('a dog', generator=1)
    told(lambda: TextToImage.from_pretrained(tmp_path/'nowhere'), 'no folder', 'owner/name')


def test_the_hub_is_asked_for_an_id(pipe, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, **options: asked.append(name) or str(pipe.save_pretrained(tmp_path)))
    assert TextToImage.from_pretrained('somebody/emoji', 'cpu').preset.name == 'smoke' and asked == ['somebody/emoji']


def test_folder_without_its_configuration(published, tmp_path):
    told(lambda: TextToImage.from_pretrained(published, 'cpu'), 'config.json', 'folder=')
    (tmp_path/'config.json').write_text('{"model_type": "bert"}')
    told(lambda: TextToImage.from_pretrained(tmp_path, 'cpu'), 'config.json', 'decoder')
    (tmp_path/'config.json').write_text('{')
    told(lambda: TextToImage.from_pretrained(tmp_path, 'cpu'), 'config.json', 'JSON')


def test_what_cannot_be_converted(published, pipe, tmp_path):
    told(lambda: convert(published/'image_decoder.pt', tmp_path/'decoder.onnx'), 'decoder.onnx', '.safetensors')
    told(lambda: convert(published/'image_decoder.pt', tmp_path/'decoder.npy'), 'decoder.npy', 'one array')
    told(lambda: convert(tmp_path/'nothing.pt', tmp_path/'x.safetensors'), 'nothing.pt', 'missing')
    told(lambda: convert(tmp_path, tmp_path/'out'), 'missing', 'image_decoder.pt')
    pipe.clip.save(tmp_path/'clip.safetensors')
    told(lambda: convert(tmp_path/'clip.safetensors', tmp_path/'clip.pt'), 'pieces')
    (tmp_path/'some').mkdir()
    shutil.copy(published/'image_embedding_mean.npy', tmp_path/'some')
    told(lambda: convert(tmp_path/'some', tmp_path/'out'), 'image_embedding_mean.npy', 'four files')
    says(shell('convert', tmp_path/'nothing.pt', tmp_path/'x.safetensors'), 'nothing.pt')


@pytest.mark.parametrize('header', [{'pieces': [1]}, {'classes': {'style': ['noto']}}])
def test_weights_that_need_their_header_keep_it(tmp_path, header):
    save_weights(tmp_path/'some.safetensors', {'w': torch.zeros(2)}, header)
    with pytest.raises(ValueError, match='has no header: keep it as safetensors'): convert(tmp_path/'some.safetensors', tmp_path/'some.pt')


def test_statistics_of_pictures_alone_are_converted(tmp_path):
    save_weights(tmp_path/'ours/statistics.safetensors', {'image_mean': torch.zeros(2), 'image_std': torch.ones(2)})
    assert [p.name for p in convert(tmp_path/'ours', tmp_path/'theirs')] == ['image_embedding_mean.npy', 'image_embedding_std.npy']


def test_average_from_the_shell(tmp_path):
    for i, value in enumerate((1., 3.)): save_weights(tmp_path/f'{i}.safetensors', {'w': torch.full((2,), value)})
    result = shell('average', tmp_path/'0.safetensors', tmp_path/'1.safetensors', '--out', tmp_path/'new/mean.safetensors')
    assert result.exit_code == 0 and result.output.strip() == str(tmp_path/'new/mean.safetensors')
    assert load_weights(tmp_path/'new/mean.safetensors')[0]['w'].tolist() == [2., 2.]
    for i, statistics in enumerate('ab'): save_weights(tmp_path/f'{i}.safetensors', {'w': torch.zeros(2)}, {'stage': 'translator', 'statistics': statistics})
    says(shell('average', tmp_path/'0.safetensors', tmp_path/'1.safetensors', '--out', tmp_path/'x.safetensors'), "'statistics' is not the same in both")
    result = shell('average', tmp_path/'0.safetensors', '--out', tmp_path/'x.safetensors')
    assert result.exit_code == 1 and result.output.strip() == '1 file was given: a mean needs the weights of at least two networks'


def test_our_own_file_comes_before_a_published_one(tmp_path):
    for name in ('CLIP_translator.pt', 'translator.safetensors'): (tmp_path/name).touch()
    assert find_checkpoint(tmp_path, 'translator').name == 'translator.safetensors'


def test_converted_weights_keep_their_precision(tmp_path):
    convert(save_weights(tmp_path/'a.safetensors', {'w': torch.ones(2).half()}), tmp_path/'b.pt')
    assert load_weights(tmp_path/'b.pt', dtype=None)[0]['w'].dtype == torch.float16
