import { type Config, ConfigError } from '../../../config.js'
import { S3_SCHEME } from '../../../contradictions.js'
import type { S3Address } from './s3-objects.js'

const FORM = /^s3:\/\/([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:\/(.*))?$/
const SEGMENT = /^[A-Za-z0-9!_.*'()-]+$/

/** Without a user and a password: credentials are no settings. */
const ENDPOINT = /^https?:\/\/[^/@?#]+\/?$/

/** The place below an address that is one process's alone; `origin` is the URL by which others know the process. */
export function placeOf(origin: string, address: S3Address): S3Address {
  return { ...address, prefix: `${address.prefix}peers/${nameOf(origin)}/` }
}

/** An origin as a segment of a key, `http_10.0.0.2_8787`: no two have the same one. */
function nameOf(origin: string): string {
  const hex = (character: string) => `!${character.charCodeAt(0).toString(16).padStart(4, '0')}`
  return origin
    .replace('://', ':')
    .replace(/[^a-z0-9.:-]/g, hex)
    .replaceAll(':', '_')
}

/** Where this process has its runs: one of several has a place of its own. Undefined where that is a folder. */
export function ownAddress(config: Parameters<typeof s3Address>[0] & Pick<Config, 'advertise'>): S3Address | undefined {
  const address = s3Address(config)
  return address && config.advertise !== '' ? placeOf(config.advertise, address) : address
}

/** Where the setting `data` says that objects lie; undefined where it is a folder. Throws ConfigError. */
export function s3Address({
  data,
  s3_endpoint: endpoint,
  s3_region: region,
  s3_path_style: path_style,
}: Pick<Config, 'data' | 's3_endpoint' | 's3_region' | 's3_path_style'>): S3Address | undefined {
  if (!data.startsWith(S3_SCHEME)) return undefined
  const [, bucket, path = ''] = FORM.exec(data) ?? []
  const segments = path.split('/').filter((segment) => segment !== '')
  const wrong = segments.find((segment) => !SEGMENT.test(segment) || /^\.+$/.test(segment))
  if (bucket === undefined || wrong !== undefined)
    throw new ConfigError(`data is '${data}', expected s3://BUCKET or s3://BUCKET/PREFIX of letters, digits and -_.`)
  if (endpoint !== '' && !ENDPOINT.test(endpoint))
    throw new ConfigError(
      `s3_endpoint is '${endpoint.replace(/\/\/[^/]*@/, '//…@')}', expected http://HOST:PORT or https://HOST`,
    )
  const prefix = segments.map((segment) => `${segment}/`).join('')
  return { kind: 's3', bucket, prefix, endpoint, region, path_style }
}
