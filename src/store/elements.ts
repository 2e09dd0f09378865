import { bfloat16ToNumber, float16Values, numberToBfloat16 } from '../../kernels/narrow.js'
import { SAFETENSORS_DTYPES } from './safetensors.js'

/** The types in which an imported state tensor may be given; `KeptDtype` are those in which the service keeps one. */
export const GIVEN_DTYPES = ['F32', 'BF16', 'F16'] as const
export type GivenDtype = (typeof GIVEN_DTYPES)[number]
export type KeptDtype = 'F32' | 'BF16'

/** The new value of each element is value · multiply / divide in float64, rounded once to the type `to`. */
export type Conversion = {
  from: GivenDtype
  to: KeptDtype
  multiply?: number
  divide?: number
}

type Values = { readonly length: number; readonly [index: number]: number }

/** Converts a tensor's elements piece by piece. A piece may end inside an element, whose other part opens the next. */
export class Elements {
  readonly #conversion: Conversion
  readonly #bytes: number
  #rest: Uint8Array = new Uint8Array(0)

  constructor(conversion: Conversion) {
    this.#conversion = conversion
    this.#bytes = SAFETENSORS_DTYPES[conversion.from]
  }

  /** The converted elements that end in `piece`, in memory of their own. */
  take(piece: Uint8Array): Float32Array | Uint16Array {
    const cut = (this.#rest.length + piece.length) % this.#bytes
    const whole = new Uint8Array(this.#rest.length + piece.length - cut)
    const used = piece.length - cut
    if (whole.length > 0) {
      whole.set(this.#rest)
      whole.set(piece.subarray(0, used), this.#rest.length)
      this.#rest = new Uint8Array(piece.subarray(used))
    } else this.#rest = Uint8Array.of(...this.#rest, ...piece)
    return this.#convert(whole)
  }

  #convert({ buffer }: Uint8Array): Float32Array | Uint16Array {
    const { from, to, multiply = 1, divide = 1 } = this.#conversion
    const same = multiply === 1 && divide === 1
    if (from === to && same) return from === 'F32' ? new Float32Array(buffer) : new Uint16Array(buffer)
    const values = READERS[from](buffer)
    const kept = to === 'F32' ? new Float32Array(values.length) : new Uint16Array(values.length)
    const round = to === 'F32' ? (value: number) => value : numberToBfloat16
    for (let i = 0; i < values.length; i++) kept[i] = round((values[i] * multiply) / divide)
    return kept
  }
}

const READERS: Readonly<Record<GivenDtype, (buffer: ArrayBufferLike) => Values>> = {
  F32: (buffer) => new Float32Array(buffer),
  BF16: (buffer) => Float32Array.from(new Uint16Array(buffer), bfloat16ToNumber),
  F16: (buffer) => {
    const values = float16Values()
    return Float32Array.from(new Uint16Array(buffer), (pattern) => values[pattern])
  },
}

/** The first element that is NaN or infinite, or below zero where that may not be; undefined where there is none. */
export function firstRefused(
  kept: Float32Array | Uint16Array,
  { mayBeNegative }: { mayBeNegative: boolean },
): { index: number; value: number } | undefined {
  const values = kept instanceof Float32Array ? kept : Float32Array.from(kept, bfloat16ToNumber)
  const least = mayBeNegative ? -Infinity : 0
  for (let index = 0; index < values.length; index++) {
    const value = values[index]
    // A finite number less itself is 0, and comparisons are false for NaN.
    if (!(value - value === 0 && value >= least)) return { index, value }
  }
  return undefined
}

/** The bytes of an array of elements: a view, no copy. */
export function bytesOf(kept: Float32Array | Uint16Array): Uint8Array {
  return new Uint8Array(kept.buffer, kept.byteOffset, kept.byteLength)
}
