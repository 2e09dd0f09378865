import { closeSync, ftruncateSync, openSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import koffi from 'koffi'
import t from 'tap'
import { makeMemory, mapDescriptor, mapMemory } from '../../src/wire/shared-memory.js'
import { layOut } from '../../src/wire/slots.js'

const descriptors = () => readdirSync('/proc/self/fd').length

t.test('two mappings of one memfd have the same bytes', async (t) => {
  const own = makeMemory(10_000)
  const other = mapMemory(process.pid, own.descriptor, 10_000)
  const view = new Uint8Array(koffi.view(other.pointer, 10_000))
  own.view[9_999] = 7
  t.equal(view[9_999], 7)
  view[0] = 3
  t.equal(own.view[0], 3)
  t.throws(() => ftruncateSync(own.descriptor, 1), { code: 'EPERM' }, 'nobody can shrink it')
  other.unmap()
  own.unmap()
})

t.test('what cannot be mapped is refused, and no descriptor stays', async (t) => {
  const create: (name: string, flags: number) => number = koffi
    .load(null)
    .func('memfd_create', 'int', ['const char *', 'uint'])
  const unsealed = create('unsealed', 2)
  const file = openSync(join(t.testdir({ f: 'text' }), 'f'), 'r+')
  const own = makeMemory(4096)
  const before = descriptors()
  t.throws(() => mapMemory(process.pid, unsealed, 1), { message: 'the shared memory has no F_SEAL_SHRINK' })
  t.throws(() => mapDescriptor(file, 1), { message: 'the shared memory is no memfd: it has no seals' })
  t.throws(() => mapMemory(process.pid, own.descriptor, 4097), { message: /has 4096 bytes, expected are 4097 or more/ })
  t.throws(() => mapMemory(process.pid, own.descriptor, 0), { message: /mmap of 0 bytes failed with error 22/ })
  t.throws(() => makeMemory(-1))
  t.equal(descriptors(), before)
  own.unmap()
  for (const descriptor of [unsealed, file]) closeSync(descriptor)
})

t.test('slots begin behind the proof, at multiples of 256, and none overlaps another', async (t) => {
  t.same(layOut([1, 256, 257, 4]), { offsets: [256, 512, 768, 1280], bytes: 1536 })
  t.same(layOut([]), { offsets: [], bytes: 256 })
})
