import type { StoreSample } from '../../metrics.js'
import { FolderObjects } from './folder-objects.js'
import type { Objects } from './objects.js'
import type { S3Address } from './s3/s3-objects.js'

/** Where objects lie, as plain data, which another thread can be sent. */
export type ObjectsAddress = S3Address | { readonly kind: 'folder'; readonly root: string }

/** Opens objects. The AWS SDK is loaded only where they lie in S3: it takes as long as all of the service. */
export async function openObjects(address: ObjectsAddress, observe: (sample: StoreSample) => void): Promise<Objects> {
  if (address.kind === 'folder') return new FolderObjects(address.root)
  const { S3Objects } = await import('./s3/s3-objects.js')
  return new S3Objects(address, observe)
}
