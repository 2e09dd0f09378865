import { chmodSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { hashOf } from '../../src/access/key-file.js'
import { Keys } from '../../src/access/keys.js'
import { keysCommand } from '../../src/commands/operate/keys.js'

/** Runs the command; answers what it prints, and what the terminal shows beside that. */
async function keys(...argv: string[]) {
  const shown: string[] = []
  const terminal = { write: (text: string) => void shown.push(text) }
  const printed = await keysCommand(argv, {}, { terminal })
  return { printed, shown: shown.join('') }
}

t.test('add makes a key, prints it once, and its file has the hash only', async (t) => {
  const file = join(t.testdir({}), 'keys.yaml')
  const first = await keys('add', 'alice', '--file', file, '--runs', 'alice-', '--scopes', 'step,read')
  const second = await keys('add', 'root', '--file', file, '--quotas', 'runs=4,bytes_per_second=2000000')
  t.match(first, {
    printed: /^muond_[A-Za-z0-9_-]{43}$/,
    shown: `alice: step, read; runs named alice-…. The key is shown this once: ${file} has its SHA-256.\n`,
  })
  t.match(second.shown, /^root: step, read, checkpoint; all runs\. /)
  t.not(first.printed, second.printed)
  const text = readFileSync(file, 'utf8')
  for (const { printed } of [first, second]) {
    t.notMatch(text, String(printed))
    t.match(text, hashOf(String(printed)))
  }
  t.equal(statSync(file).mode & 0o777, 0o600)
  const known = new Keys({ api_keys: [], keys_file: file })
  t.equal(known.find(String(first.printed))?.name, 'alice')
  t.equal(known.find(`${first.printed}x`), undefined)
  t.same(await keys('list', '--file', file), {
    printed: [
      'key    scopes                  runs     quotas',
      'alice  step, read              alice-…',
      'root   step, read, checkpoint  all      runs 4, bytes_per_second 2000000',
    ].join('\n'),
    shown: '',
  })
})

t.test('comments and the mode of a file stay, and a removed key is gone', async (t) => {
  const file = join(t.testdir({}), 'keys.yaml')
  await keys('add', 'a', '--file', file)
  writeFileSync(file, `# ours\n${readFileSync(file, 'utf8')}`)
  chmodSync(file, 0o640)
  await keys('add', 'b', '--file', file)
  t.same(await keys('remove', 'a', '--file', file), { printed: undefined, shown: '' })
  t.match(readFileSync(file, 'utf8'), /^# ours\nkeys:\n {2}- name: b\n/)
  t.equal(statSync(file).mode & 0o777, 0o640)
  await keys('remove', 'b', '--file', file)
  t.match(readFileSync(file, 'utf8'), /keys: \[\]/)
  await keys('add', 'c', '--file', file)
  t.match((await keys('list', '--file', file)).printed, /^c /m)
})

t.test('the file may come from the variable of the service', async (t) => {
  const file = join(t.testdir({}), 'keys.yaml')
  await keysCommand(['add', 'a'], { MUOND_KEYS_FILE: file }, { terminal: { write: () => {} } })
  t.match(await keysCommand(['list'], { MUOND_KEYS_FILE: file }, { terminal: { write: () => {} } }), /^a /m)
  t.match(await keysCommand(['--help'], {}, { terminal: { write: () => {} } }), /^muond keys add NAME/)
})

t.test('what cannot be is one line, and changes nothing', async (t) => {
  const file = join(t.testdir({}), 'keys.yaml')
  await keys('add', 'a', '--file', file)
  const before = readFileSync(file, 'utf8')
  const CASES: [string[], RegExp][] = [
    [[], /^keys takes add NAME, remove NAME or list/],
    [['add'], /^keys takes/],
    [['add', 'a', 'b'], /^keys takes/],
    [['list', 'a'], /^keys takes/],
    [['list'], /^--file is missing/],
    [['add', 'a', '--file', file], /keys\[0\] and keys\[1\] have the same name or the same sha256$/],
    [['add', 'b c', '--file', file], /keys\[1\]\.name is "b c", expected 1 to 64/],
    [['add', 'b', '--file', file, '--scopes', 'step,write'], /scopes\[1\] is "write", expected "step" or "read" or/],
    [['add', 'b', '--file', file, '--runs', 'team1'], /runs is "team1", expected the beginning of run names, with/],
    [['add', 'b', '--file', file, '--quotas', 'runs=many'], /quotas\.runs is "many", expected a count above 0/],
    [['add', 'b', '--file', file, '--quotas', 'runs'], /quotas\.runs is "", expected a count above 0/],
    [['remove', 'b', '--file', file], /has no key 'b', but a$/],
    [['add', 'b', '--file', join(file, 'c')], /cannot be written: ENOTDIR/],
    [['add', 'b', '--file', join(file, '..')], /cannot be read: EISDIR/],
    [['list', '--file', join(file, '..', 'nowhere')], /cannot be read: ENOENT/],
  ]
  for (const [argv, message] of CASES) await t.rejects(keys(...argv), { name: 'ConfigError', message }, argv.join(' '))
  t.equal(readFileSync(file, 'utf8'), before)
})

t.test('a file of keys says where it is wrong', async (t) => {
  const file = join(t.testdir({}), 'keys.yaml')
  const sha256 = hashOf('x')
  const entry = { name: 'a', sha256, scopes: ['read'] }
  const CASES: [unknown, RegExp][] = [
    ['keys: [', /is no YAML: /],
    ['', /has no key: nobody could use the service$/],
    [{ keys: [] }, /has no key/],
    [{ key: [] }, /: key is unknown$/],
    [{ keys: [{ ...entry, sha256: 'abc' }] }, /keys\[0\]\.sha256 is "abc", expected a SHA-256/],
    [{ keys: [{ ...entry, key: 'plain' }] }, /keys\[0\]\.key is unknown/],
    [{ keys: [entry, { ...entry, name: 'b' }] }, /keys\[0\] and keys\[1\] have the same name or the same sha256/],
  ]
  for (const [content, message] of CASES) {
    writeFileSync(file, typeof content === 'string' ? content : JSON.stringify(content))
    t.throws(() => new Keys({ api_keys: [], keys_file: file }), { name: 'ConfigError', message })
  }
  writeFileSync(file, JSON.stringify({ keys: [entry] }))
  chmodSync(file, 0o666)
  t.throws(() => new Keys({ api_keys: [], keys_file: file }), { message: /has mode 666: everybody may add a key/ })
})
