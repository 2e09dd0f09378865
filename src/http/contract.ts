import assert from 'node:assert'
import { readFileSync } from 'node:fs'
import type { FastifySchema } from 'fastify'
import { parse } from 'yaml'

/** openapi.yaml as text and parsed. */
export type Contract = { readonly text: string; readonly document: Document }

type Parameter = { readonly name: string; readonly in: string; readonly required?: boolean; readonly schema: object }
type Reference = { readonly $ref: string }
type Operation = {
  readonly operationId: string
  readonly parameters?: (Parameter | Reference)[]
  readonly requestBody?: { readonly content: Readonly<Record<string, { readonly schema?: object }>> }
  readonly security?: readonly unknown[]
}
type Path = Readonly<Record<string, Operation>> & { readonly parameters?: (Parameter | Reference)[] }
type Document = {
  readonly openapi: string
  readonly info: { readonly title: string; readonly version: string }
  readonly paths: Readonly<Record<string, Path>>
  readonly components: { readonly parameters: Readonly<Record<string, Parameter>> }
}

/** An operation of the contract as fastify routes it. */
export type Endpoint = {
  readonly id: string
  readonly method: string
  /** The path, with `:run` for `{run}`. */
  readonly url: string
  /** Whether the contract asks for no key. */
  readonly open: boolean
  readonly schema: FastifySchema
}

let contract: Contract | undefined

/** The contract that every route is made from. It lies beside package.json and is parsed once in a process. */
export function readContract(): Contract {
  if (contract !== undefined) return contract
  const text = readFileSync(new URL('../../../openapi.yaml', import.meta.url), 'utf8')
  contract = { text, document: parse(text) }
  return contract
}

export function endpointsOf({ document }: Contract): Endpoint[] {
  return Object.entries(document.paths).flatMap(([path, { parameters = [], ...operations }]) => {
    return Object.entries(operations).map(([method, operation]) => ({
      id: operation.operationId,
      method: method.toUpperCase(),
      url: path.replace(/{(\w+)}/g, ':$1'),
      open: operation.security?.length === 0,
      schema: schemaOf(
        operation,
        [...parameters, ...(operation.parameters ?? [])].map((parameter) => resolved(document, parameter)),
      ),
    }))
  })
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
function schemaOf({ requestBody }: Operation, parameters: readonly Parameter[]): FastifySchema {
  const [path, query, header] = ['path', 'query', 'header'].map((place) =>
    parameters.filter((parameter) => parameter.in === place),
  )
  const content = Object.entries(requestBody?.content ?? {}).filter(([, { schema }]) => schema)
  return {
    ...(path.length > 0 && { params: objectOf(path) }),
    querystring: { ...objectOf(query), additionalProperties: false },
    ...(header.length > 0 && { headers: objectOf(header) }),
    ...(content.length > 0 && { body: { content: Object.fromEntries(content) } }),
  }
}

function objectOf(parameters: readonly Parameter[]): object {
  return {
    type: 'object',
    properties: Object.fromEntries(parameters.map(({ name, schema }) => [name, schema])),
    required: parameters.filter(({ required }) => required).map(({ name }) => name),
  }
}
