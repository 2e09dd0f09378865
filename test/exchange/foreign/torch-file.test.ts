import { rmSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import t from 'tap'
import { readTorchFile } from '../../../src/exchange/foreign/torch-file.js'
import { ZipWriter } from '../../../src/exchange/zip-writer.js'

t.test('a pickle too large to be one of a state is refused before it is read', async (t) => {
  const path = join(t.testdir({}), 'large.pt')
  const zeros = new Uint8Array(2 ** 26)
  const file = await open(path, 'w+')
  let at = 0
  // The zeros are a hole in the file.
  const zip = new ZipWriter(async (bytes) => {
    if (bytes !== zeros) await file.write(bytes, 0, bytes.length, at)
    at += bytes.length
  })
  await zip.add('a/data.pkl', 5 * 2 ** 26, [zeros, zeros, zeros, zeros, zeros])
  await zip.end()
  await t.rejects(readTorchFile(file, path), { message: /data\.pkl has 335544320 bytes, expected at most 268435456$/ })
  await file.close()
  rmSync(path)
})
