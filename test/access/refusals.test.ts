import t from 'tap'
import { MOST_ADDRESSES, Refusals } from '../../src/access/refusals.js'

t.test('an address is told to wait for the rest of the minute once it was refused too often', async (t) => {
  const refusals = new Refusals(2)
  t.same(refusals.count('10.0.0.1', 0), { count: 1, most: 2, wait_seconds: 0 })
  t.same(refusals.count('10.0.0.1', 1000), { count: 2, most: 2, wait_seconds: 0 })
  t.same(refusals.count('10.0.0.1', 45_000), { count: 3, most: 2, wait_seconds: 15 })
  t.equal(refusals.count('10.0.0.2', 45_000).count, 1)
  t.same(refusals.count('10.0.0.1', 60_000), { count: 1, most: 2, wait_seconds: 0 })
})

t.test('the addresses of one network of IPv6 are one, and an IPv4 address is itself in both spellings', async (t) => {
  const groups = [
    [
      '2001:db8:1:2::5',
      '2001:db8:1:2:3:4:5:6',
      '2001:db8:1:2:ffff::1',
      '2001:0db8:0001:0002:0:0:0:9',
      '2001:db8:1:2::1%eth0',
    ],
    ['2001:db8:1:3::5'],
    ['::1', '::2'],
    ['fe80::1', 'fe80::2:3:4:5'],
    ['10.0.0.1', '::ffff:10.0.0.1'],
    ['10.0.0.2'],
    [''],
  ]
  for (const [i, group] of groups.entries()) {
    const refusals = new Refusals(100)
    for (const other of groups.toSpliced(i, 1).flat()) refusals.count(other, 0)
    for (const [j, address] of group.entries()) t.equal(refusals.count(address, 0).count, j + 1, address)
  }
})

t.test('so many addresses are counted at a time, and the oldest is forgotten', async (t) => {
  const refusals = new Refusals(1)
  for (let i = 0; i <= MOST_ADDRESSES; i++) refusals.count(`10.0.${i >> 8}.${i & 255}`, i)
  t.equal(refusals.count('10.0.0.1', MOST_ADDRESSES).count, 2, 'the second is there')
  t.equal(refusals.count('10.0.0.0', MOST_ADDRESSES).count, 1, 'the first is not')
})
