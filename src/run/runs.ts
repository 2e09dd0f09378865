import type { Config } from '../config.js'
import type { Device } from '../device/device.js'
import type { Demand } from '../device/job.js'
import { ServiceError } from '../errors.js'
import { planStep } from '../optimizer/algorithm.js'
import { attentionDifference, parseAttentions, rowScaleBytes } from '../optimizer/attention.js'
import { stateBearing } from '../optimizer/hyperparameters.js'
import { firstDifference, type Parameter, parseParameters, stateBytes } from '../optimizer/parameter.js'
import type { Presets } from '../optimizer/preset.js'
import type { OpenFrame } from '../wire/frame.js'
import { type Declaration, declarationOf, parseGroups, refuseUnsupported } from './declaration.js'
import { Run, type Writer } from './run.js'
import { type Groups, groupOf } from './schedule.js'

/** The run that an `open` gave, and whether it existed before. */
export type Opened = { run: Run; resumed: boolean }

/** The table of runs: it creates, finds, hands over and deletes them, within the limits of the settings. */
export class Runs {
  draining = false
  readonly #device: Device
  readonly #config: Config
  readonly #presets: Presets
  #runs = new Map<string, Run>()
  /** Runs that wait for their kernels: they count as runs already. */
  #creating = 0
  #turns = new Map<string, Promise<unknown>>()

  constructor(device: Device, config: Config, presets: Presets) {
    this.#device = device
    this.#config = config
    this.#presets = presets
    device.onFailure = () => this.#expelAll()
  }

  list(): Run[] {
    return [...this.#runs.values()]
  }

  get(name: string): Run {
    const run = this.#runs.get(name)
    if (run === undefined) throw new ServiceError('RUN_NOT_FOUND', `there is no run '${name}'`)
    return run
  }

  /** Opens a run for `writer`. What one name is asked for happens in the order of the calls. */
  open(frame: OpenFrame, writer: Writer): Promise<Opened> {
    return this.#inTurn(frame.run, () => this.#open(frame, writer))
  }

  /** Deletes a run with its state; its connection is closed. */
  delete(name: string): Promise<void> {
    return this.#inTurn(name, async () => {
      const run = this.get(name)
      this.#runs.delete(name)
      const { writer } = run
      writer?.expel(new ServiceError('RUN_NOT_FOUND', `run '${name}' was deleted`, { close: 1008 }))
      await run.settled()
      run.dispose()
    })
  }

  async #open(frame: OpenFrame, writer: Writer): Promise<Opened> {
    refuseUnsupported(frame)
    if (this.draining) throw new ServiceError('DRAINING', 'the service shuts down and opens no run')
    const known = this.#runs.get(frame.run)
    if (known && frame.mode === 'create') throw new ServiceError('RUN_EXISTS', `run '${frame.run}' exists`)
    if (!known && frame.mode === 'resume') this.get(frame.run)
    if (known) return this.#resume(known, frame, writer)
    return { run: await this.#create(frame, writer), resumed: false }
  }

  async #resume(run: Run, frame: OpenFrame, writer: Writer): Promise<Opened> {
    if (run.writer && !frame.takeover) {
      throw new ServiceError(
        'RUN_BUSY',
        `run '${run.name}' has a connection (epoch ${run.epoch}), open it with takeover to replace that`,
      )
    }
    const groups = checkSame(run, frame, this.#presets)
    await run.attach(writer)
    if (groups) run.schedule.replace(groups, run.ahead.length === 0)
    return { run, resumed: true }
  }

  async #create(frame: OpenFrame, writer: Writer): Promise<Run> {
    const runs = this.#runs.size + this.#creating
    if (runs >= this.#config.max_runs) {
      throw new ServiceError('OVER_CAPACITY', `the service holds ${runs} runs, at most ${this.#config.max_runs}`)
    }
    const declaration = declarationOf(frame, this.#presets)
    this.#checkFits(declaration.parameters)
    const run = await this.#build(frame.run, declaration)
    this.#runs.set(run.name, run)
    await run.attach(writer)
    return run
  }

  async #build(name: string, { groups, parameters, attentions }: Declaration): Promise<Run> {
    // A slow reader may leave the row scales with their update.
    const scales = rowScaleBytes(attentions, parameters)
    const demands = demandsOf(parameters, groups).map((demand, index) => {
      return { ...demand, update_bytes: demand.update_bytes + (scales.get(index) ?? 0) }
    })
    const grant = this.#device.admit(demands, `run '${name}'`)
    this.#creating += 1
    const loaded = this.#device.load(demands).finally(() => {
      this.#creating -= 1
    })
    await loaded.catch((error) => {
      this.#device.dismiss(grant)
      throw error
    })
    const { receipts_kept } = this.#config
    return new Run(this.#device, { name, groups, parameters, attentions, grant, receipts_kept })
  }

  #checkFits(parameters: readonly Parameter[]): void {
    if (parameters.length > this.#config.max_parameters) {
      throw new ServiceError(
        'OVER_CAPACITY',
        `a run holds at most ${this.#config.max_parameters} parameters, given are ${parameters.length}`,
      )
    }
    const { staging } = this.#device
    const large = parameters.find(({ gradient_bytes }) => !staging.fits(gradient_bytes))
    if (!large) return
    const needs = `a gradient of parameter '${large.name}' needs ${large.gradient_bytes} bytes of staging memory`
    throw new ServiceError('OVER_CAPACITY', `${needs}, the arena has ${staging.capacity}`, { parameter: large.index })
  }

  async #inTurn<T>(name: string, work: () => Promise<T>): Promise<T> {
    const before = this.#turns.get(name)
    const turn = (before ?? Promise.resolve()).then(work)
    const settled = turn.catch(() => undefined)
    this.#turns.set(name, settled)
    try {
      return await turn
    } finally {
      if (this.#turns.get(name) === settled) this.#turns.delete(name)
    }
  }

  #expelAll(): void {
    const error = new ServiceError(
      'DEVICE_FAILED',
      `the device ${this.#device.backend.name} has failed: ${this.#device.failed?.message}`,
      { close: 1011 },
    )
    for (const run of this.#runs.values()) run.writer?.expel(error)
    this.#runs.clear()
  }
}

/** Compares what a resuming `open` gives with what the run has; answers the groups to replace, if any were given. */
function checkSame(run: Run, frame: OpenFrame, presets: Presets): Groups | undefined {
  const existing = run.schedule.current.groups
  const groups = frame.groups && parseGroups(frame.groups, presets)
  if (groups) {
    const difference = groupDifference(existing, groups)
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.parameters) {
    const difference = firstDifference(run.parameters, parseParameters(frame.parameters, groups ?? existing))
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.attentions) {
    const difference = attentionDifference(run.attentions, parseAttentions(frame.attentions, run.parameters))
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  return groups
}

function groupDifference(existing: Groups, given: Groups): string | undefined {
  for (const [name, group] of existing) {
    const other = given.get(name)
    if (!other) return `its group '${name}' is not given`
    const difference = stateBearing(group, other)
    if (difference) return `group '${name}': ${difference}`
  }
  for (const name of given.keys()) if (!existing.has(name)) return `it has no group '${name}'`
  return undefined
}

/** What the device is asked for: one step of every parameter. */
function demandsOf(parameters: readonly Parameter[], groups: Groups): Demand[] {
  return parameters.map((parameter) => ({
    plan: planStep(parameter, groupOf(parameter, groups), { step: 1, replay: false }),
    gradient_bytes: parameter.gradient_bytes,
    update_bytes: parameter.update_bytes,
    state_bytes: stateBytes(parameter),
  }))
}
