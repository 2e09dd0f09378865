import { basename } from 'node:path'
import { shardName, shareOut, tensorIndexText } from '../store/checkpoint/state-files.js'
import { type StateSource, stateMetadata } from '../store/checkpoint/state-source.js'
import { encodeHeader } from '../store/safetensors.js'
import { writeFiles, writeWhole } from './output.js'

/**
 * Writes a state as one safetensors file, or, where it has more than `most` bytes, as shards and an index,
 * `<path>.index.json`, beside each other. Returns the paths. Throws OutputExistsError.
 */
export async function writeSafetensors(path: string, source: StateSource, most: number): Promise<string[]> {
  const shares = shareOut(source.tensors, ({ bytes }) => bytes, most)
  const stem = path.replace(/\.safetensors$/, '')
  const shards = shares.length === 1 ? [path] : shares.map((_, i) => shardName(stem, i, shares.length))
  const paths = shares.length === 1 ? shards : [...shards, `${stem}.safetensors.index.json`]
  const shardOf = shares.flatMap((share, i) => share.map(() => i))
  await writeWhole(paths, (partials) =>
    writeFiles(partials, async (files) => {
      const metadata = stateMetadata(source.description)
      for (const [i, share] of shares.entries()) await files[i].write(encodeHeader(share, metadata))
      if (files.length > shards.length) {
        const all = source.tensors.map((tensor, i) => ({ ...tensor, file: basename(shards[shardOf[i]]) }))
        await files[shards.length].write(Buffer.from(tensorIndexText(all)))
      }
      for await (const { tensor, piece } of source.read()) await files[shardOf[tensor]].write(piece)
    }),
  )
  return paths
}
