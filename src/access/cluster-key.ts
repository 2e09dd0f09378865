import { readFileSync } from 'node:fs'
import { type Config, ConfigError } from '../config.js'
import { errorText } from '../errors.js'

const LEAST_CHARACTERS = 16

export type ClusterKeySettings = Partial<Pick<Config, 'cluster_key' | 'cluster_key_file'>>

/**
 * The key that the processes of a cluster show each other, from its setting or the file of it; empty where there is
 * neither. Throws ConfigError for a file that cannot be read or has no such key.
 */
export function readClusterKey({ cluster_key = '', cluster_key_file: path = '' }: ClusterKeySettings): string {
  if (path === '') return cluster_key
  const text = contentOf(path).trim()
  if (text.length >= LEAST_CHARACTERS && !/\s/.test(text)) return text
  throw new ConfigError(
    `key file '${path}' of the cluster has no key: one line of ${LEAST_CHARACTERS} characters or more`,
  )
}

function contentOf(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (error) {
    throw new ConfigError(`key file '${path}' of the cluster cannot be read: ${errorText(error)}`)
  }
}
