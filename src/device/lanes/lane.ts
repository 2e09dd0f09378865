import { parentPort, workerData } from 'node:worker_threads'
import { CpuExecutor } from '../cpu/cpu-executor.js'
import { CudaExecutor } from '../cuda/cuda-executor.js'
import { cudaSpace } from '../cuda/cuda-space.js'
import type { Executor, LaneOptions, LaneReply, LaneRequest } from '../executor.js'
import type { JobResult } from '../job.js'
import { OnnxExecutor } from '../onnx/onnx-executor.js'
import { openOnnxRuntime } from '../onnx/onnxruntime.js'
import { packResults, unpackJobs } from './packed-jobs.js'
import { Requests } from './requests.js'
import { Transcoder } from './transcoder.js'

const requests = new Requests(new Transcoder(start(workerData)))

parentPort?.on('message', (request: LaneRequest) => {
  const reply = handle(request)
  if (reply) parentPort?.postMessage(reply)
})

function start(options: LaneOptions): Executor {
  /* c8 ignore next -- needs a GPU: npm run test:gpu */
  if (options.kind === 'cuda') return new CudaExecutor(options)
  const runtime = openOnnxRuntime(options.folder)
  /* c8 ignore next -- needs a GPU: npm run test:gpu */
  if (options.kind === 'cuda_onnx') return new OnnxExecutor(runtime, cudaSpace(options.gpu), { half: true })
  return new CpuExecutor(runtime, options.threads)
}

function handle(request: LaneRequest): LaneReply | undefined {
  switch (request.type) {
    case 'load':
      return answer(request.id, () => {
        requests.executor.load(request.needs, request.scratch)
        return []
      })
    case 'run':
      return answer(request.id, () => requests.run(unpackJobs(request.jobs)))
    case 'forget':
      requests.forget(request.pointer)
      return undefined
    case 'stop':
      return stop()
  }
}

function answer(id: number, work: () => JobResult[]): LaneReply {
  try {
    return { id, results: packResults(work()) }
  } catch (error) {
    return { id, error: String(error).replace(/^\w*Error: /, '') }
  }
}

// The worker ends by itself once nothing listens.
// Ending it from outside while a run is in flight would crash the process.
function stop(): undefined {
  requests.executor.close()
  parentPort?.close()
}
