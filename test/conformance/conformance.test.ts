import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { WebSocket } from 'ws'
import { Backing, CHUNK_BYTES } from '../../src/commands/conformance/backing.js'
import { CHECK_NAMES, type Check, Findings, type Row } from '../../src/commands/conformance/checks.js'
import { conformanceCommand } from '../../src/commands/conformance/conformance.js'
import { STEPS_NEEDED } from '../../src/commands/conformance/scenes.js'
import { Stage, type StageOptions } from '../../src/commands/conformance/stage.js'
import { Extent, Ranges } from '../../src/wire/ranges.js'
import { normal, RawClient } from '../service.js'
import { type Fault, PlainClient } from './plain-client.js'
import { train } from './trainer.js'

const FAULTS: Check[] = ['reconnect', 'receipt', 'overloaded', 'refused', 'draining', 'not-finite', 'lost-run']
const LIBERTIES: Check[] = ['cuts', 'unknown', 'ping', 'slow']

const backing = await Backing.start()
t.teardown(() => backing.close())

async function start(t: Test, options: Partial<StageOptions> = {}): Promise<Stage> {
  const stage = await Stage.start(backing, {
    ...{ host: '127.0.0.1', port: 0, quadratic: true, slow_seconds: 0.6, skip: new Set() },
    ...{ findings: new Findings(), ...options },
  })
  t.teardown(() => stage.close())
  return stage
}

const only = (...checks: Check[]) => new Set([...LIBERTIES, ...FAULTS].filter((check) => !checks.includes(check)))
const resultOf = (rows: readonly Row[], check: Check) => rows.find((row) => row.check === check)?.result

t.test('the Node client passes whole', async (t) => {
  const stage = await start(t)
  t.equal(await train(stage.address), STEPS_NEEDED - 1, 'it stops where the run is lost')
  t.equal(await stage.rest(), true)
  t.same(
    stage
      .rows()
      .filter(({ result }) => result !== 'passed')
      .map(({ check }) => check),
    ['skipped', 'checkpoint'],
  )
  t.ok(stage.isWhole)
})

t.test('so does the smallest client', async (t) => {
  const stage = await start(t)
  await t.rejects(new PlainClient(stage.address).train(STEPS_NEEDED), /RUN_NOT_FOUND/)
  await stage.rest()
  t.same(
    stage.rows().flatMap(({ faults }) => faults),
    [],
  )
  t.ok(stage.isWhole)
})

/** A client's fault, the check that finds it, what is told of it, and the scenes that it takes. */
const BROKEN: [Fault, Check, RegExp, Check[]][] = [
  ['text', 'frames', /a text message: send every frame as a binary message: the message is 8/, []],
  ['misspelt key', 'frames', /open.modus is unknown: the message is 8[0-9a-f]+… \(\d+ bytes\)/, []],
  ['end within a gradient', 'order', /FRAME_UNEXPECTED: a frame 'end' while.*; the last frames were .*\(step 1\)/, []],
  ['whole gradients', 'chunks', /gradient.data has 396 bytes, at most 250 are allowed: the message is 85/, []],
  ['negative lr', 'values', /lr is -1/, []],
  ['steps from 0', 'steps', /steps count from 1/, []],
  ['missing gradient', 'steps', /STEP_INCOMPLETE.*'w1'/, []],
  ['no takeover', 'reconnect', /open without takeover/, ['reconnect']],
  ['other bits', 'steps', /with another gradient/, ['reconnect']],
  ['update lost', 'answers', /the update of 'w1' for step 2 was lost/, ['reconnect']],
  ['update twice', 'arithmetic', /before step 3 element 0 of 'w\d' is/, ['reconnect']],
  ['no decay', 'arithmetic', /before step 2 element/, []],
  ['strict keys', 'unknown', /no further than step 2/, ['unknown']],
  ['strict types', 'unknown', /no further than step 2/, ['unknown']],
  ['one update at a time', 'cuts', /no further than step 2/, ['cuts']],
  ['no pong', 'ping', /not answered/, ['ping']],
  ['impatient', 'slow', /no further than step 2/, ['slow']],
  ['gives up', 'reconnect', /no further than step 2/, ['reconnect']],
  ['gives up', 'receipt', /no further than step 2/, ['receipt']],
  ['too early', 'overloaded', /opened again after 0\.\d+ s, retry_after_seconds was 0.5/, ['overloaded']],
  ['gives up at 503', 'refused', /no further than step 2/, ['refused']],
  ['gives up at 1012', 'draining', /no further than step 2/, ['draining']],
  ['trains NaN on', 'steps', /STEP_CONFLICT/, ['not-finite']],
  ['trains a new run on', 'lost-run', /goes on with weights of step 2/, ['lost-run']],
]

for (const [fault, check, told, scenes] of BROKEN) {
  t.test(`a client with the fault '${fault}' fails the check '${check}'`, async (t) => {
    const stage = await start(t, { skip: only(...scenes) })
    await new PlainClient(stage.address, fault).train(scenes.length + 2).catch(() => {})
    await stage.rest()
    const rows = stage.rows()
    t.equal(resultOf(rows, check), 'failed', JSON.stringify(rows.filter(({ result }) => result !== 'passed')))
    t.match(rows.find((row) => row.check === check)?.faults.join(), told)
    t.notOk(stage.isWhole)
  })
}

const trainer = fileURLToPath(new URL('trainer.js', import.meta.url))
const QUICK = ['ws://127.0.0.1:0', '--slow', '0']

/** Runs the command, and gathers what it tells on the way. */
async function run(argv: readonly string[], stop: Promise<unknown> = new Promise(() => {})) {
  let told = ''
  const write = (text: string) => {
    told += text
  }
  const { text, isWhole } = await conformanceCommand(argv, process.env, { terminal: { write }, stop })
  return { told, text, isWhole }
}

t.test('the command runs a client, and prints what it has found', async (t) => {
  const { text, told, isWhole } = await run([...QUICK, '--quadratic', '--', process.execPath, trainer])
  t.ok(isWhole)
  t.match(told, /^listening at ws:\/\/127.0.0.1:\d+\n$/)
  t.match(text, /^check +result +seen +what\nframes +passed +\d+ {2}frames are binary/)
  t.match(text, /\n\n19 passed, 0 failed, 2 not seen$/)
})

t.test('a client that is silent is ended, and one that stops where it may is started again', async (t) => {
  const endless = ['--patience', '0.2', '--json', '--', process.execPath, '-e', 'setInterval(() => {}, 1000)']
  t.match(JSON.parse((await run([...QUICK, ...endless])).text), {
    whole: false,
    checks: [{ check: 'frames', result: 'not seen' }],
  })
  const stopping = `import('${new URL('plain-client.js', import.meta.url)}').then(({ PlainClient }) => new PlainClient('{url}', 'stops at NaN').train(20))`
  const { text, isWhole } = await run([...QUICK, '--', process.execPath, '-e', stopping])
  t.ok(isWhole, text)
})

t.test('without a command it serves until it is stopped', async (t) => {
  const { text, isWhole } = await run(QUICK, Promise.resolve())
  t.notOk(isWhole)
  t.match(text, /0 passed, 0 failed, 20 not seen$/)
})

t.test('requests of REST and refusals reach the service behind', async (t) => {
  const stage = await start(t)
  const http = stage.address.replace('ws', 'http')
  t.match(await (await fetch(`${http}/v1/capabilities`)).json(), { protocols: [1] })
  const socket = new WebSocket(`${stage.address}/v2`)
  const [, response] = await once(
    socket.on('error', () => {}),
    'unexpected-response',
  )
  t.equal(response.statusCode, 400)
  response.resume()
  const { result, faults } = stage.rows()[CHECK_NAMES.indexOf('frames')]
  t.match([result, ...faults], ['failed', /the upgrade to '\/v2' is refused with 400: the stream is at \/v1\/stream/])
})

t.test('a faulty argument is told with what would be right', async (t) => {
  const cases: [string[], RegExp][] = [
    [['http://127.0.0.1'], /'http:\/\/127.0.0.1', expected a loopback address/],
    [['ws://0.0.0.0:1'], /expected a loopback address/],
    [['nonsense'], /expected a loopback address/],
    [['ws://[::1]:1', 'ws://127.0.0.1:1'], /takes one URL/],
    [['--skip', 'ping,pong'], /--skip names pong, expected some of frames/],
    [['--slow', 'x'], /--slow is 'x', expected seconds/],
    [['--slow='], /--slow is '', expected seconds/],
  ]
  for (const [argv, message] of cases) await t.rejects(run(argv), { name: 'ConfigError', message })
  t.match((await run(['--help'])).text, /^muond conformance \[URL\]/)
  await t.rejects(run([...QUICK, '--', '/no/such/program']), /ENOENT/)
  const stage = await start(t)
  await t.rejects(run([stage.address]), /EADDRINUSE/)
})

t.test('the status of the process is 1 where something is wrong or was not seen', async (t) => {
  const server = fileURLToPath(new URL('../../src/server.js', import.meta.url))
  const status = async (argv: readonly string[]) => {
    const child = spawn(process.execPath, [server, 'conformance', ...argv], { stdio: 'ignore' })
    const [code] = await once(child, 'exit')
    return code
  }
  t.equal(await status(['--help']), 0)
  t.equal(await status([...QUICK, '--', process.execPath, '--version']), 1)
})

t.test('docs/first-client.md has every check, the steps that a client takes, and the length of a chunk', async (t) => {
  const page = readFileSync('docs/first-client.md', 'utf8')
  for (const check of CHECK_NAMES) t.match(page, `\`${check}\``)
  t.match(page, `The client takes ${STEPS_NEEDED} steps or more`)
  t.match(page, `Its \`limits.chunk_bytes\` is ${CHUNK_BYTES}`)
})

t.test('what a client need not do is seen where it does it, and tensors in blocks are cut anywhere', async (t) => {
  const stage = await start(t, { skip: only('cuts', 'reconnect'), quadratic: false })
  const client = await RawClient.connect(`${stage.address}/v1/stream`)
  const parameters = [
    { name: 'blocks', shape: [40, 40], group: 'all', update_dtype: 'int8_block256' },
    { name: 'half', shape: [], group: 'all', gradient_dtype: 'bfloat16' },
  ]
  const groups = [{ name: 'all', algorithm: 'sgd', lr: 1 }]
  const shm = { kind: 'shm', nonce: Buffer.alloc(32), process: 1, descriptors: [1, 2] }
  const opened = await client.open({ run: 'r', groups, parameters, transport: [shm] })
  t.match(opened.transport, { kind: 'websocket', refused: [{ kind: 'shm', reason: /tensors come over the socket/ }] })
  client.send({ type: 'step', step: 1, gradient_scale: 0.5 })
  const gradients = [normal(1, 1600), Uint16Array.of(0x3f80)]
  for (const step of [1, 2]) await client.step(step, gradients, [0, 1], 250)
  t.equal(client.updates.get(0)!.data.length, 1600 + 14)
  client.send({ type: 'checkpoint', tag: 'best' })
  await client.expect('checkpointed')
  // A step without updates is no occasion for a scene.
  client.send({ type: 'end', step: 3, skipped: [0, 1] })
  await client.expect('receipt')
  client.gradient(7, 4, { values: Float32Array.of(1) })
  t.match(await client.expect('error'), { code: 'PARAMETER_UNKNOWN' })
  await client.close()
  await stage.rest()
  const rows = stage.rows()
  for (const check of ['cuts', 'hyperparameters', 'skipped', 'checkpoint'] as const)
    t.equal(resultOf(rows, check), 'passed')
  t.equal(resultOf(rows, 'reconnect'), 'not seen')
  t.equal(resultOf(rows, 'values'), 'failed')
})

t.test('members of a run are looked at, and nothing happens to them', async (t) => {
  const stage = await start(t, { quadratic: false })
  const groups = [{ name: 'all', algorithm: 'sgd', lr: 1 }]
  const members = await Promise.all([0, 1].map(() => RawClient.connect(`${stage.address}/v1/stream`)))
  for (const [rank, client] of members.entries()) {
    const ranges = [[2 * rank, 2 * rank + 2]]
    const parameters = [{ name: 'w', shape: [4], group: 'all', ranges }]
    await client.open({ run: 'r', groups, parameters, member: { rank, world_size: 2 } })
  }
  await members[0]!.expect('members')
  for (const step of [1, 2, 3]) {
    for (const [rank, client] of members.entries())
      client.gradient(0, step, {
        values: normal(1, 4),
        extent: Extent.of('float32', new Ranges([[2 * rank, 2 * rank + 2]])),
      })
    for (const client of members) client.send({ type: 'end', step })
    for (const client of members) await client.expect('receipt')
  }
  for (const client of members) client.socket.terminate()
  t.equal(stage.left, FAULTS.length + LIBERTIES.length)
})

t.test('the command shows what was wrong', async (t) => {
  const text = `import('${new URL('plain-client.js', import.meta.url)}').then(({ PlainClient }) => new PlainClient('{url}', 'text').train(1))`
  const verdict = await run([...QUICK, '--', process.execPath, '-e', text])
  t.match(verdict.text, /\n\nframes: a text message: send every frame as a binary message: the message is 8/)
  t.match(verdict.told, /\nframes: a text message/)
})

t.test('a frame before open, and one that is cut off, are told to the client and to its author', async (t) => {
  const stage = await start(t)
  const early = await RawClient.connect(`${stage.address}/v1/stream`, { headers: { authorization: 'Bearer any' } })
  early.send({ type: 'end', step: 1 })
  t.match(await early.expect('error'), { code: 'FRAME_UNEXPECTED' })
  t.match(await early.closed(), { code: 1002 })
  const socket = new WebSocket(`${stage.address}/v1/stream`, ['muond.v1', 'bearer.any'])
  await once(socket, 'open')
  t.equal(socket.protocol, 'muond.v1')
  socket.send(Buffer.of(0x81))
  await once(socket, 'close')
  const faults = new Map(stage.rows().map(({ check, faults }) => [check, faults.join()]))
  t.match(
    faults.get('order'),
    /^FRAME_UNEXPECTED: a frame 'end' before a successful open; the last frames were end \(step 1\)$/,
  )
  t.match(faults.get('frames'), /: the message is 81$/)
})
