import { DTYPES } from '../dtype.js'

/** Element types a tensor of a graph may have, with the number of TensorProto.DataType (onnx.proto). */
export const ELEMENT_TYPES = {
  float32: DTYPES.float32.onnx,
  bfloat16: DTYPES.bfloat16.onnx,
  float16: DTYPES.float16.onnx,
  int64: 7,
  bool: 9,
} as const satisfies Record<string, number>

export type ElementType = keyof typeof ELEMENT_TYPES

/** A number is a fixed dimension, a name a symbolic one: equal names are equal sizes within one run. */
export type Dim = number | string

/** An attribute says whether its number is an integer or a float: ONNX tells them apart, JavaScript does not. */
export type Attribute = { float: number } | { int: number } | { ints: readonly number[] } | { string: string }

export type OnnxNode = {
  op: string
  domain: string
  inputs: readonly string[]
  outputs: readonly string[]
  attributes: Readonly<Record<string, Attribute>>
}

/** A constant: raw little-endian bytes in C order. */
export type OnnxInitializer = { name: string; dtype: ElementType; dims: readonly number[]; data: Uint8Array }

/** An input or output of a graph; without `dims` its rank is open, too. */
export type OnnxValue = { name: string; dtype: ElementType; dims?: readonly Dim[] }

export type OnnxModel = {
  name: string
  nodes: readonly OnnxNode[]
  initializers: readonly OnnxInitializer[]
  inputs: readonly OnnxValue[]
  outputs: readonly OnnxValue[]
}

// Opset 20 with IR 9 is the newest pair that every ONNX Runtime from 1.17 on loads and captures into CUDA graphs.
const IR_VERSION = 9
const OPSET_VERSION = 20
const CONTRIB_VERSION = 1

/** ModelProto bytes of a model. Field numbers here and below: onnx/onnx.proto. */
export function encodeModel(model: OnnxModel): Uint8Array {
  const domains = new Set(['', ...model.nodes.map((node) => node.domain)])
  return message(
    int(1, IR_VERSION),
    text(2, 'muond'),
    bytes(7, encodeGraph(model)),
    ...[...domains].map((domain) => bytes(8, encodeOpset(domain))),
  )
}

function encodeOpset(domain: string): Uint8Array {
  return message(text(1, domain), int(2, domain === '' ? OPSET_VERSION : CONTRIB_VERSION))
}

function encodeGraph(model: OnnxModel): Uint8Array {
  return message(
    ...model.nodes.map((node) => bytes(1, encodeNode(node))),
    text(2, model.name),
    ...model.initializers.map((initializer) => bytes(5, encodeTensor(initializer))),
    ...model.inputs.map((value) => bytes(11, encodeValue(value))),
    ...model.outputs.map((value) => bytes(12, encodeValue(value))),
  )
}

function encodeNode(node: OnnxNode): Uint8Array {
  return message(
    ...node.inputs.map((name) => text(1, name)),
    ...node.outputs.map((name) => text(2, name)),
    text(4, node.op),
    ...Object.entries(node.attributes).map(([name, attribute]) => bytes(5, encodeAttribute(name, attribute))),
    text(7, node.domain),
  )
}

function encodeAttribute(name: string, attribute: Attribute): Uint8Array {
  if ('float' in attribute) return message(text(1, name), float(2, attribute.float), int(20, 1))
  if ('int' in attribute) return message(text(1, name), int(3, attribute.int), int(20, 2))
  if ('string' in attribute) return message(text(1, name), text(4, attribute.string), int(20, 3))
  return message(text(1, name), ...attribute.ints.map((value) => int(8, value)), int(20, 7))
}

function encodeTensor(tensor: OnnxInitializer): Uint8Array {
  return message(
    ...tensor.dims.map((dim) => int(1, dim)),
    int(2, ELEMENT_TYPES[tensor.dtype]),
    text(8, tensor.name),
    bytes(9, tensor.data),
  )
}

function encodeValue(value: OnnxValue): Uint8Array {
  const shape = value.dims === undefined ? [] : [bytes(2, encodeShape(value.dims))]
  const tensorType = message(int(1, ELEMENT_TYPES[value.dtype]), ...shape)
  return message(text(1, value.name), bytes(2, message(bytes(1, tensorType))))
}

function encodeShape(dims: readonly Dim[]): Uint8Array {
  return message(...dims.map((dim) => bytes(1, typeof dim === 'number' ? int(1, dim) : text(2, dim))))
}

// Protobuf's wire format: a field is a tag (number << 3 | wire type), then by its wire type a varint (0), a length and
// as many bytes (2), or 4 bytes (5).

function message(...fields: readonly Uint8Array[]): Uint8Array {
  return Buffer.concat(fields)
}

function int(field: number, value: number): Uint8Array {
  return Buffer.from([...varint(field << 3), ...varint(value)])
}

function bytes(field: number, value: Uint8Array): Uint8Array {
  return Buffer.concat([Buffer.from([...varint((field << 3) | 2), ...varint(value.length)]), value])
}

function text(field: number, value: string): Uint8Array {
  return bytes(field, Buffer.from(value))
}

function float(field: number, value: number): Uint8Array {
  const encoded = Buffer.alloc(5)
  encoded[0] = (field << 3) | 5
  encoded.writeFloatLE(value, 1)
  return encoded
}

/** Seven bits a byte, least significant first; a negative int64 is its two's complement and takes ten bytes. */
function varint(value: number): number[] {
  const encoded: number[] = []
  let rest = BigInt.asUintN(64, BigInt(value))
  for (; rest > 127n; rest >>= 7n) encoded.push(Number(rest & 127n) | 128)
  encoded.push(Number(rest))
  return encoded
}
