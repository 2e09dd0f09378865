import { parentPort, workerData } from 'node:worker_threads'
import { CpuExecutor, type CpuLane } from './cpu-executor.js'
import { CudaExecutor, type CudaLane } from './cuda-executor.js'
import type { Executor, JobResult, LaneReply, LaneRequest } from './job.js'

/** What a lane is started with. */
export type LaneOptions = CpuLane | CudaLane

const executor = start(workerData)

parentPort?.on('message', (request: LaneRequest) => {
  const reply = handle(request)
  if (reply) parentPort?.postMessage(reply)
})

function start(options: LaneOptions): Executor {
  /* c8 ignore next -- needs a GPU: npm run test:gpu */
  return options.kind === 'cpu' ? new CpuExecutor(options) : new CudaExecutor(options)
}

function handle(request: LaneRequest): LaneReply | undefined {
  switch (request.type) {
    case 'load':
      return answer(request.id, () => {
        executor.load(request.needs)
        return []
      })
    case 'run':
      return answer(request.id, () => executor.run(request.jobs))
    case 'forget':
      executor.forget(request.pointer)
      return undefined
    case 'stop':
      return stop()
  }
}

function answer(id: number, work: () => JobResult[]): LaneReply {
  try {
    return { id, results: work() }
  } catch (error) {
    return { id, error: String(error).replace(/^\w*Error: /, '') }
  }
}

// The worker ends by itself once nothing listens: ending it from outside while a run is in flight would crash the process.
function stop(): undefined {
  executor.close()
  parentPort?.close()
}
