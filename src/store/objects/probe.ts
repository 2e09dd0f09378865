import { randomUUID } from 'node:crypto'
import { type Objects, StoreError, type Version } from './objects.js'

/** So many writers race for one object. */
const RACING = 16

/**
 * Finds out whether of all conditional writes on one condition exactly one is done: nothing else keeps two services
 * apart that believe to have the same run. Some stores have let two win. Throws StoreError that says what has happened.
 */
export async function probe(objects: Objects): Promise<void> {
  const [fresh, changing] = [`probes/${randomUUID()}`, `probes/${randomUUID()}`]
  try {
    await Promise.all([
      race(objects, fresh, {
        what: 'write an object if there is none (If-None-Match: *)',
        write: (bytes) => objects.putIfAbsent(fresh, bytes),
      }),
      objects.putIfAbsent(changing, Buffer.from(changing)).then((version = '') =>
        race(objects, changing, {
          what: 'write an object if it is unchanged (If-Match)',
          write: (bytes) => objects.putIfUnchanged(changing, bytes, version),
        }),
      ),
    ])
  } finally {
    await objects.delete([fresh, changing]).catch(() => undefined)
  }
}

type Race = { what: string; write: (bytes: Buffer) => Promise<Version | undefined> }

async function race(objects: Objects, key: string, { what, write }: Race): Promise<void> {
  const contents = Array.from({ length: RACING }, () => Buffer.from(randomUUID()))
  const versions = await Promise.all(contents.map(write))
  const winners = contents.flatMap((content, i) => {
    const version = versions[i]
    return version === undefined ? [] : [{ content, version }]
  })
  const [winner] = winners
  if (winner === undefined || winners.length > 1)
    throw new StoreError(
      `${objects.name}: of ${RACING} that ${what} at once ${winners.length} did, expected is exactly 1: two services could have one run`,
    )
  const found = await objects.get(key)
  if (found?.version === winner.version && found.bytes.equals(winner.content)) return
  throw new StoreError(
    `${objects.name}: of ${RACING} that ${what} at once one did, and the object is not what it wrote`,
  )
}
