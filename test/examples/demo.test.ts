import { execFile } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'

const DEMO = fileURLToPath(new URL('../../examples/demo.js', import.meta.url))
const demo = (...flags: string[]) => promisify(execFile)(process.execPath, [DEMO, ...flags])

t.test('the demo trains twice, prints the comparison and draws both curves', async (t) => {
  const svg = `${t.testdir()}/demo.svg`
  const { stdout, stderr } = await demo('--quick', '--svg', svg)
  t.match(stdout, /final validation loss, nats per byte +\d\.\d{4} +\d\.\d{4}\n/)
  t.match(stdout, / 20 steps of 256 examples, seed 1/)
  t.match(stdout, /Muon \+ AdamW (came|did not come) to AdamW's final loss/)
  t.match(stderr, /AdamW, lr 0\.006 .* 20\/20 {2}validation loss/)
  t.equal(readFileSync(svg, 'utf8').match(/<polyline/g)?.length, 2)
})

t.test('a sweep tries every learning rate', async (t) => {
  const { stdout } = await demo('--sweep', '--steps', '1')
  t.equal(stdout.match(/^\| AdamW +\|/gm)?.length, 5)
  t.equal(stdout.match(/^\| Muon \+ AdamW \|/gm)?.length, 5)
})

t.test('--help says what the demo does and starts nothing', async (t) => {
  const { stdout, stderr } = await demo('--help')
  t.match(stdout, 'AdamW for\neverything, then Muon')
  t.equal(stderr, '')
})

t.test('a number of steps that is none is refused by name', async (t) => {
  await t.rejects(demo('--steps', 'many'), /--steps is 'many', expected a whole number from 1 on/)
})
