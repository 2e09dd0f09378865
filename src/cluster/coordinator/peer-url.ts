import { ConfigError } from '../../config.js'

/**
 * The origin that a text names, such as http://10.0.0.2:8787: processes are known by it, so it must have one spelling.
 * Throws ConfigError, with the setting's name, where it is none.
 */
export function peerUrl(text: string, setting: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined
  const isOrigin = url && /^https?:$/.test(url.protocol) && url.pathname === '/' && !url.search && !url.hash
  if (isOrigin && url.username === '' && url.password === '') return url.origin
  throw new ConfigError(`${setting} has '${text}', expected the URL of a process without a path: http://10.0.0.2:8787`)
}

/** The origins of a list, each once and sorted: processes with equal lists must come to the same answers. */
export function peerUrls(texts: readonly string[], setting: string): readonly string[] {
  return [...new Set(texts.map((text) => peerUrl(text, setting)))].sort()
}
