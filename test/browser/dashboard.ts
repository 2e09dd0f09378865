import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import type { Page } from 'playwright-core'
import t, { type Test } from 'tap'
import { connect } from '../../src/client/client.js'
import type { components } from '../../src/http/openapi.js'
import { startCluster, wholeOf } from '../cluster/service.js'
import { startService } from '../service.js'
import { launch, openLarge, openPage, openTrainer, startStage } from './stage.js'

// The dashboard in a real browser. `npm run test:ui` installs one and runs this.

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')
const RUN = 'moonlight-small'
const TABS = ['Parameters', 'Receipts', 'Checkpoints', 'Members', 'Errors', 'Hyperparameters']

type Schemas = components['schemas']
type Receipts = { receipts: Schemas['Receipt'][] }
type ParameterPage = { parameters: Schemas['ParameterSummary'][] }

async function get<Body>(url: string): Promise<Body> {
  return (await (await fetch(url)).json()) as Body
}

const browser = await launch()
t.teardown(() => browser.close())

/** Holds what the page shows against the rules of axe for WCAG 2.2 AA and good practice. */
async function checkAccessible(t: Test, page: Page, what: string): Promise<void> {
  // The page's own policy lets no script in; the debugger's evaluation is none of the page.
  await page.evaluate(AXE)
  const found = await page.evaluate<string[]>(
    'axe.run().then(({ violations }) => violations.map(({ id, nodes }) => id.concat(" ", nodes[0].html)))',
  )
  t.same(found, [], what)
}

const heading = (page: Page, name: string) => page.getByRole('heading', { level: 1, name, exact: true }).waitFor()
const tab = (page: Page, name: string) => page.getByRole('tab', { name: new RegExp(`^${name}`) })
/** A number as the page writes it. */
const shown = (value: number) => String(Number(value.toPrecision(4)))
/** The term of a list and what it says. */
const fact = (page: Page, term: string) =>
  page.locator('.tiles > div', { has: page.getByText(term, { exact: true }) }).locator('dd')

t.test('the keyboard alone leads from the list through a run, and takes a checkpoint', async (t) => {
  const { service, trainer } = await startStage({ data: t.testdir() }, { steps: 3 })
  const { page, problems, close } = await openPage(browser, service.http)
  await heading(page, 'Runs')
  const link = page.getByRole('link', { name: RUN })
  await link.waitFor()
  await page.keyboard.press('Tab')
  t.equal(await page.evaluate('document.activeElement.textContent'), 'Skip to content')
  for (let presses = 0; presses < 12; presses += 1) {
    if ((await page.evaluate('document.activeElement.textContent')) === RUN) break
    await page.keyboard.press('Tab')
  }
  await page.keyboard.press('Enter')
  await heading(page, RUN)
  t.equal(await page.title(), `${RUN} · muond`)
  await tab(page, 'Parameters').focus()
  for (const name of TABS.slice(1)) {
    await page.keyboard.press('ArrowRight')
    t.equal(await tab(page, name).getAttribute('aria-selected'), 'true', name)
    t.ok(await page.getByRole('tabpanel', { name: new RegExp(`^${name}`) }).isVisible(), name)
  }
  await page.keyboard.press('Home')
  for (let i = 0; i < 2; i += 1) await page.keyboard.press('ArrowRight')
  await page.keyboard.press('Tab')
  await page.keyboard.type('by hand')
  await page.keyboard.press('Enter')
  await page.getByText('Step 3 is on the disk.').waitFor()
  await page.getByRole('row', { name: /by hand/ }).waitFor()
  const { checkpoints } = await get<{ checkpoints: object[] }>(`${service.http}/v1/runs/${RUN}/checkpoints`)
  t.match(checkpoints.at(-1), { step: 3, tags: ['by hand'] })
  await page.goBack()
  await heading(page, 'Runs')
  t.same(problems, [])
  await close()
  await trainer.close()
  await service.app.close()
})

t.test('a run shows its steps as they happen, what it refused, and goes on after the service was away', async (t) => {
  const data = t.testdir()
  const { service, trainer } = await startStage({ data }, { steps: 5 })
  const { page, problems, close } = await openPage(browser, service.http)
  await page.getByRole('link', { name: RUN }).click()
  await fact(page, 'Step').getByText('5', { exact: true }).waitFor()
  await tab(page, 'Receipts').click()
  const firstRow = page.getByRole('table', { name: 'Receipts' }).getByRole('row').nth(1)
  await firstRow.getByText('5', { exact: true }).waitFor()
  const caption = page.locator('figure', { hasText: 'Gradient norm' })
  const { receipts } = await get<Receipts>(`${service.http}/v1/runs/${RUN}/receipts`)
  await caption.getByText(shown(receipts[4]!.gradient_norm), { exact: true }).waitFor()
  const { gradient_norm } = await trainer.step()
  await firstRow.getByText('6', { exact: true }).waitFor()
  await caption.getByText(shown(gradient_norm), { exact: true }).waitFor()
  t.equal(await page.locator('figure canvas:visible').count(), 6, 'every chart is drawn')

  const broken = trainer.run.parameters.map(({ size }) => new Float32Array(size).fill(NaN))
  await trainer.run.step(broken, { skip_refused: true })
  await tab(page, 'Errors').click()
  await page
    .getByRole('row', { name: /GRADIENT_NOT_FINITE.*'embedding'/ })
    .first()
    .waitFor()
  t.same(problems, [])

  const { port } = new URL(service.http)
  await trainer.close()
  await service.drain()
  await page.getByText('Trying again…').waitFor()
  const again = await startService({ data, port: Number(port), lanes: 1 })
  await again.restored
  const back = await openTrainer(again, RUN)
  await back.step()
  await fact(page, 'Step').getByText('8', { exact: true }).waitFor()
  await page.getByText('live', { exact: true }).waitFor()
  await close()
  await back.close()
  await again.app.close()
})

t.test('ten thousand parameters are a few dozen rows of the page, which can be filtered and sorted', async (t) => {
  const { service, trainer } = await startStage({ receipts_kept: 10 })
  const large = await openLarge(service, 'experts', 10_000)
  const { page, problems, close } = await openPage(browser, service.http)
  await page.getByRole('link', { name: 'experts' }).click()
  await page.getByText('10,000 parameters', { exact: true }).waitFor()
  const table = page.getByRole('table', { name: 'Parameters' })
  t.equal(await table.getAttribute('aria-rowcount'), '10001')
  t.ok((await table.getByRole('row').count()) < 50)
  const rows = page.locator('.rows:visible')
  await rows.focus()
  await page.keyboard.press('End')
  await table.getByText('experts.2499.norm', { exact: true }).waitFor()
  t.ok((await table.getByRole('row').count()) < 50)
  await table
    .getByText(/exp_avg \d\S* · exp_avg_sq/)
    .first()
    .waitFor()
  await page.getByLabel('Filter parameters by name').fill('experts.77.')
  await page.getByText('4 of 10,000').waitFor()
  const { parameters } = await get<ParameterPage>(`${service.http}/v1/runs/experts/parameters?offset=308&limit=4`)
  await table.getByRole('button', { name: 'Gradient norm' }).click()
  const [largest] = parameters.sort((one, other) => other.last!.gradient_norm - one.last!.gradient_norm)
  await table.getByRole('row').nth(1).getByText(largest!.name, { exact: true }).waitFor()
  t.equal(await table.getByRole('columnheader', { name: 'Gradient norm' }).getAttribute('aria-sort'), 'descending')
  t.same(problems, [])
  await close()
  for (const { close } of [large, trainer]) await close()
  await service.app.close()
})

t.test('a run over several processes is a row at its head, whose page tells where its shards are', async (t) => {
  const processes = await startCluster(t, 2)
  const client = await connect(processes[0].url)
  const data = [new Float32Array(64), new Float32Array(32)]
  const run = await client.open({
    ...{ run: 'wide', shards: 2, groups: [{ name: 'all', algorithm: 'adamw', lr: 0.1 }] },
    parameters: data.map((values, i) => ({ name: `w${i}`, shape: [values.length], group: 'all', data: values })),
  })
  const step = () => run.step(data.map((values) => values.map(() => 1)))
  await step()
  const { head, body } = await wholeOf(processes, 'wide')
  const { page, problems, close } = await openPage(browser, head.peer)
  const row = page.getByRole('row', { name: 'wide 2 shards' })
  await row.getByRole('link', { name: 'wide', exact: true }).click()
  await heading(page, 'wide')
  await fact(page, 'Step').getByText('1', { exact: true }).waitFor()
  await step()
  await fact(page, 'Step').getByText('2', { exact: true }).waitFor()
  const shards = page.getByRole('table', { name: 'Shards' })
  for (const { run, peer } of body.shards) {
    await shards.getByRole('row', { name: `${run} ${peer} 1` }).waitFor()
    const link = shards.getByRole('link', { name: run })
    t.equal(await link.getAttribute('href'), `${peer}/ui#/runs/${encodeURIComponent(run)}`)
  }
  await checkAccessible(t, page, 'the page of a whole')
  if (process.env.PICTURE) await page.screenshot({ path: process.env.PICTURE })
  t.same(problems, [])
  await close()
  await client.close()
})

t.test('a service with keys shows nothing before it is given one, and the key stays in its tab', async (t) => {
  const { service, trainer } = await startStage(
    { api_keys: 'right-key-0123456789' },
    { steps: 2, token: 'right-key-0123456789' },
  )
  const { page, close } = await openPage(browser, service.http)
  const dialog = page.getByRole('dialog', { name: 'Key of this service' })
  await dialog.waitFor()
  await dialog.getByRole('alert').getByText('a key is needed').waitFor()
  await checkAccessible(t, page, 'the question for the key')
  await page.keyboard.type('wrong-key-0123456789')
  await page.keyboard.press('Enter')
  await dialog.getByRole('alert').getByText('this key is not known').waitFor()
  await dialog.getByLabel('Bearer key').fill('right-key-0123456789')
  await page.keyboard.press('Enter')
  await page.getByRole('link', { name: RUN }).click()
  await fact(page, 'Step').getByText('2', { exact: true }).waitFor()
  await trainer.step()
  await fact(page, 'Step').getByText('3', { exact: true }).waitFor()
  const kept = await page.evaluate<string[]>(
    '[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie, location.href, document.body.outerHTML]',
  )
  t.same(
    kept.map((text) => text.includes('right-key-0123456789')),
    [true, false, false, false, false],
    'it is in the session storage alone',
  )
  const other = await openPage(browser, service.http)
  await other.page.getByRole('dialog').waitFor()
  await other.close()
  await page.getByRole('button', { name: 'Key' }).click()
  await dialog.getByRole('button', { name: 'Forget it' }).click()
  await dialog.getByRole('alert').getByText('a key is needed').waitFor()
  t.equal(await page.evaluate('sessionStorage.length'), 0)
  await close()
  await trainer.close()
  await service.app.close()
})

t.test('every view is accessible, wide in light and narrow in dark', async (t) => {
  const { service, trainer } = await startStage({ data: t.testdir() }, { steps: 4 })
  const idle = await openTrainer(service, 'idle')
  await idle.close()
  for (const [colorScheme, width] of [
    ['light', 1280],
    ['dark', 400],
  ] as const) {
    const { page, problems, close } = await openPage(browser, service.http, {
      colorScheme,
      viewport: { width, height: 900 },
    })
    const where = `${colorScheme}, ${width} pixels`
    await page.getByRole('link', { name: RUN }).waitFor()
    await checkAccessible(t, page, `runs: ${where}`)
    await page.getByRole('link', { name: RUN }).click()
    await page.getByText('13 parameters').waitFor()
    await page.locator('figure canvas').first().waitFor()
    for (const name of TABS) {
      await tab(page, name).click()
      await checkAccessible(t, page, `${name}: ${where}`)
    }
    t.ok(
      await page.evaluate('document.documentElement.scrollWidth <= innerWidth'),
      `nothing is wider than the window: ${where}`,
    )
    t.same(problems, [], where)
    await close()
  }
  await trainer.close()
  await service.app.close()
})
