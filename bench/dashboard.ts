import { mkdirSync } from 'node:fs'
import { loadavg } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import type { Browser, Page } from 'playwright-core'
import { launch, openLarge, openPage, openTrainer, startStage, type Trainer } from '../test/browser/stage.js'
import { type Service, startService } from '../test/service.js'

// How fast the dashboard is in headless Chromium, and what it looks like:
//   node dist/bench/dashboard.js [--pictures FOLDER]

const PARAMETERS = 10_000
const RUN = 'moonlight-small'
/** Has Chromium write down every task of every thread, with the processor time that it took. */
const CATEGORIES = ['disabled-by-default-devtools.timeline', 'devtools.timeline', '__metadata']
/** Scrolls through all rows in steps of a row's height times 23, one in each frame; resolves to the times of frames. */
const SCROLL = `new Promise((resolve) => {
  const rows = document.querySelector('.rows')
  const times = []
  const on = (now) => {
    times.push(now)
    const before = rows.scrollTop
    rows.scrollTop += 736
    if (rows.scrollTop === before) resolve(times)
    else requestAnimationFrame(on)
  }
  requestAnimationFrame(on)
})`
/** A frame that takes longer is seen as a hitch. */
const SMOOTH_MS = 50

const { values } = parseArgs({ options: { pictures: { type: 'string' } } })
const browser = await launch()
const { service, trainer } = await startStage({ data: '' }, { steps: 150 })
const large = await openLarge(service, 'experts', PARAMETERS)
await measurePaint(browser, service)
await measureScrolling(browser, service)
await measureSteps(browser, service, trainer)
if (values.pictures !== undefined) await takePictures(browser, values.pictures)
await Promise.all([trainer.close(), large.close()])
await browser.close()
await service.app.close()

/** Seconds from the request of the page until it shows something, in a browser that has seen none of it. */
async function measurePaint(browser: Browser, { http }: Service): Promise<void> {
  const times: number[] = []
  for (let i = 0; i < 5; i += 1) {
    const { page, close } = await openPage(browser, http)
    await page.getByRole('link', { name: RUN }).waitFor()
    times.push(await page.evaluate<number>("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    await close()
  }
  console.log(`first contentful paint: ${times.map((time) => time.toFixed(0)).join(', ')} ms`)
}

async function measureScrolling(browser: Browser, { http }: Service): Promise<void> {
  const { page, close } = await openPage(browser, http)
  await page.getByRole('link', { name: 'experts' }).click()
  await page.getByText(`${PARAMETERS.toLocaleString('en-US')} parameters`, { exact: true }).waitFor()
  let times: number[] = []
  const { frame } = await report(page, `scrolling through ${PARAMETERS} parameters`, async () => {
    times = await page.evaluate<number[]>(SCROLL)
  })
  const frames = times.slice(1).map((time, i) => time - times[i]!)
  const late = frames.filter((frame) => frame > SMOOTH_MS).length
  const longest = Math.max(...frames).toFixed(1)
  console.log(
    `${frames.length} frames: at most ${frame} ms of processor; the longest ${longest} ms in all, ${late} over ${SMOOTH_MS} ms, at a load of ${loadavg()[0]}`,
  )
  await close()
}

async function measureSteps(browser: Browser, { http }: Service, { step }: Trainer): Promise<void> {
  const { page, close } = await openPage(browser, http)
  await page.getByRole('link', { name: RUN }).click()
  await page.locator('figure canvas').first().waitFor()
  await report(page, '100 steps as they happen', async () => {
    for (let i = 0; i < 100; i += 1) await step()
  })
  await close()
}

/**
 * Tells the longest task of the page's thread while `work` is done, and answers the longest frame of its animation. Processor time is what the page needs on any machine;
 * wall-clock time has in it what others on this machine do.
 */
async function report(page: Page, what: string, work: () => Promise<void>): Promise<{ frame: string }> {
  await browser.startTracing(page, { categories: CATEGORIES })
  await work()
  const { traceEvents }: { traceEvents: TraceEvent[] } = JSON.parse(String(await browser.stopTracing()))
  const threads = new Set(
    traceEvents.filter(({ args }) => args?.name === 'CrRendererMain').map(({ pid, tid }) => `${pid} ${tid}`),
  )
  const tasks = traceEvents.filter(({ name, pid, tid }) => name === 'RunTask' && threads.has(`${pid} ${tid}`))
  const longest = (key: 'dur' | 'tdur') => (Math.max(...tasks.map((task) => task[key] ?? 0)) / 1000).toFixed(1)
  console.log(
    `${what}: ${tasks.length} tasks, the longest ${longest('tdur')} ms of processor, ${longest('dur')} ms in all`,
  )
  return { frame: longestFrame(traceEvents, threads, tasks) }
}

/** Milliseconds of processor time of all tasks of the longest frame: from one call of its animation to the next. */
function longestFrame(
  events: readonly TraceEvent[],
  threads: ReadonlySet<string>,
  tasks: readonly TraceEvent[],
): string {
  const begins = events
    .filter(({ name, pid, tid }) => name === 'FireAnimationFrame' && threads.has(`${pid} ${tid}`))
    .map(({ ts }) => ts)
    .sort((one, other) => one - other)
  const sums = begins.map(() => 0)
  for (const { ts, dur = 0, tdur = 0 } of tasks) {
    // The task that calls the animation has begun before.
    const frame = begins.findLastIndex((begin) => begin < ts + dur)
    if (frame >= 0) sums[frame]! += tdur
  }
  return (Math.max(0, ...sums) / 1000).toFixed(1)
}

type TraceEvent = {
  name: string
  pid: number
  tid: number
  ts: number
  dur?: number
  tdur?: number
  args?: { name?: string }
}

/** Pictures of both pages in both colour schemes and two widths, with something in every table. */
async function takePictures(browser: Browser, folder: string): Promise<void> {
  mkdirSync(folder, { recursive: true })
  const data = join(folder, 'data')
  const { service, trainer } = await startStage({ data }, { steps: 220 })
  const others = [await openTrainer(service, 'ablation-no-clip'), await openTrainer(service, 'sweep-lr-0.02')]
  for (const { step } of others) for (let i = 0; i < 3; i += 1) await step()
  await others[1]?.close()
  await trainer.run.checkpoint({ tag: 'before-decay' })
  const broken = trainer.run.parameters.map(({ size }) => new Float32Array(size).fill(NaN))
  await trainer.run.step(broken, { skip_refused: true })
  for (const colorScheme of ['light', 'dark'] as const) {
    for (const width of [1280, 400]) {
      const { page, close } = await openPage(browser, service.http, { colorScheme, viewport: { width, height: 900 } })
      const shoot = (name: string) =>
        page.screenshot({ path: join(folder, `${name}-${colorScheme}-${width}.png`), fullPage: true })
      await page.getByRole('link', { name: RUN }).waitFor()
      for (let i = 0; i < 5; i += 1) await trainer.step()
      await page.waitForTimeout(2500)
      await shoot('runs')
      await page.getByRole('link', { name: RUN }).click()
      await page.getByText('13 parameters').waitFor()
      await page.waitForTimeout(4500)
      await shoot('run')
      for (const name of ['Receipts', 'Checkpoints', 'Errors', 'Hyperparameters']) {
        await page.getByRole('tab', { name: new RegExp(`^${name}`) }).click()
        await page.waitForTimeout(300)
        await shoot(name.toLowerCase())
      }
      await close()
    }
  }
  await trainer.close()
  await others[0]?.close()
  await service.app.close()
  const keyed = await startService({ api_keys: 'a-key-of-sixteen-letters' })
  const { page, close } = await openPage(browser, keyed.http)
  await page.getByRole('dialog').waitFor()
  await page.screenshot({ path: join(folder, 'key.png') })
  await close()
  await keyed.app.close()
}
