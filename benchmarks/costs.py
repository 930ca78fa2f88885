"""Where the time of one pass goes: operations and bytes on paper, what was measured, and the gap."""
import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from measure import copy_rate, matmul_rate

SYNCHRONISING = {'cpu': ('aten::_local_scalar_dense', 'aten::nonzero'), 'cuda': ('cudaStreamSynchronize', 'cudaEventSynchronize', 'cudaDeviceSynchronize')}  # on a GPU the former end in the latter
_MOVE_NOTHING = {'view', '_unsafe_view', 'reshape', 'expand', 'permute', 'transpose', 't', 'slice', 'select', 'unbind', 'split', 'squeeze', 'unsqueeze', 'detach', 'as_strided', 'alias', 'unfold', 'empty'}


class _Bytes(TorchDispatchMode):
    "Adds up what every operation reads and writes."
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name.removeprefix('aten::') not in _MOVE_NOTHING:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


def on_paper(model, n: int, training: bool = False) -> dict:
    "Operations of the products, and bytes if every operation fetched its operands from memory, of one pass with n images; counted without a device."
    model = copy.deepcopy(model).to('meta').train(training)
    x, t, y = torch.zeros(n, 3, model.image_size, model.image_size), torch.zeros(n, dtype=torch.long), torch.zeros(n, model.embedding_size)
    with FlopCounterMode(display=False) as flop, _Bytes() as memory, torch.set_grad_enabled(training):
        output = model(*(v.to('meta') for v in (x, t, y)))
        if training: output.square().mean().backward()
    return {'flop': flop.get_total_flops(), 'bytes': memory.bytes, 'weights': sum(p.nbytes for p in model.parameters())}


def profiled(work, device, top: int = 12) -> dict:
    "The share of each operation in the time of `work`, largest first."
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA]*(torch.device(device).type == 'cuda')
    work()
    with torch.profiler.profile(activities=activities) as profile:
        work()
        if torch.device(device).type == 'cuda': torch.cuda.synchronize(device)
    gpu = torch.device(device).type == 'cuda'
    events = [e for e in profile.key_averages() if not gpu or e.device_type == torch.autograd.DeviceType.CPU]  # operations, with the time of their kernels, which have rows of their own besides
    time = (lambda e: e.self_device_time_total) if gpu else (lambda e: e.self_cpu_time_total)
    total = sum(map(time, events))
    return {e.key: time(e)/total for e in sorted(events, key=time, reverse=True)[:top]}


def host_waits(sampler_steps, device) -> int:
    "How often the host waited for the device inside a sampling loop, counted by the profiler from the second step to the last but one."
    steps = iter(sampler_steps)
    next(steps)
    with torch.profiler.profile() as profile:
        for step in steps:
            if step.t == 1: break
    return sum(e.count for e in profile.key_averages() if e.key in SYNCHRONISING[torch.device(device).type])


def gap(model, n: int, seconds: float, device, dtype, training: bool = False) -> dict:
    "Measured seconds of a pass beside the least that its operations, or its bytes, would take at this machine's measured rates."
    paper, rate, bandwidth = on_paper(model, n, training), matmul_rate(device, dtype, 0.5), copy_rate(device)
    return {**paper, 'images': n, 'seconds': seconds, 'matmul_rate': rate, 'copy_rate': bandwidth, 'seconds_for_flop': paper['flop']/rate,
            'seconds_for_bytes': paper['bytes']/bandwidth, 'share_of_matmul_rate': paper['flop']/seconds/rate}
