// What the page asks of its service: REST with the key, metrics, and the events of a run.

const KEY = 'muond.key'

/** A refusal of the service: `status` of HTTP and `code` of the problem document. */
export class Problem extends Error {
  /**
   * @param {number} status
   * @param {{ code?: string, detail?: string }} document
   */
  constructor(status, { code = 'UNKNOWN', detail = `the service answered with status ${status}` }) {
    super(detail)
    this.status = status
    this.code = code
  }
}

/** The key of this tab. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  /** @param {string} value */
  set: (value) => (value === '' ? sessionStorage.removeItem(KEY) : sessionStorage.setItem(KEY, value)),
}

/**
 * @param {string} path relative to the service
 * @param {RequestInit} [options]
 */
async function request(path, { headers, ...options } = {}) {
  const all = new Headers(headers)
  if (key.get() !== '') all.set('authorization', `Bearer ${key.get()}`)
  const response = await fetch(path, { ...options, headers: all })
  if (response.ok) return response
  throw new Problem(response.status, await response.json().catch(() => ({})))
}

/**
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<any>}
 */
export async function get(path, options) {
  return (await request(path, options)).json()
}

/**
 * @param {string} path
 * @param {object} body
 * @returns {Promise<any>}
 */
export async function post(path, body) {
  const headers = { 'content-type': 'application/json' }
  return (await request(path, { method: 'POST', headers, body: JSON.stringify(body) })).json()
}

/**
 * The samples of `/metrics` by name and labels as they are written there.
 * @param {AbortSignal} signal
 * @returns {Promise<Map<string, number>>}
 */
export async function metrics(signal) {
  const text = await (await request('metrics', { signal })).text()
  const samples = [...text.matchAll(/^(\w+(?:\{[^}]*\})?) (\S+)$/gm)]
  return new Map(samples.map(([, name, value]) => [name, Number(value)]))
}

/**
 * Events of a run until the stream ends. EventSource cannot send a key.
 * @param {string} run
 * @param {{ after?: number, signal: AbortSignal }} options `after`: the last step whose receipt is known
 * @returns {AsyncGenerator<{ name: string, data: any }>}
 */
export async function* events(run, { after, signal }) {
  /** @type {Record<string, string>} */
  const headers = after === undefined ? {} : { 'last-event-id': String(after) }
  const { body } = await request(`v1/runs/${run}/events`, { headers, signal })
  if (!body) return
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const parts = (rest + piece.value).split('\n\n')
    rest = parts.pop() ?? ''
    for (const part of parts) {
      const fields = new Map(part.split('\n').map((line) => [line.split(': ', 1)[0], line.replace(/^\w+: /, '')]))
      const data = fields.get('data')
      if (data !== undefined) yield { name: fields.get('event') ?? '', data: JSON.parse(data) }
    }
  }
}
