"""Distances of muond's and torch.optim.Muon's second update to float64.

`make DIR` writes the cases for accuracy.js, `judge DIR` judges its results.
"""
import json
import sys

import torch

SHAPES = [(64, 64), (768, 768), (2304, 768), (3072, 768), (768, 3072), (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (2048, 7168), (1, 512), (512, 1), (32, 1), (1, 53), (53, 1), (17, 701), (33, 77), (256, 64), (65, 77), (1, 1)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Singular values of gradients that are not noise: number `i` of `n`, from 1 on. A spike is one among many small ones.
SPECTRA = {
    'sqrt': lambda i, n: i**-0.5,
    'inverse': lambda i, n: 1 / i,
    'exponential': lambda i, n: 1e-4 ** ((i - 1) / (n - 1)),
    'spike': lambda i, n: torch.where(i == 1, 1.0, 1e-2),
}
SPECTRUM_SHAPES = [(768, 768), (768, 3072), (2048, 2048), (512, 1024)]


def cases():
    for rows, cols in SHAPES:
        for dtype in ('float32', 'bfloat16'):
            yield f'muon_{rows}x{cols}_{dtype}', (rows, cols), dtype, {'algorithm': 'muon'}, 1.0
    for spectrum in SPECTRA:
        for rows, cols in SPECTRUM_SHAPES:
            yield f'muon_{spectrum}_{rows}x{cols}', (rows, cols), 'float32', {'algorithm': 'muon'}, spectrum
        for named in ('polar_express', 'deepseek_v4'):
            yield f'muon_{spectrum}_{named}', (512, 1024), 'float32', {'algorithm': 'muon', 'ns_coefficients': named}, spectrum
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        yield f'muon_scale_{scale}', (64, 96), 'float32', {'algorithm': 'muon'}, scale
    yield 'muon_zero', (64, 96), 'float32', {'algorithm': 'muon'}, 0.0
    yield 'muon_polar', (256, 512), 'float32', {'algorithm': 'muon', 'ns_coefficients': 'polar_express'}, 1.0
    yield 'muon_v4', (256, 300), 'float32', {'algorithm': 'muon', 'ns_coefficients': 'deepseek_v4'}, 1.0
    for dtype in ('float32', 'bfloat16', 'float16'):
        yield f'adamw_{dtype}', (1000, 7), dtype, {'algorithm': 'adamw'}, 1.0
        yield f'sgd_{dtype}', (1001,), dtype, {'algorithm': 'sgd', 'momentum': 0.9}, 1.0


def make(folder):
    listed = []
    torch.manual_seed(0)
    for name, shape, dtype, group, scale in cases():
        noise = torch.randn(shape, dtype=torch.float64)
        gradient = (with_spectrum(noise, scale) if scale in SPECTRA else noise * scale).to(getattr(torch, dtype))
        open(f'{folder}/{name}.gradient', 'wb').write(gradient.view(torch.uint8).numpy().tobytes() if gradient.dim() else b'')
        listed.append({'name': name, 'shape': list(shape), 'dtype': dtype, 'group': group})
    json.dump(listed, open(f'{folder}/cases.json', 'w'))


def with_spectrum(noise, name):
    """A matrix with the singular vectors of the noise, and other singular values."""
    u, old, v = torch.linalg.svd(noise.cuda(), full_matrices=False)
    i = torch.arange(1, len(old) + 1, device=u.device, dtype=torch.float64)
    return ((u * SPECTRA[name](i, len(old))) @ v).cpu()


def oracle(u, steps):
    x = u / (u.norm() or 1)
    if x.shape[0] > x.shape[1]:
        return oracle(u.T, steps).T
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def judge(folder):
    s = 1.05
    polar = [(8.28721201814563, -23.595886519098837, 17.300387312530933), (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
             (3.9486908534822946, -2.908902115962949, 0.5518191394370137), (3.3184196573706015, -2.488488024314874, 0.51004894012372),
             (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]
    sets = {'polar_express': [(a / s, b / s**3, c / s**5) for a, b, c in polar],
            'deepseek_v4': [COEFFICIENTS] * 8 + [(2, -1.5, 0.5)] * 2}
    for name, shape, dtype, group, scale in cases():
        raw = bytearray(open(f'{folder}/{name}.gradient', 'rb').read())
        g = torch.frombuffer(raw, dtype=getattr(torch, dtype)).reshape(shape).cuda().double()
        read = lambda kind: torch.frombuffer(bytearray(open(f'{folder}/{name}.{kind}', 'rb').read()), dtype=torch.float32).reshape(shape).cuda().double()
        update, state = read('update'), read('state')
        line = {'name': name}
        if group['algorithm'] == 'muon':
            m1 = 0.05 * g
            m2 = 0.95 * m1 + 0.05 * g
            u = 0.95 * m2 + 0.05 * g
            want = oracle(u, sets.get(group.get('ns_coefficients'), [COEFFICIENTS] * 5))
            line['momentum'] = distance(state, m2)
            line['ours'] = distance(update, want)
            if (scale == 1.0 or scale in SPECTRA) and 'ns_coefficients' not in group:
                # What torch is given has the spectrum only in float32; its Newton-Schulz is in bfloat16 all the same.
                torch_dtype = torch.float32 if scale in SPECTRA else torch.bfloat16
                p = torch.nn.Parameter(torch.zeros(shape, device='cuda', dtype=torch_dtype))
                optimizer = torch.optim.Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn=None)
                for _ in range(2):
                    p.data.zero_()
                    p.grad = g.to(torch_dtype)
                    optimizer.step()
                line['torch'] = distance(-p.double() / max(1, shape[0] / shape[1]) ** 0.5, want)
        elif group['algorithm'] == 'adamw':
            m = 0.9 * 0.1 * g + 0.1 * g
            v = 0.999 * 0.001 * g * g + 0.001 * g * g
            line['ours'] = distance(update, (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8))
            line['momentum'] = distance(state, m)
        else:
            line['ours'] = distance(update, 1.9 * g)
        print(json.dumps(line))


def distance(a, b):
    return float(f'{((a - b).norm() / (b.norm() or 1)).item():.3g}')


{'make': make, 'judge': judge}[sys.argv[1]](sys.argv[2])
