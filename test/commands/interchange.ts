import { PassThrough } from 'node:stream'
import { exportCommand } from '../../src/commands/export.js'
import { importCommand } from '../../src/commands/import.js'
import { RawClient, type Service, startService } from '../service.js'

export const SILENT = { terminal: new PassThrough() }
const SMALL = { staging_bytes: 2 ** 20, lanes: 1 }

export const start = (settings: Parameters<typeof startService>[0] = {}) => startService({ ...SMALL, ...settings })

export const exporting = ({ http }: Service, run: string, ...rest: string[]) =>
  exportCommand([run, ...rest, '--url', http], {}, SILENT)

export const importing = ({ http }: Service, run: string, ...rest: string[]) =>
  importCommand([run, ...rest, '--url', http], {}, SILENT)

export async function stateOf({ http }: Service, run: string): Promise<Buffer> {
  return Buffer.from(await (await fetch(`${http}/v1/runs/${run}/state`)).arrayBuffer())
}

/** A run of these groups and parameters, opened. */
export async function opened(service: Service, run: string, model: object): Promise<RawClient> {
  const client = await RawClient.connect(service.url)
  await client.open({ run, ...model })
  return client
}
