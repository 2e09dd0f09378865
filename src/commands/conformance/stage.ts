import { once } from 'node:events'
import { createServer, type IncomingMessage, request, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { Duplex } from 'node:stream'
import { WebSocket, WebSocketServer } from 'ws'
import { chooseSubprotocol } from '../../http/auth.js'
import { MESSAGE_BYTES, type OpenFrame } from '../../wire/frame.js'
import { type Backing, CHUNK_BYTES } from './backing.js'
import type { Check, Findings, Row } from './checks.js'
import { Course } from './course.js'
import { type Backstage, Link } from './link.js'
import type { Scene } from './scene.js'
import { SCENES, STEPS_NEEDED } from './scenes.js'

export type StageOptions = {
  /** A name or an address, as it stands in a URL: that of IPv6 in brackets. */
  host: string
  /** 0 picks a free one. */
  port: number
  quadratic: boolean
  slow_seconds: number
  /** Checks that are not asked for; a scene among them is not played. */
  skip: ReadonlySet<Check>
  findings: Findings
}

const STREAM = 'the stream is at /v1/stream, behind the address that the client is given'

/** What a client need not do. */
const OPTIONAL: readonly Check[] = ['hyperparameters', 'skipped', 'checkpoint']

/** A server before the real service that every frame passes, with a scene for each step. */
export class Stage implements Backstage {
  readonly findings: Findings
  readonly chunk_bytes = CHUNK_BYTES
  readonly #backing: Backing
  readonly #options: StageOptions
  readonly #server: Server
  readonly #links = new Set<Link>()
  readonly #upgrades = new WebSocketServer({
    ...{ noServer: true, maxPayload: MESSAGE_BYTES, perMessageDeflate: false, skipUTF8Validation: true },
    handleProtocols: chooseSubprotocol,
  })
  readonly #courses = new Map<string, Course>()
  readonly #scenes: Scene[]
  #heardAt = performance.now()

  /** Listens; the backing is closed by who has started it. */
  static async start(backing: Backing, options: StageOptions): Promise<Stage> {
    const stage = new Stage(backing, options)
    stage.#server.listen(options.port, options.host.replace(/[[\]]/g, ''))
    await once(stage.#server, 'listening')
    return stage
  }

  private constructor(backing: Backing, options: StageOptions) {
    this.#backing = backing
    this.#options = options
    this.findings = options.findings
    this.#server = createServer((incoming, reply) => passOn(incoming, reply, backing.port))
    this.#server.on('upgrade', (upgrade, socket, head) => this.#upgrade(upgrade, socket, head))
    const { slow_seconds, skip } = options
    const props = {
      slow_seconds,
      refuseUpgrade: () => {
        backing.draining = true
      },
      deleteRun: (name: string) => backing.deleteRun(name),
      fail: (check: Check, fault: string) => this.findings.fail(check, fault),
    }
    this.#scenes = SCENES.map((make) => make(props)).filter(({ check }) => !skip.has(check))
  }

  /** Scenes that were not played yet. */
  get left(): number {
    return this.#scenes.length
  }

  get address(): string {
    const { port } = this.#server.address() as AddressInfo
    return `ws://${this.#options.host}:${port}`
  }

  /** Seconds since the last frame in either direction. */
  get quiet_seconds(): number {
    return (performance.now() - this.#heardAt) / 1000
  }

  heard(): void {
    this.#heardAt = performance.now()
  }

  enter({ run, member }: OpenFrame): { course: Course; isReturn: boolean } {
    const { rank = 0, replica = 0, world_size = 1, replicas = 1 } = member ?? {}
    const key = `${run} ${replica} ${rank}`
    const known = this.#courses.get(key)
    const course = known ?? new Course(run, this.findings, this.#options.quadratic)
    course.plays = world_size * replicas === 1
    this.#courses.set(key, course)
    return { course, isReturn: known !== undefined }
  }

  advance(course: Course): void {
    this.#leave(course)
    course.begin()
    if (course.plays && course.step > 1) course.scene = this.#scenes.shift()
  }

  /**
   * The client has ended. Says whether it may end where it did, and lets it begin again: its runs are forgotten, the
   * scenes that it has met are not.
   */
  async rest(): Promise<boolean> {
    const courses = [...this.#courses.values()]
    const mayEnd = courses.map((course) => this.#end(course)).every((end) => end)
    this.#courses.clear()
    for (const link of this.#links) link.end()
    this.#links.clear()
    await this.#backing.deleteRuns()
    return mayEnd
  }

  /** All checks that were asked for. */
  rows(): Row[] {
    return this.findings.rows().filter(({ check }) => this.#isWanted(check) || OPTIONAL.includes(check))
  }

  /** Whether nothing is wrong, and everything was seen that a client must do. */
  get isWhole(): boolean {
    return this.rows().every(
      ({ check, result }) => result === 'passed' || (result === 'not seen' && !this.#isWanted(check)),
    )
  }

  async close(): Promise<void> {
    for (const link of this.#links) link.end()
    this.#server.closeAllConnections()
    this.#server.close()
    await once(this.#server, 'close')
  }

  #isWanted(check: Check): boolean {
    const { quadratic, skip } = this.#options
    return !skip.has(check) && !OPTIONAL.includes(check) && (check !== 'arithmetic' || quadratic)
  }

  /** The next step begins: the client has come through the scene of the last one. */
  #leave(course: Course): void {
    const { scene } = course
    course.scene = undefined
    if (!scene) return
    // It had no occasion, in a step without updates for one: another step will have one.
    if (!scene.acted) return void this.#scenes.push(scene)
    const lack = scene.lacks?.()
    if (lack === undefined) this.findings.pass(scene.check)
    else this.findings.fail(scene.check, lack)
  }

  /** Whether the client may have ended in the scene. */
  #end({ scene, step }: Course): boolean {
    if (!scene?.acted) return true
    if (scene.mayEnd?.()) {
      this.findings.pass(scene.check)
      return true
    }
    this.findings.fail(
      scene.check,
      `the client went no further than step ${step}; if it has ended as it should, let it take ${STEPS_NEEDED} steps`,
    )
    return false
  }

  /** Connects to the service first, so that whatever it refuses is refused with its own words. */
  #upgrade(upgrade: IncomingMessage, socket: Duplex, head: Buffer): void {
    const { authorization, 'sec-websocket-protocol': protocols } = upgrade.headers
    const service = new WebSocket(
      `ws://127.0.0.1:${this.#backing.port}${upgrade.url}`,
      protocols?.split(/\s*,\s*/) ?? [],
      {
        ...{ perMessageDeflate: false, maxPayload: 0 },
        headers: authorization === undefined ? {} : { authorization },
      },
    )
    socket.on('error', () => service.terminate())
    service.once('error', () => socket.destroy())
    service.once('unexpected-response', (_, response) => {
      const { statusCode } = response
      // Libraries tell of a refused upgrade little more than that it was refused. A scene refuses with 503.
      if (statusCode !== 503)
        this.findings.fail('frames', `the upgrade to '${upgrade.url}' is refused with ${statusCode}: ${STREAM}`)
      this.#backing.draining = false
      void answer(response, socket)
    })
    service.once('open', () =>
      this.#upgrades.handleUpgrade(upgrade, socket, head, (client) => {
        const link = new Link(client, service, this)
        this.#links.add(link)
      }),
    )
  }
}

/** Gives a refused upgrade's answer to the client, as it is. */
async function answer(response: IncomingMessage, socket: Duplex): Promise<void> {
  const parts: Buffer[] = []
  for await (const part of response) parts.push(part)
  const headers = Object.entries({ ...response.headers, connection: 'close' })
  const head = headers.filter(([name]) => name !== 'transfer-encoding').map(([name, value]) => `${name}: ${value}`)
  const top = Buffer.from(`HTTP/1.1 ${response.statusCode} ${response.statusMessage}\r\n${head.join('\r\n')}\r\n\r\n`)
  socket.end(Buffer.concat([top, ...parts]), () => socket.destroy())
}

/** Gives a request of REST to the service. */
function passOn(incoming: IncomingMessage, reply: ServerResponse, port: number): void {
  const { method, url, headers } = incoming
  const passed = request({ host: '127.0.0.1', port, method, path: url, headers }, (response) => {
    reply.writeHead(Number(response.statusCode), response.headers)
    response.pipe(reply)
  })
  /* c8 ignore next -- the service behind is of this process, and ends later */
  passed.once('error', () => reply.destroy())
  incoming.pipe(passed)
}
