/* c8 ignore start -- needs a GPU: npm run test:gpu */
import { mostItems } from '../../../kernels/cuda/entry-points.js'
import { THREADS } from '../../../kernels/cuda/source.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import type { CudaStream, ListItem } from './cuda.js'

/**
 * What kernels are to do, gathered: a launch costs the host several microseconds and the GPU a few, however little it
 * does, so that what does not depend on each other is launched together.
 */
export class LaunchLists {
  readonly #stream: CudaStream
  readonly #find: (name: string) => Pointer
  readonly #kernels = new Map<string, Pointer>()
  #waiting = new Map<string, ListItem[]>()

  constructor(stream: CudaStream, find: (name: string) => Pointer) {
    this.#stream = stream
    this.#find = find
  }

  /** Adds an item for a kernel; it depends on nothing that waits. */
  add(name: string, blocks: number, parameters: ListItem['parameters']): void {
    const items = this.#waiting.get(name)
    if (items) items.push({ blocks, parameters })
    else this.#waiting.set(name, [{ blocks, parameters }])
  }

  /**
   * Queues what waits, one launch for as many items of a kernel as go into it. What is added later may depend on it.
   */
  launch(): void {
    for (const [name, items] of this.#waiting) {
      const most = mostItems(items[0].parameters.length)
      const kernel = this.#kernels.get(name) ?? this.#find(name)
      this.#kernels.set(name, kernel)
      for (let at = 0; at < items.length; at += most)
        this.#stream.launchList(kernel, THREADS, items.slice(at, at + most))
    }
    this.#waiting = new Map()
  }

  /** Forgets what waits: a failure came between. */
  clear(): void {
    this.#waiting.clear()
  }
}
/* c8 ignore stop */
