"""Times torch.optim.Muon (bf16 parameters, gradients on the GPU) on the workloads of models.ts."""
import json
import statistics
import sys
import time

import torch

WORKLOADS = {
    'gpt2': [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    'llama-1b': [(2048, 2048), (2048, 2048), (512, 2048), (512, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 16,
    'experts': [(2048, 7168)] * 48,
}

for name, shapes in WORKLOADS.items():
    if len(sys.argv) > 1 and name not in sys.argv[1].split(','):
        continue
    parameters = [torch.nn.Parameter(torch.randn(shape, device='cuda', dtype=torch.bfloat16)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.Muon(parameters, lr=1e-3)
    times = []
    for step in range(13):
        torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    print(json.dumps({'workload': name, 'version': torch.__version__,
                      'milliseconds': round(statistics.median(times[3:]), 2)}))
    del parameters, optimizer
    torch.cuda.empty_cache()
