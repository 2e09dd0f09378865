import { existsSync } from 'node:fs'
import { type Browser, type BrowserContextOptions, chromium, type Page } from 'playwright-core'
import { connect, type Receipt, type Run } from '../../src/client/client.js'
import { gaussian } from '../reference.js'
import { type Service, startService } from '../service.js'

/** Where Debian has Chromium, and where others may have one. */
const PLACES = [process.env.CHROMIUM ?? '', '/usr/bin/chromium', '/usr/bin/google-chrome']

/** Chromium without a screen. Root has no sandbox for it. */
export function launch(): Promise<Browser> {
  const executablePath = PLACES.find((place) => place !== '' && existsSync(place))
  if (executablePath === undefined) throw new Error('there is no Chromium: install one, or name it in CHROMIUM')
  return chromium.launch({ executablePath, args: process.getuid?.() === 0 ? ['--no-sandbox'] : [] })
}

/** A page of its own browser profile, and all that went wrong in it. */
export async function openPage(
  browser: Browser,
  url: string,
  options: BrowserContextOptions = {},
): Promise<{ page: Page; problems: string[]; close: () => Promise<void> }> {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options })
  const page = await context.newPage()
  const problems: string[] = []
  page.on('console', (message) => message.type() === 'error' && problems.push(message.text()))
  page.on('pageerror', (error) => problems.push(String(error)))
  page.on('request', (request) => request.url().startsWith(url) || problems.push(`a request to ${request.url()}`))
  await page.goto(`${url}/ui`)
  return { page, problems, close: () => context.close() }
}

const WIDTH = 64
const LAYERS = 4

/** A service with a small transformer in training, whose QK-clip has something to do. `steps` are done already. */
export async function startStage(
  settings: Parameters<typeof startService>[0],
  { run: name = 'moonlight-small', steps = 0, token }: { run?: string; steps?: number; token?: string } = {},
): Promise<{ service: Service; trainer: Trainer }> {
  const service = await startService({ lanes: 1, ...settings })
  const trainer = await openTrainer(service, name, token)
  for (let step = 0; step < steps; step += 1) await trainer.step()
  return { service, trainer }
}

export type Trainer = { run: Run; step: () => Promise<Receipt>; close: () => Promise<void> }

/** Opens a run of that transformer. */
export async function openTrainer(service: Service, run: string, token?: string): Promise<Trainer> {
  const client = await connect(service.http.replace('http', 'ws'), token === undefined ? {} : { token })
  const layers = Array.from({ length: LAYERS }, (_, layer) => [
    { name: `layers.${layer}.attention.qkv`, shape: [3 * WIDTH, WIDTH], group: 'hidden', split: [WIDTH, WIDTH, WIDTH] },
    { name: `layers.${layer}.mlp.up`, shape: [2 * WIDTH, WIDTH], group: 'hidden' },
    { name: `layers.${layer}.norm`, shape: [WIDTH], group: 'rest' },
  ]).flat()
  const parameters = [{ name: 'embedding', shape: [256, WIDTH], group: 'rest' }, ...layers]
  const weights = parameters.map(({ shape }, i) => noise(i, product(shape)))
  const attentions = Array.from({ length: LAYERS }, (_, layer) => {
    const parameter = 1 + 3 * layer
    return {
      name: `layers.${layer}`,
      ...{ query_heads: 4, head_dim: WIDTH / 4, query: { parameter }, key: { parameter, first_row: WIDTH } },
    }
  })
  const groups = [
    { name: 'hidden', algorithm: 'muonclip', lr: 0.02 },
    { name: 'rest', algorithm: 'adamw', lr: 0.001 },
  ]
  const opened = await client.open({
    ...{ run, groups, attentions },
    parameters: parameters.map((parameter, i) => ({ ...parameter, data: weights[i]! })),
  })
  const step = () => {
    const number = opened.step_count + 1
    const size = 1 / Math.sqrt(number) + 0.2 * Math.abs(Math.sin(number * 12.9898))
    const gradients = weights.map((values, i) => noise(number * 100 + i, values.length).map((value) => value * size))
    const logits = (layer: number) =>
      Array.from({ length: 4 }, (_, head) => 60 + layer * 8 + head * 4 + 30 * Math.sin(number / 7))
    const max_logits = Object.fromEntries(attentions.map(({ name }, layer) => [name, logits(layer)]))
    return opened.step(gradients, { max_logits })
  }
  return { run: opened, step, close: () => client.close() }
}

/** Opens a run of very many parameters, and does one step of it. */
export async function openLarge(service: Service, run: string, count: number): Promise<Trainer> {
  const client = await connect(service.http.replace('http', 'ws'))
  const weights = Array.from({ length: count }, (_, i) => noise(i, 16))
  const parameters = weights.map((data, i) => ({
    ...{ name: `experts.${i >> 2}.${['gate', 'up', 'down', 'norm'][i & 3]}`, shape: [4, 4], group: 'all', data },
  }))
  const opened = await client.open({ run, groups: [{ name: 'all', algorithm: 'adamw', lr: 1e-3 }], parameters })
  const step = () => opened.step(weights.map((values) => values.slice()))
  await step()
  return { run: opened, step, close: () => client.close() }
}

function noise(seed: number, count: number): Float32Array {
  return Float32Array.from(gaussian(seed, count))
}

function product(shape: readonly number[]): number {
  return shape.reduce((size, dimension) => size * dimension, 1)
}
