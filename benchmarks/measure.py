"""How every benchmark measures: alternating runs, medians, peak memory, fitted exponents, and on which machine."""
import ctypes, math, os, platform, re, statistics, subprocess, time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from t2i.core import uses_bfloat16

RESULTS, REPOSITORY = Path(__file__).parent/'results', Path(__file__).parents[1]


def synchronize(device):
    if torch.device(device).type == 'cuda': torch.cuda.synchronize(device)


def alternate(
    candidates: dict,  # name → function without arguments
    device,
    seconds: float,  # at least this long in all …
    rounds: int = 3,  # … and at least so many runs of each
    warm_up: bool = True,  # a first run of each is not counted
) -> dict:  # name → seconds of every run
    "Run the candidates in turn, so that whatever else the machine does meets them alike."
    times = {name: [] for name in candidates}
    for run in candidates.values():
        if warm_up: run()
    synchronize(device)
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def compare(times: dict, of: str, amount: float = 1) -> dict:
    """Median seconds for one of `amount`, their quartiles, and how many times faster `of` is: the median of the rounds' ratios."""
    table = {}
    for name, all_runs in times.items():
        runs = [t/amount for t in all_runs]
        low, middle, high = statistics.quantiles(runs, n=4) if len(runs) > 1 else runs*3
        table[name] = {'seconds': middle, 'quartiles': [low, high], 'runs': runs}
    for name, row in table.items(): row['ratio'] = statistics.median(t/o for t, o in zip(row['runs'], table[of]['runs']))
    return table


def fitted_exponent(sizes, values) -> float:
    "The slope of log(value) against log(size): 1 is proportional, 0 constant."
    x, y = ([math.log(v) for v in values] for values in (sizes, values))
    return statistics.linear_regression(x, y).slope


class peak_memory:
    "Around a piece of work: `.bytes` is how far it raised the process's memory (of a GPU: what was allocated at most)."
    def __init__(self, device): self.device, self.cuda = device, torch.device(device).type == 'cuda'

    def __enter__(self):
        if self.cuda: torch.cuda.reset_peak_memory_stats(self.device)
        else:
            if (trim := getattr(ctypes.CDLL(None), 'malloc_trim', None)): trim(0)  # what was freed goes back to the system …
            Path('/proc/self/clear_refs').write_text('5')  # … and the high-water mark falls to what is resident now
        self.before = self.read('VmRSS')
        return self

    def __exit__(self, *_): self.bytes = self.read('VmHWM') - self.before

    def read(self, key) -> int:
        if self.cuda: return torch.cuda.max_memory_allocated(self.device) if key == 'VmHWM' else torch.cuda.memory_allocated(self.device)
        return 1024*int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def matmul_rate(device, dtype=torch.float32, seconds: float = 1.) -> float:
    "FLOP/s of a product of square matrices: what everything else is compared to."
    n = 8192 if torch.device(device).type == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2*n**3/statistics.median(alternate({'matmul': lambda: a@b}, device, seconds)['matmul'])


def copy_rate(device, seconds: float = 0.5) -> float:
    "Bytes per second, read and written, of copying an array that no cache holds."
    source = torch.ones(2**28 if torch.device(device).type == 'cuda' else 2**25, device=device)
    target = torch.empty_like(source)
    return 2*source.nbytes/statistics.median(alternate({'copy': lambda: target.copy_(source)}, device, seconds)['copy'])


def processor() -> str:
    return next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if 'model name' in line), platform.processor())


def _version(package):
    try: return version(package)
    except PackageNotFoundError: return None


def _git(*arguments):
    try: done = subprocess.run(['git', *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError: return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(device='cpu') -> dict:
    "Hardware, versions and commit."
    flags = next((line.split(':')[1].split() for line in open('/proc/cpuinfo') if line.startswith('flags')), [])
    memory = int(re.search(r'MemTotal:\s+(\d+)', Path('/proc/meminfo').read_text())[1])
    found = {'device': str(device), 'processor': processor(), 'cores': len(os.sched_getaffinity(0)), 'threads': torch.get_num_threads(), 'memory': 1024*memory,
             'instructions': [f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f in flags], 'load': os.getloadavg()[0],
             'versions': {'python': platform.python_version(), 'torch': torch.__version__, **{p: _version(p) for p in ('diffusers', 'open_clip_torch', 'numpy', 'pillow', 't2i')}},
             'commit': _git('rev-parse', 'HEAD'), 'changed_files': len((_git('status', '--porcelain', '--untracked-files=no') or '').splitlines()),
             'when': time.strftime('%Y-%m-%d %H:%M')}
    if torch.device(device).type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        found |= {'gpu': properties.name, 'gpu_memory': properties.total_memory, 'cuda': torch.version.cuda}
    return found


def machine_name(device) -> str:
    "A name for the file of the results: the GPU's, or the processor's with its number of cores and what they compute in, if not float32."
    what = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else f'{processor()} {len(os.sched_getaffinity(0))} cores{" bfloat16"*uses_bfloat16(device)}'
    return re.sub(r'[^a-z0-9]+', '-', what.lower()).strip('-')
