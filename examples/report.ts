import { last, type Outcome } from './train.js'

/** The comparison as a text table: one column per outcome, the first of which sets the loss to reach. */
export function comparison(outcomes: readonly [Outcome, ...Outcome[]]): string {
  const target = last(outcomes[0].curve).loss
  const name = outcomes[0].recipe.title
  const reached = outcomes.map(({ curve }) => curve.find(({ loss }) => loss <= target))
  return table([
    ['', ...outcomes.map(({ recipe }) => recipe.title)],
    ['final validation loss, nats per byte', ...outcomes.map(({ curve }) => last(curve).loss.toFixed(4))],
    [`steps to ${name}'s final loss`, ...reached.map((evaluation) => evaluation?.step.toString() ?? 'never')],
    [`seconds to ${name}'s final loss`, ...reached.map((evaluation) => evaluation?.seconds.toFixed(1) ?? 'never')],
    ['seconds of training in all', ...outcomes.map(({ curve }) => last(curve).seconds.toFixed(1))],
    ['  forward and backward, ms per step', ...outcomes.map(({ milliseconds }) => milliseconds.model.toFixed(1))],
    ['  through the service, ms per step', ...outcomes.map(({ milliseconds }) => milliseconds.service.toFixed(1))],
    ['update RMS, hidden matrices', ...outcomes.map(({ updateRms }) => updateRms.hidden.toFixed(3))],
    ['update RMS, the rest', ...outcomes.map(({ updateRms }) => updateRms.rest.toFixed(3))],
  ])
}

/** How the second outcome compares with the first in steps, in a sentence. */
export function conclusion([{ recipe, curve }, other]: readonly [Outcome, Outcome]): string {
  const { step, loss } = last(curve)
  const reached = other.curve.find((evaluation) => evaluation.loss <= loss)?.step
  const baseline = `${recipe.title}'s final loss`
  if (reached === undefined)
    return `${other.recipe.title} did not come to ${baseline} in ${last(other.curve).step} steps.`
  return `${other.recipe.title} came to ${baseline} after ${reached} of ${step} steps.`
}

/** The sweep as a Markdown table. */
export function sweepTable(outcomes: readonly Outcome[]): string {
  const rows = outcomes.map(({ recipe, curve }) => {
    return [recipe.title, String(recipe.hidden.lr), String(recipe.rest.lr), last(curve).loss.toFixed(4)]
  })
  return markdown([['optimizer', 'lr, hidden matrices', 'lr, the rest', 'final validation loss'], ...rows])
}

/** A Markdown table of a header and its rows, aligned so that a terminal shows it well too. */
export function markdown(rows: readonly (readonly string[])[]): string {
  const widths = rows[0].map((_, column) => Math.max(3, ...rows.map((row) => row[column].length)))
  const line = (row: readonly string[]) => `| ${row.map((cell, i) => cell.padEnd(widths[i])).join(' | ')} |`
  return [
    line(rows[0]),
    `|${widths.map((width) => '-'.repeat(width + 2)).join('|')}|`,
    ...rows.slice(1).map(line),
  ].join('\n')
}

/** The outcome with the lowest final validation loss. */
export function best(outcomes: readonly Outcome[]): Outcome {
  return outcomes.reduce((one, other) => (last(other.curve).loss < last(one.curve).loss ? other : one))
}

function table(rows: readonly (readonly string[])[]): string {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)))
  const line = (row: readonly string[]) =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i])))
  return rows.map((row) => line(row).join('   ').trimEnd()).join('\n')
}
