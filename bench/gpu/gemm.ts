/** Writes the Hopper kernel's text and constants for gemm.py: `node dist/bench/gpu/gemm.js FOLDER`. */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { GEMM_CLUSTER, GEMM_SHARED_BYTES, GEMM_THREADS, GEMM_TILE } from '../../kernels/cuda/gemm.js'
import { GEMM_SOURCE } from '../../src/device/cuda/sources.js'

const folder = process.argv[2]
const constants = { cluster: GEMM_CLUSTER, shared: GEMM_SHARED_BYTES, threads: GEMM_THREADS, ...GEMM_TILE }
writeFileSync(join(folder, 'gemm.cu'), GEMM_SOURCE)
writeFileSync(join(folder, 'gemm.json'), JSON.stringify(constants))
