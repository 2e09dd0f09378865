import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import t from 'tap'
import { openManifest, sealManifest } from '../../src/store/checkpoint/manifest.js'
import { openIdentity, sealIdentity } from '../../src/store/identity.js'
import { known, MODEL, type Trace, train, trainStep, undisturbed } from '../run/trainer.js'
import { RawClient, startService } from '../service.js'
import { copyFolder, flip, id, manifestOf, reseal, rewrite, runFolder, start, stateFile } from './data-folder.js'

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, 6)
  await service.app.close()
})

/** Damages of the newest checkpoint, and the errors that the client and REST are told. */
const BREAKAGES: [string, (data: string) => void, RegExp][] = [
  [
    'a flipped bit in a tensor',
    (data) => flip(stateFile(data), -1),
    /has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  ],
  ...['param_groups.json', 'state.safetensors.index.json'].map((name): [string, (data: string) => void, RegExp] => [
    `a flipped bit in ${name}`,
    (data) => flip(join(runFolder(data), 'checkpoints', id(5), name), 20),
    new RegExp(`/${id(5)}/${name} has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$`),
  ]),
  ['a flipped bit in a header', (data) => flip(stateFile(data), 9), /has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/],
  ['a header that is too long', (data) => flip(stateFile(data), 4), /has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/],
  ['a file that is cut off', (data) => truncateSync(stateFile(data), 300), /has 300 bytes, expected \d+$/],
  ['a file that is gone', (data) => rmSync(stateFile(data)), /cannot be opened: ENOENT/],
  [
    'a flipped bit in the manifest',
    (data) => flip(manifestOf(data, 5), 30),
    /manifest\.json has SHA-256 [0-9a-f]{64}, expected/,
  ],
  [
    'a manifest that is cut off',
    (data) => truncateSync(manifestOf(data, 5), 500),
    /manifest\.json does not end with its SHA-256/,
  ],
  [
    'a run.json that is none',
    (data) => writeFileSync(join(runFolder(data), 'run.json'), '{'),
    /run\.json does not end with its SHA-256/,
  ],
  ['a run.json that is gone', (data) => rmSync(join(runFolder(data), 'run.json')), /run\.json cannot be read: ENOENT/],
  [
    'a run.json with another learning rate',
    (data) => rewrite(join(runFolder(data), 'run.json'), '"lr":0.002', '"lr":0.902'),
    /run\.json has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  ],
  [
    'a run.json with another algorithm',
    (data) => rewrite(join(runFolder(data), 'run.json'), '"algorithm":"', '"algorithm":"x'),
    /run\.json has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  ],
  [
    'a run.json with another epoch',
    (data) => rewrite(join(runFolder(data), 'run.json'), /"epoch": \d+/, '"epoch": -5'),
    /run\.json has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  ],
  [
    'a digest that does not follow',
    (data) => reseal(data, { previous_digest: '00'.repeat(32) }),
    /step 5 of run 'r' has digest [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  ],
  [
    'a tensor that is lacking',
    (data) => reseal(data, ({ files: [first, ...files], bytes }) => ({ files, bytes: bytes - first!.bytes })),
    /has no tensor 'state\.m\.momentum_buffer'$/,
  ],
  [
    'a tensor of another shape',
    (data) =>
      reseal(data, ({ parameters }) => ({
        parameters: [{ ...parameters[0]!, shape: [16, 24] }, ...parameters.slice(1)],
      })),
    /tensor 'state\.m\.momentum_buffer' is F32 \[24,16\], expected F32 \[16,24\]$/,
  ],
]

t.test('a checkpoint that is not what was written is refused with its file; the run never starts cold', async (t) => {
  const data = mkdtempSync(join(tmpdir(), 'muond-'))
  t.teardown(() => rmSync(data, { recursive: true }))
  const service = await start(data)
  const { client } = await train(service, { last: 6 })
  await client.close()
  // Groups that an open gives anew are remembered in run.json.
  const again = await RawClient.connect(service.url)
  const groups = MODEL.groups.map((group) => ({ ...group, lr: 0.002 }))
  await again.open({ run: 'r', mode: 'resume', ...MODEL, groups })
  await again.close()
  await service.app.close()
  for (const [name, breakIt, message] of BREAKAGES) {
    await t.test(name, async (t) => {
      const copy = `${t.testdir({})}/data`
      copyFolder(data, copy)
      breakIt(copy)
      const again = await start(copy)
      await again.restored
      t.equal(again.device.memory.bytes, 0)
      t.equal(again.device.admittedBytes, 0)
      const listed = (await (await fetch(`${again.http}/v1/runs`)).json()) as {
        runs: []
        stored: { name: string; detail: string }[]
      }
      t.match(listed, { runs: [], stored: [{ name: 'r', status: 'unreadable', detail: message }] })
      t.match(await (await fetch(`${again.http}/v1/runs/r`)).json(), { code: 'CHECKPOINT_UNREADABLE', detail: message })
      const next = await RawClient.connect(again.url)
      for (const mode of ['resume', 'create_or_resume'] as const) {
        next.send({ type: 'open', protocol: 1, run: 'r', mode, ...MODEL })
        t.match(await next.expect('error'), { code: 'CHECKPOINT_UNREADABLE', status: 500, message })
      }
      next.send({ type: 'open', protocol: 1, run: 'r', mode: 'create', ...MODEL })
      t.match(await next.expect('error'), { code: 'RUN_EXISTS' })
      if (!name.startsWith('a run.json')) {
        // An older checkpoint is still readable: a client that asks for it goes on from there.
        next.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume', checkpoint: id(5) })
        t.match(await next.expect('error'), { code: 'CHECKPOINT_UNREADABLE', message })
        t.match(await next.open({ run: 'r', mode: 'resume', checkpoint: id(0) }), { step: 0, resumed: true })
        t.same(known([await trainStep(next, 1)]), known(reference.slice(0, 1)))
      }
      await next.close()
      t.equal((await fetch(`${again.http}/v1/runs/r`, { method: 'DELETE' })).status, 204)
      t.notOk(existsSync(runFolder(copy)))
      await again.app.close()
    })
  }
})

/** Copies run `r` to another folder, as a run of another name: its manifest and its run.json say that name as well. */
function copyRun(from: string, to: string, run: string): void {
  copyFolder(runFolder(from), runFolder(to, run))
  const manifest = join(runFolder(to, run), 'checkpoints', id(0), 'manifest.json')
  writeFileSync(manifest, sealManifest({ ...openManifest(readFileSync(manifest, 'utf8'), manifest), run }))
  const identity = join(runFolder(to, run), 'run.json')
  writeFileSync(identity, sealIdentity({ ...openIdentity(readFileSync(identity, 'utf8'), identity, 'r'), run }))
}

t.test(
  'a journal is computed again from its gradients: damage is told with the record, a torn tail is cut',
  async (t) => {
    const data = mkdtempSync(join(tmpdir(), 'muond-'))
    t.teardown(() => rmSync(data, { recursive: true }))
    const settings = { durability: 'journal', checkpoint_steps: 0 } as const
    const service = await start(data, settings)
    await (await train(service, { last: 4 })).client.close()
    await service.app.close()
    const name = '000000000001.journal'
    const bytes = readFileSync(join(runFolder(data), 'journal', name))
    const random = fc.sample(fc.tuple(fc.nat(bytes.length - 1), fc.integer({ min: 1, max: 255 })), {
      ...{ numRuns: 25, seed: 11 },
    })
    const damaged = random.map(([at, change]) => {
      const copy = Buffer.from(bytes)
      copy[at]! ^= change
      return copy
    })
    const journals = [bytes, bytes.subarray(0, -1), Buffer.concat([bytes, Buffer.from('torn')]), ...damaged]
    // A run of its own for each of them: one service restores them all.
    const copies = t.testdir({})
    for (const [i, journal] of journals.entries()) {
      copyRun(data, copies, `r${i}`)
      writeFileSync(join(runFolder(copies, `r${i}`), 'journal', name), journal)
    }
    const again = await start(copies, settings)
    await again.restored
    for (const i of journals.keys()) {
      const run = `r${i}`
      const problem = again.runs.stored.get(run)
      if (i > 2 && problem !== undefined) {
        t.match(problem, new RegExp(`${name}: record \\d+ at byte \\d+`))
        continue
      }
      const client = await RawClient.connect(again.url)
      const { step, digest } = await client.open({ run, mode: 'resume' })
      t.equal(digest, reference[step - 1]!.digest, 'what is restored is a step of the undisturbed run')
      t.equal(step, [4, 3, 4][i] ?? 3, 'only the end of the last step can be taken for a tail')
      await client.close()
    }
    t.ok(again.runs.stored.size > 15, 'most of the journal is of steps that are not the last one')
    await again.app.close()
  },
)
