import type { Config } from '../config.js'
import type { Metrics } from '../metrics.js'
import type { DataStore } from './data-store.js'
import { DataFolder } from './folder/data-folder.js'
import { DataObjects } from './objects/data-objects.js'
import { ownAddress, placeOf, s3Address } from './objects/s3/s3-address.js'

/**
 * Opens what runs are kept in; undefined without the setting `data`. In a store of objects each process of a cluster
 * has a place of its own.
 */
export async function openData(config: Config, { observeStore }: Metrics): Promise<DataStore | undefined> {
  const { data, advertise, data_wait_seconds: wait_seconds, s3_lease_seconds: lease_seconds } = config
  if (data === '') return undefined
  const [all, own] = [s3Address(config), ownAddress(config)]
  if (all === undefined || own === undefined) return DataFolder.open(data, wait_seconds)
  const places = advertise === '' ? {} : { placeOf: (origin: string) => placeOf(origin, all) }
  return DataObjects.open(own, { wait_seconds, lease_seconds, observe: observeStore, ...places })
}
