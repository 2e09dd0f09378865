import { X509Certificate } from 'node:crypto'
import { readFileSync, statSync } from 'node:fs'
import { readKeyFile } from '../../../access/key-file.js'
import { Keys } from '../../../access/keys.js'
import type { Config } from '../../../config.js'
import { isLoopback } from '../../../contradictions.js'
import { readCredentials, speaksTls } from '../../../http/listening/tls.js'
import { readPresets } from '../../../store/presets.js'
import { counted } from '../../amount.js'
import { type Finding, failure, finding, ok, warning } from './finding.js'

const GROUP_MAY_WRITE = 0o020
const OTHERS_MAY_READ = 0o077
const CERTIFICATE = /-----BEGIN CERTIFICATE-----[\s\S]*?-----END CERTIFICATE-----/g
const DAY_MS = 86_400_000
/** So long before its end a certificate should be renewed: those of Let's Encrypt are renewed 30 days before. */
const EXPIRES_SOON_DAYS = 30

/** Who may use the service: the keys of the settings and of their file. */
export function checkKeys(config: Config): Promise<Finding[]> {
  return finding('keys', 'muond keys add NAME --file FILE makes a file of keys', () => {
    const { everybody } = new Keys(config)
    return everybody === undefined ? knownKeys(config) : noKeys(config)
  })
}

function knownKeys({ api_keys, keys_file }: Config): Finding {
  const variable = `${counted(api_keys.length, 'key')} in MUOND_API_KEYS`
  if (keys_file === '') return ok('keys', variable)
  const inFile = `${counted(readKeyFile(keys_file).length, 'key')} in ${keys_file}`
  const found = api_keys.length === 0 ? inFile : `${inFile}, ${variable}`
  const { mode } = statSync(keys_file)
  if ((mode & GROUP_MAY_WRITE) === 0) return ok('keys', found)
  return warning('keys', `${found}; mode ${octal(mode)}: its group may add a key`, `chmod g-w ${keys_file}`)
}

function noKeys({ host, tls_client_ca, insecure_no_keys }: Config): Finding[] {
  if (tls_client_ca !== '') return [ok('keys', 'none: each client certificate may do everything')]
  if (isLoopback(host)) return [ok('keys', 'none: everybody on this machine may do everything')]
  // Else the settings are refused, which is told of them.
  if (!insecure_no_keys) return []
  return [warning('keys', 'none: whoever reaches the service may do everything', '--keys-file FILE (muond keys add)')]
}

/** The certificate, its key and the authorities of clients; `now` is in milliseconds since 1970. */
export async function checkTls(config: Config, now: number): Promise<Finding[]> {
  const { tls_cert, tls_key, tls_client_ca } = config
  if (!speaksTls(config)) return noTls(config)
  return finding('TLS', 'one PEM file with the certificate chain, and one with its private key', () => {
    readCredentials(config)
    const authorities = tls_client_ca === '' ? [] : [certificates('TLS clients', tls_client_ca, now)]
    return [certificates('TLS', tls_cert, now), keyFile(tls_key), ...authorities]
  })
}

function noTls({ host, insecure_no_tls }: Config): Finding[] {
  if (isLoopback(host)) return [ok('TLS', 'none: plain HTTP on the loopback')]
  // Else the settings are refused, which is told of them.
  if (!insecure_no_tls) return []
  const found = 'none: whoever is on the way reads keys and gradients, unless a proxy in front has TLS'
  return [warning('TLS', found, '--tls-cert and --tls-key')]
}

/** The presets that come with muond, and those of the setting. */
export function checkPresets({ presets }: Config): Promise<Finding[]> {
  return finding('presets', 'muond presets --presets DIR says what is wrong in each file', () => {
    const [all, shipped] = [readPresets(presets).size, readPresets().size]
    return ok('presets', presets === '' ? counted(all, 'preset') : `${shipped} and ${all - shipped} of ${presets}`)
  })
}

/** The certificates of a PEM file, all of which have to be in their time: whose is the first to end is told. */
function certificates(check: string, path: string, now: number): Finding {
  const blocks = readFileSync(path, 'utf8').match(CERTIFICATE) ?? []
  const all = blocks.map((block) => new X509Certificate(block))
  const [first] = all.toSorted((one, other) => Date.parse(one.validTo) - Date.parse(other.validTo))
  if (first === undefined)
    return failure(
      check,
      `${path} has no certificate: no client could have one of it`,
      'PEM: -----BEGIN CERTIFICATE-----',
    )
  const late = all.find(({ validFrom }) => Date.parse(validFrom) > now)
  if (late)
    return failure(check, `${nameOf(late)} of ${path} holds from ${dayOf(late.validFrom)} on`, 'set the clock, or wait')
  const days = Math.floor((Date.parse(first.validTo) - now) / DAY_MS)
  const found = `${nameOf(first)} of ${path}`
  if (days < 0) return failure(check, `${found} has ended on ${dayOf(first.validTo)}`, RENEW)
  const ends = `${found} ends on ${dayOf(first.validTo)}, in ${counted(days, 'day')}`
  return days < EXPIRES_SOON_DAYS ? warning(check, ends, RENEW) : ok(check, ends)
}

const RENEW = 'renew it, and send the service SIGHUP'

/** Its subject in one line; some have names of hosts only. */
function nameOf({ subject, subjectAltName }: X509Certificate): string {
  /* c8 ignore next -- those of the tests have a subject */
  return `certificate ${(subject || subjectAltName || 'without a name').split('\n').join(', ')}`
}

/** The day of a date as certificates have it, in UTC: `2030-01-31`. */
function dayOf(date: string): string {
  return new Date(date).toISOString().slice(0, 10)
}

function keyFile(path: string): Finding {
  const { mode } = statSync(path)
  if ((mode & OTHERS_MAY_READ) === 0) return ok('TLS key', path)
  return warning('TLS key', `${path} has mode ${octal(mode)}: others than its owner reach the key`, `chmod 600 ${path}`)
}

function octal(mode: number): string {
  return (mode & 0o777).toString(8)
}
