import { h, setText } from './dom.js'

const ROW_PIXELS = 32
/** Rows kept ready above and below those in view. */
const SPARE_ROWS = 6
const MOST_PIXELS = 15 * ROW_PIXELS

/**
 * @template Row
 * @typedef {object} Column
 * @property {string} head
 * @property {string} width of a grid's track
 * @property {boolean} [figure] whether it is aligned as numbers are
 * @property {(row: Row) => string} text
 * @property {(cell: HTMLElement, row: Row) => void} [render] draws the cell in place of `text`
 * @property {(row: Row) => number | string | undefined} [by] what a reader may sort by
 */

/**
 * A table of any length: only the rows in view are elements, which scrolling gives other texts. Rows have one height.
 * @template Row
 */
export class VirtualTable {
  /** @type {readonly Row[]} */
  #rows = []
  /** @type {Row[]} */
  #sorted = []
  /** @type {HTMLElement[]} */
  #pool = []
  /** @type {{ column: number, down: boolean } | undefined} */
  #order
  #first = 0
  #isQueued = false
  #columns
  #onView
  #space = h('div', { class: 'space', role: 'presentation' })
  #heads
  #body
  element

  /**
   * @param {string} label
   * @param {Column<Row>[]} columns
   * @param {(rows: Row[]) => void} [onView] hears which rows are in view when they are drawn
   */
  constructor(label, columns, onView = () => {}) {
    this.#columns = columns
    this.#onView = onView
    this.#heads = columns.map((column, i) => this.#head(column, i))
    this.#body = h('div', { class: 'rows', role: 'rowgroup', tabindex: 0, 'aria-label': label }, this.#space)
    this.#body.addEventListener('scroll', () => this.refresh(), { passive: true })
    const head = h(
      'div',
      { role: 'rowgroup', class: 'heads' },
      h('div', { role: 'row', class: 'line' }, ...this.#heads),
    )
    const table = h('div', { role: 'table', class: 'virtual', 'aria-label': label }, head, this.#body)
    this.element = h('div', { class: 'scroll' }, table)
    this.#table = table
    table.style.setProperty('--tracks', columns.map(({ width }) => width).join(' '))
  }

  #table

  /** @param {readonly Row[]} rows */
  setRows(rows) {
    this.#rows = rows
    this.#sort()
  }

  /** Rows in view have changed: draws them again in the next frame. */
  refresh() {
    if (this.#isQueued) return
    this.#isQueued = true
    requestAnimationFrame(() => {
      this.#isQueued = false
      this.#draw()
    })
  }

  #sort() {
    const order = this.#order
    const by = order && this.#columns[order.column].by
    this.#sorted = by ? sorted(this.#rows, by, order.down) : [...this.#rows]
    this.#space.style.height = `${this.#sorted.length * ROW_PIXELS}px`
    this.#body.style.height = `${Math.min(MOST_PIXELS, Math.max(1, this.#sorted.length) * ROW_PIXELS)}px`
    this.#table.setAttribute('aria-rowcount', String(this.#sorted.length + 1))
    this.refresh()
  }

  #draw() {
    const shown = Math.ceil(MOST_PIXELS / ROW_PIXELS) + 1 + 2 * SPARE_ROWS
    const top = Math.floor(this.#body.scrollTop / ROW_PIXELS)
    this.#first = Math.max(0, Math.min(top - SPARE_ROWS, this.#sorted.length - shown))
    const rows = this.#sorted.slice(this.#first, this.#first + shown)
    while (this.#pool.length < rows.length) this.#grow()
    this.#pool.forEach((line, i) => {
      line.hidden = i >= rows.length
      if (i < rows.length) this.#fill(line, rows[i], this.#first + i)
    })
    this.#onView(this.#sorted.slice(top, top + Math.ceil(MOST_PIXELS / ROW_PIXELS)))
  }

  #grow() {
    const cells = this.#columns.map(({ figure }) => h('div', { role: 'cell', class: figure && 'figure' }))
    const line = h('div', { role: 'row', class: 'line' }, ...cells)
    this.#pool.push(line)
    this.#space.append(line)
  }

  /**
   * @param {HTMLElement} line
   * @param {Row} row
   * @param {number} position
   */
  #fill(line, row, position) {
    line.style.transform = `translateY(${position * ROW_PIXELS}px)`
    line.setAttribute('aria-rowindex', String(position + 2))
    this.#columns.forEach((column, i) => {
      const cell = line.children[i]
      if (!(cell instanceof HTMLElement)) return
      const text = column.text(row)
      if (column.render) column.render(cell, row)
      else setText(cell, text)
      if (!column.figure) cell.title = text
    })
  }

  /**
   * @param {Column<Row>} column
   * @param {number} index
   */
  #head({ head, figure, by }, index) {
    const name = by ? h('button', { type: 'button', onclick: () => this.#orderBy(index) }, head) : head
    return h('div', { role: 'columnheader', class: figure && 'figure' }, name)
  }

  /** @param {number} column */
  #orderBy(column) {
    const before = this.#order?.column === column ? this.#order : undefined
    // Large values first, then small ones, then the order in which the rows came.
    this.#order = before === undefined ? { column, down: true } : before.down ? { column, down: false } : undefined
    const sortOf = (/** @type {number} */ i) =>
      this.#order?.column !== i ? 'none' : this.#order.down ? 'descending' : 'ascending'
    this.#heads.forEach((head, i) => {
      if (this.#columns[i].by) head.setAttribute('aria-sort', sortOf(i))
    })
    this.#sort()
  }
}

/**
 * Rows without a value come last.
 * @template Row
 * @param {readonly Row[]} rows
 * @param {(row: Row) => number | string | undefined} by
 * @param {boolean} down
 * @returns {Row[]}
 */
function sorted(rows, by, down) {
  const keyed = rows.map((row) => ({ row, value: by(row) }))
  keyed.sort(({ value: a }, { value: b }) => {
    if (a === b) return 0
    if (a === undefined) return 1
    if (b === undefined) return -1
    return (a < b ? -1 : 1) * (down ? -1 : 1)
  })
  return keyed.map(({ row }) => row)
}
