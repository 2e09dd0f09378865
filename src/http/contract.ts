import assert from 'node:assert'
import { readFileSync } from 'node:fs'
import type { FastifySchema } from 'fastify'

import { CLUSTER, SCOPES } from '../access/principal.js'
import { parseYaml } from '../yaml.js'
import type { Access } from './auth.js'

/** openapi.yaml as text and parsed. */
export type Contract = { readonly text: string; readonly document: Document }

type Parameter = { readonly name: string; readonly in: string; readonly required?: boolean; readonly schema: object }
type Reference = { readonly $ref: string }
type Operation = {
  readonly operationId: string
  readonly parameters?: (Parameter | Reference)[]
  readonly requestBody?: { readonly content: Readonly<Record<string, { readonly schema?: object }>> }
  /** None where the operation is open to all, otherwise the scope that it takes, if it takes one. */
  readonly security?: readonly { readonly bearer: readonly string[] }[]
  /** Whether it is about the runs of everybody. */
  readonly 'x-all-runs'?: boolean
}
type Path = Readonly<Record<string, Operation>> & { readonly parameters?: (Parameter | Reference)[] }
type Document = {
  readonly openapi: string
  readonly info: { readonly title: string; readonly version: string }
  readonly paths: Readonly<Record<string, Path>>
  readonly components: {
    readonly parameters: Readonly<Record<string, Parameter>>
    readonly schemas: Readonly<Record<string, object>>
  }
}

/** An operation of the contract as fastify routes it. */
export type Endpoint = {
  readonly id: string
  readonly method: string
  /** The path, with `:run` for `{run}`. */
  readonly url: string
  /** The key that the contract asks for. */
  readonly access: Access
  readonly schema: FastifySchema
}

/** Operations whose answers are streams: a HEAD would begin one only to throw it away. */
export const STREAMED: ReadonlySet<string> = new Set(['streamEvents', 'getParameterState', 'getState'])

/** Operations whose handler reads the body as it comes. */
export const STREAMED_BODIES: ReadonlySet<string> = new Set(['putState', 'postStep'])

/** Operations of runs that may be spread over several processes. */
export const WHOLES: ReadonlySet<string> = new Set(['getShards', 'getVotes', 'postVote', 'deleteRun'])

let contract: Contract | undefined

/** The contract that every route is made from. It lies beside package.json and is parsed once in a process. */
export function readContract(): Contract {
  if (contract !== undefined) return contract
  const text = readFileSync(new URL('../../../openapi.yaml', import.meta.url), 'utf8')
  contract = { text, document: parseYaml(text) as Document }
  return contract
}

/** The text of asyncapi.yaml, which lies beside openapi.yaml. */
export function readAsyncapi(): string {
  return readFileSync(new URL('../../../asyncapi.yaml', import.meta.url), 'utf8')
}

export function endpointsOf({ document }: Contract): Endpoint[] {
  return Object.entries(document.paths).flatMap(([path, { parameters = [], ...operations }]) => {
    return Object.entries(operations).map(([method, operation]) => ({
      id: operation.operationId,
      method: method.toUpperCase(),
      url: path.replace(/{(\w+)}/g, ':$1'),
      access: accessOf(operation),
      schema: schemaOf(
        document,
        operation,
        [...parameters, ...(operation.parameters ?? [])].map((parameter) => resolved(document, parameter)),
      ),
    }))
  })
}

/** Every operation says it itself: what a new one leaves out must not fall to whatever is usual. */
function accessOf({ operationId, security, 'x-all-runs': allRuns = false }: Operation): Access {
  assert(security, `the contract does not say which key ${operationId} takes`)
  const [requirement] = security
  if (requirement === undefined) return 'open'
  const [role] = requirement.bearer
  const scope = [...SCOPES, CLUSTER as typeof CLUSTER].find((known) => known === role)
  assert(scope !== undefined || role === undefined, `${operationId} takes the scope ${role}, which there is not`)
  return { ...(scope !== undefined && { scope }), allRuns }
}

function resolved({ components }: Document, parameter: Parameter | Reference): Parameter {
  if (!('$ref' in parameter)) return parameter
  const found = components.parameters[parameter.$ref.replace('#/components/parameters/', '')]
  assert(found, `the contract has no ${parameter.$ref}`)
  return found
}

/**
 * What requests are held against. Answers are sent as they are made: a serializer from the contract would silently drop
 * what the contract does not list.
 */
function schemaOf(document: Document, { requestBody }: Operation, parameters: readonly Parameter[]): FastifySchema {
  const [path, query, header] = ['path', 'query', 'header'].map((place) =>
    parameters.filter((parameter) => parameter.in === place),
  )
  const content = Object.entries(requestBody?.content ?? {}).flatMap(([type, { schema }]) =>
    schema && type === 'application/json' ? [[type, { schema: inlined(document, schema) }]] : [],
  )
  return {
    ...(path.length > 0 && { params: objectOf(path) }),
    querystring: { ...objectOf(query), additionalProperties: false },
    ...(header.length > 0 && { headers: objectOf(header) }),
    ...(content.length > 0 && { body: { content: Object.fromEntries(content) } }),
  }
}

/** A schema of a body with the schemas in it that it refers to; none of them refers to itself. */
function inlined(document: Document, schema: unknown): unknown {
  if (Array.isArray(schema)) return schema.map((inner) => inlined(document, inner))
  if (typeof schema !== 'object' || schema === null) return schema
  if (!('$ref' in schema)) {
    return Object.fromEntries(Object.entries(schema).map(([key, inner]) => [key, inlined(document, inner)]))
  }
  const found = document.components.schemas[String(schema.$ref).replace('#/components/schemas/', '')]
  assert(found, `the contract has no ${schema.$ref}`)
  return inlined(document, found)
}

function objectOf(parameters: readonly Parameter[]): object {
  return {
    type: 'object',
    properties: Object.fromEntries(parameters.map(({ name, schema }) => [name, schema])),
    required: parameters.filter(({ required }) => required).map(({ name }) => name),
  }
}
