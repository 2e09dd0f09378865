import { execFile } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { EXAMPLES } from '../../examples/catalog.js'

const PROGRAM = fileURLToPath(new URL('../../examples/examples.js', import.meta.url))
const examples = (...flags: string[]) => promisify(execFile)(process.execPath, [PROGRAM, ...flags])
const PAGE = '# one\n<!-- overhead -->\nold\n<!-- /overhead -->\nrest\n'

t.test('an example runs by name, prints its table and leaves results, picture and section', async (t) => {
  const folder = t.testdir({ 'examples.md': PAGE })
  const { stdout, stderr } = await examples('overhead', '--quick', '--out', folder, '--tables', `${folder}/examples.md`)
  const { machine, seconds, results } = JSON.parse(readFileSync(`${folder}/overhead.json`, 'utf8'))
  const { table, svg } = EXAMPLES.get('overhead')!.show(results)
  t.match(stdout, `overhead, ${seconds} s\n\n${table}\n`)
  t.equal(readFileSync(`${folder}/overhead.svg`, 'utf8'), svg)
  t.equal(readFileSync(`${folder}/examples.md`, 'utf8'), PAGE.replace('old', table))
  t.match(machine, { node: process.version, date: /^\d{4}-/ })
  t.match(stderr, /overhead {3}\[#+\] 12\/12/)
})

t.test('a file without the section is refused', async (t) => {
  const folder = t.testdir({ 'examples.md': PAGE.replace('<!-- /overhead -->', '') })
  const run = examples('overhead', '--quick', '--out', folder, '--tables', `${folder}/examples.md`)
  await t.rejects(run, /examples.md has no section <!-- overhead --> … <!-- \/overhead -->/)
})

t.test('a name that is none is refused before anything is measured', async (t) => {
  await t.rejects(examples('overhead', 'speed'), {
    message: /no example 'speed', expected one of update-rms, overhead, qk-clip, efficiency/,
    stdout: '',
  })
})

t.test('--help says what is measured and starts nothing', async (t) => {
  const { stdout, stderr } = await examples('--help')
  t.match(stdout, 'Measures what is claimed of Muon')
  t.equal(stderr, '')
})
