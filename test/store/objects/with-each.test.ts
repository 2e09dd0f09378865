import t from 'tap'
import { withEach } from '../../../src/store/objects/with-each.js'
import { turn } from '../../service.js'

t.test('work is done with each item, with so many at a time, and ends when nothing is under way', async (t) => {
  let underWay = 0
  let most = 0
  const done: number[] = []
  const work = async (item: number) => {
    most = Math.max(most, ++underWay)
    await turn()
    underWay -= 1
    if (item === 4) throw new Error('the fourth fails')
    done.push(item)
  }
  await withEach([1, 2, 3], 2, work)
  t.same([done, most], [[1, 2, 3], 2])
  done.length = 0
  await t.rejects(withEach([1, 2, 3, 4, 5, 6, 7, 8, 9], 3, work), { message: 'the fourth fails' })
  t.equal(underWay, 0)
  t.ok(done.length < 8, 'nothing more is begun')
})
