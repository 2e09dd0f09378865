import t from 'tap'
import { Feed, RECEIPTS_KEPT } from '../../src/client/receipts.js'

t.test('every reader gets every item from its own beginning, then the end', async (t) => {
  const feed = new Feed<number>()
  const early = feed.read()
  feed.push(1)
  const late = feed.read()
  feed.push(2)
  feed.end()
  t.same(await collect(early), [1, 2])
  t.same(await collect(late), [2])
  t.same(await collect(feed.read()), [], 'a reader of an ended feed')
})

t.test('a reader that waits is woken by an item and by the end', async (t) => {
  const feed = new Feed<number>()
  const reader = feed.read()
  const [first, second] = [reader.next(), reader.next()]
  feed.push(7)
  feed.end()
  t.same(await first, { value: 7, done: false })
  t.same(await second, { value: undefined, done: true })
})

t.test('a slow reader loses the oldest items', async (t) => {
  const feed = new Feed<number>()
  const reader = feed.read()
  for (let i = 0; i < RECEIPTS_KEPT + 3; i++) feed.push(i)
  feed.end()
  const items = await collect(reader)
  t.equal(items.length, RECEIPTS_KEPT)
  t.equal(items[0], 3)
})

t.test('leaving the loop releases the reader', async (t) => {
  const feed = new Feed<number>()
  const reader = feed.read()
  feed.push(1)
  for await (const item of reader) {
    t.equal(item, 1)
    break
  }
  feed.push(2)
  t.same(await collect(reader), [])
})

async function collect<Item>(items: AsyncIterable<Item>): Promise<Item[]> {
  const all: Item[] = []
  for await (const item of items) all.push(item)
  return all
}
