import type { Config } from '../../config.js'
import type { Metrics } from '../../metrics.js'
import { openObjects } from '../../store/objects/open-objects.js'
import { s3Address } from '../../store/objects/s3/s3-address.js'
import { WholeFiles } from './whole-files.js'
import { WholeObjects } from './whole-objects.js'
import type { WholeStore } from './whole-store.js'

/** Opens what wholes are kept in; undefined without the setting `data`. */
export async function openWholes(config: Config, { observeStore }: Metrics): Promise<WholeStore | undefined> {
  const { data, durability } = config
  if (data === '') return undefined
  const address = s3Address(config)
  return address
    ? new WholeObjects(await openObjects(address, observeStore))
    : new WholeFiles(data, durability === 'journal')
}
