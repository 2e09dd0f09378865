import assert from 'node:assert'
import type { SourceTensor, StateSource } from '../../store/checkpoint/state-source.js'

/** Reads the update counts of a state, which come before its other tensors; `rest` gives the bytes of these. */
export async function readCounts({ tensors, read }: StateSource): Promise<{
  counts: ReadonlyMap<string, number>
  rest: AsyncGenerator<{ tensor: SourceTensor; piece: Uint8Array }>
}> {
  const pieces = read()
  const names = tensors.filter(isCount).map(({ name }) => name)
  const counts = new Map<string, number>()
  for (const name of names) {
    let bytes = Buffer.alloc(0)
    while (bytes.length < BigInt64Array.BYTES_PER_ELEMENT) {
      const { done, value } = await pieces.next()
      assert(!done && tensors[value.tensor].name === name, `count '${name}' comes before the other tensors`)
      bytes = Buffer.concat([bytes, value.piece])
    }
    counts.set(name, Number(bytes.readBigInt64LE()))
  }
  return { counts, rest: resolved(tensors, pieces) }
}

/** Whether a tensor of a state is a parameter's update count: an int64 without dimensions. */
export function isCount({ dtype, shape }: SourceTensor): boolean {
  return dtype === 'I64' && shape.length === 0
}

async function* resolved(
  tensors: readonly SourceTensor[],
  pieces: ReturnType<StateSource['read']>,
): AsyncGenerator<{ tensor: SourceTensor; piece: Uint8Array }> {
  for await (const { tensor, piece } of pieces) yield { tensor: tensors[tensor], piece }
}
