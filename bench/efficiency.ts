/** GFLOP/s: `gflops` by the clock, `gflops_per_cpu` by CPU seconds of the whole process. */
export type Speed = { gflops: number; gflops_per_cpu: number }

/** The answer of bench/newton-schulz: measurements of Muon's job and of one large MatMul in turn. */
export type Efficiency = { size: number; threads: number; pairs: { newton_schulz: Speed; matmul: Speed }[] }
