import { readdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import type { components } from '../../src/http/openapi.js'
import { MOST_WAITING } from '../../src/run/boundary.js'
import { GRADIENTS, openRun, startService } from './service.js'

type Checkpoint = components['schemas']['Checkpoint']
const id = (step: number) => `step-${String(step).padStart(12, '0')}`

async function call<T>(url: string, method: string, body?: object): Promise<{ status: number; body: T }> {
  const response = await fetch(url, {
    method,
    ...(body && { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } }),
  })
  const text = await response.text()
  return { status: response.status, body: text === '' ? undefined : JSON.parse(text) }
}

t.test('a checkpoint is taken, listed, tagged and deleted', async (t) => {
  const data = t.testdir({})
  const { url } = await startService(t, { data, checkpoint_steps: 0, checkpoints_kept: 2 })
  const trainer = await openRun(url, 'a')
  const checkpoints = `${url}/v1/runs/a/checkpoints`
  t.match(await call(checkpoints, 'GET'), { body: { checkpoints: [{ checkpoint: id(0), step: 0, tags: [] }] } })
  const receipt = await trainer.step(1, GRADIENTS)
  const taken = await call<Checkpoint>(checkpoints, 'POST', { tag: 'best' })
  t.match(taken, { status: 201, body: { checkpoint: id(1), step: 1, digest: receipt.digest, tags: ['best'] } })
  t.ok(taken.body.bytes > 4 * (6 + 3 + 3 + 4))
  t.same((await call(`${checkpoints}/best`, 'GET')).body, taken.body)
  // The step has a checkpoint already: only the tag is new.
  t.same((await call<Checkpoint>(checkpoints, 'POST', { tag: 'also' })).body.tags, ['best', 'also'])
  t.same((await call<Checkpoint>(checkpoints, 'POST', { tag: 'also' })).body.tags, ['best', 'also'])
  t.same((await call<Checkpoint>(checkpoints, 'POST')).body.tags, ['best', 'also'])
  for (const step of [2, 3, 4]) {
    await trainer.step(step, GRADIENTS)
    await call(checkpoints, 'POST')
  }
  const listed = await call<{ checkpoints: Checkpoint[] }>(checkpoints, 'GET')
  t.same(
    listed.body.checkpoints.map(({ step }) => step),
    [1, 3, 4],
    'the tagged one and the two newest',
  )
  // A tag leads to the newest checkpoint with it; the one before is kept for its other tag.
  t.same((await call<Checkpoint>(checkpoints, 'POST', { tag: 'best' })).body.step, 4)
  t.match(await call(`${checkpoints}/best`, 'GET'), { body: { step: 4 } })
  t.match(await call(`${checkpoints}/also`, 'GET'), { body: { step: 1 } })
  t.equal((await call(`${checkpoints}/${id(3)}`, 'DELETE')).status, 204)
  t.match(await call(`${checkpoints}/${id(3)}`, 'DELETE'), { status: 404, body: { code: 'NOT_FOUND' } })
  t.match(await call(`${checkpoints}/best`, 'DELETE'), {
    status: 422,
    body: { code: 'PARAMETER_INVALID', detail: /is the newest of run 'a', from which it goes on after a restart$/ },
  })
  t.same(readdirSync(join(data, 'runs', 'a', 'checkpoints')).sort(), [id(1), id(4)])
  t.match((await call<components['schemas']['Run']>(`${url}/v1/runs/a`, 'GET')).body, { durable_step: 4 })
  trainer.socket.close()
})

t.test('what no tag can be is refused', async (t) => {
  const { url } = await startService(t, { data: t.testdir({}) })
  const trainer = await openRun(url, 'a')
  for (const tag of ['', 'x'.repeat(129)]) {
    t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST', { tag }), {
      status: 400,
      body: { code: 'REQUEST_INVALID' },
    })
  }
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST', { tag: id(7) }), {
    status: 422,
    body: { code: 'PARAMETER_INVALID' },
  })
  t.match(await call(`${url}/v1/runs/b/checkpoints`, 'POST'), { status: 404, body: { code: 'RUN_NOT_FOUND' } })
  trainer.socket.close()
})

t.test('without a data folder there are no checkpoints', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  const refused = { status: 422, body: { code: 'PARAMETER_INVALID', detail: /keeps no checkpoints/ } }
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST'), refused)
  const none = { checkpoints: [], reason: 'this service keeps none: it was started without a data folder' }
  t.same(await call(`${url}/v1/runs/a/checkpoints`, 'GET'), { status: 200, body: none })
  t.match((await call(`${url}/v1/runs/a`, 'GET')).body as object, { durable_step: 0 })
  trainer.socket.close()
})

t.test('a checkpoint waits for the end of a step that has begun', async (t) => {
  const { url, runs } = await startService(t, { data: t.testdir({}), checkpoint_steps: 0 })
  const trainer = await openRun(url, 'a')
  await trainer.step(1, GRADIENTS)
  trainer.sendStep(2, GRADIENTS.slice(0, 2))
  t.match(await trainer.next('error'), { code: 'STEP_INCOMPLETE' })
  const run = runs.get('a')
  const listening = run.listenerCount('receipt')
  const taken = call<Checkpoint>(`${url}/v1/runs/a/checkpoints`, 'POST')
  while (run.listenerCount('receipt') < listening + 1) await new Promise(setImmediate)
  const listeners = MOST_WAITING - 1
  const others = Array.from({ length: listeners }, () => call<Checkpoint>(`${url}/v1/runs/a/checkpoints`, 'POST'))
  while (run.listenerCount('receipt') < listening + MOST_WAITING) await new Promise(setImmediate)
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST'), { status: 429, body: { code: 'OVERLOADED' } })
  await trainer.step(2, GRADIENTS)
  t.match(await taken, { status: 201, body: { step: 2 } })
  for (const other of others) t.match(await other, { status: 201, body: { step: 2 } })
  trainer.socket.close()
})

t.test('the stream takes checkpoints between two steps, and the next step does not wait for the disk', async (t) => {
  const { url } = await startService(t, { data: t.testdir({}), checkpoint_steps: 0 })
  const trainer = await openRun(url, 'a')
  const first = await trainer.step(1, GRADIENTS)
  trainer.send({ type: 'checkpoint', tag: 'one' })
  trainer.sendStep(2, GRADIENTS)
  t.match(await trainer.next('checkpointed'), { checkpoint: id(1), step: 1, digest: first.digest })
  // Two checkpoints in a row: the second one waits until the first is on the disk.
  trainer.sendStep(3, GRADIENTS)
  trainer.send({ type: 'checkpoint' })
  trainer.sendStep(4, GRADIENTS)
  trainer.send({ type: 'checkpoint' })
  t.match(await trainer.next('checkpointed'), { step: 3 })
  t.match(await trainer.next('checkpointed'), { step: 4 })
  trainer.send({ type: 'checkpoint', tag: id(9) })
  t.match(await trainer.next('error'), { code: 'PARAMETER_INVALID', message: /^tag is "step-0{11}9", expected/ })
  trainer.sendStep(5, GRADIENTS.slice(0, 1))
  t.match(await trainer.next('error'), { code: 'STEP_INCOMPLETE' })
  trainer.send({ type: 'checkpoint' })
  t.match(await trainer.next('error'), {
    code: 'FRAME_UNEXPECTED',
    message: /after gradients of step 5, expected between two steps$/,
  })
})

t.test('a checkpoint that cannot be written is told, and the run goes on', async (t) => {
  const data = t.testdir({})
  const { url, metrics } = await startService(t, { data, checkpoint_steps: 2 })
  const trainer = await openRun(url, 'a')
  const first = await trainer.step(1, GRADIENTS)
  const folder = join(data, 'runs', 'a', 'checkpoints')
  // Not even root can make a folder where a file is.
  writeFileSync(join(folder, id(1)), '')
  trainer.send({ type: 'checkpoint' })
  t.match(await trainer.next('error'), {
    code: 'STORAGE_FAILED',
    status: 507,
    retryable: true,
    step: 1,
    message: /^the checkpoint of run 'a' at step 1 cannot be written: EEXIST/,
  })
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST'), { status: 507, body: { code: 'STORAGE_FAILED' } })
  t.match((await metrics.checkpoint_failures_total.get()).values, [{ value: 2 }])
  rmSync(join(folder, id(1)))
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST'), { status: 201, body: { step: 1, digest: first.digest } })
  trainer.socket.close()
})
