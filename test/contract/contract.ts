import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { keyOf, keysFile } from '../http/keys.js'
import { MODEL } from '../http/service.js'
import { startService } from '../service.js'

// Schemathesis against the service, with keys and without: `node dist/test/contract/contract.js SCHEMATHESIS`. The last
// line is `N passed, N failed`, where each of the two is one.

const [schemathesis = 'schemathesis'] = process.argv.slice(2)
const SEED = '20'
/** Seconds for each of the two. */
const BUDGET = '20'
/** The stream ends with a handshake, and the events with their reader. */
const ENDLESS = ['openStream', 'streamEvents']
/**
 * Of the checks of single answers those that hold whatever was asked before: the tool's other ones follow a resource
 * that it has made. A key is asked for only where there are keys.
 */
const CHECKS = [
  'not_a_server_error',
  'status_code_conformance',
  'content_type_conformance',
  'response_headers_conformance',
  'response_schema_conformance',
  'negative_data_rejection',
  'unsupported_method',
]

async function check(name: string, settings: object, args: readonly string[]): Promise<boolean> {
  const folder = mkdtempSync(join(tmpdir(), 'muond-contract-'))
  const service = await startService({
    lanes: 1,
    max_refusals_per_minute: 1_000_000,
    data: join(folder, 'data'),
    ...settings,
  })
  const headers = { 'content-type': 'application/json', authorization: `Bearer ${keyOf('all')}` }
  const open = JSON.stringify({ run: 'r', ...MODEL })
  const opened = await fetch(`${service.http}/v1/runs`, { method: 'POST', headers, body: open })
  console.log(`-- ${name}: ${opened.status}`)
  const ids = ENDLESS.flatMap((id) => ['--exclude-operation-id', id])
  const options = [
    '--seed',
    SEED,
    '--max-time',
    BUDGET,
    '--workers',
    '1',
    '--no-color',
    '--generation-database',
    'none',
  ]
  const run = [
    '--config-file',
    resolve('test/contract/schemathesis.toml'),
    'run',
    `${service.http}/openapi.yaml`,
    ...options,
    ...ids,
    ...args,
  ]
  const tool = spawn(schemathesis, run, { stdio: 'inherit', cwd: folder })
  const [status] = await once(tool, 'exit')
  await service.app.close()
  rmSync(folder, { recursive: true })
  return status === 0
}

const keys = keysFile({ testdir: () => mkdtempSync(join(tmpdir(), 'muond-keys-')) }, [
  { name: 'all', scopes: ['step', 'read', 'checkpoint', 'admin'] },
])
const held = [
  await check('without keys', {}, ['--checks', CHECKS.join(','), '--generation-with-security-parameters', 'false']),
  await check('with keys', { keys_file: keys.path }, [
    ...['--checks', [...CHECKS, 'ignored_auth'].join(',')],
    ...['--header', `Authorization: Bearer ${keyOf('all')}`],
  ]),
]
const passed = held.filter(Boolean).length
console.log(`${passed} passed, ${held.length - passed} failed`)
process.exitCode = passed === held.length ? 0 : 1
