import { readFileSync } from 'node:fs'
import t from 'tap'
import { EXAMPLES } from '../../examples/catalog.js'

const README = readFileSync('README.md', 'utf8')

for (const [name, entry] of EXAMPLES) {
  t.test(`${name}: the table in the README and the picture are those of the results beside it`, async (t) => {
    const { results } = JSON.parse(readFileSync(`docs/examples/${name}.json`, 'utf8'))
    const { table, svg } = entry.show(results)
    t.match(README, `<!-- ${name} -->\n${table}\n<!-- /${name} -->`)
    t.match(README, `(docs/examples/${name}.svg)`)
    t.equal(readFileSync(`docs/examples/${name}.svg`, 'utf8'), svg)
  })
}
