import { isDeepStrictEqual } from 'node:util'

/** A server of the API, and who asks it. `path` is behind the leases of a namespace. */
export type Call = (asked: {
  method: 'GET' | 'POST' | 'PUT' | 'DELETE'
  path: string
  body?: unknown
  token: 'admin' | 'wrong' | 'stranger'
}) => Promise<{ status: number; body: unknown }>

/** An exchange as it is kept: versions have the names that the exchanges gave them. */
export type Exchange = { readonly name: string; readonly status: number; readonly body: unknown }

const METADATA = { name: 'one', labels: { 'muond/kind': 'peer' }, annotations: { 'muond/url': 'http://one:8787' } }
const SPEC = { holderIdentity: 'http://one:8787_1', leaseDurationSeconds: 12, renewTime: '2026-11-30T12:00:00.000000Z' }
const LATER = { ...SPEC, renewTime: '2026-11-30T12:00:04.000000Z' }

function lease(metadata: object = METADATA, spec: object = SPEC) {
  return { apiVersion: 'coordination.k8s.io/v1', kind: 'Lease', metadata, spec }
}

/**
 * Carries out, in an empty namespace, one of each kind of exchange that `KubernetesClient` relies on, and answers what
 * came back of it. What differs from one server or time to another is left out: uids, times, other fields of metadata.
 */
export async function exchange(call: Call): Promise<Exchange[]> {
  const exchanges: Exchange[] = []
  const versions = new Map<string, string>()
  const ask = async (
    name: string,
    asked: Omit<Parameters<Call>[0], 'token'>,
    token: 'admin' | 'wrong' | 'stranger' = 'admin',
  ) => {
    const { status, body } = await call({ ...asked, token })
    exchanges.push({ name, status, body: kept(body, versions) })
    const { uid, resourceVersion } = Object(Reflect.get(Object(body), 'metadata'))
    return { uid, resourceVersion }
  }
  const put = (version: object, spec = SPEC) =>
    ({ method: 'PUT', path: '/one', body: lease({ ...METADATA, ...version }, spec) }) as const
  const remove = (preconditions: object) => ({ method: 'DELETE', path: '/one', body: { preconditions } }) as const

  await ask('a list of none', { method: 'GET', path: '?labelSelector=muond%2Fkind%3Dpeer' })
  await ask('a Lease that is not there', { method: 'GET', path: '/one' })
  const first = await ask('is created', { method: 'POST', path: '', body: lease() })
  await ask('is not created twice', { method: 'POST', path: '', body: lease() })
  await ask('is read', { method: 'GET', path: '/one' })
  await ask('is listed by its label', { method: 'GET', path: '?labelSelector=muond%2Fkind%3Dpeer' })
  await ask('is not listed by another label', { method: 'GET', path: '?labelSelector=muond%2Fkind%3Dhead' })
  const second = await ask('is replaced by its version', put(first, LATER))
  await ask('is not replaced by an old version', put(first))
  await ask('is not replaced without a version', put({}))
  await ask('is not replaced by what is no version', put({ ...second, resourceVersion: 'none' }))
  await ask('is not removed by an old version', remove(first))
  await ask('has the newest version', { method: 'GET', path: '/one' })
  await ask('is removed by its version', remove(second))
  await ask('is not removed twice', remove(second))
  await ask('is not replaced when it is gone', put(second))
  await ask('is made anew without its uid', put({ resourceVersion: second.resourceVersion }))
  await ask('is not the one that is gone', put(second))
  await ask('of which nothing is removed', remove(second))
  await ask('a value without a holder', { method: 'POST', path: '', body: lease({ ...METADATA, name: 'value' }, {}) })
  await ask('a time without microseconds', {
    ...{ method: 'POST', path: '' },
    body: lease({ name: 'two' }, { ...SPEC, renewTime: '2026-11-30T12:00:00Z' }),
  })
  await ask('a name with a capital letter', { method: 'POST', path: '', body: lease({ name: 'Two' }) })
  await ask('a length of 0 seconds', {
    ...{ method: 'POST', path: '' },
    body: lease({ name: 'two' }, { ...SPEC, leaseDurationSeconds: 0 }),
  })
  await ask('annotations that are too large', {
    ...{ method: 'POST', path: '' },
    body: lease({ name: 'two', annotations: { 'muond/value': 'x'.repeat(2 ** 18) } }),
  })
  await ask('a token of nobody', { method: 'GET', path: '/one' }, 'wrong')
  await ask('a user without a Role', { method: 'GET', path: '/one' }, 'stranger')
  return exchanges
}

/** The fields that the client reads; messages are for people, and have uids and versions. */
function kept(body: unknown, versions: Map<string, string>): unknown {
  const { kind, items, metadata, spec, status, reason, code } = Object(body)
  if (kind === 'LeaseList') return { kind, items: (items as unknown[]).map((item) => kept(item, versions)) }
  if (kind === 'Status') return { kind, status, reason, code }
  const { name, labels, annotations, resourceVersion } = metadata
  if (!versions.has(resourceVersion)) versions.set(resourceVersion, `version ${versions.size + 1}`)
  return { kind, metadata: { name, labels, annotations, resourceVersion: versions.get(resourceVersion) }, spec }
}

/** The first exchange that is not as it was recorded. */
export function differenceOf(recorded: readonly Exchange[], now: readonly Exchange[]): string | undefined {
  const plain: readonly Exchange[] = JSON.parse(JSON.stringify(now))
  const index = recorded.findIndex((each, i) => !isDeepStrictEqual(each, plain[i]))
  return index < 0 ? undefined : `${JSON.stringify(plain[index])} is not ${JSON.stringify(recorded[index])}`
}
