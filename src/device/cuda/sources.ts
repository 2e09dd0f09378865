import { readFileSync } from 'node:fs'
import { cudaSource, gemmSource } from '../../../kernels/cuda/source.js'

const FOLDER = new URL('../../../../kernels/cuda/', import.meta.url)

// Read wherever the service starts, and not where a GPU is found: an installation that lacks a file shows it at once.
const read = (name: string) => readFileSync(new URL(name, FOLDER), 'utf8')

export const CUDA_SOURCE = cudaSource(read)
export const GEMM_SOURCE = gemmSource(read)
