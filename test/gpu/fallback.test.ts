import { spawn } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import t from 'tap'
import { momentumStep, orthogonalizeByIteration, relativeDistance } from '../reference.js'
import { normal, RawClient } from '../service.js'
import { NO_GPU } from './gpu.js'

const KELLER_JORDAN = Array.from({ length: 5 }, () => [3.4445, -4.775, 2.0315] as const)
const SERVER = new URL('../../src/server.js', import.meta.url).pathname
const SHAPES = [
  [96, 64],
  [64, 256],
  [33, 77],
  [1, 32],
] as const

t.test('without NVRTC the kernels are those of ONNX Runtime', { skip: NO_GPU, timeout: 120_000 }, async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  linkAllBut('libnvrtc', folder)
  // The loader finds this one first, and it is none.
  writeFileSync(join(folder, 'libnvrtc.so.13'), '')
  const env = { ...process.env, LD_LIBRARY_PATH: folder, MUOND_DEVICE: 'cuda', MUOND_PORT: '0' }
  const server = spawn(process.execPath, [SERVER], { env, stdio: ['ignore', 'pipe', 'inherit'] })
  const exited = new Promise<number | null>((resolve) => server.once('exit', resolve))
  let address = ''
  let reason = ''
  for await (const line of createInterface(server.stdout)) {
    const entry = JSON.parse(line)
    if (entry.event === 'listening') address = entry.address
    if (entry.event === 'device_chosen') reason = entry.reason
    if (address && reason) break
  }
  t.match(reason, /^libnvrtc\.so\.13 cannot be loaded .*ONNX Runtime's, which are slower$/)
  const client = await RawClient.connect(`${address.replace('http', 'ws')}/v1/stream`)
  const groups = [
    { name: 'muon', algorithm: 'muon' },
    { name: 'sgd', algorithm: 'sgd' },
  ]
  const parameters = [
    ...SHAPES.map((shape, i) => ({ name: `m${i}`, shape: [...shape], group: 'muon' })),
    { name: 'bias', shape: [700_001], group: 'sgd' },
  ]
  await client.open({ run: 'r', groups, parameters })
  const buffers = SHAPES.map(([rows, cols]) => new Float64Array(rows * cols))
  for (const step of [1, 2]) {
    const gradients = parameters.map(({ shape }, i) =>
      normal(
        step * 10 + i,
        shape.reduce((product, dim) => product * dim, 1),
      ),
    )
    t.match(await client.step(step, gradients), { step, applied: parameters.length })
    for (const [i, [rows, cols]] of SHAPES.entries()) {
      const oracle = momentumStep(buffers[i]!, gradients[i]!, {
        ...{ momentum: 0.95, nesterov: true, momentum_form: 'ema' },
      })
      buffers[i] = oracle.buffer
      const o = orthogonalizeByIteration({ rows, cols, data: oracle.direction }, KELLER_JORDAN)
      const distance = relativeDistance(floatsOf(client.updates.get(i)!.data), o.data)
      t.ok(distance < 2.5e-3, `${rows}x${cols}: distance ${distance}`)
    }
    const sgd = floatsOf(client.updates.get(SHAPES.length)!.data)
    t.ok(
      sgd.every((value, i) => value === gradients[SHAPES.length]![i]),
      'a direction of plain SGD is the gradient',
    )
    const first = updatesOf(client)
    for (let again = 0; again < 20; again++) {
      for (const [index, values] of gradients.entries()) client.gradient(index, step, { values })
      client.send({ type: 'end', step })
      t.match(await client.expect('receipt'), { step, replayed: true })
      t.same(updatesOf(client), first, 'a replay is the same bytes, whatever lane computes it')
    }
  }
  await client.close()
  server.kill('SIGTERM')
  t.equal(await exited, 0)
})

/** Links to every library that LD_LIBRARY_PATH finds, but for those that start so. */
function linkAllBut(prefix: string, folder: string): void {
  const known = new Set<string>()
  for (const from of (process.env.LD_LIBRARY_PATH ?? '').split(':').filter(Boolean)) {
    for (const name of readdirSync(from)) {
      if (!name.includes('.so') || name.startsWith(prefix) || known.has(name)) continue
      known.add(name)
      symlinkSync(join(from, name), join(folder, name))
    }
  }
}

function updatesOf({ updates }: RawClient): string[] {
  return [...updates.values()].map(({ data }) => data.toString('base64'))
}

function floatsOf({ buffer, byteOffset, length }: Buffer): Float32Array {
  return new Float32Array(buffer.slice(byteOffset, byteOffset + length) as ArrayBuffer)
}
