import { join } from 'node:path'
import t from 'tap'
import { ConfigError } from '../../src/config.js'
import { readPresetFiles, readPresets } from '../../src/store/presets.js'

const MINE = 'description: mine\nalgorithm: sgd\nhyperparameters: { sgd: { lr: 0.7 } }\n'

t.test('the presets that come with muond are valid, and each of their values names its source', async (t) => {
  const presets = readPresets()
  t.same([...presets.keys()], ['deepseek-v4', 'diloco', 'kimi-k2', 'moonlight', 'muloco', 'nanogpt', 'torch'])
  for (const { name, description, source, recipes } of presets.values()) {
    t.ok(description.length <= 50 && source.length > 0, name)
    const isOuter = Object.keys(recipes).join() === 'sgd'
    t.ok(isOuter || 'adamw' in recipes, `${name} has values for what Muon does not take`)
    for (const recipe of Object.values(recipes)) {
      for (const [key, value] of Object.entries(recipe)) t.ok(value.source.length > 0, `${name} ${key}`)
    }
  }
})

t.test('what a publication does not say is marked', async (t) => {
  const unconfirmed = [...readPresets().values()].flatMap(({ name, recipes }) =>
    Object.values(recipes).flatMap((recipe) =>
      Object.entries(recipe).flatMap(([key, { confirmed }]) => (confirmed ? [] : [`${name} ${key}`])),
    ),
  )
  t.same([...new Set(unconfirmed.map((text) => text.split(' ')[0]))], ['diloco', 'kimi-k2', 'muloco'])
  t.ok(unconfirmed.includes('kimi-k2 momentum'))
})

t.test("a person's own presets are YAML or JSON, added to the others; other files are left alone", async (t) => {
  const json = JSON.stringify({ description: 'j', algorithm: 'adamw', hyperparameters: { adamw: {} } })
  const folder = t.testdir({ 'a.yaml': MINE, 'b.yml': MINE, 'c.json': json, 'README.md': 'not one', '.d.yaml': 'no' })
  t.same([...readPresets(folder).keys()].slice(-3), ['a', 'b', 'c'])
  t.same(readPresetFiles(folder).at(-3), {
    file: join(folder, 'a.yaml'),
    text: MINE,
    preset: {
      name: 'a',
      description: 'mine',
      source: '',
      algorithm: 'sgd',
      recipes: { sgd: { lr: { value: 0.7, source: '', confirmed: true } } },
    },
  })
})

t.test('what cannot be read is one line with the file and the key', async (t) => {
  const cases: [string, string, string | RegExp][] = [
    ['bad.yaml', MINE.replace('0.7', '-1'), 'hyperparameters.sgd: lr is -1, expected a finite float32 number >= 0'],
    ['typo.yaml', MINE.replace('description', 'describtion'), /^describtion is unknown, expected description, /],
    ['broken.yaml', 'a: [1, 2\nb: 3', /^[^\n]+ at line 2, column 1$/],
    ['twice.yaml', `${MINE}description: again\n`, /^duplicated mapping key at line 4, column 1$/],
  ]
  for (const [name, text, message] of cases) {
    const folder = t.testdir({ [name]: text })
    const error = thrown(() => readPresets(folder))
    const [file, rest] = [join(folder, name), error.message.slice(join(folder, name).length + 2)]
    t.ok(error.message.startsWith(`${file}: `), error.message)
    t.match(rest, message)
  }
  t.match(
    thrown(() => readPresets('/nowhere/at/all')).message,
    /^presets folder '\/nowhere\/at\/all' cannot be read: ENOENT/,
  )
})

t.test('a file whose name no group could give is refused, not left out', async (t) => {
  for (const name of ['my recipe.yaml', '-x.yml', 'é.json', 'UPPER.YAML', `${'x'.repeat(129)}.yaml`]) {
    const { message } = thrown(() => readPresets(t.testdir({ [name]: MINE })))
    const expected =
      ": expected a name of 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first, then .yaml, .yml or .json"
    t.ok(message.endsWith(`/${name}${expected}`), message)
  }
})

t.test('a name that is taken is refused, whether muond or the folder has it', async (t) => {
  const shipped = t.testdir({ 'torch.yaml': MINE })
  t.match(
    thrown(() => readPresets(shipped)).message,
    /\/torch\.yaml: there is a preset 'torch' already, .*presets\/torch\.yaml$/,
  )
  const twice = t.testdir({ 'a.json': '{}', 'a.yaml': MINE, 'b.json': MINE })
  t.match(thrown(() => readPresets(twice)).message, /a\.json: description is missing/)
  const both = t.testdir({ 'a.yaml': MINE, 'a.yml': MINE })
  t.match(thrown(() => readPresets(both)).message, /a\.yml: there is a preset 'a' already, .*a\.yaml$/)
})

function thrown(work: () => unknown): ConfigError {
  try {
    work()
  } catch (error) {
    if (error instanceof ConfigError) return error
    throw error
  }
  throw new Error('nothing was thrown')
}
