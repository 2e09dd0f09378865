import { readFileSync } from 'node:fs'
import { cudaSource, gemmSource } from '../../../kernels/cuda/source.js'

const FOLDER = new URL('../../../../kernels/cuda/', import.meta.url)

// The files are read on every start, also without a GPU, so that an installation that lacks one shows it at once.
const read = (name: string) => readFileSync(new URL(name, FOLDER), 'utf8')

/** The CUDA C++ of the elementwise kernels, as NVRTC is given it. */
export const CUDA_SOURCE = cudaSource(read)
/** The CUDA C++ of Hopper's matrix products, as NVRTC is given it. */
export const GEMM_SOURCE = gemmSource(read)
