import { openObjects } from '../../../store/objects/open-objects.js'
import { holderOfObjects } from '../../../store/objects/owner.js'
import { probe } from '../../../store/objects/probe.js'
import type { S3Address } from '../../../store/objects/s3/s3-objects.js'
import { type Finding, finding, ok, taken } from './finding.js'

const REMEDY =
  'the bucket must be there; credentials, region and endpoint must be right, and allow to read, write, list and delete'

/** A store of objects: whether it answers and keeps conditions, and who has it. Its runs are checked by a start. */
export function checkObjects(address: S3Address): Promise<Finding[]> {
  return finding('data', REMEDY, async () => {
    const objects = await openObjects(address, () => {})
    await probe(objects)
    const found = `${objects.name} can be written, and of racing writers lets exactly one win`
    const holder = await holderOfObjects(objects)
    if (holder === undefined || holder.released) return ok('data', `${found}; nobody uses it`)
    return taken('data', `${found}; it is in use by ${holder.holder}, or was when that ended without a word`, '--data')
  })
}
