import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import t from 'tap'
import { exportCommand } from '../../src/commands/export.js'
import { importCommand } from '../../src/commands/import.js'
import { byteProgress } from '../../src/commands/progress.js'
import { parseSafetensors } from '../../src/store/safetensors.js'
import { keyOf, keysFile } from '../http/keys.js'
import { MODEL, train, trainStep } from '../run/trainer.js'
import { exporting, opened, SILENT, start, stateOf } from './interchange.js'

const id = (step: number) => `step-${String(step).padStart(12, '0')}`

t.test('a run is exported as one safetensors file, or as shards with an index', async (t) => {
  const service = await start()
  const { client } = await train(service, { run: 'a', last: 3 })
  const folder = t.testdir({})
  const out = join(folder, 'a.safetensors')
  const printed = await exporting(service, 'a', '--to', 'safetensors', '--out', out)
  const body = await stateOf(service, 'a')
  t.equal(printed, `run 'a' at step 3, digest ${service.runs.get('a').digest}\n${out}\n5.33 kB of state`)
  t.same(readFileSync(out), body)
  t.same(readdirSync(folder), ['a.safetensors'])
  await t.rejects(exporting(service, 'a', '--to', 'safetensors', '--out', out), {
    name: 'ConfigError',
    message: `${out} exists already`,
  })

  const sharded = join(t.testdir({}), 'a.safetensors')
  const options = { ...SILENT, shard_bytes: 2000 }
  await exportCommand(['a', '--to', 'safetensors', '--out', sharded, '--url', service.http], {}, options)
  const names = readdirSync(join(sharded, '..')).sort()
  const index = JSON.parse(readFileSync(`${sharded}.index.json`, 'utf8'))
  t.same(names.slice(0, 2), ['a-00001-of-00004.safetensors', 'a-00002-of-00004.safetensors'])
  t.equal(names.length, 5)
  const { tensors } = parseSafetensors(body)
  t.same(Object.keys(index.weight_map), [...tensors.keys()])
  t.equal(
    index.metadata.total_size,
    [...tensors.values()].reduce((sum, { data }) => sum + data.length, 0),
  )
  for (const [name, file] of Object.entries<string>(index.weight_map)) {
    const shard = parseSafetensors(readFileSync(join(sharded, '..', file)))
    t.same(shard.tensors.get(name), tensors.get(name))
    t.match(shard.metadata, { run: 'a', step: '3' })
  }
  await client.close()
  await service.app.close()
})

t.test('a checkpoint is exported from a data folder while a service is at work there', async (t) => {
  const data = t.testdir({})
  const service = await start({ data, checkpoint_steps: 2, checkpoint_file_bytes: 2000 })
  const { client } = await train(service, { run: 'a', last: 2 })
  const second = parseSafetensors(await stateOf(service, 'a')).tensors
  await fetch(`${service.http}/v1/runs/a/checkpoints`, {
    method: 'POST',
    body: '{"tag":"best"}',
    headers: { 'content-type': 'application/json' },
  })
  for (const step of [3, 4]) await trainStep(client, step)
  await service.runs.keeper('a').settled()
  const fourth = parseSafetensors(await stateOf(service, 'a')).tensors
  let files = 0
  const offline = async (...rest: string[]) => {
    const out = join(data, `out-${files++}.safetensors`)
    await exportCommand(['a', '--to', 'safetensors', '--out', out, '--data', data, ...rest], {}, SILENT)
    return parseSafetensors(readFileSync(out)).tensors
  }
  t.same(await offline(), fourth)
  t.same(await offline('--checkpoint', 'best'), second)
  t.same(await offline('--checkpoint', id(2)), second)
  const first = await offline('--checkpoint', id(0))
  t.equal(first.size, 7, 'a count of 0 for every parameter')
  t.same(
    [...first.values()].map(({ data }) => Buffer.from(data).readBigInt64LE()),
    [0n, 0n, 0n, 0n, 0n, 0n, 0n],
  )
  mkdirSync(join(data, 'runs', 'empty', 'checkpoints'), { recursive: true })
  await t.rejects(exportCommand(['empty', '--to', 'safetensors', '--out', 'x', '--data', data], {}, SILENT), {
    message: `run 'empty' has no checkpoint yet, there are none`,
  })
  const refused = {
    name: 'ConfigError',
    message: `run 'a' has no checkpoint 'worst', there are ${id(0)}, ${id(2)}, ${id(4)}`,
  }
  await t.rejects(offline('--checkpoint', 'worst'), refused)
  await t.rejects(exportCommand(['b', '--to', 'safetensors', '--out', 'x', '--data', data], {}, SILENT), {
    message: /^data folder '.*' has no run 'b': ENOENT/,
  })
  await client.close()
  await service.app.close()

  const checkpoint = join(data, 'runs', 'a', 'checkpoints', id(4))
  const shard = readdirSync(checkpoint)
    .filter((name) => name.endsWith('.safetensors'))
    .at(-1)!
  const bytes = readFileSync(join(checkpoint, shard))
  bytes[bytes.length - 1]! ^= 1
  writeFileSync(join(checkpoint, shard), bytes)
  for (const format of ['safetensors', 'torch-dcp']) {
    const out = join(data, `damaged.${format}`)
    const command = exportCommand(['a', '--to', format, '--out', out, '--data', data], {}, SILENT)
    await t.rejects(command, { name: 'ConfigError', message: /has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/ })
    t.notOk(existsSync(out))
    t.notOk(existsSync(`${out}.partial`))
  }
  writeFileSync(join(checkpoint, shard), bytes.subarray(0, -1))
  await t.rejects(offline(), { message: /tensors end at byte|has \d+ bytes, expected \d+/ })
  rmSync(join(checkpoint, shard))
  await t.rejects(offline(), { message: /cannot be opened: ENOENT/ })
  writeFileSync(join(checkpoint, 'manifest.json'), '{}')
  await t.rejects(offline(), { message: /manifest\.json does not end with its SHA-256/ })
  rmSync(join(checkpoint, 'manifest.json'))
  mkdirSync(join(checkpoint, 'manifest.json'))
  await t.rejects(offline(), { message: /manifest\.json cannot be read: EISDIR/ })
})

t.test('torch-dcp is a file of torch files, one behind the other, and a pickle that says where each is', async (t) => {
  const service = await start()
  const { client } = await train(service, { run: 'a', last: 1 })
  const out = join(t.testdir({}), 'dcp')
  await exporting(service, 'a', '--to', 'torch-dcp', '--out', out)
  t.same(readdirSync(out).sort(), ['.metadata', '__0_0.distcp'])
  const data = readFileSync(join(out, '__0_0.distcp')).toString('latin1')
  const metadata = readFileSync(join(out, '.metadata')).toString('latin1')
  const stored = metadata.split('_StorageInfo').length - 1
  t.equal(data.split('PK\x05\x06').length - 1, stored)
  // Items: 7 counts, 12 tensors, and for every parameter its hyperparameters and its algorithm.
  t.ok(stored > 7 + 12 + 7 * 6, `${stored} items`)
  for (const name of ['state.m.momentum_buffer', 'state.scalar.max_exp_avg_sq', 'param_groups.qk.momentum_form'])
    t.match(metadata, name)
  const fresh = await opened(service, 'fresh', TORCH)
  await exporting(service, 'fresh', '--to', 'torch-dcp', '--out', `${out}-fresh`)
  t.notMatch(readFileSync(join(`${out}-fresh`, '.metadata')).toString('latin1'), /momentum_buffer/)
  await fresh.close()
  await client.close()
  await service.app.close()
})

const TORCH = {
  groups: [
    { name: 'muon', algorithm: 'muon' },
    { name: 'rest', algorithm: 'adamw' },
  ],
  parameters: [
    { name: 'b', shape: [3], group: 'rest' },
    { name: 'w', shape: [4, 3], group: 'muon' },
    { name: 'v', shape: [2, 3], group: 'rest' },
  ],
}

t.test('a torch file for each class of optimizer, with the order of its parameters', async (t) => {
  const service = await start()
  const client = await opened(service, 'a', TORCH)
  await client.step(1, [Float32Array.of(1, 2, 3), new Float32Array(12).fill(0.5), new Float32Array(6).fill(2)])
  const folder = t.testdir({})
  const printed = await exporting(service, 'a', '--to', 'torch-optimizer', '--out', join(folder, 'o.pt'))
  t.equal(
    printed,
    [
      `run 'a' at step 1, digest ${service.runs.get('a').digest}`,
      `${'file'.padEnd(folder.length + 11)}  optimizer          index  parameter`,
      `${folder}/o.Muon.pt   torch.optim.Muon       0  w`,
      `${folder}/o.AdamW.pt  torch.optim.AdamW      0  b`,
      `${''.padEnd(folder.length + 11)}                         1  v`,
    ].join('\n'),
  )
  t.same(readdirSync(folder).sort(), ['o.AdamW.pt', 'o.Muon.pt'])
  // The file of a single class has the name that was asked for.
  const only = await opened(service, 'only', { groups: TORCH.groups, parameters: [TORCH.parameters[1]!] })
  await exporting(service, 'only', '--to', 'torch-optimizer', '--out', join(folder, 'only.pt'))
  t.ok(existsSync(join(folder, 'only.pt')))
  await client.close()
  await only.close()
  await service.app.close()
})

t.test('what torch cannot hold is told, and left out if that is asked for', async (t) => {
  const service = await start()
  const groups = [
    { name: 'custom', algorithm: 'muon', adjust_lr_fn: 'rms:0.18' },
    { name: 'list', algorithm: 'muon', ns_coefficients: 'polar_express' },
    { name: 'decayed', algorithm: 'sgd', weight_decay: 0.1 },
    { name: 'named', algorithm: 'muon', ns_coefficients: 'keller_jordan', adjust_lr_fn: 'spectral' },
    { name: 'one', algorithm: 'muon', ns_coefficients: [[3.4445, -4.775, 2.0315]], adjust_lr_fn: 'none' },
  ]
  const parameters = groups.map(({ name }) => ({ name, shape: [2, 2], group: name }))
  const client = await opened(service, 'b', { groups, parameters })
  await client.step(
    1,
    parameters.map(() => Float32Array.of(1, 2, 3, 4)),
  )
  const { client: other } = await train(service, { run: 'a', last: 1 })
  const folder = t.testdir({})
  const arguments_ = (name: string) => ['--to', 'torch-optimizer', '--out', join(folder, name)]
  const reasons = [
    `parameter 'qk' of group 'muonclip' is split into blocks, torch.optim.Muon takes it as one matrix`,
    `parameter 'experts' of group 'normuon' has shape [2,8,6], torch.optim.Muon takes two dimensions`,
  ]
  await t.rejects(exporting(service, 'a', ...arguments_('a.pt')), { name: 'ConfigError', message: reasons.join('\n') })
  t.same(readdirSync(folder), [])
  const printed = await exporting(service, 'a', ...arguments_('a.pt'), '--partial')
  t.same(
    printed.split('\n').slice(-2),
    reasons.map((reason) => `left out: ${reason}`),
  )
  t.same(readdirSync(folder).sort(), ['a.Adam.pt', 'a.AdamW.pt', 'a.Muon.pt', 'a.RMSprop.pt', 'a.SGD.pt'])
  const left = await exporting(service, 'b', ...arguments_('b.pt'), '--partial')
  t.match(
    left,
    /left out: parameter 'custom' .* has adjust_lr_fn 'rms:0\.18', torch\.optim\.Muon knows original, match_rms_adamw, spectral, none/,
  )
  t.match(
    left,
    /left out: parameter 'list' .* has ns_coefficients "polar_express", torch\.optim\.Muon takes three numbers/,
  )
  t.match(left, /left out: parameter 'decayed' .* has weight_decay 0\.1, which torch\.optim\.SGD adds to the gradient/)
  t.notMatch(left, /left out: parameter '(named|one)'/)
  const none = await opened(service, 'none', { groups: [groups[0]], parameters: [parameters[0]] })
  await t.rejects(exporting(service, 'none', ...arguments_('none.pt'), '--partial'), {
    message: /has adjust_lr_fn 'rms:0.18'/,
  })
  for (const each of [client, other, none]) await each.close()
  await service.app.close()
})

t.test('NorMuon’s statistic is nothing that torch has', async (t) => {
  const service = await start()
  const groups = [{ name: 'n', algorithm: 'muon', second_momentum: 'normuon' }]
  const client = await opened(service, 'a', { groups, parameters: [{ name: 'w', shape: [2, 2], group: 'n' }] })
  const out = join(t.testdir({}), 'a.pt')
  await t.rejects(exporting(service, 'a', '--to', 'torch-optimizer', '--out', out), {
    message: `parameter 'w' of group 'n' has second_momentum normuon, torch.optim.Muon has none`,
  })
  await client.close()
  await service.app.close()
})

t.test('a run is exported and imported over a Unix socket', async (t) => {
  const service = await start()
  const { client } = await train(service, { run: 'a', last: 3 })
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const path = join(folder, 'm.sock')
  await service.listenLocally(path)
  const body = await stateOf(service, 'a')
  for (const [i, url] of [`ws+unix://${path}`, `http+unix://${path}`, `ws+unix://${path}:/v1/stream`].entries()) {
    const out = join(folder, `${i}.safetensors`)
    await exportCommand(['a', '--to', 'safetensors', '--out', out, '--url', url], {}, SILENT)
    t.same(readFileSync(out), body, url)
    const other = await opened(service, `to-${i}`, MODEL)
    await importCommand([`to-${i}`, out, '--from', 'muond', '--url', url], {}, SILENT)
    t.same(parseSafetensors(await stateOf(service, `to-${i}`)).tensors, parseSafetensors(body).tensors, url)
    await other.close()
  }
  const missing = ['a', '--to', 'safetensors', '--out', join(folder, 'x'), '--url', `ws+unix://${path}.gone`]
  await t.rejects(exportCommand(missing, {}, SILENT), {
    message: /^ws\+unix:.*m\.sock\.gone cannot be reached: .*ENOENT/,
  })
  await client.close()
  await service.app.close()
})

t.test('every mistake has one line', async (t) => {
  const file = keysFile(t, [
    { name: 'reader', scopes: ['read'] },
    { name: 'writer', scopes: ['step'] },
  ])
  const service = await start({ keys_file: file.path })
  const folder = dirname(file.path)
  writeFileSync(join(folder, 'key'), `${keyOf('reader')}\n`)
  const out = join(folder, 'x')
  const CASES: [string[], RegExp][] = [
    [[], /^export takes the name of one run/],
    [['a', 'b'], /^export takes the name of one run/],
    [['a'], /^--to is missing, expected one of safetensors, torch-dcp, torch-optimizer$/],
    [['a', '--to', 'onnx', '--out', out], /^--to is 'onnx', expected/],
    [['a', '--to', 'safetensors'], /^--out is missing/],
    [['a', '--to', 'safetensors', '--out', out, '--checkpoint', 'x'], /^--checkpoint goes with --data$/],
    [
      ['a', '--to', 'safetensors', '--out', out, '--data', 'x', '--url', service.http],
      /^--data and --url exclude each other$/,
    ],
    [['a', '--to', 'safetensors', '--out', out, '--url', 'ftp://x'], /^--url is 'ftp:\/\/x', expected one such as/],
    [['a', '--to', 'safetensors', '--out', out, '--url', 'ws+unix://run/m.sock'], /expected .* or ws\+unix:\/\/\/run/],
    [
      ['a', '--to', 'safetensors', '--out', out, '--url', 'http://127.0.0.1:1'],
      /^http:\/\/127\.0\.0\.1:1 cannot be reached: .*ECONNREFUSED/,
    ],
    [
      ['a', '--to', 'safetensors', '--out', out, '--url', service.http],
      /answers 401: a key is needed.* \(UNAUTHORIZED\)$/,
    ],
    [
      ['a', '--to', 'safetensors', '--out', out, '--url', service.http, '--token-file', join(folder, 'key')],
      /answers 404: there is no run 'a'; .* \(RUN_NOT_FOUND\)$/,
    ],
    [
      ['a', '--to', 'safetensors', '--out', out, '--url', 'http://localhost:1'],
      /^http:\/\/localhost:1 cannot be reached: .*ECONNREFUSED/,
    ],
    [
      ['a', '--to', 'safetensors', '--out', out, '--url', service.http.replace('http', 'https')],
      /cannot be reached: .*(EPROTO|SSL|wrong version)/,
    ],
    [
      ['a', '--to', 'safetensors', '--out', out, '--token-file', join(folder, 'nowhere')],
      /^--token-file: ENOENT: no such file/,
    ],
    [['a', '--from', 'x'], /^Unknown option '--from'/],
  ]
  for (const [argv, message] of CASES)
    await t.rejects(exportCommand(argv, {}, SILENT), { name: 'ConfigError', message }, argv.join(' '))
  const fromVariable = exportCommand(
    ['a', '--to', 'safetensors', '--out', out, '--url', service.http],
    { MUOND_TOKEN: keyOf('reader') },
    SILENT,
  )
  await t.rejects(fromVariable, { message: /RUN_NOT_FOUND/ })
  const unfit = exportCommand(
    ['a', '--to', 'safetensors', '--out', out, '--url', service.http],
    { MUOND_TOKEN: keyOf('writer') },
    SILENT,
  )
  await t.rejects(unfit, { message: /takes a key with the scope read; this one has step \(FORBIDDEN\)$/ })
  t.match(await exportCommand(['--help'], {}, SILENT), /^muond export RUN --to FORMAT --out PATH/)
  await service.app.close()
})

t.test('a peer that is no muond, or leaves in the middle, is told in one line and leaves nothing behind', async (t) => {
  const service = await start()
  const { client } = await train(service, { run: 'a', last: 1 })
  const body = await stateOf(service, 'a')
  const folder = t.testdir({})
  let answer: (response: import('node:http').ServerResponse) => void = () => {}
  const peer = createServer((_request, response) => answer(response)).listen(0, '127.0.0.1')
  await new Promise((resolve) => peer.once('listening', resolve))
  const url = `http://127.0.0.1:${(peer.address() as AddressInfo).port}`
  const attempt = (to: string) => exportCommand(['a', '--to', to, '--out', join(folder, 'x'), '--url', url], {}, SILENT)
  answer = (response) => response.writeHead(500).end('<html>')
  await t.rejects(attempt('safetensors'), { message: /answers 500: <html>$/ })
  answer = (response) => response.writeHead(500).end()
  await t.rejects(attempt('safetensors'), { message: /answers 500: nothing$/ })
  answer = (response) => response.end('hello')
  await t.rejects(attempt('safetensors'), /ends after 5 bytes, within its header/)
  const other = await (await fetch(`${service.http}/v1/runs/a/parameters/0/state`)).arrayBuffer()
  answer = (response) => response.end(Buffer.from(other))
  await t.rejects(attempt('safetensors'), { message: 'it says that it is format undefined of muond, expected 1' })
  for (const to of ['safetensors', 'torch-dcp', 'torch-optimizer']) {
    answer = (response) => {
      response.writeHead(200, { 'content-length': body.length })
      response.write(body.subarray(0, -100), () => response.destroy())
    }
    await t.rejects(attempt(to), {
      name: 'ConfigError',
      message: to === 'torch-optimizer' ? /torch\.optim/ : /connection was lost/,
    })
    t.same(readdirSync(folder), [])
  }
  peer.closeAllConnections()
  peer.close()
  await client.close()
  await service.app.close()
})

t.test('a terminal is told how far a large state is, and nothing else is', async (t) => {
  const written: string[] = []
  const terminal = { isTTY: true, columns: 60, write: (text: string) => written.push(text) }
  const progress = byteProgress('exporting:', 200e6, terminal)
  for (let i = 0; i < 100; i++) progress.done(2e6)
  progress.end()
  t.equal(written[0], '\rexporting: 2 MB of 200 MB, 1 %\x1b[K')
  t.same(written.slice(-2), ['\rexporting: 200 MB of 200 MB, 100 %\x1b[K', '\n'])
  t.ok(written.length < 10, 'not for every piece')
  written.length = 0
  for (const other of [byteProgress('a', 1e6, terminal), byteProgress('a', 200e6, { write: terminal.write })]) {
    other.done(1e6)
    other.end()
  }
  t.same(written, [])
})
