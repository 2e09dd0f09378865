import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { parse } from 'yaml'
import { readCommand, unknownVariables } from '../../src/config.js'

const FOLDER = 'deploy/kubernetes'
const SIZES = [1, 4, 16]

const read = (path: string) => parse(readFileSync(join(FOLDER, path), 'utf8'))
type Variable = { name: string; value?: string; valueFrom?: object }

const set = read('base/statefulset.yaml')
const [container] = set.spec.template.spec.containers
const variables: Variable[] = container.env

/** The variables of a pod of a size, as the kubelet puts them together. */
function environmentOf(size: number, pod: string): Record<string, string> {
  const [{ literals }] = read(`shards-${size}/kustomization.yaml`).configMapGenerator
  const shared = (literals as string[]).map((literal) => {
    const at = literal.indexOf('=')
    return [literal.slice(0, at), literal.slice(at + 1)]
  })
  const own = variables.map(({ name, value = pod }) => [name, value.replace('$(POD_NAME)', pod)])
  return Object.fromEntries([...shared, ...own])
}

t.test('each process of each size starts with what its pod has', async (t) => {
  for (const size of SIZES) {
    const { replicas } = read(`shards-${size}/kustomization.yaml`)
    t.same(replicas, [{ name: 'muond', count: size }])
    for (let i = 0; i < size; i++) {
      const environment = environmentOf(size, `${set.metadata.name}-${i}`)
      const command = readCommand([], environment)
      t.same(unknownVariables(environment), [])
      if (command.kind !== 'serve') throw new Error('a text is printed')
      const { peers, advertise, shards, allowed_hosts, host, port } = command.config
      t.equal(peers.length, size)
      t.equal(peers[i], advertise)
      t.equal(shards, size)
      t.match(new URL(advertise), { protocol: 'https:', port: String(container.ports[0].containerPort) })
      t.same(allowed_hosts, ['muond.muond.svc', ...peers.map((url) => new URL(url).hostname)])
      t.same([host, port], ['0.0.0.0', 8787])
    }
  }
})

t.test('what the variables name is mounted, and what is mounted is there', async (t) => {
  const { volumes } = set.spec.template.spec
  const claims = set.spec.volumeClaimTemplates.map(({ metadata }: { metadata: { name: string } }) => metadata.name)
  const mounts: { name: string; mountPath: string }[] = container.volumeMounts
  const paths = variables.flatMap(({ value = '' }) => (value.startsWith('/') ? [value] : []))
  t.equal(paths.length, 6)
  for (const path of paths)
    t.ok(
      mounts.some(({ mountPath }) => path.startsWith(mountPath)),
      path,
    )
  const names = [...volumes.map(({ name }: { name: string }) => name), ...claims]
  for (const { name } of mounts) t.ok(names.includes(name), name)
})

t.test('the state has room in the memory that a pod has', async (t) => {
  const { limits, requests } = container.resources
  t.equal(limits.memory, requests.memory)
  const memory = Number(/^(\d+)Gi$/.exec(limits.memory)?.[1]) * 2 ** 30
  const { value } = variables.find(({ name }) => name === 'MUOND_STATE_BYTES_LIMIT')!
  t.equal(Number(value), memory * 0.75)
})

t.test('selectors are of the labels that pods get', async (t) => {
  const { labels } = read('base/kustomization.yaml')
  const [{ pairs, includeTemplates }] = labels
  t.equal(includeTemplates, true)
  for (const file of ['statefulset', 'poddisruptionbudget'])
    t.same(read(`base/${file}.yaml`).spec.selector.matchLabels, pairs, file)
  t.same(read('base/service.yaml').spec.selector, pairs)
  t.same(read('base/networkpolicy.yaml').spec.podSelector.matchLabels, pairs)
})
