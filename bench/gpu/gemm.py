"""Checks and times the kernel of kernels/cuda/gemm.cu on a Hopper GPU against float64 and cuBLAS (torch).

gemm.py FOLDER check|singles|sets|ops ...: FOLDER has gemm.cu and gemm.json, which gemm.ts writes. Variables: SEED of
the inputs, SMALL for a check of small shapes only (under compute-sanitizer), CUBIN=1 for a gemm.cubin made elsewhere,
ALONE for ops without cuBLAS, GEMM another name than gemm.
"""
import ctypes
import glob
import heapq
import itertools
import json
import os
import statistics
import struct
import sys

import torch

FOLDER = sys.argv[1]
NAME = os.environ.get('GEMM', 'gemm')
CONSTANTS = json.load(open(f'{FOLDER}/{NAME}.json'))
NONE = 0xFFFFFFFF
BOTH_ALONG, BOTH_ACROSS, B_ACROSS = 0, 1, 2

torch.zeros(1, device='cuda')
driver = ctypes.CDLL('libcuda.so.1')


def call(name, *arguments):
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f'{name}: {text.value}')


def compile_kernel():
    found = glob.glob(os.path.dirname(torch.__path__[0]) + '/nvidia/**/libnvrtc.so.1*', recursive=True)
    nvrtc = ctypes.CDLL(found[0])
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = open(f'{FOLDER}/{NAME}.cu').read().encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b'gemm.cu', 0, None, None)
    options = [b'--gpu-architecture=sm_90a', b'--std=c++17', b'--ptxas-options=-v']
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    if code or 'Potential' in text or 'spill' in text and '0 bytes spill stores' not in text:
        print(text)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def load_kernel():
    own = f'{FOLDER}/{NAME}.cubin'
    cubin = open(own, 'rb').read() if os.environ.get('CUBIN') else compile_kernel()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call('cuModuleLoadData', ctypes.byref(module), cubin)
    call('cuModuleGetFunction', ctypes.byref(function), module, b'gemm')
    call('cuFuncSetAttribute', function, 8, CONSTANTS['shared'])
    return function


KERNEL = load_kernel()
SMS = torch.cuda.get_device_properties(0).multi_processor_count
CLUSTERS = SMS // CONSTANTS['cluster']


def encode(tensor):
    rows, cols = tensor.shape
    space = ctypes.create_string_buffer(256)
    at = (ctypes.addressof(space) + 63) // 64 * 64
    dims, strides = (ctypes.c_uint64 * 2)(cols, rows), (ctypes.c_uint64 * 1)(cols * 2)
    box, steps = (ctypes.c_uint32 * 2)(64, 64), (ctypes.c_uint32 * 2)(1, 1)
    call('cuTensorMapEncodeTiled', ctypes.c_void_p(at), 6, 2, ctypes.c_void_p(tensor.data_ptr()), dims, strides, box, steps, 0, 3, 2, 0)
    return ctypes.string_at(at, 128)


class Maps:
    """Tensor maps in device memory, one for each matrix; write() after the last add()."""

    def __init__(self, room=4096):
        self.memory = torch.zeros(room * 128, dtype=torch.uint8, device='cuda')
        self.bytes, self.known = bytearray(), {}

    def __call__(self, tensor):
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in self.known:
            self.known[key] = self.memory.data_ptr() + len(self.bytes)
            self.bytes += encode(tensor)
        return self.known[key]

    def write(self):
        self.memory[:len(self.bytes)] = torch.frombuffer(self.bytes, dtype=torch.uint8).cuda()


class Problem:
    def __init__(self, mode, a, b, d, k, alpha=1.0, c=None, beta=0.0, e=None, gamma=0.0, diagonal=0.0, symmetric=False):
        self.mode, self.a, self.b, self.c, self.d, self.e, self.k = mode, a, b, c, d, e, k
        self.alpha, self.beta, self.gamma, self.diagonal, self.symmetric = alpha, beta, gamma, diagonal, symmetric
        self.addends = 0 if c is None else 1 if e is None else 2
        self.k_blocks = -(-k // 64)

    def bytes(self, maps):
        at = [maps(m) if m is not None else 0 for m in (self.a, self.b, self.d, self.c, self.e)]
        return struct.pack('5Q4f', *at, self.alpha, self.beta, self.gamma, self.diagonal)

    def flops(self):
        m, n = self.d.shape
        return m * n * self.k * (1 if self.symmetric else 2)

    def tiles(self):
        rows, cols = -(-self.d.shape[0] // CONSTANTS['rows']), -(-self.d.shape[1] // CONSTANTS['cols'])
        down = 8 if CONSTANTS['cluster'] == 2 else 16
        for first in range(0, rows, down):
            for col in range(cols):
                for row in range(first, min(first + down, rows)):
                    if not self.symmetric or col * CONSTANTS['cols'] < (row + 1) * CONSTANTS['rows']:
                        yield row, col


EPILOGUE = 4


def schedule(problems):
    """Deals tiles to the cluster that is free first, those with the longest sums first."""
    order = sorted(range(len(problems)), key=lambda i: -problems[i].k_blocks)
    free = [(0, i) for i in range(CLUSTERS)]
    lists = [[] for _ in range(CLUSTERS)]
    for i in order:
        p = problems[i]
        for row, col in p.tiles():
            load, cluster = heapq.heappop(free)
            lists[cluster].append(struct.pack('IHHI4B', i, row, col, p.k_blocks, p.mode, p.symmetric, p.addends, 0))
            heapq.heappush(free, (load + p.k_blocks + EPILOGUE, cluster))
    rounds = max(map(len, lists))
    nothing = struct.pack('IHHI4B', NONE, 0, 0, 0, 0, 0, 0, 0)
    return b''.join(l[r] if r < len(l) else nothing for r in range(rounds) for l in lists), rounds


class Launch:
    def __init__(self, problems, maps):
        tiles, rounds = schedule(problems)
        own = b''.join(p.bytes(maps) for p in problems)
        self.problems = torch.frombuffer(bytearray(own), dtype=torch.uint8).cuda()
        self.tiles = torch.frombuffer(bytearray(tiles), dtype=torch.uint8).cuda()
        self.packed = struct.pack('3Q', self.problems.data_ptr(), self.tiles.data_ptr(), rounds)
        self.buffer = ctypes.create_string_buffer(self.packed, 24)
        self.size = ctypes.c_size_t(24)
        self.extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(self.buffer), 2, ctypes.addressof(self.size), 0)
        self.keep = problems
        self.flops = sum(p.flops() for p in problems)

    def __call__(self):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid = CLUSTERS * CONSTANTS['cluster']
        call('cuLaunchKernel', KERNEL, grid, 1, 1, CONSTANTS['threads'], 1, 1, CONSTANTS['shared'], stream, None, self.extra)


def gram(x, d, alpha=1.0):
    rows, cols = x.shape
    return Problem(BOTH_ACROSS if rows > cols else BOTH_ALONG, x, x, d, max(rows, cols), alpha, symmetric=True)


def product(s, t, d, alpha=1.0, **addends):
    return Problem(BOTH_ALONG, s, t, d, s.shape[0], alpha, symmetric=True, **addends)


def apply(w, x, d, alpha=1.0, beta=0.0):
    if x.shape[0] > x.shape[1]:
        return Problem(BOTH_ALONG, x, w, d, w.shape[0], alpha, c=x, beta=beta)
    return Problem(B_ACROSS, w, x, d, w.shape[0], alpha, c=x, beta=beta)


# Correctness.

SHAPES = [(64, 64), (8, 8), (128, 256), (256, 256), (72, 136), (136, 72), (320, 448), (264, 520), (1000, 200), (768, 768), (768, 3072),
          (2304, 768), (512, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (8, 8192), (1928, 2056)]


def normal(*shape):
    return torch.randn(shape, device='cuda', dtype=torch.float16)


def symmetric(m):
    x = normal(m, m)
    return x.tril() + x.tril(-1).T


def guarded(rows, cols):
    """A poisoned matrix with poisoned memory around it."""
    space = torch.full((64 + rows * cols + 64,), float('nan'), device='cuda', dtype=torch.float16)
    return space[64:64 + rows * cols].view(rows, cols), space


def mirrored(x):
    return x.tril() + x.tril(-1).T


def cases(rows, cols):
    m = min(rows, cols)
    x, s, t, c, e = normal(rows, cols), symmetric(m), symmetric(m), symmetric(m), symmetric(m)
    X, S, T, C, E = (v.double() for v in (x, s, t, c, e))
    yield 'gram', lambda d: gram(x, d, 0.37), (m, m), 0.37 * (X.T @ X if rows > cols else X @ X.T)
    yield 'product', lambda d: product(s, t, d, 1.3), (m, m), mirrored(1.3 * (S @ T))
    yield 'product+c', lambda d: product(s, t, d, 2.0315, c=c, beta=-47.75), (m, m), mirrored(2.0315 * (S @ T) - 47.75 * C)
    I = torch.eye(m, device='cuda', dtype=torch.float64)
    yield 'product+I', lambda d: product(s, t, d, 0.4, diagonal=-3.5), (m, m), mirrored(0.4 * (S @ T) - 3.5 * I)
    yield 'product+c+I', lambda d: product(s, t, d, 0.6, c=c, beta=-1.4, diagonal=20.5), (m, m), mirrored(0.6 * (S @ T) - 1.4 * C + 20.5 * I)
    yield 'product+c+e', lambda d: product(s, t, d, 0.7, c=c, beta=11.0, e=e, gamma=-20.1), (m, m), mirrored(0.7 * (S @ T) + 11 * C - 20.1 * E)
    yield 'apply', lambda d: apply(s, x, d, 0.9, 34.445), (rows, cols), 0.9 * (X @ S if rows > cols else S @ X) + 34.445 * X


def check():
    torch.manual_seed(int(os.environ.get('SEED', '0')))
    everything, bad = [], 0
    for rows, cols in SHAPES:
        if os.environ.get('SMALL') and rows * cols > 300000:
            continue
        worst = []
        for name, problem, shape, want in cases(rows, cols):
            outs = [guarded(*shape) for _ in range(3)]
            maps = Maps()
            launches = [Launch([problem(out)], maps) for out, _ in outs[:2]]
            maps.write()
            for launch in launches:
                launch()
            torch.cuda.synchronize()
            out, space = outs[0]
            error = ((out.double() - want).norm() / want.norm()).item()
            inside = bool(torch.isnan(space[:64]).all() and torch.isnan(space[-64:]).all())
            same = bool(torch.equal(out, outs[1][0]))
            even = shape[0] != shape[1] or name == 'apply' or bool(torch.equal(out, out.T))
            good = error < 4e-4 and inside and same and even
            bad += not good
            worst.append(f'{name} {error:.1e}' + ('' if good else f' BAD inside={inside} twice={same} symmetric={even}'))
            everything.append((problem(outs[2][0]), out, outs[2][0]))
        print(f'{rows}x{cols}: ' + ', '.join(worst), flush=True)
    maps = Maps()
    launch = Launch([p for p, _, _ in everything], maps)
    maps.write()
    launch()
    torch.cuda.synchronize()
    differing = sum(not torch.equal(alone, together) for _, alone, together in everything)
    print(f'{len(everything)} problems in one launch: {differing} differ from the launch of each alone; bad: {bad}', flush=True)


# Time.

A, B, C = 3.4445, -4.7750, 2.0315


def direct(shapes, steps=5):
    """Problem lists of all matrices of `shapes`, one a launch; the inputs and the outputs."""
    sets = []
    for rows, cols in shapes:
        m = min(rows, cols)
        x = normal(rows, cols)
        x /= x.float().norm()
        sets.append((x, torch.empty_like(x), x.new_empty(m, m), x.new_empty(m, m), torch.empty_like(x)))
    launches = []
    for step in range(steps):
        source = 0 if step == 0 else 1 if step % 2 else 4
        target = 1 if step % 2 == 0 else 4
        launches.append([gram(s[source], s[2]) for s in sets])
        launches.append([product(s[2], s[2], s[3], C, c=s[2], beta=B) for s in sets])
        launches.append([apply(s[3], s[source], s[target], 1.0, A) for s in sets])
    return launches, [s[0] for s in sets], [s[target] for s in sets]


def gram_form(shapes):
    """Three iterations on the Gram matrix and then two, centred; five direct ones where a matrix is not that long."""
    long = [s for s in shapes if max(s) >= 2 * min(s) and min(s) >= 512]
    rest = [s for s in shapes if s not in long]
    sets = []
    for rows, cols in long:
        m = min(rows, cols)
        x = normal(rows, cols)
        x /= x.float().norm()
        sets.append((x, torch.empty_like(x), torch.empty_like(x), *(x.new_empty(m, m) for _ in range(5))))
    launches = []

    def launch(*problems):
        launches.append([p for group in problems for p in group])

    centre = 0.5
    shift = (B * centre + C * centre**2) / A
    q = 1 + shift
    p = lambda r, at, shift=0.0: [product(s[r], s[r], s[at], C / A, c=s[r], beta=B / A, diagonal=-shift) for s in sets]
    w = lambda zi, wi, at, q=1.0: [product(s[zi], s[wi], s[at], 1.0, c=s[wi], beta=q, e=s[zi], gamma=q) for s in sets]
    t = lambda zi, r, at, q=1.0: [product(s[zi], s[r], s[at], 1.0, c=s[r], beta=q) for s in sets]
    n = lambda zi, ti, at, q=1.0: [product(s[zi], s[ti], s[at], A * A, c=s[ti], beta=A * A * q) for s in sets]
    x, y, o, r, t1, z1, z2, w1 = range(8)
    launch([gram(s[x], s[r]) for s in sets])
    launch(p(r, z1))
    launch(t(z1, r, t1))
    launch(n(z1, t1, r))
    launch(p(r, z2))
    launch(w(z2, z1, w1), t(z2, r, t1))
    launch(n(z2, t1, r))
    launch(p(r, z1))
    launch(w(z1, w1, t1))
    launch([apply(s[t1], s[x], s[y], A**3, A**3) for s in sets])
    launch([gram(s[y], s[r]) for s in sets])
    launch(p(r, z1, shift))
    launch(t(z1, r, t1, q))
    launch(n(z1, t1, r, q))
    launch(p(r, z2, shift))
    launch(w(z2, z1, w1, q))
    launch([apply(s[w1], s[y], s[o], A**2, A**2 * q * q) for s in sets])
    others = direct(rest) if rest else ([], [], [])
    both = [a + b for a, b in itertools.zip_longest(launches, others[0], fillvalue=[])]
    return both, [s[x] for s in sets] + others[1], [s[o] for s in sets] + others[2]


def cublas(xs, steps=5):
    outs = []
    for x in xs:
        tall = x.shape[0] > x.shape[1]
        for _ in range(steps):
            g = x.T @ x if tall else x @ x.T
            p = torch.addmm(g, g, g, beta=B, alpha=C)
            x = torch.addmm(x, x, p, beta=A) if tall else torch.addmm(x, p, x, beta=A)
        outs.append(x)
    return outs


def exact(x, steps=5):
    x = x.double()
    tall = x.shape[0] > x.shape[1]
    for _ in range(steps):
        g = x.T @ x if tall else x @ x.T
        p = B * g + C * (g @ g)
        x = A * x + (x @ p if tall else p @ x)
    return x


def timed(work, repeats, seconds=0.4):
    """Median milliseconds of a graph of `work`, by `repeats`."""
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for i in range(100):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        if i >= 7 and sum(times) > seconds * 1000:
            break
    return statistics.median(times[2:]) / repeats


GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
LLAMA = [(2048, 2048), (2048, 2048), (512, 2048), (512, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 16
SINGLES = [(768, 768), (768, 2304), (768, 3072), (2048, 2048), (512, 2048), (2048, 8192), (8192, 2048)]


def distance(outs, xs):
    worst = 0
    for out, x in list(zip(outs, xs))[:8]:
        want = exact(x)
        worst = max(worst, ((out.double() - want).norm() / want.norm()).item())
    return worst


def compare(name, shapes, copies):
    line = f'{name:10}'
    for form in (direct, gram_form):
        if form is gram_form and not any(max(s) >= 2 * min(s) for s in shapes):
            continue
        maps = Maps()
        lists = [form(shapes) for _ in range(copies)]
        launches = [Launch(problems, maps) for made in lists for problems in made[0]]
        maps.write()

        def work():
            for launch in launches:
                launch()

        ms = timed(work, copies)
        flops = sum(l.flops for l in launches) / copies
        line += f'{form.__name__} {ms:.4f} ms {flops / ms / 1e9:.0f} TF/s (error {distance(lists[0][2], lists[0][1]):.1e})  '
        inputs = [x for l in lists for x in l[1]]
    keep = {}

    def library():
        keep['outs'] = cublas(inputs)

    ms = timed(library, copies)
    line += f'cuBLAS {ms:.4f} ms (error {distance(keep["outs"], inputs):.1e})'
    print(line, flush=True)


def singles():
    for rows, cols in SINGLES:
        compare(f'{rows}x{cols}', [(rows, cols)], 16 if min(rows, cols) < 2048 else 4)


def sets():
    compare('GPT-2', GPT2, 1)
    compare('Llama-1B', LLAMA, 1)


def ops():
    """Each operation on a list of equal matrices."""
    for rows, cols, count in ((2048, 8192, 12), (8192, 2048, 12), (2048, 2048, 32), (768, 3072, 48), (768, 768, 48)):
        m = min(rows, cols)
        maps = Maps()
        sets = [(normal(rows, cols), symmetric(m), symmetric(m), normal(rows, cols)) for _ in range(count)]
        kinds = {'gram': [gram(x, g) for x, _, g, _ in sets], 'product': [product(s, s, g, 1.0, c=s, beta=0.5) for _, s, g, _ in sets],
                 'apply': [apply(s, x, y, 1.0, 0.5) for x, s, _, y in sets]}
        made = {name: Launch(problems, maps) for name, problems in kinds.items()}
        maps.write()
        line = f'{rows}x{cols} x{count}: '
        for name, launch in made.items():
            ms = timed(launch, 1, 0.15)
            done = sum(p.k_blocks * 64 * CONSTANTS['rows'] * CONSTANTS['cols'] * 2 for p in kinds[name] for _ in p.tiles())
            line += f'{name} {ms:.3f} ms {launch.flops / ms / 1e9:.0f} TF/s (in tiles {done / ms / 1e9:.0f})  '

        if os.environ.get('ALONE'):
            print(line, flush=True)
            continue

        def library():
            for x, s, _, _ in sets:
                x @ s if rows > cols else s @ x

        ms = timed(library, 1, 0.2)
        print(line + f'cuBLAS apply without addend {ms:.3f} ms {sum(p.flops() for p in kinds["apply"]) / ms / 1e9:.0f} TF/s', flush=True)


if __name__ == '__main__':
    for what in sys.argv[2:]:
        {'check': check, 'singles': singles, 'sets': sets, 'ops': ops}[what]()
