import t from 'tap'
import { progressBar } from '../../examples/progress.js'

function written(isTTY: boolean, total: number): string[] {
  const texts: string[] = []
  const report = progressBar('run', total, { isTTY, write: (text) => texts.push(text) })
  for (let done = 1; done <= total; done++) report(done, `note ${done}`)
  return texts
}

t.test('a terminal shows one line that is rewritten, and ends it', (t) => {
  const texts = written(true, 40)
  t.equal(texts.length, 40)
  t.ok(texts.every((text) => text.startsWith('\rrun [')))
  t.same(
    texts.filter((text) => text.includes('\n')),
    texts.slice(-1),
  )
  t.match(texts[19], '[###############...............] 20/40  note 20')
  t.end()
})

t.test('a terminal narrower than the line shows its beginning', (t) => {
  const texts: string[] = []
  progressBar('run', 4, { isTTY: true, columns: 20, write: (text) => texts.push(text) })(2, 'a note')
  t.same(texts, ['\rrun [###############\x1b[K'])
  t.end()
})

t.test('a log gets a line for every tenth', (t) => {
  const texts = written(false, 200)
  t.same(
    texts.map((text) => Number(/(\d+)\/200/.exec(text)?.[1])),
    [20, 40, 60, 80, 100, 120, 140, 160, 180, 200],
  )
  t.ok(texts.every((text) => text.endsWith('\n') && !text.includes('\r')))
  t.end()
})

t.test('fewer than ten steps are a line each', (t) => {
  t.equal(written(false, 3).length, 3)
  t.end()
})
