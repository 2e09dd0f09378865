import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { exportCommand } from '../../src/commands/export.js'
import { importCommand } from '../../src/commands/import.js'
import {
  call,
  dict,
  float,
  global,
  int,
  list,
  type Picklable,
  persistent,
  pickle,
  tuple,
} from '../../src/exchange/torch/pickle.js'
import { TorchFile, tensorNode } from '../../src/exchange/torch/tensor.js'
import { ZipWriter } from '../../src/exchange/zip-writer.js'
import { encodeHeader, parseSafetensors, type SafetensorsDtype } from '../../src/store/safetensors.js'
import { MODEL, train, trainStep } from '../run/trainer.js'
import { bytesOf, normal, type RawClient, type Service } from '../service.js'
import { exporting, importing, opened, SILENT, start, stateOf } from './interchange.js'

type Values = { dtype?: SafetensorsDtype; shape: readonly number[]; data: Uint8Array }
const f32 = (shape: readonly number[], seed: number): Values => ({
  shape,
  data: bytesOf(
    normal(
      seed,
      shape.reduce((a, b) => a * b, 1),
    ),
  ),
})

/** Writes a safetensors file. */
function writeTensors(path: string, tensors: Record<string, Values>, metadata: Record<string, string> = {}): string {
  const entries = Object.entries(tensors).map(([name, { dtype = 'F32', shape, data }]) => ({
    name,
    dtype,
    shape,
    bytes: data.length,
  }))
  writeFileSync(
    path,
    Buffer.concat([encodeHeader(entries, metadata), ...Object.values(tensors).map(({ data }) => data)]),
  )
  return path
}

/** Writes a file as torch.save does; a value is a tensor or a node of a pickle. */
async function writeTorch(
  path: string,
  state: readonly (readonly [Picklable, Record<string, Values | Picklable>])[],
  groups: Picklable,
): Promise<string> {
  const storages = new Map<string, Uint8Array>()
  const node = (value: Values | Picklable): Picklable => {
    if (typeof value !== 'object' || value === null || 'kind' in value) return value
    const key = String(storages.size)
    storages.set(key, value.data)
    return tensorNode({ dtype: value.dtype ?? 'F32', shape: value.shape }, key)
  }
  const states = state.map(([key, values]): [Picklable, Picklable] => [
    key,
    dict(Object.entries(values).map(([name, value]): [Picklable, Picklable] => [name, node(value)])),
  ])
  const parts: Uint8Array[] = []
  const root = dict([
    ['state', dict(states)],
    ['param_groups', groups],
  ])
  const file = await TorchFile.begin(async (bytes) => void parts.push(bytes.slice()), root)
  for (const [key, data] of storages) {
    const storage = await file.storage(key, data.length)
    await storage.write(data)
    await storage.end()
  }
  await file.end()
  writeFileSync(path, Buffer.concat(parts))
  return path
}

const group = (params: readonly Picklable[], names?: readonly string[]) =>
  dict([['lr', float(0.1)], ['params', list(params)], ...(names ? [['param_names', list(names)] as const] : [])])

async function tensorsOf(service: Service, run: string): Promise<Record<string, number[]>> {
  const { tensors } = parseSafetensors(await stateOf(service, run))
  const values = [...tensors].map(([name, { dtype, data }]) => {
    const { buffer } = new Uint8Array(data)
    return [name, dtype === 'I64' ? [...new BigInt64Array(buffer)].map(Number) : [...new Float32Array(buffer)]]
  })
  return Object.fromEntries(values)
}
const valuesOf = ({ data }: Values) => [...new Float32Array(new Uint8Array(data).buffer)]

t.test(
  'what is exported is imported: the next three steps are the same, bit for bit, with every algorithm',
  async (t) => {
    const data = t.testdir({ data: {} })
    const service = await start({ data: join(data, 'data'), checkpoint_file_bytes: 2000, checkpoint_steps: 5 })
    const { client } = await train(service, { run: 'a', last: 5 })
    const file = join(data, 'a.safetensors')
    await exporting(service, 'a', '--to', 'safetensors', '--out', file)
    const folder = join(data, 'data', 'runs', 'a', 'checkpoints', 'step-000000000005')
    const shards = join(data, 'shards')
    mkdirSync(shards)
    await exportCommand(
      ['a', '--to', 'safetensors', '--out', join(shards, 'x.safetensors'), '--url', service.http],
      {},
      { ...SILENT, shard_bytes: 2000 },
    )
    const sources = [file, folder, join(folder, 'state.safetensors.index.json'), shards]
    const runs: RawClient[] = []
    for (const [i, source] of sources.entries()) {
      const run = `b${i}`
      runs.push(await opened(service, run, MODEL))
      // The index alone does not say the momentum_form of the buffers.
      const form = i === 2 ? ['--momentum-form', 'ema'] : []
      const printed = await importing(service, run, source, '--from', 'muond', ...form)
      t.match(
        printed,
        /^run 'b\d' goes on after step 0 with the state of 7 parameters, digest [0-9a-f]{64}, checkpoint step-000000000000\.1$/,
      )
    }
    for (const step of [6, 7, 8]) {
      const { updates } = await trainStep(client, step)
      for (const i of [0, 1, 3]) t.equal((await trainStep(runs[i]!, step - 5, step)).updates, updates)
    }
    // The import into b2 took a heavy ball for an ema, so its buffer has another value.
    const [own, other] = [await tensorsOf(service, 'b1'), await tensorsOf(service, 'b2')]
    t.not(own['state.qk.momentum_buffer']![0], other['state.qk.momentum_buffer']![0])
    await t.rejects(importing(service, 'b2', sources[2]!, '--from', 'muond'), {
      message: `the file does not say what the momentum of 'm' is: give --momentum-form ema or heavy_ball`,
    })
    for (const each of [client, ...runs]) await each.close()
    await service.app.close()
  },
)

t.test('a damaged checkpoint is refused before a byte of it is sent', async (t) => {
  const data = t.testdir({})
  const service = await start({ data, checkpoint_file_bytes: 2000, checkpoint_steps: 1 })
  const { client } = await train(service, { run: 'a', last: 1 })
  const folder = join(data, 'runs', 'a', 'checkpoints', 'step-000000000001')
  const shard = join(folder, 'state-00004-of-00004.safetensors')
  const bytes = readFileSync(shard)
  bytes[bytes.length - 1]! ^= 1
  writeFileSync(shard, bytes)
  const { digest } = service.runs.get('a')
  await t.rejects(importing(service, 'a', folder, '--from', 'muond'), {
    name: 'ConfigError',
    message: /has SHA-256 \w+, expected \w+$/,
  })
  t.equal(service.runs.get('a').digest, digest)
  await client.close()
  await service.app.close()
})

/** Two matrices, an embedding and a vector, as a model has them. */
const SMALL = {
  groups: [
    { name: 'ema', algorithm: 'muon', momentum: 0.9 },
    { name: 'rest', algorithm: 'adamw' },
  ],
  parameters: [
    { name: 'e', shape: [4, 2], group: 'rest' },
    { name: 'h.0', shape: [2, 3], group: 'ema' },
    { name: 'h.1', shape: [5, 3], group: 'ema' },
    { name: 'conv', shape: [2, 3, 2, 2], group: 'ema', matrices: 'flatten' },
    { name: 'n', shape: [2], group: 'rest' },
  ],
}
const adam = (shape: readonly number[], seed: number) => {
  const square = f32(shape, seed + 1)
  return {
    first: f32(shape, seed),
    second: { ...square, data: bytesOf(Float32Array.from(valuesOf(square), Math.abs)) },
  }
}

t.test('Moonlight’s state is a heavy ball, with names of its own for AdamW', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const [embedding, norm] = [adam([4, 2], 1), adam([2], 3)]
  const [m0, m1, conv] = [f32([2, 3], 5), f32([5, 3], 6), f32([2, 12], 7)]
  const moments = ({ first, second }: ReturnType<typeof adam>, step: number) => {
    return { use_muon: false, step: int(step), moment1: first, moment2: second }
  }
  const path = await writeTorch(
    join(t.testdir({}), 'moonlight.pt'),
    [
      [int(0), { use_muon: true, momentum_buffer: m0 }],
      [int(1), { use_muon: true, momentum_buffer: m1 }],
      [int(2), { use_muon: true, momentum_buffer: conv }],
      [int(3), moments(embedding, 7)],
      [int(4), moments(norm, 7)],
    ],
    list([group([0, 1, 2, 3, 4].map(int))]),
  )
  await importing(service, 'r', path, '--from', 'moonlight', '--order', '--step', '12')
  const kept = await tensorsOf(service, 'r')
  const ema = (tensor: Values) => valuesOf(tensor).map((value) => Math.fround(value * (1 - 0.9)))
  t.same(kept, {
    'state.e.step': [7],
    'state.h.0.step': [12],
    'state.h.1.step': [12],
    'state.conv.step': [12],
    'state.n.step': [7],
    'state.e.exp_avg': valuesOf(embedding.first),
    'state.e.exp_avg_sq': valuesOf(embedding.second),
    'state.h.0.momentum_buffer': ema(m0),
    'state.h.1.momentum_buffer': ema(m1),
    'state.conv.momentum_buffer': ema(conv),
    'state.n.exp_avg': valuesOf(norm.first),
    'state.n.exp_avg_sq': valuesOf(norm.second),
  })
  await client.close()
  await service.app.close()
})

t.test('KellerJordan’s state is an average, and its matrices may be sorted by their shapes', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const [embedding, norm] = [adam([4, 2], 1), adam([2], 3)]
  const [m0, m1, conv] = [f32([2, 3], 5), f32([5, 3], 6), f32([2, 3, 2, 2], 7)]
  const moments = ({ first, second }: ReturnType<typeof adam>, step: number) => {
    return { step: int(step), exp_avg: first, exp_avg_sq: second }
  }
  // AdamW's groups first, then Muon's, the largest size first.
  const path = await writeTorch(
    join(t.testdir({}), 'kj.pt'),
    [
      [int(0), moments(embedding, 3)],
      [int(1), moments(norm, 4)],
      [int(2), { momentum_buffer: m1 }],
      [int(3), { momentum_buffer: conv }],
      [int(4), { momentum_buffer: m0 }],
    ],
    list([group([int(0), int(1)]), group([int(2), int(3), int(4)])]),
  )
  await importing(service, 'r', path, '--from', 'keller-jordan', '--order')
  t.match(await tensorsOf(service, 'r'), {
    'state.e.step': [3],
    'state.n.step': [4],
    'state.h.0.step': [1],
    'state.e.exp_avg': valuesOf(embedding.first),
    'state.h.0.momentum_buffer': valuesOf(m0),
    'state.h.1.momentum_buffer': valuesOf(m1),
    'state.conv.momentum_buffer': valuesOf(conv),
  })
  await t.rejects(importing(service, 'r', path, '--from', 'torch-optimizer', '--order'), {
    message: `'momentum_buffer' of parameter 'h.0' has shape [5,3] in the file, [2,3] in the run`,
  })
  await client.close()
  await service.app.close()
})

/** Writes a file as numpy.savez does. */
async function writeNumpy(
  path: string,
  arrays: Record<
    string,
    {
      descr: string
      shape: readonly number[]
      data: Uint8Array
      columns?: boolean
      version?: number
      header?: string
      headerBytes?: number
    }
  >,
): Promise<string> {
  const parts: Uint8Array[] = []
  const zip = new ZipWriter(async (bytes) => void parts.push(bytes.slice()))
  for (const [name, { descr, shape, data, columns = false, version = 1, header, headerBytes }] of Object.entries(
    arrays,
  )) {
    const sizes = shape.length === 1 ? `${shape[0]},` : shape.join(', ')
    const text =
      header ?? `{'descr': '${descr}', 'fortran_order': ${columns ? 'True' : 'False'}, 'shape': (${sizes}), }\n`
    const head = Buffer.alloc(version === 1 ? 10 : 12)
    head.write('\x93NUMPY', 'latin1')
    head[6] = version
    if (version === 1) head.writeUInt16LE(headerBytes ?? text.length, 8)
    else head.writeUInt32LE(headerBytes ?? text.length, 8)
    const bytes = Buffer.concat([head, Buffer.from(text), data])
    await zip.add(`${name}.npy`, bytes.length, [bytes])
  }
  await zip.end()
  writeFileSync(path, Buffer.concat(parts))
  return path
}

t.test('optax has one count, mu for Muon, and mu and nu for Adam', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const folder = t.testdir({})
  const [embedding, norm] = [adam([4, 2], 1), adam([2], 3)]
  const [m0, m1, conv] = [f32([2, 3], 5), f32([5, 3], 6), f32([2, 3, 2, 2], 7)]
  const array = ({ shape, data }: Values) => ({ descr: '<f4', shape, data })
  const columns = Float32Array.from({ length: 6 }, (_, i) => valuesOf(m0)[(i % 2) * 3 + Math.floor(i / 2)]!)
  const arrays = {
    count: { descr: '<f8', shape: [], data: new Uint8Array(Float64Array.of(9).buffer) },
    'mu/e': array(embedding.first),
    'nu/e': array(embedding.second),
    'mu/h/0': { ...array(m0), data: bytesOf(columns), columns: true },
    'mu/h/1': array(m1),
    'mu/conv': { ...array(conv), version: 2 },
    'mu/n': array(norm.first),
    'nu/n': array(norm.second),
  }
  const expected = {
    'state.e.step': [9],
    'state.h.0.step': [9],
    'state.e.exp_avg': valuesOf(embedding.first),
    'state.e.exp_avg_sq': valuesOf(embedding.second),
    'state.h.0.momentum_buffer': valuesOf(m0),
    'state.h.1.momentum_buffer': valuesOf(m1),
    'state.conv.momentum_buffer': valuesOf(conv),
    'state.n.exp_avg': valuesOf(norm.first),
  }
  const npz = await writeNumpy(join(folder, 'o.npz'), arrays)
  await importing(service, 'r', npz, '--from', 'optax')
  t.match(await tensorsOf(service, 'r'), expected)
  const file = writeTensors(join(folder, 'o.safetensors'), {
    count: { dtype: 'I32', shape: [], data: new Uint8Array(Int32Array.of(9).buffer) },
    'mu/e': embedding.first,
    'nu/e': embedding.second,
    'mu/matrices/first': m0,
    'mu/h.1': m1,
    'mu/conv': conv,
    'mu/n': norm.first,
    'nu/n': norm.second,
  })
  writeFileSync(join(folder, 'names.json'), '{"matrices/first": "h.0"}')
  await importing(service, 'r', file, '--from', 'optax', '--names', join(folder, 'names.json'))
  t.match(await tensorsOf(service, 'r'), expected)
  const refusals: [Record<string, Parameters<typeof writeNumpy>[1][string]>, RegExp][] = [
    [{ 'mu/e': { ...arrays['mu/e'], descr: '>f4' } }, /entry 'mu\/e\.npy' is >f4, expected one of <f4/],
    [{ 'nu/e': arrays['nu/e'] }, /there is 'nu\/e' but no 'mu\/e'/],
    [{ 'trace/e': arrays['mu/e'] }, /tensor 'trace\/e' has no name of the form mu\/<path>/],
    [{ 'mu/e': { ...arrays['mu/e'], version: 9 } }, /is no array of numpy/],
    [
      { count: { ...arrays.count, shape: [2], data: new Uint8Array(16) } },
      /'count' has shape \[2\], expected one number/,
    ],
    [
      { count: { ...arrays.count, descr: '<f2', data: new Uint8Array(2) } },
      /'count' is float16, expected a float32, float64/,
    ],
    [
      { 'mu/h.0': { ...arrays['mu/h/0'], data: new Uint8Array(23) }, count: arrays.count },
      /entry 'mu\/h\.0\.npy' has 23 bytes of numbers, expected 24$/,
    ],
    [
      { 'mu/h/0': { ...arrays['mu/h/0'], descr: '<f8', data: new Uint8Array(48) } },
      /'momentum_buffer' of parameter 'h\.0' is float64, expected one of float32/,
    ],
    [{ "mu/'": { ...arrays['mu/e'], descr: "x', 'y" } }, /entry 'mu\/'\.npy' is x, expected/],
    [{ 'mu/e': { ...arrays['mu/e'], header: '{}' } }, /entry 'mu\/e\.npy' has the header "\{\}"/],
    [{ 'mu/e': { ...arrays['mu/e'], headerBytes: 60_000 } }, /entry 'mu\/e\.npy' has a header of 60000 bytes/],
  ]
  for (const [content, message] of refusals) {
    const path = await writeNumpy(join(folder, 'refused.npz'), content)
    await t.rejects(importing(service, 'r', path, '--from', 'optax', '--partial'), { message })
  }
  t.match(await tensorsOf(service, 'r'), expected)
  await client.close()
  await service.app.close()
})

t.test('names are mapped, the others keep theirs, and nobody is taken for another', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const folder = t.testdir({})
  const path = writeTensors(
    join(folder, 'x.safetensors'),
    {
      'state.first.momentum_buffer': f32([2, 3], 1),
      'state.first.step': { dtype: 'I64', shape: [], data: new Uint8Array(BigInt64Array.of(4n).buffer) },
      'state.h.1.momentum_buffer': f32([5, 3], 2),
      'state.h.1.step': { shape: [], data: bytesOf(Float32Array.of(5)) },
    },
    { momentum_form: '{"first":"heavy_ball","h.1":"ema"}' },
  )
  const names = (map: object) => {
    writeFileSync(join(folder, 'names.json'), JSON.stringify(map))
    return importing(service, 'r', path, '--from', 'muond', '--partial', '--names', join(folder, 'names.json'))
  }
  await names({ first: 'h.0' })
  const kept = await tensorsOf(service, 'r')
  t.same(
    kept['state.h.0.momentum_buffer'],
    valuesOf(f32([2, 3], 1)).map((value) => Math.fround(value * (1 - 0.9))),
  )
  t.same(kept['state.h.1.momentum_buffer'], valuesOf(f32([5, 3], 2)))
  t.same([kept['state.h.0.step'], kept['state.h.1.step'], kept['state.e.step']], [[4], [5], [0]])
  await t.rejects(names({}), { message: `the file has state of 'first', the run has no parameter of that name` })
  await t.rejects(names({ first: 'h.1' }), { message: `'first' and 'h.1' of the file are both for 'h.1'` })
  await t.rejects(names({ first: 'h.0', 'h.9': 'n' }), {
    message: `the map of names has 'h.9', the file has no parameter of that name`,
  })
  await t.rejects(names({ first: 'e' }), {
    message: `the file has 'momentum_buffer' of parameter 'e', adamw keeps exp_avg, exp_avg_sq`,
  })
  await t.rejects(names({ first: 7 }), { message: /names\.json is no map from names to names$/ })
  for (const none of [[], null]) {
    writeFileSync(join(folder, 'none.json'), JSON.stringify(none))
    const attempt = importing(service, 'r', path, '--from', 'muond', '--names', join(folder, 'none.json'))
    await t.rejects(attempt, { message: /none\.json is no map from names to names$/ })
  }
  const word = writeTensors(
    join(folder, 'y.safetensors'),
    { 'state.h.0.momentum_buffer': f32([2, 3], 1) },
    { momentum_form: 'heavy_ball' },
  )
  await importing(service, 'r', word, '--from', 'muond', '--partial')
  t.same((await tensorsOf(service, 'r'))['state.h.0.momentum_buffer'], kept['state.h.0.momentum_buffer'])
  writeFileSync(join(folder, 'names.json'), '[')
  await t.rejects(importing(service, 'r', path, '--from', 'muond', '--names', join(folder, 'names.json')), {
    message: /cannot be read: Unexpected/,
  })
  await client.close()
  await service.app.close()
})

t.test('a buffer that torch does not keep without momentum is zero, and that is said', async (t) => {
  const service = await start()
  const model = (momentum: number) => ({
    groups: [{ name: 'g', algorithm: 'rmsprop', momentum }],
    parameters: [{ name: 'w', shape: [3], group: 'g' }],
  })
  const clients = [await opened(service, 'without', model(0)), await opened(service, 'with', model(0.5))]
  const square = { shape: [3], data: bytesOf(Float32Array.of(1, 2, 3)) }
  const path = await writeTorch(
    join(t.testdir({}), 'r.pt'),
    [[int(0), { step: { shape: [], data: bytesOf(Float32Array.of(6)) }, square_avg: square, momentum_buffer: null }]],
    list([group([int(0)], ['w'])]),
  )
  const printed = await importing(service, 'without', path, '--from', 'torch-optimizer')
  t.match(
    printed,
    /the state of 1 parameter, .*the service keeps no checkpoints\nparameter 'w' has no momentum_buffer in the file: it is zero$/,
  )
  t.same(await tensorsOf(service, 'without'), {
    'state.w.step': [6],
    'state.w.square_avg': [1, 2, 3],
    'state.w.momentum_buffer': [0, 0, 0],
  })
  await t.rejects(importing(service, 'with', path, '--from', 'torch-optimizer'), {
    message: `the file has no 'momentum_buffer' of parameter 'w'`,
  })
  for (const client of clients) await client.close()
  await service.app.close()
})

t.test('a parameter that torch has not stepped yet has no state', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', {
    groups: [{ name: 'g', algorithm: 'muon' }],
    parameters: [
      { name: 'w', shape: [1, 2], group: 'g' },
      { name: 'v', shape: [1, 2], group: 'g' },
    ],
  })
  await client.step(1, [Float32Array.of(1, 2), Float32Array.of(3, 4)])
  const path = await writeTorch(
    join(t.testdir({}), 'm.pt'),
    [[int(0), { momentum_buffer: { shape: [1, 2], data: bytesOf(Float32Array.of(5, 6)) } }]],
    list([group([int(0), int(1)], ['w', 'v'])]),
  )
  await importing(service, 'r', path, '--from', 'torch-optimizer')
  t.same(await tensorsOf(service, 'r'), { 'state.w.step': [1], 'state.v.step': [0], 'state.w.momentum_buffer': [5, 6] })
  await t.rejects(importing(service, 'r', path, '--from', 'torch-optimizer', '--order'), {
    message: '1 parameters of the file have no state: --order cannot tell which they are',
  })
  await client.close()
  await service.app.close()
})

const W = { shape: [2, 3], data: new Uint8Array(24) }
const marker = join(tmpdir(), `muond-import-ran-${process.pid}`)

t.test('a hostile .pt is refused by what it wants, and nothing of it runs', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const folder = t.testdir({})
  const archive = async (name: string, entries: Record<string, Uint8Array>) => {
    const parts: Uint8Array[] = []
    const zip = new ZipWriter(async (bytes) => void parts.push(bytes.slice()))
    for (const [entry, bytes] of Object.entries(entries)) await zip.add(entry, bytes.length, [bytes])
    await zip.end()
    const path = join(folder, name)
    writeFileSync(path, Buffer.concat(parts))
    return path
  }
  const command = `touch ${marker}`
  const evil = Buffer.concat([
    Buffer.from('\x80\x02cos\nsystem\nX', 'latin1'),
    Buffer.from([command.length, 0, 0, 0]),
    Buffer.from(`${command}\x85R.`, 'latin1'),
  ])
  const good = [[int(0), { momentum_buffer: W }]] as const
  const named = list([group([int(0)], ['h.0'])])
  const bytes = persistent(tuple('storage', global('torch', 'ByteStorage'), '0', 'cpu', int(1)))
  const byte = call(global('torch._utils', '_rebuild_tensor_v2'), bytes, int(0), tuple(), tuple(), false, dict([]))
  const file = (name: string) => join(folder, name)
  const plain = readFileSync(await writeTorch(file('good.pt'), good, named))
  const cut = (name: string, bytes: Uint8Array) => {
    writeFileSync(file(name), bytes)
    return file(name)
  }
  const state = (value: Picklable) =>
    pickle(
      dict([
        ['state', dict([[int(0), dict([['momentum_buffer', value]])]])],
        ['param_groups', named],
      ]),
    )
  const CASES: [string, string, RegExp][] = [
    [
      'os.system',
      await archive('evil.pt', { 'a/data.pkl': evil }),
      /evil\.pt: the file asks for os\.system, which no state dict/,
    ],
    [
      'the old format of torch.save',
      cut('old.pt', Buffer.from('\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.', 'latin1')),
      /old\.pt: it is no ZIP archive/,
    ],
    ['nothing', cut('empty.pt', Buffer.alloc(0)), /no ZIP archive, or is cut off/],
    ['cut off', cut('cut.pt', plain.subarray(0, -30)), /no ZIP archive, or is cut off/],
    [
      'no pickle',
      await archive('none.pt', { 'a/other': Buffer.alloc(1) }),
      /it has no data\.pkl, expected a file of torch\.save/,
    ],
    [
      'big-endian',
      await archive('big.pt', { 'a/data.pkl': pickle(dict([])), 'a/byteorder': Buffer.from('big') }),
      /its byte order is 'big', expected 'little'/,
    ],
    [
      'a list',
      await archive('list.pt', { 'a/data.pkl': pickle(list([])) }),
      /no optimizer's state dict with state and param_groups, it holds a list of 0/,
    ],
    [
      'a model',
      await archive('model.pt', { 'a/data.pkl': pickle(dict([['weight', int(1)]])) }),
      /there are 'weight' \(--key leads to one\)/,
    ],
    ['an empty dict', await archive('dict.pt', { 'a/data.pkl': pickle(dict([])) }), /there are no keys/],
    [
      'a storage that is lacking',
      await archive('lacking.pt', { 'a/data.pkl': state(tensorNode({ dtype: 'F32', shape: [2, 3] }, '7')) }),
      /it has no entry 'a\/data\/7'/,
    ],
    [
      'a storage that is short',
      await archive('short.pt', {
        'a/data.pkl': state(tensorNode({ dtype: 'F32', shape: [2, 3] }, '0')),
        'a/data/0': Buffer.alloc(20),
      }),
      /'momentum_buffer' of parameter 'h\.0' ends at byte 24 of its storage, which has 20/,
    ],
    [
      'a text as state',
      await archive('text.pt', { 'a/data.pkl': state('x') }),
      /'momentum_buffer' of parameter 'h\.0' is 'x', expected a tensor/,
    ],
    [
      'a state without a name',
      await writeTorch(file('unnamed.pt'), [[int(0), {}]], list([dict([['params', list([list([])])]])])),
      /a parameter of a param_group is a list of 0/,
    ],
    [
      'an index twice',
      await writeTorch(file('twice.pt'), good, list([group([int(0), int(0)])])),
      /is 0, expected an index or a name of its own/,
    ],
    [
      'a group that is none',
      await writeTorch(file('group.pt'), good, list([int(3)])),
      /a param_group is 3 without params/,
    ],
    [
      'a step that is none',
      await writeTorch(file('step.pt'), [[int(0), { momentum_buffer: W, step: W }]], named),
      /'step' of parameter 'h\.0' has shape \[2,3\], expected one number/,
    ],
    [
      'a step in a byte',
      await archive('byte.pt', {
        'a/data.pkl': pickle(
          dict([
            ['state', dict([[int(0), dict([['step', byte]])]])],
            ['param_groups', named],
          ]),
        ),
        'a/data/0': Buffer.alloc(1),
      }),
      /'step' of parameter 'h\.0' is uint8, expected one of float32/,
    ],
    [
      'half a step',
      await writeTorch(file('half.pt'), [[int(0), { momentum_buffer: W, step: float(1.5) }]], named),
      /step of parameter 'h\.0' is 1\.5 in the file/,
    ],
    [
      'integers as state',
      await writeTorch(file('int.pt'), [[int(0), { momentum_buffer: { dtype: 'I32', ...W } }]], named),
      /'momentum_buffer' of parameter 'h\.0' is int32, expected one of float32, bfloat16, float16/,
    ],
    [
      'a number as a name',
      await archive('key.pt', {
        'a/data.pkl': pickle(
          dict([
            ['state', dict([[int(0), dict([[int(7), int(1)]])]])],
            ['param_groups', named],
          ]),
        ),
      }),
      /state 7 of parameter 'h\.0' has no name that is a text/,
    ],
    ['a file that is not there', file('absent.pt'), /absent\.pt cannot be opened: ENOENT/],
  ]
  for (const [name, path, message] of CASES) {
    const attempt = importing(service, 'r', path, '--from', 'torch-optimizer', '--partial')
    await t.rejects(attempt, { name: 'ConfigError', message }, name)
  }
  t.notOk(existsSync(marker))
  t.equal(service.runs.get('r').stateBytes, 0)
  const infinite = f32([2, 3], 1)
  new Float32Array(infinite.data.buffer)[3] = Infinity
  const path = await writeTorch(file('inf.pt'), [[int(0), { momentum_buffer: infinite }]], named)
  await t.rejects(importing(service, 'r', path, '--from', 'torch-optimizer', '--partial'), {
    message:
      /answers 422: tensor 'state\.h\.0\.momentum_buffer' has Infinity as element 3, expected a finite number \(STATE_INVALID\)$/,
  })
  const unnamed = await writeTorch(file('anonymous.pt'), good, list([group([int(0)])]))
  const mapped = (map: object) => {
    writeFileSync(file('names.json'), JSON.stringify(map))
    return importing(service, 'r', unnamed, '--from', 'torch-optimizer', '--partial', '--names', file('names.json'))
  }
  await t.rejects(mapped({}), {
    message: 'parameter 0 of the file has no name there: give a map with --names, or --order',
  })
  t.match(await mapped({ 0: 'h.0' }), /state of 1 parameter/)
  const whole = pickle(
    dict([
      ['epoch', int(3)],
      [
        'optimizer',
        dict([
          ['state', dict([])],
          ['param_groups', named],
        ]),
      ],
    ]),
  )
  const nested = await archive('nested.pt', { 'a/data.pkl': whole })
  t.match(
    await importing(service, 'r', nested, '--from', 'torch-optimizer', '--key', 'optimizer', '--partial'),
    /state of 1 parameter/,
  )
  await t.rejects(importing(service, 'r', nested, '--from', 'torch-optimizer', '--key', 'epoch.x'), {
    message: /it has no 'epoch\.x', it holds 3$/,
  })
  await t.rejects(importing(service, 'r', file('good.pt'), '--from', 'torch-optimizer', '--key', 'a.b'), {
    message: /it has no 'a\.b', there are 'state', 'param_groups'$/,
  })
  await client.close()
  await service.app.close()
})

t.test('files of the wrong kind, and indices that lead elsewhere, are refused', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const folder = t.testdir({
    empty: {},
    'folder.npz': {},
    'folder.safetensors': {},
    'x.index.json': '{',
    'y.index.json': '{}',
    'z.index.json': '{"weight_map":{"a":"../z.safetensors"}}',
    notes: '',
  })
  const path = (name: string) => join(folder, name)
  writeTensors(path('named.safetensors'), { w: W })
  writeTensors(path('a.safetensors'), { 'state.h.0.momentum_buffer': W })
  writeTensors(path('b.safetensors'), { 'state.h.0.momentum_buffer': W })
  writeFileSync(path('both.index.json'), '{"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}')
  writeFileSync(path('cut.safetensors'), readFileSync(path('a.safetensors')).subarray(0, -1))
  const CASES: [string, string, RegExp][] = [
    ['good.pt', 'muond', /good\.pt is a file of torch, not of muond$/],
    ['good.pth', 'optax', /good\.pth is a file of torch, not of optax$/],
    ['a.npz', 'moonlight', /a\.npz is a file of numpy, expected for moonlight is another one$/],
    ['named.safetensors', 'muond', /tensor 'w' has no name of the form state\.<parameter>\.<tensor>$/],
    ['cut.safetensors', 'muond', /cut\.safetensors: tensors end at byte 24, the data has 23 bytes$/],
    ['folder.npz', 'optax', /folder\.npz: EISDIR/],
    ['folder.safetensors', 'muond', /folder\.safetensors: EISDIR/],
    ['empty', 'muond', /empty is a folder with neither a manifest nor one index$/],
    ['notes', 'muond', /notes is no folder, and its ending is that of no known file/],
    ['x.index.json', 'muond', /x\.index\.json is no JSON/],
    ['y.index.json', 'muond', /y\.index\.json has no weight_map$/],
    ['z.index.json', 'muond', /z\.index\.json names the file "\.\.\/z\.safetensors", expected one beside it$/],
    ['w.index.json', 'muond', /w\.index\.json cannot be read: ENOENT/],
    ['both.index.json', 'muond', /b\.safetensors has tensor 'state\.h\.0\.momentum_buffer', as another file has$/],
  ]
  for (const [name, from, message] of CASES) {
    await t.rejects(importing(service, 'r', path(name), '--from', from), { name: 'ConfigError', message }, name)
  }
  // In safetensors, a parameter has all of its tensors or none.
  await t.rejects(importing(service, 'r', path('a.safetensors'), '--from', 'torch-optimizer'), {
    message: /no state of 'e', 'h\.1', 'conv', 'n' of run 'r'; with partial/,
  })
  t.match(
    await importing(service, 'r', path('a.safetensors'), '--from', 'torch-optimizer', '--partial'),
    /state of 1 parameter/,
  )
  await client.close()
  await service.app.close()
})

t.test('every mistake has one line', async (t) => {
  const service = await start()
  const client = await opened(service, 'r', SMALL)
  const file = writeTensors(join(t.testdir({}), 'a.safetensors'), { 'state.h.0.momentum_buffer': W })
  const from = ['--from', 'torch-optimizer', '--url', service.http]
  const CASES: [string[], RegExp][] = [
    [[], /^import takes the name of a run and a file/],
    [['r'], /^import takes the name of a run and a file/],
    [['r', file, 'more'], /^import takes/],
    [['r', file], /^--from is missing, expected one of muond, torch-optimizer, moonlight, keller-jordan, optax$/],
    [['r', file, '--from', 'adam'], /^--from is 'adam', expected/],
    [['r', file, ...from, '--order', '--names', 'x'], /^--order and --names exclude each other$/],
    [['r', file, ...from, '--step', '0'], /^--step is '0', expected an integer from 1 on$/],
    [
      ['r', file, ...from, '--momentum-form', 'nesterov'],
      /^--momentum-form is 'nesterov', expected ema or heavy_ball$/,
    ],
    [['r', file, ...from, '--order'], /^the file has 1 parameters with momentum_buffer, the run has 3$/],
    [['nobody', file, ...from], /answers 404: there is no run 'nobody'; .* \(RUN_NOT_FOUND\)$/],
  ]
  for (const [argv, message] of CASES)
    await t.rejects(importCommand(argv, {}, SILENT), { name: 'ConfigError', message }, argv.join(' '))
  t.match(await importCommand(['-h'], {}, SILENT), /^muond import RUN FILE --from WHOSE/)
  await client.close()
  await service.app.close()
})

t.test('a service that goes away, or refuses in the middle, is told in one line', async (t) => {
  const service = await start()
  const elements = 2 ** 22
  const model = {
    groups: [{ name: 'g', algorithm: 'sgd' }],
    parameters: [{ name: 'w', shape: [elements], group: 'g' }],
  }
  const large = await start({ staging_bytes: 2 ** 25 })
  const client = await opened(large, 'r', model)
  const values = new Float32Array(elements)
  values[5] = NaN
  const file = writeTensors(join(t.testdir({}), 'a.safetensors'), {
    'state.w.step': { dtype: 'I64', shape: [], data: new Uint8Array(BigInt64Array.of(1n).buffer) },
    'state.w.momentum_buffer': { shape: [elements], data: bytesOf(values) },
  })
  const zeros = writeTensors(join(file, '..', 'z.safetensors'), {
    'state.w.step': { dtype: 'I64', shape: [], data: new Uint8Array(BigInt64Array.of(1n).buffer) },
    'state.w.momentum_buffer': { shape: [elements], data: new Uint8Array(4 * elements) },
  })
  await importing(large, 'r', zeros, '--from', 'muond')
  const out = `${zeros}.again`
  await exporting(large, 'r', '--to', 'safetensors', '--out', out)
  t.same(
    parseSafetensors(readFileSync(out)).tensors,
    parseSafetensors(readFileSync(zeros)).tensors,
    'it came in many pieces',
  )
  // The first piece of the body is refused while most of its 16 MiB is still to come.
  await t.rejects(importing(large, 'r', file, '--from', 'muond'), {
    name: 'ConfigError',
    message: /has NaN as element 5/,
  })

  let received = 0
  const peer = createServer(async (request, response) => {
    if (request.method === 'GET') {
      const answer = await fetch(`${large.http}${request.url}`)
      return void response.end(await answer.text())
    }
    request.on('data', (piece) => {
      received += piece.length
      if (received > 2 ** 20) request.destroy()
    })
    request.on('error', () => {})
  }).listen(0, '127.0.0.1')
  await new Promise((resolve) => peer.once('listening', resolve))
  const url = `http://127.0.0.1:${(peer.address() as AddressInfo).port}`
  await t.rejects(importCommand(['r', file, '--from', 'muond', '--url', url], {}, SILENT), {
    name: 'ConfigError',
    message: /cannot be reached: (read|write)? ?E|socket hang up/,
  })
  peer.closeAllConnections()
  peer.close()
  await client.close()
  await large.app.close()
  await service.app.close()
})
