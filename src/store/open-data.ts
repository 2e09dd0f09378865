import type { Config } from '../config.js'
import type { Metrics } from '../metrics.js'
import type { DataStore } from './data-store.js'
import { DataFolder } from './folder/data-folder.js'
import { DataObjects } from './objects/data-objects.js'
import { placeOf, s3Address } from './objects/s3/s3-address.js'

/**
 * Opens what runs are kept in; undefined without the setting `data`. In a store of objects each process of a cluster has
 * a place of its own.
 */
export async function openData(config: Config, { observeStore }: Metrics): Promise<DataStore | undefined> {
  const { data, advertise, data_wait_seconds: wait_seconds, s3_lease_seconds: lease_seconds } = config
  if (data === '') return undefined
  const address = s3Address(config)
  if (address === undefined) return DataFolder.open(data, wait_seconds)
  const options = { wait_seconds, lease_seconds, observe: observeStore }
  if (advertise === '') return DataObjects.open(address, options)
  const place = (origin: string) => placeOf(origin, address)
  return DataObjects.open(place(advertise), { ...options, placeOf: place })
}
