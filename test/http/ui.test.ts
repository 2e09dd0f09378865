import { readdirSync, readFileSync } from 'node:fs'
import { get as httpGet } from 'node:http'
import { createRequire } from 'node:module'
import { gunzipSync } from 'node:zlib'
import t from 'tap'
import { startService } from './service.js'

/** What fetch hides: the body as it came. */
function plainGet(url: string, headers: Record<string, string>): Promise<{ body: Buffer; coding: string | undefined }> {
  return new Promise((resolve, reject) => {
    httpGet(url, { headers }, async (response) => {
      const pieces: Buffer[] = []
      for await (const piece of response) pieces.push(piece)
      resolve({ body: Buffer.concat(pieces), coding: response.headers['content-encoding'] })
    }).once('error', reject)
  })
}

t.test('the dashboard and all of its files come from the service, without a key', async (t) => {
  const { url } = await startService(t, { api_keys: 'a-key-of-sixteen-letters' })
  const page = await fetch(`${url}/ui`)
  t.equal(page.status, 200)
  t.match(page.headers.get('content-type'), /^text\/html/)
  const html = await page.text()
  const names = [...html.matchAll(/(?:src|href)="(ui\/[^"]+)"/g)].map(([, name]) => name!)
  t.ok(names.length >= 4)
  const modules = readdirSync('ui').filter((name) => name.endsWith('.js'))
  for (const name of [...names, 'ui/uPlot.iife.min.js', ...modules.map((name) => `ui/${name}`)]) {
    const response = await fetch(`${url}/${name}`)
    t.equal(response.status, 200, name)
    t.match(response.headers.get('content-type'), /^(text\/(css|javascript); charset=utf-8|image\/svg\+xml)/, name)
    await response.arrayBuffer()
  }
  for (const name of modules) {
    const imports = [...readFileSync(`ui/${name}`, 'utf8').matchAll(/^import .* from '(.*)'$/gm)]
    for (const [, other] of imports) t.match(other, /^\.\/[\w.]+\.js$/, `${name} imports ${other}`)
  }
  t.equal((await fetch(`${url}/v1/runs`)).status, 401, 'what the page shows needs one')
})

t.test('the policy of the page lets it load and reach its own service only', async (t) => {
  const { url } = await startService(t)
  for (const path of ['/ui', '/ui/app.js']) {
    const { headers } = await fetch(`${url}${path}`)
    const policy = headers.get('content-security-policy') ?? ''
    t.match(policy, /^default-src 'none'; /, path)
    t.notMatch(policy, /unsafe|https?:|data:|\*/, path)
    for (const rule of ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "connect-src 'self'"])
      t.ok(policy.includes(rule), `${path}: ${rule}`)
    t.equal(headers.get('x-content-type-options'), 'nosniff')
  }
  t.notMatch(
    readFileSync('ui/index.html', 'utf8'),
    /<style|style="|<script>|\son\w+="|https?:\/\//,
    'nothing is inline',
  )
})

t.test('a file comes compressed to whoever takes that, and not at all to whoever has it', async (t) => {
  const { url } = await startService(t)
  const source = readFileSync(createRequire(import.meta.url).resolve('uplot/dist/uPlot.iife.min.js'))
  const packed = await plainGet(`${url}/ui/uPlot.iife.min.js`, { 'accept-encoding': 'br, gzip' })
  t.equal(packed.coding, 'gzip')
  t.ok(packed.body.length < 50_000, `the charts are ${packed.body.length} bytes`)
  t.ok(gunzipSync(packed.body).equals(source))
  const plain = await plainGet(`${url}/ui/uPlot.iife.min.js`, {})
  t.equal(plain.coding, undefined)
  t.ok(plain.body.equals(source))
  const tag = (await fetch(`${url}/ui/app.js`)).headers.get('etag') ?? ''
  t.equal((await fetch(`${url}/ui/app.js`, { headers: { 'if-none-match': tag } })).status, 304)
  t.equal((await fetch(`${url}/ui/app.js`, { headers: { 'if-none-match': 'W/"other"' } })).status, 200)
})

t.test('a slash too many leads to the page, and an unknown file is none', async (t) => {
  const { url } = await startService(t)
  const redirected = await fetch(`${url}/ui/`)
  t.equal(redirected.url, `${url}/ui`)
  t.equal(redirected.status, 200)
  for (const name of ['nothing.js', '..%2Fpackage.json', 'tsconfig.json']) {
    const response = await fetch(`${url}/ui/${name}`)
    t.equal(response.status, 404, name)
    t.match(await response.json(), { code: 'NOT_FOUND' })
  }
  t.equal((await fetch(`${url}/ui`, { method: 'POST' })).status, 405)
})
