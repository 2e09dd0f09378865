import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import t from 'tap'
import {
  call,
  dict,
  float,
  global,
  int,
  list,
  object,
  type Picklable,
  persistent,
  pickle,
  tuple,
} from '../../../src/exchange/torch/pickle.js'
import { PickleError } from '../../../src/exchange/torch/pickle-value.js'
import { tensorNode } from '../../../src/exchange/torch/tensor.js'
import { unpickle } from '../../../src/exchange/torch/unpickle.js'

const bytes = (text: string) => Buffer.from(text, 'latin1')

t.test('a pickle has the bytes of protocol 2', async (t) => {
  const value = dict([
    ['a', int(1)],
    [int(-2), list([true, null, float(0.5)])],
    ['big', int(2 ** 40)],
  ])
  t.same(
    pickle(value),
    bytes(
      '\x80\x02}(X\x01\x00\x00\x00aJ\x01\x00\x00\x00J\xfe\xff\xff\xff](\x88NG\x3f\xe0\x00\x00\x00\x00\x00\x00e' +
        'X\x03\x00\x00\x00big\x8a\x08\x00\x00\x00\x00\x00\x01\x00\x00u.',
    ),
  )
  t.same(pickle(object(global('m', 'C'), dict([]))), bytes('\x80\x02cm\nC\n)\x81}(ub.'))
  t.same(pickle(tuple(persistent('id'), call(global('m', 'f')))), bytes('\x80\x02(X\x02\x00\x00\x00idQcm\nf\n)Rt.'))
})

t.test('what was written is read again', async (t) => {
  const leaf = fc.oneof(
    fc.constant<[Picklable, unknown]>([null, null]),
    fc.boolean().map((value): [Picklable, unknown] => [value, value]),
    fc.string({ unit: 'grapheme' }).map((value): [Picklable, unknown] => [value, value]),
    fc.maxSafeInteger().map((value): [Picklable, unknown] => [int(value), value]),
    fc.double({ noNaN: true }).map((value): [Picklable, unknown] => [float(value), value]),
  )
  const value = fc.letrec<{ value: [Picklable, unknown] }>((tie) => ({
    value: fc.oneof(
      { maxDepth: 4 },
      leaf,
      fc
        .array(tie('value'), { maxLength: 4 })
        .map((items): [Picklable, unknown] => [list(items.map(([node]) => node)), items.map(([, plain]) => plain)]),
      fc
        .dictionary(fc.string(), tie('value'), { maxKeys: 4 })
        .map((pairs): [Picklable, unknown] => [
          dict(Object.entries(pairs).map(([key, [node]]) => [key, node])),
          new Map(Object.entries(pairs).map(([key, [, plain]]) => [key, plain])),
        ]),
    ),
  })).value
  fc.assert(
    fc.property(value, ([node, plain]) => {
      t.strictSame(unpickle(pickle(node)), plain)
    }),
    { numRuns: 200, seed: 23 },
  )
})

t.test('tensors are read with their storage, offset, shape and strides', async (t) => {
  t.strictSame(unpickle(pickle(tensorNode({ dtype: 'BF16', shape: [2, 3, 4] }, 'k'))), {
    kind: 'tensor',
    storage: { kind: 'storage', key: 'k', type: 'bfloat16', elements: 24 },
    offset: 0,
    shape: [2, 3, 4],
    strides: [12, 4, 1],
  })
  const storage = persistent(tuple('storage', global('torch.storage', 'UntypedStorage'), '0', 'cuda:1', int(16)))
  const third = (dtype: Picklable) =>
    pickle(
      call(
        global('torch._utils', '_rebuild_tensor_v3'),
        ...[storage, int(1), tuple(int(3)), tuple(int(1)), false, dict([]), dtype],
      ),
    )
  t.match(unpickle(third(global('torch', 'float16'))), { storage: { type: 'float16' }, offset: 1, shape: [3] })
  t.throws(() => unpickle(third('float16')), { message: `a tensor is built of a storage with 'float16'` })
  const parameter = call(
    global('torch._utils', '_rebuild_parameter'),
    tensorNode({ dtype: 'F32', shape: [] }, 'p'),
    true,
    dict([]),
  )
  t.match(unpickle(pickle(parameter)), { kind: 'tensor', shape: [] })
})

t.test('the operations of later protocols are read', async (t) => {
  const four = bytes(
    '\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94K\x07\x8c\x01b\x94M\x00\x01\x8c\x01c\x94h\x01' +
      '\x8c\x01d\x94C\x02xy\x8c\x01e\x94B\x01\x00\x00\x00z\x8c\x01f\x94\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01' +
      '\x8c\x01g\x94\x85\x8c\x01h\x94\x8c\x11collections\x94u.',
  )
  t.throws(() => unpickle(four), PickleError)
  const value = unpickle(
    bytes(
      '\x80\x04}\x94(\x8c\x01a\x94K\x07\x8c\x01b\x94M\x00\x01\x8c\x01d\x94C\x02xy\x8c\x01f\x94\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01K\x01h\x01u.',
    ),
  )
  t.same(
    value,
    new Map<unknown, unknown>([
      ['a', 7],
      ['b', 256],
      ['d', Buffer.from('xy')],
      ['f', 2n ** 64n],
      [1, 'a'],
    ]),
  )
  t.same(unpickle(bytes('\x80\x02K\x01K\x02\x86K\x03\x85K\x01K\x02K\x03\x87\x87.')), [[1, 2], [3], [1, 2, 3]])
  t.throws(() => unpickle(bytes('\x80\x02]q\x05K\x01aK\x02ah\x05a.')), {
    message: 'the pickle has a list of 3 that holds itself',
  })
  t.same(String(unpickle(bytes('\x80\x02]r\x05\x00\x00\x00(K\x01K\x02ej\x05\x00\x00\x00\x86.'))), '1,2,1,2')
  t.same(unpickle(bytes('\x80\x02ccollections\nOrderedDict\n)R}bK\x01K\x02s.')), new Map([[1, 2]]))
  t.same(unpickle(bytes('\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R.')), new Map())
  t.same(unpickle(bytes('\x80\x02ctorch\nSize\nK\x02K\x03\x86\x85R.')), [2, 3])
  t.same(unpickle(bytes('\x80\x02B\x02\x00\x00\x00ab.')), Buffer.from('ab'))
})

const marker = join(tmpdir(), `muond-ran-${process.pid}`)
const length = (text: string) => String.fromCharCode(text.length, 0, 0, 0)

/** Of the list on the stack a list that holds it twice, again and again. */
const doubled = (times: number) => Array.from({ length: times }, (_, i) => bytes(`\x94h${String.fromCharCode(i)}\x86`))

/** Files that would do something if they were run, or take all memory. */
const HOSTILE: [string, Buffer, RegExp][] = [
  [
    'os.system',
    bytes(`\x80\x02cos\nsystem\nX${length(`touch ${marker}`)}touch ${marker}\x85R.`),
    /^the file asks for os\.system, which no state dict/,
  ],
  [
    'posix.system by STACK_GLOBAL',
    bytes(`\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.`),
    /^the file asks for posix\.system/,
  ],
  ['eval', bytes('\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.'), /^the file asks for __builtin__\.eval/],
  [
    'subprocess through INST',
    bytes('(S"true"\nisubprocess\nPopen\n.'),
    /byte 1 is operation "S", which no state dict needs/,
  ],
  ['an instance of anything', bytes('\x80\x02ccollections\nOrderedDict\n)\x81.'), /operation "\x81"/],
  ['torch.load in a pickle', bytes('\x80\x02ctorch\nload\n)R.'), /^the file asks for torch\.load/],
  ['what only looks known', bytes('\x80\x02cconstructor\n\n)R.'), /^the file asks for constructor\./],
  ['a name of Object', bytes('\x80\x02c__proto__\ntoString\n)R.'), /^the file asks for __proto__\.toString/],
  [
    'a numpy scalar',
    bytes('\x80\x02cnumpy.core.multiarray\nscalar\n)R.'),
    /^the file asks for numpy\.core\.multiarray\.scalar/,
  ],
  [
    'a dtype that is called',
    bytes('\x80\x02ctorch\nfloat32\n)R.'),
    /^the pickle calls torch\.float32 with a list of 0/,
  ],
  ['a text that is called', bytes('\x80\x02X\x01\x00\x00\x00a)R.'), /^the pickle calls 'a' with a list of 0/],
  ['arguments that are none', bytes('\x80\x02ctorch\nSize\nNR.'), /^the pickle calls torch\.Size with null/],
  [
    'an OrderedDict of pairs',
    bytes('\x80\x02ccollections\nOrderedDict\n]\x85R.'),
    /^an OrderedDict is built of a list of 0/,
  ],
  ['a textual persistent id', bytes('P0\n.'), /operation "P"/],
  ['another persistent id', bytes('\x80\x02K\x05Q.'), /^the pickle refers to 5, expected a storage/],
  [
    'a storage of another kind',
    pickle(persistent(tuple('storage', global('torch', 'Size'), '0', 'cpu', int(1)))),
    /^the pickle refers to a list of 5/,
  ],
  [
    'a storage of negative size',
    pickle(persistent(tuple('storage', global('torch', 'FloatStorage'), '0', 'cpu', int(-1)))),
    /expected a storage/,
  ],
  [
    'a tensor of nothing',
    bytes('\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.'),
    /^a tensor is built of undefined, undefined/,
  ],
  [
    'a tensor with 65 dimensions',
    pickle(
      call(
        global('torch._utils', '_rebuild_tensor_v2'),
        persistent(tuple('storage', global('torch', 'FloatStorage'), '0', 'cpu', int(1))),
        int(0),
        ...[0, 1].map(() => tuple(...Array.from({ length: 65 }, () => int(1)))),
      ),
    ),
    /^a tensor is built of a storage, 0, a list of 65/,
  ],
  ['marks without end', Buffer.concat([bytes('\x80\x02'), Buffer.alloc(2 ** 20, '(')]), /nested more than 256 deep/],
  [
    'values without end',
    Buffer.concat([bytes('\x80\x02'), Buffer.alloc(2 ** 24 + 1, ']')]),
    /has more than 16777216 values/,
  ],
  [
    'dicts without end',
    Buffer.concat([bytes('\x80\x02'), Buffer.alloc(2 ** 22 + 1, '}')]),
    /^the values of the pickle take more than 1073741824 bytes/,
  ],
  [
    'a list of lists, each there twice, as the name of a module',
    Buffer.concat([bytes('\x80\x04]'), ...doubled(100), bytes('K\x01\x93.')]),
    /^the pickle names 1 of a list of 2/,
  ],
  [
    'a list of lists, each there twice',
    Buffer.concat([bytes('\x80\x04]'), ...doubled(100), bytes('.')]),
    /^the pickle has more than 16777216 values, shared ones counted each time/,
  ],
  ['a list that is deep', bytes(`\x80\x02]${'\x85'.repeat(300)}.`), /^the pickle is nested more than 256 deep/],
  [
    'a list that becomes deep where it is shared',
    bytes(`\x80\x02]q\x01${'\x85'.repeat(200)}q\x02h\x01(${'('.repeat(100)}${'t'.repeat(100)}e\x86.`),
    /^the pickle is nested more than 256 deep/,
  ],
  ['a dict that holds itself', bytes('\x80\x02}q\x01K\x01h\x01s.'), /^the pickle has a dict of 1 that holds itself/],
  [
    'a text longer than the file',
    bytes('\x80\x02X\xff\xff\xff\xffab.'),
    /is cut off: at byte 7 it wants 4294967295 more/,
  ],
  [
    'a memo that nothing was kept in',
    bytes('\x80\x02j\xff\xff\xff\xff.'),
    /asks for value 4294967295 that it has not kept/,
  ],
  ['nothing', Buffer.alloc(0), /has 0 bytes and is cut off/],
  ['no stop', bytes('\x80\x02K\x01'), /is cut off/],
  ['a name that is cut off', bytes('\x80\x02cos'), /is cut off in the name at byte 3/],
  ['a stop without a value', bytes('\x80\x02.'), /wants a value, there is none/],
  ['a tuple without a mark', bytes('\x80\x02t.'), /wants a mark, there is none/],
  ['a list that is none', bytes('\x80\x02K\x01K\x02a.'), /uses 1 as a list/],
  ['a dict that is none', bytes('\x80\x02]K\x01K\x02s.'), /uses a list of 0 as a dict/],
  ['attributes of a number', bytes('\x80\x02K\x01}b.'), /uses 1 as a dict/],
  ['keys without a value', bytes('\x80\x02}(K\x01u.'), /is given 1 keys and values/],
  ['bytes as a list', bytes('\x80\x02B\x01\x00\x00\x00aK\x01a.'), /uses 1 bytes as a list/],
  ['a dict as a list', bytes('\x80\x02}K\x01a.'), /uses a dict of 0 as a list/],
]

t.test('hostile pickles are refused by name, and nothing of them runs', async (t) => {
  for (const [name, file, message] of HOSTILE) {
    t.throws(() => unpickle(file), { name: 'PickleError', message }, name)
  }
  t.notOk(existsSync(marker))
})

t.test('lists within each other a million deep are refused in words', async (t) => {
  const deep = Buffer.concat([bytes('\x80\x02)'), Buffer.alloc(1_000_000, '\x85', 'latin1'), bytes('.')])
  t.throws(() => unpickle(deep), { name: 'PickleError', message: 'the pickle is nested more than 256 deep' })
})

t.test('a memo with a huge index takes no more room than another', async (t) => {
  t.same(unpickle(bytes('\x80\x02K\x07r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.')), [7, 7])
})

t.test('a pickle that is cut off anywhere is refused', async (t) => {
  const whole = pickle(
    dict([['state', dict([[int(0), dict([['exp_avg', tensorNode({ dtype: 'F32', shape: [2] }, '0')]])]])]]),
  )
  for (let length = 0; length < whole.length; length++) {
    t.throws(() => unpickle(whole.subarray(0, length)), PickleError)
  }
})

t.test('no bytes make the interpreter fail in another way', async (t) => {
  const whole = pickle(
    dict([
      ['a', tensorNode({ dtype: 'F32', shape: [2] }, '0')],
      ['b', list([int(1), float(2)])],
    ]),
  )
  const mutated = fc.tuple(fc.nat(whole.length - 1), fc.nat(255)).map(([at, value]) => {
    const copy = Buffer.from(whole)
    copy[at] = value
    return copy
  })
  fc.assert(
    fc.property(fc.oneof(mutated, fc.uint8Array({ maxLength: 40 })), (file) => {
      try {
        unpickle(file)
      } catch (error) {
        t.ok(error instanceof PickleError, String(error))
      }
    }),
    { numRuns: 2000, seed: 24 },
  )
})
