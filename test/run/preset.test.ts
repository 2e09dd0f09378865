import t from 'tap'
import { normal, RawClient, startService } from '../service.js'

const PARAMETERS = [{ name: 'w', shape: [4, 8], group: 'g' }]
const GRADIENTS = [normal(1, 32)]
const KIMI = {
  algorithm: 'muon',
  preset: 'kimi-k2',
  lr: 2e-4,
  momentum_form: 'heavy_ball',
  adjust_lr_fn: 'match_rms_adamw',
}

t.test(
  'a preset is echoed with every value that holds, and computes what the same values written out compute',
  async (t) => {
    const service = await startService({ lanes: 1 })
    const client = await RawClient.connect(service.url)
    const { groups } = await client.open({
      run: 'named',
      groups: [{ name: 'g', preset: 'kimi-k2' }],
      parameters: PARAMETERS,
    })
    t.match(groups.g, { ...KIMI, weight_decay: 0.1, nesterov: true, ns_steps: 5, eps: 1e-7 })
    t.same(Object.keys(groups.g!).slice(0, 2), ['algorithm', 'preset'])
    const receipt = await client.step(1, GRADIENTS)
    t.same(receipt.groups, groups)
    const { preset, ...written } = groups.g as { algorithm: string; preset: string }
    const other = await RawClient.connect(service.url)
    await other.open({ run: 'written', groups: [{ name: 'g', ...written }], parameters: PARAMETERS })
    t.equal((await other.step(1, GRADIENTS)).digest, receipt.digest)
    await Promise.all([client.close(), other.close()])
    await service.app.close()
  },
)

t.test('keys beside the preset win, and a step changes them as it does without', async (t) => {
  const service = await startService({ lanes: 1 })
  const client = await RawClient.connect(service.url)
  const group = { name: 'g', preset: 'kimi-k2', lr: 1, nesterov: false }
  const { groups } = await client.open({ run: 'r', groups: [group], parameters: PARAMETERS })
  t.match(groups.g, { ...KIMI, lr: 1, nesterov: false })
  client.send({ type: 'step', step: 1, groups: { g: { lr: 2 } } })
  t.match((await client.step(1, GRADIENTS)).groups.g, { ...KIMI, lr: 2, nesterov: false })
  t.match((await client.step(2, GRADIENTS)).groups.g, { ...KIMI, lr: 2 }, 'it stays')
  client.send({ type: 'step', step: 3, groups: { g: { preset: 'torch' } } })
  t.match(await client.expect('error'), { code: 'HYPERPARAMETER_INVALID', message: /preset is fixed at open/ })
  await client.close()
  await service.app.close()
})

t.test('a resuming open is compared by its effective values, not by the name of its preset', async (t) => {
  const service = await startService({ lanes: 1 })
  const open = async (group: object) => {
    const client = await RawClient.connect(service.url)
    client.send({
      type: 'open',
      protocol: 1,
      run: 'r',
      takeover: true,
      groups: [{ name: 'g', ...group }],
      parameters: PARAMETERS,
    })
    const frame = await client.next()
    await client.close()
    return frame
  }
  await open({ preset: 'deepseek-v4' })
  t.match(await open({ preset: 'moonlight' }), { type: 'opened', groups: { g: { preset: 'moonlight', lr: 4.2e-4 } } })
  const written = await open({ algorithm: 'muon', momentum_form: 'heavy_ball' })
  t.match(written, { type: 'opened', groups: { g: { lr: 1e-3 } } })
  t.match(await open({ preset: 'torch' }), {
    type: 'error',
    code: 'RUN_MISMATCH',
    message: "run 'r': group 'g': momentum_form is 'heavy_ball' in the run, 'ema' given",
  })
  await service.app.close()
})

t.test('an unknown preset is refused with the known names, those of the folder too, and leaves no run', async (t) => {
  const mine = 'description: mine\nalgorithm: sgd\nhyperparameters: { sgd: { lr: 0.7 } }\n'
  const service = await startService({ lanes: 1, presets: t.testdir({ 'mine.yaml': mine }) })
  const client = await RawClient.connect(service.url)
  const open = (preset: string) => client.open({ run: 'r', groups: [{ name: 'g', preset }], parameters: PARAMETERS })
  client.send({ type: 'open', protocol: 1, run: 'r', groups: [{ name: 'g', preset: 'kimi' }], parameters: PARAMETERS })
  t.match(await client.expect('error'), {
    code: 'HYPERPARAMETER_INVALID',
    message:
      "group 'g': preset is 'kimi', expected one of deepseek-v4, diloco, kimi-k2, moonlight, muloco, nanogpt, torch, mine",
  })
  t.same(service.runs.list(), [])
  t.match(await open('mine'), { groups: { g: { algorithm: 'sgd', preset: 'mine', lr: 0.7 } } })
  await client.close()
  await service.app.close()
})
