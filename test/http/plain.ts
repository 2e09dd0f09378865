import { encodeHeader, parseSafetensors, type SafetensorsDtype } from '../../src/store/safetensors.js'

export type Tensor = {
  name: string
  shape: readonly number[]
  dtype?: SafetensorsDtype
  values: Float32Array | Uint16Array
}

/** A safetensors file; objects of `metadata` become JSON. */
export function fileOf(tensors: readonly Tensor[], metadata: Record<string, unknown> = {}): Uint8Array {
  const views = tensors.map(({ values }) => new Uint8Array(values.buffer, values.byteOffset, values.byteLength))
  const entries = tensors.map(({ name, shape, dtype = 'F32' }, i) => ({ name, dtype, shape, bytes: views[i]!.length }))
  const text = Object.entries(metadata).map(([key, value]) => [key, JSON.stringify(value)] as const)
  return Buffer.concat([encodeHeader(entries, Object.fromEntries(text)), ...views])
}

type Factors = { scale: number; decay: number; replayed: boolean; gradient_norm?: number; update_rms?: number }
type Receipt = { step: number; digest: string; replayed: boolean; applied: number; skipped: number; durable: boolean }

export type Answer = {
  status: number
  headers: Headers
  tensors: ReturnType<typeof parseSafetensors>['tensors']
  updates: Record<string, Factors>
  receipt: Receipt & Record<string, unknown>
}

/** What is asked for beside the run and the body. */
export type Asked = { step: number; query?: string; headers?: Record<string, string> }

const JSON_TYPE = { 'content-type': 'application/json' }

/** The answer to `POST /v1/runs`. */
export async function post(http: string, body: object, headers: Record<string, string> = {}) {
  const init = { method: 'POST', headers: { ...JSON_TYPE, ...headers }, body: JSON.stringify(body) }
  const answer = await fetch(`${http}/v1/runs`, init)
  return { status: answer.status, body: (await answer.json()) as Record<string, unknown> }
}

/** The answer to a step, as it stands. */
export function postStep(http: string, run: string, { step, query = '', headers = {} }: Asked, body: Uint8Array) {
  const type = { 'content-type': 'application/octet-stream' }
  const init = { method: 'POST', headers: { ...type, ...headers }, body: Buffer.from(body) }
  return fetch(`${http}/v1/runs/${run}/steps?step=${step}${query}`, init)
}

/** A step that is finished. */
export async function take(http: string, run: string, asked: Asked, body: Uint8Array): Promise<Answer> {
  const response = await postStep(http, run, asked, body)
  const bytes = new Uint8Array(await response.arrayBuffer())
  /* c8 ignore next -- fails the test */
  if (response.status !== 200) throw new Error(Buffer.from(bytes).toString())
  const { tensors, metadata } = parseSafetensors(bytes)
  const { status, headers } = response
  return { status, headers, tensors, updates: JSON.parse(metadata.updates!), receipt: JSON.parse(metadata.receipt!) }
}

/** A step that is refused: its status and its problem document. */
export async function refused(http: string, run: string, asked: Asked, body: Uint8Array) {
  const response = await postStep(http, run, asked, body)
  return { status: response.status, ...((await response.json()) as { code: string; detail: string }) }
}
