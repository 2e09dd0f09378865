/** `gflops` by the clock, `gflops_per_cpu` by CPU seconds of the whole process. */
export type Speed = { gflops: number; gflops_per_cpu: number }

/** What bench/newton-schulz answers: alternating measurements of Muon's job and of one large MatMul. */
export type Efficiency = { size: number; threads: number; pairs: { newton_schulz: Speed; matmul: Speed }[] }
