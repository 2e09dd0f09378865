import { readFileSync } from 'node:fs'
import t from 'tap'
import { presetsCommand } from '../../src/commands/presets.js'
import { ConfigError } from '../../src/config.js'

const MINE = 'description: my own\nalgorithm: sgd\nhyperparameters: { sgd: { lr: 0.7 } }\n'

t.test('the list has a line for each preset, within 80 columns', async (t) => {
  const lines = presetsCommand([], {}).split('\n')
  t.equal(lines.length, 8)
  t.ok(lines.every((line) => line.length <= 80))
  t.match(lines[0], /^preset +algorithm +description$/)
  t.match(lines[4], /^moonlight +muon +Moonlight 16B-A3B, Muon at AdamW's update RMS$/)
})

t.test('a name prints its file, sources and all', async (t) => {
  t.equal(`${presetsCommand(['deepseek-v4'], {})}\n`, readFileSync('presets/deepseek-v4.yaml', 'utf8'))
})

t.test("a person's own folder comes by flag or variable, the flag wins", async (t) => {
  const [mine, empty] = [t.testdir({ mine: { 'mine.yaml': MINE }, empty: {} }), '/nowhere']
  const own = /^mine +sgd +my own$/m
  t.match(presetsCommand(['--presets', `${mine}/mine`], {}), own)
  t.match(presetsCommand([], { MUOND_PRESETS: `${mine}/mine` }), own)
  t.match(presetsCommand(['mine'], { MUOND_PRESETS: `${mine}/mine` }), 'description: my own')
  t.notMatch(presetsCommand(['--presets', `${mine}/empty`], { MUOND_PRESETS: empty }), own)
})

t.test('what it cannot do is one line', async (t) => {
  const cases: [string[], string][] = [
    [
      ['kimi'],
      "there is no preset 'kimi', expected one of deepseek-v4, diloco, kimi-k2, moonlight, muloco, nanogpt, torch",
    ],
    [['torch', 'kimi-k2'], 'presets takes one name, got torch kimi-k2'],
    [['--colour'], "Unknown option '--colour' (--help lists the flags)"],
  ]
  for (const [argv, message] of cases) t.throws(() => presetsCommand(argv, {}), new ConfigError(message), message)
})

t.test('--help says how it is used, within 80 columns', async (t) => {
  const help = presetsCommand(['--help'], {})
  t.match(help, /^muond presets \[NAME\]/)
  t.equal(presetsCommand(['-h', 'torch'], {}), help)
  t.ok(help.split('\n').every((line) => line.length <= 80))
})
