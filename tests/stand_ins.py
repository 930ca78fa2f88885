"""Tiny stand-ins of the files that a lab has, in exactly their formats: the authors' checkpoints, OpenAI's CLIP, MS-COCO."""
import json

import numpy as np
import open_clip
import torch
from PIL import Image

from t2i.clip import CLIP
from t2i.checkpoints import PLAIN_CAPTIONS
from t2i.decoder import make_decoder
from t2i.translator import make_translator
from t2i.upsampler import make_upsampler

PRESET = '''
[clip]
model = "t2i-tiny-quickgelu"
weights = "openai"
embedding_size = 32

[data]
image_size = 16

[diffusion]
schedule = "cosine"
timesteps = 1000
target = "eps"
vlb_weight = 0.001

[decoder]
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 2
attention_resolutions = [8]
num_head_channels = 32
dropout = 0.1
drop = 0.2

[translator]
width = 24
layers = 3
expansion = 2
dropout = 0.1

[upsampler]
image_size = 64
model_channels = 32
channel_mult = [1, 1]
num_res_blocks = 1
attention_resolutions = []
num_heads = 4
num_classes = 1000

[upsampler.diffusion]
schedule = "linear"
timesteps = 1000
target = "eps"

[upsampler.sampling]
sampler = "ddpm"
steps = 2
label = "zero-shot"
batch_size = 2

[train.decoder]
batch_size = 16
clip_norm = inf

[sampling]
sampler = "ddpm"
steps = 2
guidance_scale = 6.0
image_guidance_scale = 0.005
thresholding = "dynamic"
percentile = 99.5
'''
TINY_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
URL = 'https://openaipublic.azureedge.net/clip/models/0/t2i-tiny.pt'


# -- CLIP --------------------------------------------------------------------------------------------------------
CLIPS = {'t2i-tiny': {}, 't2i-tiny-quickgelu': {'quick_gelu': True}, 't2i-large-quickgelu': {'embed_dim': 48, 'quick_gelu': True},
         't2i-wide-quickgelu': {'vision_cfg': TINY_CLIP['vision_cfg'] | {'width': 48}, 'quick_gelu': True}}


def register_clips(folder):
    "Tiny models beside open_clip's own: with both GELUs as OpenAI's, of another width, of another embedding size; and a tag that can be downloaded."
    for name, changes in CLIPS.items():
        (folder/f'{name}.json').write_text(json.dumps(TINY_CLIP | changes))
        open_clip.pretrained._PRETRAINED[name] = {'openai': {'url': URL, 'hf_hub': 't2i/no-such-model/', 'quick_gelu': True}}
    open_clip.add_model_config(folder)


def make_clip(seed=0, **changes):
    torch.manual_seed(seed)
    return open_clip.CLIP(**(TINY_CLIP | {'quick_gelu': True} | changes))


class Tree(torch.nn.Module):
    "A module that has nothing but the names of a state dict."
    def __init__(self, state):
        super().__init__()
        for name in dict.fromkeys(k.split('.')[0] for k in state):
            inside = {k.partition('.')[2]: v for k, v in state.items() if k.split('.')[0] == name}
            if '' in inside: setattr(self, name, torch.nn.Parameter(inside['']))
            else: self.add_module(name, Tree(inside))

    def forward(self, x): return x


def save_torchscript(path, state):
    "OpenAI's wrapping: a TorchScript archive, float16, with three numbers among the tensors."
    archive = Tree({k: v.half() for k, v in state.items()})
    for name, value in dict(input_resolution=32, context_length=77, vocab_size=49408).items(): archive.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.trace(archive, torch.zeros(1)), str(path))


def save_training_checkpoint(path, state):
    "What open_clip's training writes."
    torch.save({'epoch': 32, 'name': 'run', 'state_dict': {f'module.{k}': v for k, v in state.items()}, 'optimizer': {'state': {}, 'param_groups': []}}, path)


def save_statistics(folder, clip):
    text = clip.encode_captions(PLAIN_CAPTIONS)
    image = clip.encode_images(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    for name, embeddings in [('image', image), ('caption', text)]:
        np.save(folder/f'{name}_embedding_mean.npy', embeddings.mean(0).numpy())
        np.save(folder/f'{name}_embedding_std.npy', embeddings.std(0).numpy())


# -- folders -----------------------------------------------------------------------------------------------------
def save_published(folder, preset):
    "The authors' seven files and OpenAI's CLIP, by their published names."
    save_torchscript(folder/'t2i-tiny.pt', make_clip().state_dict())
    torch.manual_seed(0)
    for name, make in dict(CLIP_translator=make_translator, image_decoder=make_decoder, upsampler=make_upsampler).items():
        model = make(preset)
        for p in model.parameters(): torch.nn.init.normal_(p, std=0.06)
        torch.save(model.state_dict(), folder/f'{name}.pt')
    save_statistics(folder, CLIP.from_preset(preset, 'cpu', folder))


def save_coco(folder, n=20):
    "MS-COCO's validation pictures of 2014 and their captions, five or more each: JPEG files of several shapes, one of them grey."
    rng, annotations = np.random.default_rng(0), []
    (folder/'val2014').mkdir(parents=True)
    (folder/'annotations').mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).convert('L' if i == 3 else 'RGB')
        small.resize([(64, 48), (40, 60), (50, 50)][i % 3], Image.Resampling.BICUBIC).save(folder/f'val2014/COCO_val2014_{7*i + 1:012}.jpg')
        annotations += [{'image_id': 7*i + 1, 'id': 100*i + k, 'caption': f'Picture {i} in the words of person {k}.'} for k in range(5 + i % 2)]
    images = [{'id': 7*i + 1, 'file_name': f'COCO_val2014_{7*i + 1:012}.jpg', 'width': 64, 'height': 48} for i in range(n)]
    (folder/'annotations/captions_val2014.json').write_text(json.dumps({'info': {}, 'images': images, 'licenses': [], 'annotations': annotations}))
