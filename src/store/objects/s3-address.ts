import { type Config, ConfigError } from '../../config.js'
import { S3_SCHEME } from '../../contradictions.js'
import type { S3Address } from './s3-objects.js'

const FORM = /^s3:\/\/([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:\/(.*))?$/
const SEGMENT = /^[A-Za-z0-9!_.*'()-]+$/

/** Without a user and a password: credentials are no settings. */
const ENDPOINT = /^https?:\/\/[^/@?#]+\/?$/

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
