/** The first bytes of each arena prove that both sides see the same memory; slots begin behind them. */
export const ARENA_HEAD_BYTES = 256
/** Bytes of the nonce that a client writes to its gradient arena, and of the SHA-256 that answers it. */
export const PROOF_BYTES = 32
const ALIGNMENT = 256

/**
 * Where each tensor lies in an arena that client and service share: one slot each, in the order of the parameters,
 * at multiples of 256 bytes. Nobody names an address, so no slot can overlap another.
 */
export function layOut(sizes: readonly number[]): { offsets: number[]; bytes: number } {
  let bytes = ARENA_HEAD_BYTES
  const offsets = sizes.map((size) => {
    const offset = bytes
    bytes += Math.ceil(size / ALIGNMENT) * ALIGNMENT
    return offset
  })
  return { offsets, bytes }
}
