import t from 'tap'
import type { ErrorCode } from '../../src/errors.js'
import { decodeClientFrame } from '../../src/wire/codec.js'
import {
  array,
  bin,
  FLOAT_ONE,
  gradient,
  hex,
  NIL,
  nested,
  opening,
  parameter,
  raw,
  step,
  TRUE,
  uint32,
} from './bytes.js'

const LIMITS = { chunk_bytes: 4096 }

const refused: [what: string, bytes: Uint8Array, code: ErrorCode, message: RegExp][] = [
  ['nothing', hex(''), 'FRAME_MALFORMED', /ends at byte 0/],
  [
    'JSON',
    Buffer.from('{"type":"open"}'),
    'FRAME_MALFORMED',
    /is JSON, expected is one msgpack map: pack the same keys/,
  ],
  ['a list of JSON', Buffer.from('[1]'), 'FRAME_MALFORMED', /is JSON, expected is one msgpack map/],
  ['text that is no msgpack', Buffer.from('open'), 'FRAME_MALFORMED', /one msgpack map.* int/],
  ['a list', hex('90'), 'FRAME_MALFORMED', /one msgpack map.* list/],
  ['the byte that msgpack never uses', hex('c1'), 'FRAME_MALFORMED', /0xc1 at byte 0/],
  ['an empty map', hex('80'), 'FRAME_MALFORMED', /no type/],
  ['a type that is no text', raw(['type', 7]), 'FRAME_MALFORMED', /type of the frame/],
  ['an unknown type', raw(['type', 'gradientz']), 'FRAME_MALFORMED', /unknown frame type "gradientz"/],
  ['a type out of Object.prototype', raw(['type', 'constructor']), 'FRAME_MALFORMED', /unknown frame type/],
  ['a frame of the service', raw(['type', 'receipt']), 'FRAME_MALFORMED', /unknown frame type "receipt"/],
  ['a type as long as a novel', raw(['type', 'x'.repeat(5000)]), 'FRAME_MALFORMED', /"x{80}…"$/],
  ['bytes after the map', Buffer.concat([step('gradient_scale', 1), hex('00')]), 'FRAME_MALFORMED', /1 bytes after/],
  ['a map cut short', step('gradient_scale', 1).subarray(0, -1), 'FRAME_MALFORMED', /in the middle/],
  ['a map that declares one pair more', hex('82 a474797065 a3656e64'), 'FRAME_MALFORMED', /in the middle/],
  ['a duplicate type', raw(['type', 'end'], ['step', 1], ['type', 'end']), 'FRAME_MALFORMED', /"type" twice/],
  [
    'a duplicate key',
    raw(['type', 'end'], ['step', 1], ['step', 1]),
    'FRAME_MALFORMED',
    /end has the key "step" twice/,
  ],
  [
    'a duplicate group',
    step('groups', raw(['a', raw()], ['a', raw()])),
    'FRAME_MALFORMED',
    /step.groups has.*"a" twice/,
  ],
  [
    'a duplicate hyperparameter',
    opening(['groups', array(raw(['name', 'g'], ['algorithm', 'sgd'], ['lr', 1], ['lr', 1]))]),
    'FRAME_MALFORMED',
    /open.groups\[0\] has the key "lr" twice/,
  ],
  [
    'a duplicate key inside a hyperparameter',
    step('groups', raw(['a', raw(['x', array(raw(['y', 1], ['y', 2]))])])),
    'FRAME_MALFORMED',
    /step.groups.a.x\[0\] has the key "y" twice/,
  ],
  ['an integer as a key', raw([hex('01'), 1]), 'FRAME_MALFORMED', /key at byte 1 is a int/],
  ['a nested integer as a key', step('groups', raw([hex('01'), raw()])), 'FRAME_MALFORMED', /key at byte \d+ is a int/],
  ['a bin as a key', raw([hex('c40161'), 1]), 'FRAME_MALFORMED', /key at byte 1 is a bin/],
  ['a key that is not UTF-8', raw([hex('a1ff'), 1]), 'FRAME_MALFORMED', /not UTF-8/],
  ['a value that is not UTF-8', raw(['type', 'checkpoint'], ['tag', hex('a2c328')]), 'FRAME_MALFORMED', /not UTF-8/],
  ['nil', raw(['type', 'checkpoint'], ['tag', NIL]), 'FRAME_MALFORMED', /checkpoint.tag is a nil.*leave the key out/],
  [
    'nil as a hyperparameter',
    step('groups', raw(['a', raw(['lr', NIL])])),
    'FRAME_MALFORMED',
    /step.groups.a.lr is a nil/,
  ],
  ['nil in a list', raw(['type', 'end'], ['step', 1], ['skipped', array(NIL)]), 'FRAME_MALFORMED', /end.skipped\[0\]/],
  ['a timestamp', step('gradient_scale', hex('d6ff00000000')), 'FRAME_MALFORMED', /0xd6/],
  ['an extension', step('groups', hex('c7010100')), 'FRAME_MALFORMED', /0xc7/],
  ['a fixed extension', step('groups', hex('d40100')), 'FRAME_MALFORMED', /0xd4/],
  ['an unknown key', step('gradient_sale', 1), 'FRAME_MALFORMED', /step.gradient_sale is unknown/],
  ['an odd unknown key', step('a b', 1), 'FRAME_MALFORMED', /step."a b" is unknown/],
  ['an unknown key of a parameter', parameter(['shap', 1]), 'FRAME_MALFORMED', /open.parameters\[0\].shap is unknown/],
  ['a prototype key', step('__proto__', 1), 'FRAME_MALFORMED', /step.__proto__ is unknown/],
  ['a key out of Object.prototype', step('toString', 1), 'FRAME_MALFORMED', /step.toString is unknown/],
  ['a missing key', raw(['type', 'step']), 'FRAME_MALFORMED', /step.step is missing/],
  [
    'a gradient without data',
    raw(['type', 'gradient'], ['step', 1], ['offset', 0], ['parameter', 0]),
    'FRAME_MALFORMED',
    /data is missing/,
  ],
  ['an open without run', raw(['type', 'open'], ['protocol', 1]), 'FRAME_MALFORMED', /open.run is missing/],
  ['an open without protocol', raw(['type', 'open'], ['run', 'r']), 'FRAME_MALFORMED', /open.protocol is missing/],
  [
    'a group without name',
    opening(['groups', array(raw(['algorithm', 'sgd']))]),
    'FRAME_MALFORMED',
    /\[0\].name is missing/,
  ],
  [
    'a float as a step',
    raw(['type', 'end'], ['step', FLOAT_ONE]),
    'FRAME_MALFORMED',
    /end.step is a float, expected an integer/,
  ],
  ['a float as an offset', gradient('offset', FLOAT_ONE), 'FRAME_MALFORMED', /gradient.offset is a float/],
  [
    'a float in a shape',
    opening(['parameters', array(raw(['shape', array(FLOAT_ONE)]))]),
    'FRAME_MALFORMED',
    /\.shape\[0\] is a float/,
  ],
  ['a text as a step', raw(['type', 'end'], ['step', '1']), 'FRAME_MALFORMED', /end.step is a string/],
  ['a bool as a step', raw(['type', 'end'], ['step', TRUE]), 'FRAME_MALFORMED', /end.step is a bool/],
  ['a negative index', gradient('parameter', -1), 'FRAME_MALFORMED', /gradient.parameter is -1, expected 0 or more/],
  ['a negative step', gradient('step', -1), 'FRAME_MALFORMED', /gradient.step is -1/],
  ['a negative offset', gradient('offset', -1), 'FRAME_MALFORMED', /gradient.offset is -1/],
  [
    'a negative skipped index',
    raw(['type', 'end'], ['step', 1], ['skipped', array(-1)]),
    'FRAME_MALFORMED',
    /skipped\[0\] is -1/,
  ],
  ['2^53 as a step', gradient('step', hex('cf0020000000000000')), 'FRAME_MALFORMED', /beyond 2\^53/],
  ['-2^53 as a scale', step('gradient_scale', hex('d3ffe0000000000000')), 'FRAME_MALFORMED', /beyond 2\^53/],
  ['text as data', gradient('data', 'abcd'), 'FRAME_MALFORMED', /gradient.data is a string, expected a bin/],
  ['a list as data', gradient('data', array(1, 2)), 'FRAME_MALFORMED', /gradient.data is a list/],
  ['data that is longer than the message', gradient('data', hex('c6ffffffff00')), 'FRAME_MALFORMED', /in the middle/],
  ['data in a step', step('data', bin(4)), 'FRAME_MALFORMED', /step.data is unknown/],
  ['a text bomb', raw(['type', hex('dbffffffff61')]), 'FRAME_MALFORMED', /in the middle/],
  ['a list bomb', step('groups', hex('ddffffffff')), 'FRAME_MALFORMED', /declares 4294967295 items/],
  ['a map bomb', step('groups', hex('dfffffffff')), 'FRAME_MALFORMED', /declares 4294967295 items/],
  ['a frame that is a map bomb', hex('dfffffffff'), 'FRAME_MALFORMED', /in the middle/],
  ['nine levels', step('groups', nested(9)), 'FRAME_MALFORMED', /nested deeper than 8/],
  ['a hundred thousand levels', step('groups', nested(100_000)), 'FRAME_MALFORMED', /nested deeper than 8/],
  ['a bool as a run', raw(['type', 'open'], ['protocol', 1], ['run', TRUE]), 'FRAME_MALFORMED', /open.run is a bool/],
  ['an empty run name', raw(['type', 'open'], ['protocol', 1], ['run', '']), 'FRAME_MALFORMED', /open.run is ""/],
  ['a run name with a path', raw(['type', 'open'], ['protocol', 1], ['run', '../x']), 'FRAME_MALFORMED', /open.run is/],
  ['a run name with a line end', raw(['type', 'open'], ['protocol', 1], ['run', 'a\n']), 'FRAME_MALFORMED', /"a\\n"/],
  [
    'a run name of 129',
    raw(['type', 'open'], ['protocol', 1], ['run', 'r'.repeat(129)]),
    'FRAME_MALFORMED',
    /open.run/,
  ],
  ['an unknown mode', opening(['mode', 'append']), 'FRAME_MALFORMED', /open.mode is "append"/],
  ['a number as takeover', opening(['takeover', 1]), 'FRAME_MALFORMED', /open.takeover is a int, expected a bool/],
  ['a map as groups', opening(['groups', raw()]), 'FRAME_MALFORMED', /open.groups is a map, expected a list/],
  ['a list as groups of a step', step('groups', array()), 'FRAME_MALFORMED', /step.groups is a list, expected a map/],
  ['a number as a group of a step', step('groups', raw(['a', 1])), 'FRAME_MALFORMED', /step.groups.a is a int/],
  [
    'text as max_logits',
    step('max_logits', raw(['a', array('x')])),
    'FRAME_MALFORMED',
    /max_logits.a\[0\] is a string/,
  ],
  ['text as heads', parameter(['heads', '2']), 'FRAME_MALFORMED', /parameters\[0\].heads is a string/],
  ['a number as split', parameter(['split', 2]), 'FRAME_MALFORMED', /parameters\[0\].split is a int, expected a list/],
  ['a bool as matrices', parameter(['matrices', TRUE]), 'FRAME_MALFORMED', /parameters\[0\].matrices is a bool/],
  ['a number as a dtype', parameter(['gradient_dtype', 32]), 'FRAME_MALFORMED', /gradient_dtype is a int/],
  [
    'protocol 2',
    raw(['type', 'open'], ['protocol', 2], ['future', 1]),
    'PROTOCOL_UNSUPPORTED',
    /protocol is 2, .* speaks 1/,
  ],
  [
    'a float as protocol',
    raw(['type', 'open'], ['protocol', FLOAT_ONE]),
    'FRAME_MALFORMED',
    /open.protocol is a float/,
  ],
  [
    'ns_steps as a float in open',
    opening(['groups', array(raw(['name', 'g'], ['algorithm', 'muon'], ['ns_steps', FLOAT_ONE]))]),
    'HYPERPARAMETER_INVALID',
    /open.groups\[0\].ns_steps is the float 1, expected an integer/,
  ],
  [
    'ns_steps as a float in a step',
    step('groups', raw(['g', raw(['ns_steps', FLOAT_ONE])])),
    'HYPERPARAMETER_INVALID',
    /ns_steps/,
  ],
  ['a chunk that is too large', gradient('data', bin(4097)), 'FRAME_TOO_LARGE', /data has 4097 bytes, at most 4096/],
  [
    'an end that is too large',
    raw(['type', 'end'], ['step', 1], ['skipped', largeList(2 ** 20)]),
    'FRAME_TOO_LARGE',
    /end without/,
  ],
  [
    'a gradient with large other keys',
    gradient('step', largeList(65_536)),
    'FRAME_TOO_LARGE',
    /gradient without its data/,
  ],
  ['a message above every limit', Buffer.alloc(2 ** 24 + 1), 'FRAME_TOO_LARGE', /a message has 16777217 bytes/],
  ['two million values', opening(['attentions', largeList(2 ** 21)]), 'FRAME_TOO_LARGE', /more than 2097152/],
]

function largeList(length: number): Buffer {
  return Buffer.concat([hex('dd'), uint32(length), Buffer.alloc(length, 1)])
}

for (const [what, bytes, code, message] of refused) {
  t.test(`${what} is refused with ${code}`, async (t) => {
    t.throws(() => decodeClientFrame(bytes, LIMITS), { name: 'ServiceError', code, message })
  })
}

t.test('an open larger than a chunk limit allows is refused where the message is not', async (t) => {
  const bytes = opening(['client', Buffer.concat([hex('db'), uint32(2 ** 24), Buffer.alloc(2 ** 24, 0x61)])])
  t.throws(() => decodeClientFrame(bytes, { chunk_bytes: 2 ** 24 }), { code: 'FRAME_TOO_LARGE', message: /open has/ })
})
