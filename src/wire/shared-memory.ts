import { closeSync, constants, fstatSync, ftruncateSync, openSync, readlinkSync } from 'node:fs'
import koffi from 'koffi'

/** Memory that several processes of this host have mapped; `pointer` is its address in this one. */
export type Mapping = { readonly pointer: bigint; readonly bytes: number; unmap(): void }

/** Memory of this process that others may map by its descriptor, as long as that is open. */
export type OwnMemory = Mapping & { readonly descriptor: number; readonly view: Uint8Array<ArrayBuffer> }

const READ_AND_WRITE = 3
const SHARED = 1
// MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS and MAP_NORESERVE.
const PRIVATE_ZEROS_HERE = 0x02 | 0x10 | 0x20 | 0x4000
const FAILED = 2n ** 64n - 1n
const ADD_SEALS = 1033
const GET_SEALS = 1034
const SEAL_SHRINK = 2
const CLOSE_ON_EXEC = 1
const ALLOW_SEALING = 2

/**
 * Makes a memfd of `bytes` zero bytes that nobody can shrink. `unmap` closes its descriptor, too, and gives its pages
 * back: a view that is used all the same finds zeros of its own there. The addresses go with the last view.
 */
export function makeMemory(bytes: number): OwnMemory {
  const { memfd_create, fcntl } = libc()
  const descriptor = memfd_create('muond', CLOSE_ON_EXEC | ALLOW_SEALING)
  /* c8 ignore next -- the system has no memfd, or no descriptor left */
  if (descriptor < 0) throw new Error(`memfd_create failed with error ${koffi.errno()}`)
  try {
    ftruncateSync(descriptor, bytes)
    fcntl(descriptor, ADD_SEALS, 'int', SEAL_SHRINK)
    const { pointer, unmap } = mapDescriptor(descriptor, bytes)
    const view = new Uint8Array(koffi.view(pointer, bytes))
    collected.register(view.buffer, unmap)
    const free = () => {
      discard(pointer, bytes)
      closeSync(descriptor)
    }
    return { pointer, bytes, descriptor, view, unmap: free }
  } catch (error) {
    closeSync(descriptor)
    throw error
  }
}

/**
 * Maps a memfd of another process, named by a descriptor of that process. It must have at least `bytes` bytes and be
 * sealed against shrinking (memfd_create(2)): whoever reads pages that its owner has cut off is killed with SIGBUS.
 * Throws an Error that says what is wrong.
 */
export function mapMemory(process: number, descriptor: number, bytes: number): Mapping {
  const path = `/proc/${process}/fd/${descriptor}`
  // To open a device or a pipe would have effects of its own.
  const file = readlinkSync(path)
  if (!file.startsWith('/memfd:')) throw new Error(`${path} is ${file}, expected a memfd`)
  const opened = openSync(path, constants.O_RDWR | constants.O_NONBLOCK)
  try {
    return mapDescriptor(opened, bytes)
  } finally {
    closeSync(opened)
  }
}

/** As `mapMemory`, for a descriptor of this process, which may be closed afterwards. */
export function mapDescriptor(descriptor: number, bytes: number): Mapping {
  const { fcntl, mmap, munmap } = libc()
  const seals = fcntl(descriptor, GET_SEALS, 'int', 0)
  if (seals < 0) throw new Error('the shared memory is no memfd: it has no seals')
  if ((seals & SEAL_SHRINK) === 0) throw new Error('the shared memory has no F_SEAL_SHRINK')
  const { size } = fstatSync(descriptor)
  if (size < bytes) throw new Error(`the shared memory has ${size} bytes, expected are ${bytes} or more`)
  const pointer = mmap(null, bytes, READ_AND_WRITE, SHARED, descriptor, 0)
  if (pointer === FAILED) throw new Error(`mmap of ${bytes} bytes failed with error ${koffi.errno()}`)
  return { pointer, bytes, unmap: () => munmap(pointer, bytes) }
}

/** Unmaps what no view leads to any more: to touch unmapped memory would end the process. */
const collected = new FinalizationRegistry<() => void>((unmap) => unmap())

/** Puts zero pages of this process in the place of what is mapped at `pointer`. */
function discard(pointer: bigint, bytes: number): void {
  const at = libc().mmap(pointer, bytes, READ_AND_WRITE, PRIVATE_ZEROS_HERE, -1, 0)
  /* c8 ignore next -- the range was mapped before */
  if (at !== pointer) throw new Error(`mmap over ${bytes} bytes failed with error ${koffi.errno()}`)
}

type Libc = {
  memfd_create(name: string, flags: number): number
  fcntl(descriptor: number, command: number, type: 'int', argument: number): number
  mmap(at: bigint | null, bytes: number, protection: number, flags: number, descriptor: number, offset: number): bigint
  munmap(pointer: bigint, bytes: number): number
}

let known: Libc | undefined

function libc(): Libc {
  if (known) return known
  const library = koffi.load(null)
  known = {
    memfd_create: library.func('memfd_create', 'int', ['const char *', 'uint']),
    fcntl: library.func('int fcntl(int, int, ...)'),
    mmap: library.func('mmap', 'void *', ['void *', 'size_t', 'int', 'int', 'int', 'int64_t']),
    munmap: library.func('munmap', 'int', ['void *', 'size_t']),
  }
  return known
}
