import { readFileSync } from 'node:fs'
import t from 'tap'
import { EXAMPLES } from '../../examples/catalog.js'

const PAGE = readFileSync('docs/examples.md', 'utf8')

for (const [name, entry] of EXAMPLES) {
  t.test(`${name}: the table in docs/examples.md and the picture are those of the results beside it`, async (t) => {
    const { results } = JSON.parse(readFileSync(`docs/examples/${name}.json`, 'utf8'))
    const { table, svg } = entry.show(results)
    t.match(PAGE, `<!-- ${name} -->\n${table}\n<!-- /${name} -->`)
    t.match(PAGE, `(examples/${name}.svg)`)
    t.equal(readFileSync(`docs/examples/${name}.svg`, 'utf8'), svg)
  })
}
