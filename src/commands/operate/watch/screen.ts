import type { EventEmitter } from 'node:events'

/** Standard output. */
export type Output = Pick<EventEmitter, 'on' | 'off'> & {
  readonly isTTY?: boolean
  readonly columns?: number
  readonly rows?: number
  write(text: string): unknown
}

/** Standard input. */
export type Keyboard = Pick<EventEmitter, 'on' | 'off'> & {
  readonly isTTY?: boolean
  setRawMode?(raw: boolean): unknown
  resume(): unknown
  pause(): unknown
}

const ESCAPE = '\x1b'
const CONTROL_C = '\x03'
const QUIT = new Set(['q', 'Q', CONTROL_C])
/** The alternate screen, which leaves what was on the terminal as it is, without a cursor; and back. */
const ENTER = `${ESCAPE}[?1049h${ESCAPE}[?25l`
const LEAVE = `${ESCAPE}[?25h${ESCAPE}[?1049l`
const [HOME, CLEAR_LINE, CLEAR_BELOW] = [`${ESCAPE}[H`, `${ESCAPE}[K`, `${ESCAPE}[J`]
const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
/** Of a terminal that does not tell. */
const [COLUMNS, ROWS] = [80, 24]

/** A terminal whose whole screen is drawn again and again, until q, Ctrl-C or a signal. */
export class Screen {
  readonly #output: Output
  readonly #keyboard: Keyboard
  readonly #signals: Pick<EventEmitter, 'on' | 'off'>
  readonly #quit: () => void
  /* c8 ignore next -- the first picture is there before anything asks for one */
  #frame: (size: { columns: number; rows: number }) => readonly string[] = () => []

  constructor(
    output: Output,
    keyboard: Keyboard,
    { signals, quit }: { signals: Pick<EventEmitter, 'on' | 'off'>; quit: () => void },
  ) {
    this.#output = output
    this.#keyboard = keyboard
    this.#signals = signals
    this.#quit = quit
    output.write(ENTER)
    output.on('resize', this.#draw)
    for (const signal of SIGNALS) signals.on(signal, quit)
    keyboard.on('data', this.#pressed)
    // Keys come one by one and are not shown; Ctrl-C is one of them.
    if (keyboard.isTTY) keyboard.setRawMode?.(true)
    keyboard.resume()
  }

  /** Draws the lines that `frame` makes for the size of the terminal, now and whenever that changes. */
  show(frame: (size: { columns: number; rows: number }) => readonly string[]): void {
    this.#frame = frame
    this.#draw()
  }

  /** Leaves the terminal as it was. */
  close(): void {
    this.#output.off('resize', this.#draw)
    for (const signal of SIGNALS) this.#signals.off(signal, this.#quit)
    this.#keyboard.off('data', this.#pressed)
    if (this.#keyboard.isTTY) this.#keyboard.setRawMode?.(false)
    this.#keyboard.pause()
    this.#output.write(LEAVE)
  }

  readonly #draw = (): void => {
    const { columns = COLUMNS, rows = ROWS } = this.#output
    const lines = this.#frame({ columns, rows }).slice(0, rows)
    // A line that the terminal wraps would move all that follow.
    const text = lines.map((line) => `${line.slice(0, columns)}${CLEAR_LINE}`).join('\r\n')
    this.#output.write(`${HOME}${text}${CLEAR_BELOW}`)
  }

  readonly #pressed = (keys: Buffer): void => {
    if ([...keys.toString('latin1')].some((key) => QUIT.has(key))) this.#quit()
  }
}
