import t from 'tap'
import { markdown, type Row } from './table.js'

const row = (change: Partial<Row>): Row => ({
  ...{ fault: 'kill -9', aimed: 'rename', count: 3, same: 2, error: 1, lost: 0, seconds: 12.4 },
  ...change,
})

t.test('rows stand in columns, with a sum and their notes below', async (t) => {
  const rows = [
    row({ fell: 2 }),
    row({ fault: 'disk full', note: 'no tmpfs', count: 0, same: 0, error: 0 }),
    row({ note: 'x' }),
  ]
  t.equal(
    markdown([...rows, row({ fault: 'clock', note: 'no tmpfs', lost: 1 })]),
    `| fault         | aimed at | cases | fell there | same result | explicit error, then the same | lost | seconds |
|---------------|----------|------:|-----------:|------------:|------------------------------:|-----:|--------:|
| kill -9       | rename   |     3 |          2 |           2 |                             1 |    0 |      12 |
| disk full [1] | rename   |     0 |            |           0 |                             0 |    0 |      12 |
| kill -9 [2]   | rename   |     3 |            |           2 |                             1 |    0 |      12 |
| clock [1]     | rename   |     3 |            |           2 |                             1 |    1 |      12 |
| all           |          |     9 |            |           6 |                             3 |    1 |      50 |

[1] no tmpfs
[2] x`,
  )
})

t.test('a table without notes ends with its last row', async (t) => {
  t.match(markdown([row({})]), /\| all [^\n]* 12 \|$/)
})
