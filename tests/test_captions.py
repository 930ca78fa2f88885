"""How captions are read, and which ones the text encoder learns from."""
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from t2i import clip as clips
from t2i.clip import CLIP, TextTask, Vocabulary, neighbour_recall, paraphrase_recall
from t2i.data import AROUND, ENDINGS, OPENINGS, WITH, emoji_pixels, emoji_names, is_test_keyword, keyword_concepts, load_emoji, typed_captions
from t2i.pipeline import TextToImage


@pytest.fixture(scope='module')
def clip(): return CLIP.from_preset('emoji', 'cpu')


def test_typed_captions_say_what_may_be_said():
    table = load_emoji('train')[::25]
    seen = set()
    for row in table.itertuples():
        captions = typed_captions(row.name, row.style, row.concept, row.keywords)
        assert len(captions) == 8 and captions == typed_captions(row.name, row.style, row.concept, row.keywords)
        things = [row.name, *(k for k in row.keywords if not is_test_keyword(row.concept, k))]
        for caption in captions:
            said = re.sub(rf', {row.style} style$', '', caption)
            assert any(v in said for t in things for w in WITH for v in (t.replace(' with ', f' {w} '), re.sub('^([^,]*[^,s])(?=,|$)', r'\1s', t).replace(' with ', f' {w} '))), caption
            held_out = {w for k in row.keywords if is_test_keyword(row.concept, k) for w in k.split()} - {w for t in things for w in re.split(r'[\s,]+', t)} - AROUND
            assert not held_out & set(said.split()), caption
        seen.update(captions)
    assert 'pictures of woman firefighters, medium skin tone on a white background, noto style' in typed_captions('woman firefighter, medium skin tone', 'noto', 'woman firefighter', ['fire', 'firetruck', 'woman'])
    assert {o for o in OPENINGS if any(c.startswith(f'{o} ') for c in seen)} == {o for o in OPENINGS if o} and all(any(re.search(rf' {e}(, \w+ style)?$', c) for c in seen) for e in ENDINGS if e)


@pytest.mark.parametrize('typed, read', [
    ('Two red APPLES', 'two red apple'), ('foxes, potatoes and strawberries', 'fox, potato and strawberry'), ('a glass with stars', 'a glass with stars'),
    ('a cup of coffee', 'a cup of hot beverage'), ('two ravens.', 'two black bird'), ('scissor and a sock', 'scissors and a socks'), ('a cat that is just the best', 'a cat that is just the best'), ('a girafe and a unicron, Noto Style!', 'a giraffe and a unicorn, noto style'), ('"bannana"', '"banana"'), ('a cup of cofee', 'a cup of hot beverage'), ('gray, a gray cat', 'grey, a grey cat'), ('a violet heart and a violet', 'a purple heart and a hyacinth'), ('a golden crown', 'a yellow crown'), ('a coffee noto style', 'a hot beverage noto style'), ('a squirrel eating a nut', 'a chipmunk eating a nut'), ('red heart: noto style', 'red heart, noto style'), ("'red heart', noto style.", 'red heart , noto style'), ("two o'clock, 12:30 and Mrs. Claus", "two o'clock, 12:30 and mrs. claus"), ('a female astronaut, dark-skinned', 'a woman astronaut, dark skin tone'), ('a male elf and the female sign', 'a man elf and the female sign'), ('👩🏿‍⚖️ 🧑🏽‍🏫', 'woman judge, dark skin tone teacher, medium skin tone'), ('ON! arrow!', 'on! arrow'), ('there would be another storm', 'there would be another storm'), ('a shiny apple', 'a shiny apple'), ('grandma wearing eyeglasses', 'old woman wearing glasses'),
    ('a 🍎, please', 'a red apple , please'), ('a 👍🏽', 'a thumbs up, medium skin tone'), ('👩‍🚒🖤 ❤️', 'woman firefighter black heart red heart'), ('a ▲', 'a up-pointing triangle'), ('a corgi', 'a corgi'), ('a coffee emoji, please', 'a hot beverage emoji, please'), ('my coffee is hot', 'my hot beverage is hot'), ('a "coffee"', 'a "hot beverage"'), ('a coffee cup', 'a coffee cup'),
    ('process of duchess james', 'process of duchess james'), ('a cat and his', 'a cat and his'), ('sand in a hand', 'sand in a hand'), ('woman firefighter, medium skin tone, noto style', 'woman firefighter, medium skin tone, noto style')])
def test_captions_are_spelled_in_known_words(clip, typed, read):
    assert clip.tokenize.spell(typed).replace(' ,', ',').replace(' .', '.') == read.replace(' ,', ',').replace(' .', '.')
    assert torch.equal(clip.tokenize([typed]), clip.tokenize([read]))


def test_every_emoji_is_read_as_its_name(clip):
    names = emoji_names()
    assert len(names) > 3100 and clip.unknown_words([f'{emoji}, noto style' for emoji in names]) == []
    for emoji, name in names.items(): assert clip.tokenize.spell(f'a {emoji}.').replace(' .', '.') == clip.tokenize.spell(f'a {name}.').replace(' .', '.')


def test_emoji_that_a_vocabulary_has_are_kept():
    words = Vocabulary.of(['a 🖤'], context_length=32)
    assert words.spell('a 🖤') == 'a 🖤' and words.unknown_words('🖤') == []


def test_a_synonym_that_cannot_be_read_is_none():
    words = Vocabulary(Vocabulary.of(['a red apple', 'a hot beverage'], 8).pieces, 8, keyword_concepts)
    assert words.spell('a coffee and ravens') == 'a hot beverage and ravens' and words.looked_up('two ravens') == {}


def test_training_captions_are_read_as_they_are(clip):
    for caption in load_emoji('train', ['captions']).captions[::40].explode():
        assert clip.tokenize.spell(caption).replace(' ', '') == clip.tokenize.tokenizer.clean_fn(caption).lower().replace(' ', '')


def test_the_paraphrase_test_looks_nothing_up(clip, monkeypatch):
    table = load_emoji('test')[:60]
    learned = paraphrase_recall(clip, table)
    words = learned.keyword[[not clip.tokenize.knows(w) for w in learned.keyword]]
    assert len(words) and set(words.str.lower()) & keyword_concepts().keys()
    monkeypatch.setattr(clip.tokenize, 'synonyms', dict)
    assert paraphrase_recall(clip, table).equals(learned)


def test_the_text_encoder_learns_from_typed_captions(clip, monkeypatch):
    table = load_emoji('train')[:20]
    monkeypatch.setattr(clips, 'load_emoji', lambda split=None, columns=None, folder=None: table)
    task = TextTask(clip, 'smoke')
    row = table.iloc[3]
    expected = clip.tokenize([*row.captions, *typed_captions(row['name'], row['style'], row.concept, row.keywords)])
    assert torch.equal(task.pairs.tokens[3], expected) and (expected == Vocabulary.unknown).any()
    drawn = {tuple(task.batch(torch.tensor([3]), [torch.Generator().manual_seed(i)])[1][0].tolist()) for i in range(200)}
    assert len(drawn) > 10 and drawn <= {tuple(t.tolist()) for t in expected}


def test_a_word_without_end(clip):
    "Whoever sends one does not stop all others: each regular expression reads it once."
    with pytest.warns(UserWarning, match='word pieces'): clip.encode_captions(['x'*50_000 + ' buses'])


def test_captions_may_come_one_by_one(clip):
    pipe = TextToImage.from_preset('smoke', 'cpu')
    assert torch.equal(pipe.embed_captions(map(str.strip, ['a dog ', ' a cat'])), pipe.embed_captions(['a dog', 'a cat']))


def test_what_is_looked_up_is_told(clip):
    assert clip.looked_up(['a cup of coffee', 'ravens and cats']) == {'coffee': 'hot beverage', 'ravens': 'black bird'} and clip.looked_up(['a red apple']) == {} and clip.looked_up(['a girafe, notto style']) == {'girafe': 'giraffe', 'notto': 'noto'}
    assert clip.unknown_words(['draw me a coffee, please']) == [] and clip.unknown_words(['draw me a corgi']) == ['corgi']
    pipe = TextToImage.from_preset('emoji', 'cpu')
    with pytest.warns(UserWarning, match=r'reads others for them: coffee \(hot beverage\)$') as told: read = pipe.embed_captions(['a cup of coffee'])
    assert len(told) == 1 and torch.equal(read, pipe.embed_captions(['a cup of hot beverage']))


def test_narrow_stripes_become_grey():
    "A picture that is made smaller for the encoder is smoothed first."
    seen = []
    class Encoder(torch.nn.Module):
        def encode_image(self, x): seen.append(x); return x.flatten(1)
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    CLIP(Encoder(), None, 16, device='cpu').encode_pixels(stripes)
    assert seen[0].abs().max() < 0.2


def test_chance_of_a_paraphrase(clip):
    found = paraphrase_recall(clip, load_emoji('test')[:60], k=10)
    assert found['by chance'].tolist() == pytest.approx((1 - (1 - found.pictures/60)**10).tolist())


def test_neighbours_are_of_the_concepts_that_are_asked_for():
    everything = load_emoji('train')
    same = everything[everything.concept == everything.concept[0]]
    table, training = same[:1], pd.concat([same[1:2], everything[everything.concept != everything.concept[0]][:1]])
    first = emoji_pixels(table)[0]
    def encode_images(pixels, normalize): return torch.eye(2)[[1]] if len(pixels) == 1 and (pixels[0] == first).all() else torch.eye(2)[:len(pixels)]
    assert neighbour_recall(SimpleNamespace(encode_images=encode_images), table, training) == {'nearest': 1., 'average': 1.}


def test_the_average_neighbour_is_that_of_all_pictures_of_a_concept():
    "One picture that is very near does not stand for the others."
    everything = load_emoji('train')
    kept = everything[everything.concept.isin(everything.concept.value_counts().index[:2])].groupby('concept').head(3)
    mine, other = (part for _, part in kept.groupby('concept'))
    training, table = pd.concat([mine[1:], other[:2]]), pd.concat([mine[:1], other[2:3]])
    angles = {k: a for k, a in zip([*table.key, *training.key], [0, 180, 60, 60, 0, 180])}  # of another concept one picture is the same
    def encode(pixels, normalize):
        keys = list(table.key) if len(pixels) == 2 else list(training.key)
        a = torch.tensor([float(angles[k]) for k in keys]).deg2rad()
        return torch.stack([a.cos(), a.sin()], 1)
    assert neighbour_recall(SimpleNamespace(encode_images=encode), table, training)['average'] == 1
