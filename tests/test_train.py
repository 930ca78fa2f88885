"The training loop: several processes train as one does, and nothing is lost when a run dies."
import math, os, random, resource, signal, sys, threading, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from runs import CONFIG, PRESET, TooLate, finish, kill_and_resume, prepared, start, stop, wait_for
from shell import shell
from t2i.core import Preset, compiles, load_into, load_preset, load_weights, make_generators, randn, save_weights
from t2i.data import Standardizer, Statistics
from t2i.decoder import DecoderTask, decode, draw_augmentation, make_decoder, make_diffusion
from t2i.train import Energy, Log, Task, TrainConfig, _Run, ema_rate, train
from t2i.translator import Translator, TranslatorTask, make_translator, translator_validation


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    prepared(folder)
    return folder


@pytest.fixture(scope='module')
def whole(folder):
    "A run of one process that nobody disturbs."
    assert finish(start(folder/'whole')) == [0]
    return folder/'whole'


def losses(out, name='loss'): return torch.tensor([float(r[name]) for r in Log.read(out/'log.csv') if r[name]])


def check_weights(out, steps):
    "They load into the decoder of the pipeline, and draw."
    weights, metadata = load_weights(out/'weights.safetensors')
    assert metadata['examples'] == steps*CONFIG['batch_size']
    model = load_into(make_decoder(PRESET), weights, out).eval()
    assert decode(make_diffusion(PRESET), model, torch.zeros(1, 8), generator=0, steps=2, sampler='ddim').isfinite().all()


@pytest.mark.parametrize('config', [dict(), dict(micro_batch=2)], ids=['data-parallel', 'accumulated'])
def test_two_processes_train_as_one(folder, whole, config):
    out = folder/'-'.join(['two', *config])
    assert finish(start(out, world=2, **config)) == [0, 0]
    assert len(losses(out)) == CONFIG['steps']
    torch.testing.assert_close(losses(out), losses(whole), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses(out, 'validation_loss'), losses(whole, 'validation_loss'), atol=1e-4, rtol=0)  # of the averaged weights
    check_weights(out, CONFIG['steps'])


def in_time(attempt, tries=5):
    "`attempt(name)`, again under another name if the run was over before anything could be done to it."
    for i in range(tries):
        try: return attempt(f'try{i}')
        except TooLate: pass
    raise AssertionError(f'each of {tries} runs was over before it was stopped')


@pytest.mark.skipif(torch.__version__ < '2.9', reason='fsdp is refused')
def test_sharded_run_trains_as_one_and_goes_on_in_one_process(folder, whole):
    def attempt(name):
        processes = start(folder/f'sharded{name}', world=2, fsdp=True, micro_batch=2)
        wait_for(folder/f'sharded{name}', 8, processes)
        if (codes := stop(processes, signal.SIGTERM)) == [0, 0]: raise TooLate
        assert codes == [128 + signal.SIGTERM]*2
        return folder/f'sharded{name}'
    out = in_time(attempt)
    check_weights(out, torch.load(out/'checkpoint.pt', weights_only=True)['step'])
    assert finish(start(out)) == [0]
    torch.testing.assert_close(losses(out), losses(whole), atol=1e-5, rtol=0)


@pytest.mark.parametrize('world, kills', [(1, 3), (2, 1)])
def test_killed_run_is_resumed_exactly(folder, whole, world, kills):
    if world == 2: assert finish(start(folder/'whole2', 2)) == [0, 0]
    expected = (folder/('whole' if world == 1 else 'whole2')/'weights.safetensors').read_bytes()
    for i, step in enumerate(random.Random(world).sample(range(1, CONFIG['steps'] - 5), kills)):
        path = in_time(lambda name: kill_and_resume(folder, world, f'killed{world}{i}{name}', lambda out, processes: wait_for(out, step, processes)))
        assert path.read_bytes() == expected, f'killed at step {step} of {world} process(es)'


def test_sigterm_leaves_a_checkpoint(folder, whole):
    def attempt(name):
        processes = start(folder/f'preempted{name}', save_minutes=60.)
        wait_for(folder/f'preempted{name}', 5, processes)
        if (codes := stop(processes, signal.SIGTERM)) == [0]: raise TooLate
        assert codes == [128 + signal.SIGTERM]
        return folder/f'preempted{name}'
    out = in_time(attempt)
    assert torch.load(out/'checkpoint.pt', weights_only=True)['step'] >= 5
    assert finish(start(out)) == [0]
    assert (out/'weights.safetensors').read_bytes() == (whole/'weights.safetensors').read_bytes()


class Line(Task):
    "y = 3x − 1; at step `bad_at` the loss is multiplied by `factor`."
    def __init__(self, bad_at=None, factor=1.):
        torch.manual_seed(0)
        self.model, self.bad_at, self.factor, self.steps = nn.Linear(1, 1), bad_at, factor, 0
    def __len__(self): return 64
    def batch(self, indices, generators): return indices[:, None]/64., 3*indices[:, None]/64. - 1 + 0.1*randn((1,), generators)
    def loss(self, model, batch):
        self.steps += 1
        loss = (model(batch[0]) - batch[1]).square().mean()
        return {'loss': loss*self.factor if self.steps == self.bad_at else loss}


class Watched(Line):
    "Notes in `seen` what it is told."
    def __init__(self, seen): super().__init__(); self.seen = seen
    def loss(self, model, batch):
        self.seen.append(self.used)
        return super().loss(model, batch)


LINE = dict(batch_size=16, learning_rate=0.01, steps=40, log_every=10, save_minutes=0)


def test_the_task_is_told_how_far_the_training_is(tmp_path):
    seen = []
    train(Watched(seen), LINE | dict(steps=4, log_every=4), tmp_path/'run', device='cpu', progress=False)
    train(Watched(seen), LINE | dict(steps=8, log_every=4), tmp_path/'run', device='cpu', progress=False)
    assert seen == [0, 1/4, 2/4, 3/4] + [4/8, 5/8, 6/8, 7/8]


def test_a_longer_decay_is_no_longer_training(tmp_path):
    seen = []
    train(Watched(seen), LINE | dict(steps=4, decay_steps=16, log_every=1), tmp_path/'run', device='cpu', progress=False)
    assert seen == [0, 1/4, 2/4, 3/4]
    rates = losses(tmp_path/'run', 'learning_rate')/LINE['learning_rate']
    torch.testing.assert_close(rates, 1 - torch.arange(4)/16, atol=1e-5, rtol=0)


def test_every_step_drops_at_random_anew_and_again_alike(tmp_path):
    class Drops(Line):
        def loss(self, model, batch):
            self.drawn = [*getattr(self, 'drawn', []), torch.rand(()).item()]
            return super().loss(model, batch)

    tasks = Drops(), Drops(), Drops()
    for i, (task, seed) in enumerate(zip(tasks, (0, 0, 1))): train(task, LINE | dict(steps=4), tmp_path/str(i), seed=seed, device='cpu', progress=False)
    first, again, other = (task.drawn for task in tasks)
    assert len(set(first)) == 4 and first == again and not set(first) & set(other)


def test_the_throughput_in_the_log_is_that_since_the_last_row(tmp_path):
    train(Line(), LINE | dict(steps=40, log_every=4), tmp_path/'run', device='cpu', progress=False)
    seconds, rates = (losses(tmp_path/'run', name).double() for name in ('seconds', 'examples_per_second'))
    torch.testing.assert_close(rates*seconds.diff(prepend=torch.zeros(1)), torch.full((10,), 4.*LINE['batch_size']).double(), atol=0, rtol=1e-2)


def test_the_log_of_a_run_that_goes_on_is_the_undisturbed_one(tmp_path):
    "A row is the mean of all its steps, those before the interruption too."
    class Interrupted(Line):
        def loss(self, model, batch):
            if self.steps == 16: raise KeyboardInterrupt
            return super().loss(model, batch)

    train(Line(), LINE, tmp_path/'whole', device='cpu', progress=False)
    with pytest.raises(KeyboardInterrupt): train(Interrupted(), LINE, tmp_path/'stopped', device='cpu', progress=False)
    assert torch.load(tmp_path/'stopped/checkpoint.pt', weights_only=True)['step'] == 16
    train(Line(), LINE, tmp_path/'stopped', device='cpu', progress=False)
    for name in ('loss', 'gradient_norm'): torch.testing.assert_close(losses(tmp_path/'stopped', name), losses(tmp_path/'whole', name), atol=0, rtol=2e-5)


@pytest.mark.parametrize('factor, words', [(float('nan'), 'the loss is nan'), (float('inf'), 'the loss is inf'), (1e6, 'the loss rose from')])
def test_exploding_loss_spares_the_checkpoint(tmp_path, factor, words):
    with pytest.raises(FloatingPointError, match=f'{words}.*at step 17: lower the learning rate; the last good state is .*checkpoint.pt'):
        train(Line(17, factor), LINE | {'log_every': 1}, tmp_path, device='cpu', progress=False)
    state = torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    assert state['step'] == 16 and all(v.isfinite().all() for v in state['model'].values())


def test_full_disk_spares_the_checkpoint(tmp_path):
    class Padded(Line):
        def __init__(self): super().__init__(); self.model.padding = nn.Parameter(torch.zeros(100_000))
    train(Padded(), LINE | {'steps': 5}, tmp_path, device='cpu', progress=False)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'could not be written to at step 6 .*: make room and start again; .*checkpoint.pt is intact'):
            train(Padded(), LINE | {'steps': 10}, tmp_path, device='cpu', progress=False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path/'checkpoint.pt').read_bytes() == before
    assert not list(tmp_path.glob('.checkpoint*')), 'half a checkpoint was left behind'


def test_sigterm_while_the_log_is_written(tmp_path, monkeypatch):
    write = Log.write
    def disturbed(self, step, **values):
        write(self, step, **values)
        if step == 4: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Log, 'write', disturbed)
    with pytest.raises(SystemExit) as e: train(Line(), LINE | {'log_every': 1, 'save_minutes': 60.}, tmp_path, device='cpu', progress=False)
    assert e.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 5


def test_a_loss_may_be_negative(tmp_path):
    class Likelihood(Line):
        def loss(self, model, batch): return {'loss': super().loss(model, batch)['loss'] - 1}
    train(Likelihood(), LINE, tmp_path, device='cpu', progress=False)
    assert losses(tmp_path).min() < 0


@pytest.mark.parametrize('hours', [-1, 0, float('nan'), float('inf')])
def test_no_time_is_told_before_anything_is_written(hours, tmp_path):
    with pytest.raises(ValueError, match=f'hours is {hours}'): train(Line(), LINE, tmp_path/'run', hours=hours, device='cpu', progress=False)
    assert not (tmp_path/'run').exists()


def test_what_went_wrong_is_told_though_the_log_cannot_be_closed(tmp_path, monkeypatch):
    def full(_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter.close', full)
    with pytest.raises(FloatingPointError, match='the loss is nan'): train(Line(bad_at=15, factor=float('nan')), LINE, tmp_path, device='cpu', progress=False)


def test_a_training_leaves_no_thread_behind(tmp_path):
    train(Line(), LINE, tmp_path/'first', device='cpu', progress=False)  # what is started once may stay
    before = threading.active_count()
    for i in range(2): train(Line(), LINE, tmp_path/str(i), device='cpu', progress=False)
    assert threading.active_count() <= before


def test_a_run_that_goes_on_remembers_how_low_its_loss_was(tmp_path):
    class Worse(Line):
        def loss(self, model, batch): return {'loss': 1e6*super().loss(model, batch)['loss']}
    train(Line(), LINE | {'steps': 20}, tmp_path, device='cpu', progress=False)
    with pytest.raises(FloatingPointError, match='the loss rose from'): train(Worse(), LINE, tmp_path, device='cpu', progress=False)


def test_ctrl_c_leaves_a_checkpoint(tmp_path, monkeypatch, capsys):
    "The first one is heard after the step, and what was done is kept; whoever cannot wait asks twice."
    class Interrupted(Line):
        def loss(self, model, batch):
            for _ in range(times if self.steps == 16 else 0): signal.raise_signal(signal.SIGINT)
            return super().loss(model, batch)

    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background
    for times, step in ((1, 17), (2, None)):
        out = tmp_path/str(times)
        with pytest.raises(KeyboardInterrupt): train(Interrupted(), LINE | {'save_minutes': 60.}, out, device='cpu', progress=False)
        assert (torch.load(out/'checkpoint.pt', weights_only=True)['step'] if step else None) == step and (out/'checkpoint.pt').exists() == bool(step)
    assert 'saved at step 17' in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize('number, error', [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize('during', ['samples', 'exchange'])
def test_a_signal_does_not_wait_for_samples(tmp_path, number, error, during):
    "They are drawn after a checkpoint. The averaged weights go back in whole, also if it comes while they do."
    class Network(nn.Linear):
        def train(self, mode=True):
            if mode and drawn and during == 'exchange': signal.raise_signal(number)
            return super().train(mode)

    class Draws(Line):
        def __init__(self):
            super().__init__()
            self.model.__class__ = Network
        def samples(self, model):
            drawn.append(True)
            if during == 'exchange': return None
            signal.raise_signal(number)
            raise AssertionError('it went on')

    drawn, task, config = [], Draws(), LINE | {'save_minutes': 60., 'sample_every': 5, 'ema': 0.9}
    with pytest.raises(error): train(task, config, tmp_path, device='cpu', progress=False)
    state = torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    assert state['step'] == 5 and all(torch.equal(v, state['model'][k]) for k, v in task.model.state_dict().items())
    assert torch.is_grad_enabled() and len(drawn) == 1
    train(Line(), config, tmp_path, device='cpu', progress=False)
    train(Line(), config, tmp_path/'whole', device='cpu', progress=False)
    torch.testing.assert_close(losses(tmp_path), losses(tmp_path/'whole'), atol=0, rtol=0)


def test_one_training_at_a_time_in_a_folder(tmp_path):
    class Second(Line):
        def loss(self, model, batch):
            if self.steps == 3:
                with pytest.raises(ValueError, match='another process trains in .*: wait until it has ended, or name another folder'):
                    train(Line(), LINE, tmp_path, device='cpu', progress=False)
            return super().loss(model, batch)

    train(Second(), LINE | {'steps': 5}, tmp_path, device='cpu', progress=False)
    train(Line(), LINE, tmp_path, device='cpu', progress=False)


def test_a_finished_training_says_so(tmp_path, capsys):
    for _ in range(2): train(Line(), LINE | {'steps': 5}, tmp_path, device='cpu', progress=False)
    assert capsys.readouterr().out.count('has used up what it was given (5 steps in 0.00 hours): nothing is left to train') == 1


@pytest.mark.parametrize('key, value, words', [('steps', 0, 'more than 0'), ('log_every', 0, 'more than 0'), ('clip_norm', 0., 'more than 0'), ('ema', 1.5, 'from 0'), ('keep_best', 'val', 'use one of'),
                         ('micro_batch', '8', 'a whole number'), ('steps', 2.5, 'a whole number'), ('betas', [0.9], 'two numbers'), ('compile', 1, 'true or false'), ('learning_rate', '1e-3', 'a number'), ('cpu', 5, 'a section')])
def test_settings_that_make_no_sense(tmp_path, key, value, words):
    class Validated(Line):
        def validate(self, model): return {'validation_loss': 1.}
    with pytest.raises(ValueError, match=f'{key} is .*{words}'): train(Validated(), LINE | {key: value}, tmp_path, device='cpu', progress=False)


def test_pieces_of_a_batch_add_up(tmp_path):
    for name, config in (('whole', {}), ('pieces', dict(micro_batch=4))): train(Line(), LINE | config | {'log_every': 1}, tmp_path/name, device='cpu', progress=False)
    torch.testing.assert_close(losses(tmp_path/'pieces'), losses(tmp_path/'whole'), atol=1e-5, rtol=0)


def test_muon_goes_on_exactly(tmp_path):
    class Wide(Line):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    config = LINE | {'optimizer': 'muon', 'decay': 'constant', 'log_every': 1, 'ema': 0.9}
    for name, stops in (('whole', [40]), ('stopped', [17, 40])):
        for steps in stops: train(Wide(), config | {'steps': steps}, tmp_path/name, device='cpu', progress=False)
    assert (tmp_path/'stopped/weights.safetensors').read_bytes() == (tmp_path/'whole/weights.safetensors').read_bytes()
    assert losses(tmp_path/'whole')[-5:].mean() < 0.2*losses(tmp_path/'whole')[:5].mean()


def test_muon_trains_in_two_processes_as_in_one(folder):
    for world in (1, 2): assert finish(start(folder/f'muon{world}', world, optimizer='muon')) == [0]*world
    torch.testing.assert_close(losses(folder/'muon2'), losses(folder/'muon1'), atol=1e-4, rtol=0)
    check_weights(folder/'muon2', CONFIG['steps'])


def test_compiled_run_has_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Module, 'compile', lambda self: setattr(self, '_compiled_call_impl', torch.compile(self._call_impl, backend='eager')))
    monkeypatch.setattr('t2i.train.compiles', lambda device: True)  # the real one needs a C++ compiler
    task = Line()
    names = set(task.model.state_dict())
    assert set(load_weights(train(task, LINE | {'compile': True}, tmp_path, device='cpu', progress=False))[0]) == names
    assert task.model._compiled_call_impl is not None


@pytest.mark.parametrize('config, words', [
    (dict(micro_batch=5), 'set micro_batch to a divisor of 16'), (dict(learning_rat=1.), "a training has no setting 'learning_rat': use .*learning_rate"), (dict(cpu=dict(steps_=1)), "no setting 'steps_'"), (dict(optimizer='sgd'), "unknown optimizer 'sgd': use 'adam', 'adamw' or 'muon'"), (dict(optimizer='muon', fsdp=True), 'muon needs whole matrices'), (dict(optimizer='muon', weight_decay=0.1), 'muon knows no weight decay'), (dict(decay='step'), "use 'linear', 'cosine' or 'constant'")])
def test_bad_settings(tmp_path, config, words):
    with pytest.raises(ValueError, match=words): train(Line(), LINE | config, tmp_path, device='cpu', progress=False)


def test_contrastive_loss_is_not_cut(tmp_path):
    class Contrast(Line): contrastive = True
    with pytest.raises(ValueError, match='the loss of Contrast compares all examples of a batch'): train(Contrast(), LINE | {'micro_batch': 8}, tmp_path, device='cpu', progress=False)


def test_batches_ahead_are_those_that_are_asked_for(tmp_path):
    "Threads that work ahead for a GPU draw what the loop would draw itself, from any step on."
    def taken(ahead, first, n=7):
        run = _Run(Line(), TrainConfig(**LINE | {'micro_batch': 4}), tmp_path, 0, 'cpu', None, None, False)
        run.step = first
        batches = run.batches(ahead)
        found = [next(batches) for _ in range(n)]
        batches.close()
        return found
    for first in (0, 5):
        for (pieces, seed), (others, other_seed) in zip(taken(0, first), taken(3, first)):
            assert seed == other_seed and len(pieces) == len(others) == 4
            for a, b in zip(pieces, others): torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_what_a_batch_ahead_raises_is_raised(tmp_path):
    class Broken(Line):
        def batch(self, indices, generators): raise ValueError('the third shard is broken')
    with pytest.raises(ValueError, match='the third shard is broken'): next(_Run(Broken(), LINE, tmp_path, 0, 'cpu', None, None, False).batches(2))


def test_a_shorter_decay_stays_at_its_end(tmp_path):
    train(Line(), LINE | dict(steps=8, decay_steps=4, log_every=1), tmp_path, device='cpu', progress=False)
    assert losses(tmp_path, 'learning_rate').tolist()[4:] == [0]*4


def test_patience_without_a_number_to_wait_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match='patience is 2 .* set keep_best'): train(Line(), LINE | {'patience': 2}, tmp_path/'run', device='cpu', progress=False)
    assert not (tmp_path/'run').exists()


class Judged(Line):
    "Held-out numbers that are best at the start."
    def validate(self, model): return {'validation_loss': float(self.steps)}


def test_a_training_that_stops_early_is_over(tmp_path, capsys):
    "Its checkpoint says so: the same command trains no second time, and the best weights stay."
    early = LINE | dict(validate_every=5, keep_best='validation_loss', patience=2, save_minutes=60.)
    best = train(Judged(), early, tmp_path, device='cpu', progress=False).read_bytes()
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 15
    assert train(Judged(), early, tmp_path, device='cpu', progress=False).read_bytes() == best
    told = capsys.readouterr().out
    assert 'stopped early (15 steps), after 2 validations without a better one: nothing is left to train; raise patience' in told and 'give more' not in told


def test_a_training_without_a_best_has_weights(tmp_path):
    "Those it has come to; the path that is returned exists."
    class Lost(Line):
        def validate(self, model): return {'validation_loss': math.nan}
    assert load_weights(train(Lost(), LINE | dict(steps=3, keep_best='validation_loss'), tmp_path, device='cpu', progress=False))[1]['step'] == 3


def test_the_best_on_other_examples_is_no_measure(tmp_path):
    "After pictures were added, an old score is not waited for, and the weights that saw them are kept."
    early = LINE | dict(validate_every=5, keep_best='validation_loss', patience=2, save_minutes=60.)
    train(Judged(), early, tmp_path, device='cpu', progress=False)
    before = load_weights(tmp_path/'weights.safetensors')[1]['step']
    class Others(Judged):
        def held_out_examples(self): return 'others'
    train(Others(), early, tmp_path, device='cpu', progress=False)
    assert (before, load_weights(tmp_path/'weights.safetensors')[1]['step']) == (5, 20)


def test_seeds_of_numpy(tmp_path):
    for seed in (np.int64(3), np.uint64(3)): assert train(Line(), LINE, tmp_path/type(seed).__name__, seed=seed, device='cpu', progress=False).read_bytes() == train(Line(), LINE, tmp_path/'three', seed=3, device='cpu', progress=False).read_bytes()


def test_validation_may_be_more_frequent_than_the_log(tmp_path):
    often = LINE | dict(validate_every=3, save_minutes=60.)
    class Stopped(Judged):
        def loss(self, model, batch):
            if self.steps == 7: signal.raise_signal(signal.SIGTERM)
            return super().loss(model, batch)
    with pytest.raises(SystemExit): train(Stopped(), often, tmp_path, device='cpu', progress=False)
    train(Judged(), often, tmp_path, device='cpu', progress=False)
    assert len(losses(tmp_path)) == 4 and len(losses(tmp_path, 'validation_loss')) == 14


def test_the_last_weights_are_there_when_the_last_checkpoint_is(tmp_path, monkeypatch):
    def full(path): raise OSError(28, 'No space left on device')
    save = _Run.save_weights
    monkeypatch.setattr(_Run, 'save_weights', lambda self, tensors: full(self.out) if self.step == 8 else save(self, tensors))
    with pytest.raises(OSError): train(Line(), LINE | {'steps': 8, 'save_minutes': 60.}, tmp_path, device='cpu', progress=False)
    monkeypatch.undo()
    assert load_weights(train(Line(), LINE | {'steps': 8}, tmp_path, device='cpu', progress=False))[1]['step'] == 8


def test_what_another_process_has_just_trained_is_not_overwritten(tmp_path):
    late = _Run(Line(), LINE, tmp_path, 0, 'cpu', None, None, False)
    train(Line(), LINE, tmp_path, device='cpu', progress=False)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    with pytest.raises(ValueError, match='another process has just trained in .*: start again'): late.run()
    assert (tmp_path/'checkpoint.pt').read_bytes() == before


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_): raise OSError(38, 'Function not implemented')
    monkeypatch.setattr('t2i.train.fcntl.flock', flock)
    assert train(Line(), LINE | {'steps': 2}, tmp_path, device='cpu', progress=False).exists()


def test_windows_has_locks_of_its_own(tmp_path, monkeypatch):
    locked = set()
    def locking(descriptor, mode, n):
        name = os.readlink(f'/proc/self/fd/{descriptor}')
        if name in locked: raise PermissionError(13, 'Permission denied')
        locked.add(name)
    monkeypatch.setattr('t2i.train.fcntl', None)
    monkeypatch.setitem(sys.modules, 'msvcrt', SimpleNamespace(locking=locking, LK_NBLCK=2))
    with _Run(Line(), LINE, tmp_path, 0, 'cpu', None, None, False).alone(), pytest.raises(ValueError, match='another process trains in'):
        train(Line(), LINE, tmp_path, device='cpu', progress=False)
    locked.clear()
    assert train(Line(), LINE | {'steps': 2}, tmp_path, device='cpu', progress=False).exists()


def test_a_driver_that_does_not_say_how_busy_it_is(tmp_path, monkeypatch):
    def utilization(device): raise RuntimeError('NVML: Not Supported')
    monkeypatch.setattr(torch.cuda, 'utilization', utilization)
    run = _Run(Line(), LINE, tmp_path, 0, 'cpu', None, None, False)
    run.accelerator = SimpleNamespace(device=torch.device('cuda'))
    assert math.isnan(run.utilisation())


def test_a_process_stays_on_one_kind_of_device(tmp_path, monkeypatch):
    monkeypatch.setattr('t2i.train.process_state', lambda device: SimpleNamespace(device=torch.device('cuda')))
    with pytest.raises(ValueError, match='works on cuda already and cannot train on cpu too'): train(Line(), LINE, tmp_path, device='cpu', progress=False)


class Flat(Task):
    "Two numbers and a target for them, without noise."
    target, cannot_draw, no_memory = 'x0', False, False

    def __init__(self, **settings):
        self.model = nn.Linear(2, 1)
        for k, v in settings.items(): setattr(self, k, v)

    def __len__(self): return 64
    def batch(self, indices, generators): return [torch.stack([indices/64., 1 - indices/64.], 1)]
    def loss(self, model, batch):
        if self.no_memory: raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nSee PYTORCH_CUDA_ALLOC_CONF.')
        return {'loss': (model(batch[0]) - 1).square().mean()}
    def samples(self, model):
        if self.cannot_draw: raise RuntimeError('no picture')
    def metadata(self): return {'target': self.target}


SHORT = dict(batch_size=8, steps=20, learning_rate=1e-2, warmup=1)


def flat(out, config=SHORT, initial=None, **settings): return train(Flat(**settings), config, out, device='cpu', initial=initial, progress=False)


def test_a_training_that_goes_on_takes_the_presets_settings_of_now(tmp_path):
    flat(tmp_path)
    flat(tmp_path, SHORT | {'optimizer': 'adam', 'steps': 21, 'betas': (0.5, 0.9), 'weight_decay': 0.25})
    group, = torch.load(tmp_path/'checkpoint.pt', weights_only=True)['optimizer']['param_groups']
    assert tuple(group['betas']) == (0.5, 0.9) and group['weight_decay'] == 0.25


def test_a_training_that_cannot_draw_is_saved(tmp_path):
    with pytest.raises(RuntimeError, match='no picture'): flat(tmp_path, cannot_draw=True)
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 20 and (tmp_path/'weights.safetensors').exists()


def test_a_checkpoint_of_another_target(tmp_path):
    flat(tmp_path)
    with pytest.raises(ValueError, match="trained with the target 'x0', and the preset's is 'eps'"): flat(tmp_path, SHORT | {'steps': 30}, target='eps')
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 20


@pytest.mark.parametrize('contrastive, key', [(False, 'micro_batch'), (True, 'batch_size')])
def test_a_training_step_too_large_for_the_gpu(tmp_path, contrastive, key):
    with pytest.raises(torch.cuda.OutOfMemoryError, match=f'a training step with 8 examples at once: set {key} below 8'): flat(tmp_path, no_memory=True, contrastive=contrastive)
    with pytest.raises(torch.cuda.OutOfMemoryError, match='with 1 example at once: set gradient_checkpointing'): flat(tmp_path, SHORT | {'batch_size': 1}, no_memory=True, contrastive=contrastive)


def test_an_optimizer_too_large_for_the_gpu(tmp_path, monkeypatch):
    def step(self): raise torch.cuda.OutOfMemoryError('CUDA out of memory.')
    monkeypatch.setattr('torch.optim.Adam.step', step)
    with pytest.raises(torch.cuda.OutOfMemoryError, match='a training step with 8 examples at once'): flat(tmp_path)


def test_energy_is_asked_of_the_gpus_that_train(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr('t2i.train._Run.gpus', lambda self: ['7'])
    monkeypatch.setattr('t2i.train.Energy', lambda gpus=None: asked.append(gpus) or Energy())
    flat(tmp_path)
    assert asked == [['7']]


def test_weights_of_another_target_are_no_start(tmp_path):
    flat(tmp_path/'x0')
    with pytest.raises(ValueError, match=r"weights.safetensors is of a network that was trained with the target 'x0', and the preset's is 'eps'"): flat(tmp_path/'eps', target='eps', initial=tmp_path/'x0/weights.safetensors')


def test_a_decoder_says_what_it_predicts(tmp_path):
    prepared(tmp_path)
    assert DecoderTask(PRESET, tmp_path/'prepared').metadata()['target'] == PRESET.diffusion.target == 'v'
    with pytest.raises(ValueError, match="no 'thresholding'"): DecoderTask(Preset.nest({**PRESET, 'sampling': {k: v for k, v in PRESET.sampling.items() if k != 'thresholding'}}), tmp_path/'prepared')  # not after hours


def test_a_task_is_told_what_trains_it(tmp_path):
    task = Line()
    task.gpu = True
    _Run(task, LINE, tmp_path, 0, 'cpu', None, None, False)
    assert task.gpu is False


def test_the_thesis_mirrors_half_of_its_pictures(tmp_path):
    "And their embeddings stay."
    prepared(tmp_path)
    def batch(mirror):
        task = DecoderTask(Preset.nest({**PRESET, 'decoder': PRESET.decoder | {'mirror': mirror}}), tmp_path/'prepared')
        return task.batch(torch.arange(64) % len(task), make_generators(0, 64))[:2]
    (plain, y), (half, y_half), (all_, y_all) = map(batch, (0., load_preset('thesis').decoder.mirror, 1.))
    assert torch.equal(all_, plain.flip(2)) and torch.equal(y, y_half) and torch.equal(y, y_all)
    mirrored = (half == all_).flatten(1).all(1)
    assert 20 < mirrored.sum() < 44 and torch.equal(half[~mirrored], plain[~mirrored])


def test_without_a_compiler_training_goes_on(tmp_path, monkeypatch):
    "A warning says why."
    def compile(function, **options):
        def run(*arguments): raise error
        return run
    monkeypatch.setattr('torch.compile', compile)
    error = AssertionError()
    with pytest.warns(UserWarning, match=r'\(AssertionError\).*not compiled'): assert not compiles('cpu')
    error = RuntimeError('No working C++ compiler found\nSee the documentation.')
    with pytest.warns(UserWarning, match=r'\(No working C.. compiler found\).*not compiled'): flat(tmp_path, SHORT | {'compile': True})
    assert len(losses(tmp_path, 'loss')) and (tmp_path/'weights.safetensors').exists()


def test_the_translator_is_validated_on_ten_thousand_pairs_that_are_read_once(tmp_path, monkeypatch):
    "Spread over all of them, the last ones too."
    n, reads = 25_000, []
    prepared(tmp_path)
    place = torch.arange(n)[:, None].expand(n, 8)/n
    save_weights(tmp_path/'prepared/validation/00000.safetensors', {'images': torch.zeros(n, 16, 16, 3, dtype=torch.uint8), 'image_embeddings': place.half(), 'text_embeddings': place[:, None].half()}, {'keys': []})
    task = TranslatorTask(PRESET, tmp_path/'prepared')
    monkeypatch.setattr(task.held_out, '_gather', lambda name, indices, gather=task.held_out._gather: reads.append(name) or gather(name, indices))
    first, second = task.validate(task.model), task.validate(task.model)
    assert first == second and sorted(reads) == ['image_embeddings', 'text_embeddings']
    _, images = task.held_out_pairs
    assert images.shape == (10_000, 8) and abs(images.mean() - 0.5) < 0.01 and images.max() > 0.99


def test_fsdp_of_an_older_torch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('torch.__version__', torch.torch_version.TorchVersion('2.8.0'))
    with pytest.raises(ValueError, match='with torch 2.8.0, fsdp trains with other losses'): flat(tmp_path, SHORT | {'fsdp': True})


def test_embeddings_of_changed_pictures_are_standardised(tmp_path):
    folder, raw, told = prepared(tmp_path), torch.randn(4, 8), []
    Statistics(Standardizer(torch.full((8,), 3.), torch.full((8,), 2.))).save(folder/'statistics.safetensors')
    preset = Preset.nest(PRESET | {'decoder': PRESET.decoder | {'augment': 1., 'drop': 0.}})
    task = DecoderTask(preset, folder, clip=SimpleNamespace(encode_pixels=lambda x: raw))
    def network(x, t, y, augmentation): told.append(y); return task.model(x, t, y, augmentation)
    task.loss(network, task.batch(torch.arange(4), make_generators(0, 4)))
    torch.testing.assert_close(told[0], (raw - 3)/2)


def test_the_translator_learns_from_every_caption(tmp_path):
    task = TranslatorTask(PRESET, prepared(tmp_path))
    drawn, *_ = task.batch(torch.zeros(40, dtype=torch.long), make_generators(0, 40))
    assert all(10 < (drawn == each).all(1).sum() < 30 for each in task.data.text_embeddings([0])[0])


@pytest.mark.parametrize('training', [False, True])
def test_validation_leaves_the_mode_as_it_was(training):
    model = make_translator(PRESET).train(training)
    translator_validation(model, torch.randn(4, 8), torch.randn(4, 8))
    assert model.training == training


def test_the_average_of_a_short_run_forgets_its_start():
    assert [ema_rate(0.9999, step) for step in (0, 90)] == [1/10, 91/100] and ema_rate(0.9999, 10**6) == 0.9999


def test_changes_of_pictures_go_both_ways():
    some = draw_augmentation(1., make_generators(0, 4000))[:, 1:]
    assert abs((some > 0).float().mean(0) - (some < 0).float().mean(0)).max() < 0.05


def test_validation_is_a_mean_over_pictures_and_not_over_batches(tmp_path):
    task = DecoderTask(PRESET, prepared(tmp_path))
    assert 0.5 < task.validate(task.model.eval())['validation_simple'] < 2  # of six; a fresh network says zero, and is off by the noise


def test_a_changed_picture_keeps_the_embedding_that_it_was_told(tmp_path):
    preset, seen = Preset.nest(PRESET | {'decoder': PRESET.decoder | {'augment': 1., 'drop': 0.}}), []
    task = DecoderTask(preset, prepared(tmp_path), clip=SimpleNamespace(encode_pixels=lambda x: torch.zeros(4, 8)))
    images, y, own, _, *rest = task.batch(torch.arange(4), make_generators(0, 4))
    def network(x, t, y, augmentation):
        seen.append(y)
        return task.model(x, t, y, augmentation)
    task.loss(network, (images, y, own, torch.tensor([True, False, True, False]), *rest))
    assert torch.equal(seen[0][::2], y[::2]) and not seen[0][1::2].any()


def test_gradients_are_clipped(tmp_path):
    before = torch.cat([p.detach().flatten() for p in Line().model.parameters()])
    after, _ = load_weights(train(Line(), LINE | {'clip_norm': 1e-12}, tmp_path, device='cpu', progress=False))
    assert (torch.cat([after['weight'].flatten(), after['bias']]) - before).abs().max() < 1e-3  # far below Adam's ε


def test_a_checkpoint_is_written_every_few_minutes(tmp_path):
    class Slow(Line):
        def loss(self, model, batch):
            time.sleep(0.02)
            if self.steps == 30: raise KeyboardInterrupt
            return super().loss(model, batch)
    with pytest.raises(KeyboardInterrupt): train(Slow(), LINE | {'save_minutes': 0.1/60, 'log_every': 100}, tmp_path, device='cpu', progress=False)
    assert 1 <= torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] <= 30


def test_a_plateau_is_no_improvement(tmp_path):
    class Constant(Line):
        def validate(self, model): return {'validation_loss': 1.}
    train(Constant(), LINE | dict(validate_every=5, keep_best='validation_loss', patience=2), tmp_path, device='cpu', progress=False)
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 15


def test_the_optimizer_has_the_settings_of_its_stage_from_the_first_step_on(tmp_path):
    flat(tmp_path, SHORT | {'betas': (0.5, 0.9), 'weight_decay': 0.25, 'optimizer': 'adamw'})
    group, = torch.load(tmp_path/'checkpoint.pt', weights_only=True)['optimizer']['param_groups']
    assert tuple(group['betas']) == (0.5, 0.9) and group['weight_decay'] == 0.25


@pytest.mark.parametrize('stage', ['decoder', 'all'])
def test_a_stage_alone_gets_all_of_the_time(stage, monkeypatch, tmp_path):
    hours = {}
    monkeypatch.setattr('t2i.cli.train_stage', lambda stage, preset, runs, given, *_: hours.update({stage: given}) or runs)
    assert shell('train', stage, '--preset', 'smoke', '--hours', 1, '--device', 'cpu', '--out', tmp_path/'run').exit_code == 0
    assert sum(hours.values()) == pytest.approx(1) and (stage == 'all' or hours == {'decoder': 1})


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path):
    folder = tmp_path/'.weights.safetensors.ab.safetensors.cd'
    folder.mkdir()
    left = [tmp_path/'.checkpoint.pt.ab.pt', tmp_path/'.weights.safetensors.ab.safetensors', folder/'whole', tmp_path/'.log.csv.ab.csv']
    for path in left: path.touch()
    flat(tmp_path, SHORT)
    assert not any(path.exists() for path in [*left, folder])


def test_the_seed_of_a_validation_draws_its_dropout_masks():
    model, pairs = Translator(8, width=8, layers=2, dropout=0.5), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    first, second = (translator_validation(model, *pairs, seed=seed) for seed in (0, 1))
    assert first['validation_loss_dropout'] != second['validation_loss_dropout'] and first['validation_loss'] == second['validation_loss']
