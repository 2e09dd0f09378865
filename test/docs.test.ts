import { execFile } from 'node:child_process'
import { EventEmitter } from 'node:events'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { PassThrough } from 'node:stream'
import { pathToFileURL } from 'node:url'
import { promisify } from 'node:util'
import t, { type Test } from 'tap'
import { NAMED_COEFFICIENTS } from '../kernels/orthogonalize/coefficients.js'
import { explainCommand } from '../src/commands/explain.js'
import { checkCommand } from '../src/commands/operate/check/check.js'
import { statusCommand } from '../src/commands/operate/watch/status.js'
import { topCommand } from '../src/commands/operate/watch/top.js'
import { SETTINGS } from '../src/config.js'
import { HYPERPARAMETERS, type Table } from '../src/optimizer/table.js'
import { readPresets } from '../src/store/presets.js'
import { markdown } from './chaos/table.js'
import { train, trainStep } from './run/trainer.js'
import { type RawClient, startService } from './service.js'

const README = readFileSync('README.md', 'utf8')
const NODE = readFileSync('docs/node.md', 'utf8')
const section = (file: string, name: string) =>
  readFileSync(file, 'utf8').split(`<!-- ${name} -->\n`)[1]!.split(`<!-- /${name} -->`)[0]!
const codeIn = (text: string, language: string) =>
  [...text.matchAll(new RegExp(`\`\`\`${language}\n([\\s\\S]*?)\`\`\``, 'g'))].map(([, code]) => code!)
/** The README is read in one go. */
const MOST_LINES = 150
const MOST_WORDS = 2000
/** All but the last triple of these are divided by (s, s³, s⁵), s = 1.05. */
const PADDED = ['polar_express', 'cubic5']
const cell = (text: string) => text.replaceAll('|', '\\|')

t.test('docs/operations.md lists every setting as the service knows it', async (t) => {
  const rows = Object.entries(SETTINGS).map(([name, setting]) => {
    const value = setting.default === '' ? '' : `\`${setting.default}\``
    const spelled = 'secret' in setting ? `MUOND_${name.toUpperCase()}` : `--${name.replaceAll('_', '-')}`
    return `| \`${spelled}\` | ${value} | ${cell(setting.description)} |\n`
  })
  t.equal(section('docs/operations.md', 'settings'), `| flag | default | meaning |\n|---|---|---|\n${rows.join('')}`)
})

t.test('docs/operations.md lists every metric of our own with its help text', async (t) => {
  const service = await startService()
  const metrics = await service.metrics.registry.getMetricsAsJSON()
  const ours = metrics.filter(({ name }) => !/^muond_(process|nodejs)_/.test(name))
  const rows = ours.map(({ name, type, help }) => `| \`${name}\` | ${type} | ${cell(help)} |\n`)
  t.equal(section('docs/operations.md', 'metrics'), `| metric | type | meaning |\n|---|---|---|\n${rows.join('')}`)
  await service.app.close()
})

/** Runs code that uses the Node client against the service. */
async function runCode(t: Test, code: string, url: string): Promise<void> {
  const entry = (name: string) => pathToFileURL(resolve(`dist/src/client/${name}.js`)).href
  const file = join(t.testdir({}), 'trainer.mjs')
  const entries = code.replace('muond/client', entry('client')).replace('muond/tfjs', entry('tfjs'))
  writeFileSync(file, entries.replace('ws://127.0.0.1:8787', url))
  await import(pathToFileURL(file).href)
}

t.test('the README is short, and its picture is what the demo draws', async (t) => {
  t.ok(README.split('\n').length <= MOST_LINES, `at most ${MOST_LINES} lines`)
  t.ok(README.split(/\s+/).length <= MOST_WORDS, `at most ${MOST_WORDS} words`)
  t.match(readFileSync('docs/images/demo.svg', 'utf8'), "AdamW's final loss")
})

t.test('the Node trainer of the README runs as it stands', async (t) => {
  const service = await startService()
  await runCode(t, codeIn(README, 'js')[0]!, service.url)
  t.equal(service.runs.get('first').step, 1)
  await service.app.close()
})

t.test('the Python trainer of the README is one that the tests of clients/python run', async (t) => {
  const [trainer] = codeIn(README, 'python')
  t.ok(codeIn(readFileSync('clients/python/README.md', 'utf8'), 'python').includes(trainer!))
})

t.test('the code of docs/node.md runs from top to bottom', async (t) => {
  const service = await startService({ data: t.testdir({ data: {} }) })
  await runCode(t, codeIn(NODE, 'js').join('\n'), service.url)
  // Five steps, one with a refused gradient, one that was taken back, and the one after that.
  t.equal(service.runs.get('node').step, 7)
  await service.app.close()
})

t.test('the commands of docs/http.md print what it says', async (t) => {
  const service = await startService()
  const text = readFileSync('docs/http.md', 'utf8')
  const [code, printed] = [codeIn(text, 'sh')[0]!, codeIn(text, 'text')[0]!]
  const file = join(t.testdir({ 'step.sh': code.replace('http://127.0.0.1:8787', service.http) }), 'step.sh')
  const { stdout } = await promisify(execFile)('sh', ['-e', file], { cwd: dirname(file), timeout: 60_000 })
  const [opened, ...rest] = stdout.replaceAll('\r', '').split(/(?<=\})\n?(?=muond-)/)
  t.match(JSON.parse(opened!), { run: 'first', step: 0, resumed: false })
  t.equal(rest.join(''), printed)
  await service.app.close()
})

t.test('the program of docs/tfjs.md runs as it stands', async (t) => {
  const service = await startService()
  await runCode(t, codeIn(readFileSync('docs/tfjs.md', 'utf8'), 'js')[0]!, service.url)
  t.equal(service.runs.get('tfjs').step, 20)
  await service.app.close()
})

/** Files whose links must lead somewhere. */
const PAGES = [
  'README.md',
  'CONTRIBUTING.md',
  'SECURITY.md',
  'CHANGELOG.md',
  'docs',
  'bench',
  'clients',
  'examples',
  'test',
].flatMap((place) =>
  place.endsWith('.md')
    ? [place]
    : readdirSync(place, { recursive: true, encoding: 'utf8' })
        .filter(
          (name) => name.endsWith('.md') && !/(^|\/)(\.venv|node_modules|site-packages|\.pytest_cache)\//.test(name),
        )
        .map((name) => join(place, name)),
)
const withoutCode = (text: string) =>
  text.replace(/^```[\s\S]*?^```/gm, '').replace(/`[^`\n]*`/g, (code) => code.replace(/[[\](]/g, ''))

/** The anchors of a page's headings, as GitHub makes them. */
function anchorsOf(page: string): string[] {
  const text = readFileSync(page, 'utf8').replace(/^```[\s\S]*?^```/gm, '')
  return [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading]) =>
    heading!
      .toLowerCase()
      .replace(/[^\p{L}\p{N}_\- ]/gu, '')
      .replaceAll(' ', '-'),
  )
}

t.test('every link of every page leads to a file, and to a heading that is there', async (t) => {
  let links = 0
  for (const page of PAGES) {
    for (const [, link] of withoutCode(readFileSync(page, 'utf8')).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^https?:/.test(link!)) continue
      links++
      const [path, anchor] = link!.split('#')
      const target = path === '' ? page : join(dirname(page), path!)
      if (!t.ok(existsSync(target), `${page}: ${link}`) || anchor === undefined) continue
      t.ok(anchorsOf(target).includes(anchor), `${page}: ${link} has no such heading`)
    }
  }
  t.ok(links > 100, `${links} links`)
})

t.test('the example of muond explain prints what docs/operations.md shows', async (t) => {
  const [, open, printed] =
    section('docs/operations.md', 'explain').match(/```json\n([\s\S]*?)```[\s\S]*```text\n([\s\S]*?)\n```/) ?? []
  const file = join(t.testdir({ 'open.json': open! }), 'open.json')
  t.equal(explainCommand([file], {}), printed)
})

/** What a command printed, without what is another thing on each machine and in each moment. */
function skeletonOf(text: string): string {
  return text
    .replaceAll(/process \d+ on \S+ since \S+/g, 'PROCESS')
    .replaceAll(/\/\S*|(?<=\d\.\d\.\d\.\d:)\d+/g, 'PLACE')
    .replaceAll(/\d[\d.]*/g, '0')
    .replaceAll(/0 [kMGT]?B|\b0 (s|min|h) ago|\bnow\b/g, '0')
    .replaceAll(/0 (s|min|h)$/gm, '0')
    .replaceAll(/-+/g, '-')
    .replaceAll(/ +/g, ' ')
}

t.test('check, status and top print what docs/operations.md shows', async (t) => {
  const data = join(t.testdir({}), 'data')
  const service = await startService({ data, durability: 'journal', checkpoint_steps: 5, lanes: 2 })
  const names = ['moonlight-small', 'ablation-no-clip', 'sweep-lr-0.02']
  const clients: RawClient[] = []
  for (const run of names) clients.push((await train(service, { run, last: 7 })).client)
  for (const run of names) await service.runs.keeper(run).settled()
  await clients[2]!.close()
  const shown = (name: string) => section('docs/operations.md', name).match(/```text\n\$ .*\n([\s\S]*?)\n```/)![1]!
  const same = (name: string, printed: string) => {
    const lines = (text: string) => skeletonOf(text).split('\n').sort()
    t.same(lines(printed), lines(shown(name)), name)
  }
  const failed = () => t.fail('nothing is wrong')
  const steps = async (step: number) => {
    for (const client of clients.slice(0, 2)) await trainStep(client, step)
  }
  await steps(8)
  same('status', await statusCommand([service.http], {}, { failed }))
  await steps(9)
  const output = new PassThrough()
  let printed = ''
  output.on('data', (text) => (printed += text))
  const terminal = { output, keyboard: new PassThrough(), signals: new EventEmitter() }
  await topCommand([service.http, '--count', '2', '--interval', '0.1'], {}, terminal)
  same('top', printed.trim().split('\n\n')[1]!)
  const argv = ['--device', 'cpu', '--data', data, '--durability', 'journal']
  const checked = await checkCommand(argv, { MUOND_PORT: new URL(service.http).port }, { failed })
  same('check', checked.replace('MUOND_PORT, ', ''))
  for (const client of clients.slice(0, 2)) await client.close()
  await service.app.close()
})

t.test('docs/faults.md shows the faults that were tried last', async (t) => {
  const { rows, seed } = JSON.parse(readFileSync('bench/results/chaos.json', 'utf8'))
  t.equal(section('docs/faults.md', 'chaos'), `${markdown(rows)}\n\nSeed ${seed}.\n`)
  t.ok(rows.every(({ lost }: { lost: number }) => lost === 0))
})

t.test('the preset of docs/algorithms.md is one, and its table has those that come with muond', async (t) => {
  const text = readFileSync('docs/algorithms.md', 'utf8')
  const [, example] = text.match(/```yaml\n([\s\S]*?)```/) ?? []
  t.ok(readPresets(t.testdir({ 'may.yaml': example! })).has('may'))
  for (const { name, recipes } of readPresets().values()) {
    const algorithms = Object.keys(recipes).map((algorithm) => `\`${algorithm}\``)
    t.ok(new RegExp(`^\\| \`${name}\` +\\| ${algorithms.join(', ')} +\\|`, 'm').test(text), name)
  }
})

t.test(
  'docs/algorithms.md lists every hyperparameter with its default, and marks those that no step changes',
  async (t) => {
    const text = readFileSync('docs/algorithms.md', 'utf8')
    for (const algorithm of ['muon', 'adamw', 'rmsprop', 'sgd'] as const) {
      const [, body] = text.split(`\n## ${algorithm}\n`)
      const [, ...rows] = body!
        .split('\n## ')[0]!
        .match(/\n\| hyperparameter [\s\S]*?\n\n/)![0]
        .trim()
        .split('\n')
        .slice(1)
      const written = rows.map((row) => row.split('|').map((text) => text.trim()))
      const table: Table = HYPERPARAMETERS[algorithm]
      t.same(
        written.map(([, key]) => key),
        Object.keys(table).map((key) => `\`${key}\``),
        algorithm,
      )
      for (const [i, [key, { default: value, sticky }]] of Object.entries(table).entries()) {
        const [, , fallback, range] = written[i]!
        const [shown] = fallback!.replaceAll('`', '').split(', or ')
        t.same(typeof value === 'string' ? shown : JSON.parse(shown!), value, `${algorithm} ${key}`)
        t.equal(range!.includes('_fixed_'), !sticky, `${algorithm} ${key}`)
      }
    }
  },
)

t.test('the example of the arithmetic in docs/protocol.md has the bits that its formulas lead to', async (t) => {
  const [, table] =
    readFileSync('docs/protocol.md', 'utf8').match(/\n## Arithmetic\n[\s\S]*?\n(\| \|[\s\S]*?)\n\n/) ?? []
  const rows = table!.split('\n').slice(2)
  const { fround } = Math
  for (const column of [2, 4]) {
    const [W, data, keep, s, a, b, c, fused] = rows.map((row) =>
      floatOf(row.split('|')[column]!.replaceAll(/[ `]/g, '')),
    )
    t.equal(keep, fround(1 - 0.002))
    t.equal(s, fround(-0.02))
    t.same([a, b, c], [fround(keep! * W!), fround(s! * data!), fround(a! + b!)])
    // The product is exact in float64, and so is this sum of numbers of like size.
    t.equal(fused, fround(a! + s! * data!))
    t.not(fused, c)
  }
})

function floatOf(bits: string): number {
  return Buffer.from(bits, 'hex').readFloatBE()
}

t.test('docs/protocol.md names the hyperparameters that a resuming open must give alike', async (t) => {
  const [, named] = readFileSync('docs/protocol.md', 'utf8').match(/marks _fixed_: ([^)]*)\)/) ?? []
  const fixed = Object.values(HYPERPARAMETERS).flatMap((table: Table) =>
    // There is one value of `centered` only.
    Object.keys(table).filter((key) => !table[key]!.sticky && key !== 'centered'),
  )
  t.same(new Set([...named!.matchAll(/`(\w+)`/g)].map(([, key]) => key)), new Set(fixed))
})

t.test(
  'docs/algorithms.md gives the coefficients that are computed with, padded sets as they were published',
  async (t) => {
    const text = readFileSync('docs/algorithms.md', 'utf8')
    const written = [...text.matchAll(/-?\d+(\.\d+)?/g)].map(([number]) => Math.abs(Number(number)))
    for (const [name, { coefficients }] of Object.entries(NAMED_COEFFICIENTS)) {
      t.match(text, `\`${name}\``)
      coefficients.forEach((triple, step) => {
        triple.forEach((number, power) => {
          const padded = PADDED.includes(name) && step < coefficients.length - 1
          const published = Math.abs(number) * (padded ? 1.05 ** (2 * power + 1) : 1)
          t.ok(
            written.some((other) => Math.abs(other - published) <= 1e-12 * published),
            `${name}: ${published}`,
          )
        })
      })
    }
  },
)
