import t from 'tap'
import { shorten, tableLines } from '../src/text-table.js'

const TABLE = {
  head: ['name', 'n'],
  align: ['left', 'right'],
  rows: [
    ['a.very.long.name.of.a.tensor', '1'],
    ['b', '1000'],
  ],
} as const

t.test('columns are as wide as their widest cell, and no line ends with a space', async (t) => {
  t.same(
    tableLines({
      ...TABLE,
      align: ['right', 'left'],
      rows: [
        ['a', ''],
        ['bcdef', '12'],
      ],
    }),
    [' name  n', '    a', 'bcdef  12'],
  )
})

t.test('a width shortens the first column in its middle, but not below twelve characters', async (t) => {
  t.same(tableLines(TABLE, 24), ['name                   n', 'a.ver….of.a.tensor     1', 'b                   1000'])
  t.same(
    tableLines(TABLE, 5).map((line) => line.length),
    [18, 18, 18],
  )
  t.same(tableLines(TABLE, 34), tableLines(TABLE), 'what fits is left as it is')
})

t.test('shorten keeps both ends', async (t) => {
  t.equal(shorten('abcdefghij', 10), 'abcdefghij')
  t.equal(shorten('abcdefghij', 7), 'ab…ghij')
})
