/** A schema of OpenAPI 2, as the API of Kubernetes gives it. */
type Schema = { readonly [key: string]: unknown }
type Definitions = Readonly<Record<string, Schema>>

/** The kinds that deploy/kubernetes has, and their groups and versions. */
const KINDS: Readonly<Record<string, string>> = {
  ServiceAccount: 'io.k8s.api.core.v1',
  ConfigMap: 'io.k8s.api.core.v1',
  Service: 'io.k8s.api.core.v1',
  StatefulSet: 'io.k8s.api.apps.v1',
  PodDisruptionBudget: 'io.k8s.api.policy.v1',
  NetworkPolicy: 'io.k8s.api.networking.v1',
  Role: 'io.k8s.api.rbac.v1',
  RoleBinding: 'io.k8s.api.rbac.v1',
}
/** What is said of these in OpenAPI 2 is less than what the API takes. */
const TEXT_OR_NUMBER = { oneOf: [{ type: 'string' }, { type: 'number' }] }
const OWN: Definitions = {
  'io.k8s.apimachinery.pkg.util.intstr.IntOrString': TEXT_OR_NUMBER,
  'io.k8s.apimachinery.pkg.api.resource.Quantity': TEXT_OR_NUMBER,
}

/**
 * JSON schemas for kubeconform, one for each kind, with the definitions that it needs and without descriptions. As
 * `fieldValidation=Strict` of the API, they refuse a field that is not known.
 */
export function schemasOf(definitions: Definitions): Map<string, string> {
  const all = { ...definitions, ...OWN }
  const texts = Object.entries(KINDS).map(([kind, group]): [string, string] => {
    const root = `${group}.${kind}`
    const needed = new Map<string, Schema>()
    collect(root, all, needed)
    const schema = { $ref: `#/definitions/${root}`, definitions: Object.fromEntries([...needed].sort()) }
    return [`${kind.toLowerCase()}.json`, `${JSON.stringify(schema)}\n`]
  })
  return new Map(texts)
}

function collect(name: string, all: Definitions, needed: Map<string, Schema>): void {
  const schema = all[name]
  if (schema === undefined || needed.has(name)) return
  needed.set(name, closed(schema))
  for (const [, other = ''] of JSON.stringify(schema).matchAll(/"#\/definitions\/([^"]+)"/g))
    collect(other, all, needed)
}

/** Without what is for people and for clients; an object of known fields has no others. */
function closed(schema: Schema): Schema {
  const { description: _, 'x-kubernetes-group-version-kind': __, properties, ...rest } = schema
  if (properties === undefined) return rest
  const kept = Object.entries(properties as Definitions).map(([name, each]) => [name, plain(each)])
  return { ...rest, properties: Object.fromEntries(kept), additionalProperties: false }
}

/** Of a field only its type: formats and hints of patches are Kubernetes' own. */
function plain(schema: Schema): Schema {
  const { $ref, type, items, additionalProperties } = schema
  return {
    ...($ref !== undefined && { $ref }),
    ...(type !== undefined && { type }),
    ...(items !== undefined && { items: plain(items as Schema) }),
    ...(additionalProperties !== undefined && { additionalProperties: plain(additionalProperties as Schema) }),
  }
}
