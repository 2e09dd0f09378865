import { h } from './dom.js'

/**
 * Tabs as the ARIA Authoring Practices have them: one tab is in the order of Tab, arrows, Home and End go to others.
 * @param {string} label of all of them
 * @param {[string, HTMLElement][]} panels
 * @param {(name: string) => void} onShow hears which one is shown now
 */
export function tabs(label, panels, onShow) {
  let shown = panels[0][0]
  const parts = panels.map(([name, content]) => partOf(name, content))
  const show = (/** @type {string} */ name, hasFocus = true) => {
    shown = name
    for (const { tab, panel } of parts) {
      const isShown = tab.dataset.name === name
      tab.setAttribute('aria-selected', String(isShown))
      tab.tabIndex = isShown ? 0 : -1
      panel.hidden = !isShown
      if (isShown && hasFocus) tab.focus()
    }
    onShow(name)
  }
  parts.forEach(({ tab }, i) => {
    tab.addEventListener('click', () => show(panels[i][0]))
    tab.addEventListener('keydown', ({ key }) => {
      const to = targetOf(key, i, panels.length)
      if (to !== undefined) show(panels[to][0])
    })
  })
  show(shown, false)
  const list = h('div', { role: 'tablist', 'aria-label': label }, ...parts.map(({ tab }) => tab))
  return {
    element: h('section', { class: 'tabs', 'aria-label': label }, list, ...parts.map(({ panel }) => panel)),
    get shown() {
      return shown
    },
    /**
     * Says how many of its things there are.
     * @param {string} name
     * @param {number} number
     */
    label(name, number) {
      const part = parts.find(({ tab }) => tab.dataset.name === name)
      const text = number > 0 ? `${name} ${number}` : name
      if (part && part.tab.textContent !== text) part.tab.textContent = text
    },
  }
}

/**
 * @param {string} name
 * @param {HTMLElement} content
 */
function partOf(name, content) {
  const id = name.toLowerCase()
  const tab = h(
    'button',
    { type: 'button', role: 'tab', id: `tab-${id}`, 'aria-controls': `panel-${id}`, 'data-name': name },
    name,
  )
  return { tab, panel: h('div', { role: 'tabpanel', id: `panel-${id}`, 'aria-labelledby': `tab-${id}` }, content) }
}

/**
 * @param {string} key
 * @param {number} from
 * @param {number} length
 */
function targetOf(key, from, length) {
  if (key === 'ArrowRight') return (from + 1) % length
  if (key === 'ArrowLeft') return (from + length - 1) % length
  if (key === 'Home') return 0
  return key === 'End' ? length - 1 : undefined
}
