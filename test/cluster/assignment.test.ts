import t from 'tap'
import { firstAssignment, nextAssignment } from '../../src/cluster/assignment.js'
import { modelOf } from './models.js'

/** Four parameters of 100 float32 elements: 800 bytes of state each, as adamw has it. */
const { parameters, attentions } = modelOf(
  'm',
  Array.from({ length: 4 }, (_, i) => ({ name: `p${i}`, shape: [100], group: 'adamw' })),
)
const STATE = 800
const room = (url: string, parameters: number) => ({ url, free_bytes: parameters * STATE })
const model = { parameters, attentions }
const peersOf = ({ shards }: { shards: readonly { readonly peer: string }[] }) => shards.map(({ peer }) => peer)

t.test('without a number of shards there are as few as have room', async (t) => {
  const one = firstAssignment('gpt', model, { rooms: [room('a', 4), room('b', 9)] })
  t.same(one, { run: 'gpt', generation: 1, shards: [{ peer: 'b', parameters: [0, 1, 2, 3] }] })
  const two = firstAssignment('gpt', model, { rooms: [room('a', 3), room('b', 2)] })
  t.same(two.shards, [
    { peer: 'a', parameters: [0, 2] },
    { peer: 'b', parameters: [1, 3] },
  ])
  // Three have 1.6 times the state together, but none has room for two parameters but one.
  const four = firstAssignment('gpt', model, { rooms: [room('a', 1), room('b', 1.9), room('c', 1.9), room('d', 1.9)] })
  t.same(peersOf(four).sort(), ['a', 'b', 'c', 'd'])
})

t.test('a number of shards that is asked for: several may have one process', async (t) => {
  const asked = firstAssignment('gpt', model, { rooms: [room('a', 4), room('b', 1)], shards: 3 })
  t.same(peersOf(asked), ['a', 'a', 'a'])
  t.same(peersOf(firstAssignment('gpt', model, { rooms: [room('a', 4), room('b', 4)], shards: 2 })), ['a', 'b'])
  const tooMany = () => firstAssignment('gpt', model, { rooms: [room('a', 4)], shards: 5 })
  t.throws(tooMany, { code: 'PARAMETER_INVALID' })
})

t.test('no room: the shard, its bytes and what is free are named', async (t) => {
  const rooms = [room('a', 1), room('b', 1)]
  t.throws(() => firstAssignment('gpt', model, { rooms }), {
    code: 'OVER_CAPACITY',
    message: /shard 0 of run 'gpt' needs 3200 bytes of state, free are 800 on a, 800 on b: start another process/,
  })
  t.throws(() => firstAssignment('gpt', model, { rooms, shards: 2 }), { code: 'OVER_CAPACITY', message: /1600 bytes/ })
  t.throws(() => firstAssignment('gpt', model, { rooms: [] }), { message: /free are there is no process/ })
})

t.test('shards of dead processes go to those with the most room; the others stay', async (t) => {
  const first = firstAssignment('gpt', model, { rooms: [room('a', 1), room('b', 1), room('c', 1), room('d', 1)] })
  const next = nextAssignment(first, [room('a', 2), room('c', 3)], parameters)
  t.same(next, {
    run: 'gpt',
    generation: 2,
    shards: [
      { peer: 'a', parameters: [0] },
      { peer: 'c', parameters: [1] },
      { peer: 'c', parameters: [2] },
      { peer: 'a', parameters: [3] },
    ],
  })
  t.same(peersOf(nextAssignment(next, [room('a', 0), room('c', 0)], parameters)), ['a', 'c', 'c', 'a'])
  t.throws(() => nextAssignment(next, [room('a', 1)], parameters), {
    code: 'OVER_CAPACITY',
    message: /shard 2 of run 'gpt' needs 800 bytes of state, free are 800 on a/,
  })
})
