/** (a, b, c) of one Newton-Schulz iteration: σ <- aσ + bσ³ + cσ⁵ on every singular value. */
export type Triple = readonly [number, number, number]

export type CoefficientSet = {
  readonly coefficients: readonly Triple[]
  readonly ns_steps: number
  readonly source: string
}

/**
 * The polynomial of σ/s instead of σ: a singular value that rounding put slightly above 1 stays inside the interval
 * that the coefficients were optimized for.
 */
const padded = (s: number, [a, b, c]: Triple): Triple => [a / s, b / s ** 3, c / s ** 5]

const KELLER_JORDAN: Triple = [3.4445, -4.775, 2.0315]

/** The sets that a client may ask for by name, each with the number of iterations that is its default. */
export const NAMED_COEFFICIENTS = {
  keller_jordan: {
    source:
      'Keller Jordan, Muon (https://kellerjordan.github.io/posts/muon); the default ns_coefficients of torch.optim.Muon',
    ns_steps: 5,
    coefficients: [KELLER_JORDAN],
  },
  quintic: {
    // Found with the method of https://leloykun.github.io/ponder/muon-opt-coeffs.
    source: 'KellerJordan/modded-nanogpt, train_gpt_medium.py (You Jiacheng): five quintics, one per iteration',
    ns_steps: 5,
    coefficients: [
      [4.0848, -6.8946, 2.927],
      [3.9505, -6.3029, 2.6377],
      [3.7418, -5.5913, 2.3037],
      [2.8769, -3.1427, 1.2046],
      [2.8366, -3.0525, 1.2012],
    ],
  },
  polar_express: {
    // The paper's Algorithm 1 pads with s = 1.01. Half-precision rounding of a rank-1 gradient can give σ = 1.02, and
    // iterations that are padded with 1.01 make that explode.
    source: 'Amsel, Persson, Musco, Gower, The Polar Express (arXiv 2505.16932), Algorithm 1, padded with s = 1.05',
    ns_steps: 5,
    coefficients: [
      padded(1.05, [8.28721201814563, -23.595886519098837, 17.300387312530933]),
      padded(1.05, [4.107059111542203, -2.9478499167379106, 0.5448431082926601]),
      padded(1.05, [3.9486908534822946, -2.908902115962949, 0.5518191394370137]),
      padded(1.05, [3.3184196573706015, -2.488488024314874, 0.51004894012372]),
      padded(1.05, [2.300652019954817, -1.6689039845747493, 0.4188073119525673]),
      padded(1.05, [1.891301407787398, -1.2679958271945868, 0.37680408948524835]),
      padded(1.05, [1.8750014808534479, -1.2500016453999487, 0.3750001645474248]),
      [1.875, -1.25, 0.375],
    ],
  },
  deepseek_v4: {
    source: 'DeepSeek-V4 report, hybrid Newton-Schulz: eight iterations of keller_jordan, then two that settle at 1',
    ns_steps: 10,
    coefficients: [...new Array<Triple>(8).fill(KELLER_JORDAN), [2, -1.5, 0.5], [2, -1.5, 0.5]],
  },
  cubic5: {
    // As published the composed polynomial turns negative just above 1; hence the padding.
    // The numbers are those of programs that cite the paper, to 7 digits; the paper's own table was not at hand.
    source: 'Huang, How Much Orthogonalization Does Muon Need? (arXiv 2606.00371), padded with s = 1.05',
    ns_steps: 5,
    coefficients: [
      padded(1.05, [3.3656576, -3.3420992, 0]),
      padded(1.05, [2.5744352, -1.4957376, 0]),
      padded(1.05, [2.5368962, -1.431257, 0]),
      padded(1.05, [2.4418906, -1.276404, 0]),
      [2.2230472, -0.963065, 0],
    ],
  },
} as const satisfies Record<string, CoefficientSet>

export type CoefficientsName = keyof typeof NAMED_COEFFICIENTS

/** One triple for each of `ns_steps` iterations: a longer list is cut, the last triple of a shorter one is repeated. */
export function expandCoefficients(coefficients: readonly Triple[], ns_steps: number): Triple[] {
  const last = coefficients.at(-1)
  if (last === undefined) throw new Error('ns_coefficients is an empty list, expected at least one triple')
  return Array.from({ length: ns_steps }, (_, index) => coefficients[index] ?? last)
}

/** The composed polynomial p(σ): the singular value that σ becomes by the iterations, one per triple. */
function composedPolynomial(coefficients: readonly Triple[], sigma: number): number {
  return coefficients.reduce((x, [a, b, c]) => x * (a + x * x * (b + x * x * c)), sigma)
}

// Normalized singular values lie in (0, 1]. Half-precision rounding of the norm can lift one to 1.02.
const LARGEST_SIGMA = 1.02
const LARGEST_RESULT = 1.5
// A² holds fourth powers of singular values, and float16 ends at 65504 < 16⁴.
const LARGEST_INTERMEDIATE = 16

/**
 * The reason why coefficients must not be used, with the point and the value; undefined for safe ones. `coefficients`
 * is the expanded list, one triple per iteration.
 *
 * Coefficients are safe when no iteration flips the sign of a singular value in (0, 1.02] or lifts it to 16, and the
 * last one keeps it below 1.5. The check is exact, not sampled: a polynomial takes (0, h] to an interval whose end is
 * the largest of its values at h and at its critical points, and the next iteration starts from that interval.
 */
export function checkCoefficients(coefficients: readonly Triple[]): string | undefined {
  let largest = LARGEST_SIGMA
  for (const [index, triple] of coefficients.entries()) {
    const bound = index === coefficients.length - 1 ? LARGEST_RESULT : LARGEST_INTERMEDIATE
    const values = extremePoints(triple, largest).map((x) => ({ x, y: composedPolynomial([triple], x) }))
    const unsafe = values.find(({ y }) => !(y > 0 && y < bound))
    if (unsafe !== undefined) {
      const place = `iteration ${index + 1} of ${coefficients.length} takes a singular value of ${unsafe.x} to ${unsafe.y}`
      return `${place}, expected above 0 and below ${bound}`
    }
    largest = Math.max(...values.map(({ y }) => y))
  }
  return undefined
}

/** The points of (0, largest] at which aσ + bσ³ + cσ⁵ can be extreme: the end, and the roots of a + 3bσ² + 5cσ⁴. */
function extremePoints([a, b, c]: Triple, largest: number): number[] {
  // The roots as the pair q/5c and a/q: nothing cancels, and with c = 0 the first is infinite and the second right.
  const q = (-3 * b - (b < 0 ? -1 : 1) * Math.sqrt(9 * b * b - 20 * a * c)) / 2
  const roots = [Math.sqrt(q / (5 * c)), Math.sqrt(a / q)]
  return [largest, ...roots.filter((root) => root > 0 && root < largest)]
}
