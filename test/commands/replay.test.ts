import { execFile } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { PassThrough } from 'node:stream'
import { promisify } from 'node:util'
import t from 'tap'
import { connect } from '../../src/client/client.js'
import { replayCommand } from '../../src/commands/replay.js'
import { gradientsOf, modelOf } from '../client/model.js'
import { QUICK } from '../client/service.js'
import { startCluster, wholeOf } from '../cluster/service.js'
import { id, runFolder } from '../keep/data-folder.js'
import { forge, groupsFile, recorder, replaying } from '../replay/recorded.js'
import { train } from '../run/trainer.js'

const run = promisify(execFile)

/** The data folder of a run `r` with three steps. */
let data: string
t.before(async () => {
  data = t.testdir({})
  const service = await recorder(data)
  const { client } = await train(service, { last: 3 })
  await client.close()
  await service.app.close()
})

t.test('the arguments of replay are checked', async (t) => {
  const means = { terminal: new PassThrough(), failed: () => {} }
  const refused = (message: string, ...argv: string[]) =>
    t.rejects(replayCommand(argv, {}, means), { name: 'ConfigError', message })
  await refused('replay takes the name of one run (--help says more)')
  await refused('replay takes the name of one run (--help says more)', 'a', 'b')
  await refused('--data is missing: the data folder that has the run', 'a')
  await refused('--from is empty', 'a', '--data', 'x', '--from=')
  await refused("--to is '0', expected a whole number from 1 on", 'a', '--data', 'x', '--to', '0')
  await refused("--every is '1.5', expected a whole number from 1 on", 'a', '--data', 'x', '--every', '1.5')
  await refused(
    "setting device: must be auto, cpu, cuda, cuda:N or cuda:N,N, got 'tpu'",
    'a',
    '--data',
    'x',
    '--device',
    'tpu',
  )
  t.match(await replayCommand(['--help'], {}, means), /^muond replay RUN/)
  const missing = replayCommand(['a'], { MUOND_DATA: t.testdir({}), MUOND_DEVICE: 'cpu' }, means)
  await t.rejects(missing, { message: /^data folder '.*' has no run 'a'/ })
})

t.test('a replay is printed, or written as files', async (t) => {
  const groups = [
    { name: 'sgd', algorithm: 'adamw', lr: 0.01 },
    { name: 'muon', algorithm: 'muon', lr: 0.02 },
  ]
  const file = groupsFile(data, groups)
  const out = join(data, 'out')
  const means = { terminal: new PassThrough(), failed: () => {} }
  const env = { MUOND_DEVICE: 'cpu', MUOND_LANES: '1' }
  const command = (...rest: string[]) => replayCommand(['r', '--data', data, '--groups', file, ...rest], env, means)
  const text = await command('--out', `${out}/`)
  const blocks = text.split('\n\n')
  t.match(blocks[0], new RegExp(`^run 'r': steps 1 to 3 of 3, from ${id(0)}, on cpu with ONNX Runtime \\d`))
  t.match(
    blocks[1],
    /^muon: muon, 1 parameter, in group muon: muon\nstep +lr +gradient norm +update norm +update RMS +other lr +other norm +other RMS +ratio +cosine\n/,
  )
  t.match(text, /\nrmsprop: rmsprop, 1 parameter\n.*\n +1 .*\n +2 .*\n +3 +- +- +- +-\n/, 'a step that skips it')
  t.match(blocks.at(-1), /^note: an update is scale · data: .*\nnote: the gradients are those of the run as it was: /)
  t.same(readdirSync(out).sort(), ['replay.json', 'replay.svg'])
  const json = JSON.parse(readFileSync(join(out, 'replay.json'), 'utf8'))
  t.same(json, JSON.parse(JSON.stringify(await replaying(data, 'r', { groups: file }))))
  t.same(json, JSON.parse(await command('--json')))
  t.notMatch(await command('--to', '2', '--every', '2'), /^ +3 /m)
  t.match(readFileSync(join(out, 'replay.svg'), 'utf8'), /^<svg /)
  await t.rejects(command('--out', out), { name: 'ConfigError', message: `${out} exists already` })
})

t.test('the process ends with 1 where a step is another one, and says which', async (t) => {
  const argv = ['dist/src/server.js', 'replay', 'r', '--data', data, '--device', 'cpu']
  t.match(await run('node', argv), {
    stdout: /^run 'r': .*\n3 steps computed again: every digest is the journal's/,
    stderr: '',
  })
  forge(join(runFolder(data), 'journal', '000000000001.journal'), (head, payload) => {
    if (head.type === 'gradient' && head.step === 1 && head.parameter === 0) payload[0]! ^= 1
    return head
  })
  const out = join(data, 'failed')
  const stdout =
    /\n0 steps as the journal says, then:\nstep 1 is not what the journal says\nparameter 'm': the fingerprint of its gradient is [0-9a-f]{16}, the journal has [0-9a-f]{16} \(.*\)\ndigest [0-9a-f]{64}, the journal has [0-9a-f]{64} \(/
  await t.rejects(run('node', [...argv, '--out', out]), { code: 1, stdout, stderr: '' })
  t.same(readdirSync(out), ['replay.json'], 'there is no step to draw')
})

t.test('a shard is computed again as any run is', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, durability: 'journal' })
  const client = await connect(processes[0]!.url, QUICK)
  const model = modelOf('gpt')
  const whole = await client.open({ ...model, shards: 2 })
  for (const step of [1, 2]) await whole.step(gradientsOf(model.parameters, step))
  const { shards } = (await wholeOf(processes, 'gpt')).body
  await client.close()
  for (const process of processes) await process.stop()
  const { data } = processes.find(({ peer }) => peer === shards[1]!.peer)!
  const means = { terminal: new PassThrough(), failed: () => {} }
  const text = await replayCommand(['gpt~1', '--data', data], { MUOND_DEVICE: 'cpu', MUOND_LANES: '1' }, means)
  t.match(text, /^run 'gpt~1': steps 1 to 2 of 2, /)
  const wrong = replayCommand(['gpt~01', '--data', data], { MUOND_DEVICE: 'cpu' }, means)
  await t.rejects(wrong, { message: "'gpt~01' is no name of a run" })
})
