import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import t from 'tap'
import { openTrainer } from '../browser/stage.js'
import { type Service, startService } from '../service.js'

// What Prometheus makes of the metrics. `npm run test:prometheus` installs Debian's and runs this.

type Panel = { title: string; targets?: { expr: string }[] }

const run = (program: string, args: string[], input = '') => {
  const { status, stdout, stderr } = spawnSync(program, args, { input, encoding: 'utf8' })
  return { status, text: `${stdout}${stderr}` }
}

t.test('promtool has nothing to say about the metrics of a service that has trained', async (t) => {
  const service = await startTrained({ run_metrics: true, data: t.testdir(), durability: 'journal' })
  const metrics = await (await fetch(`${service.http}/metrics`)).text()
  t.match(metrics, /^muond_run_step\{run="observed"\} 3$/m)
  t.same(run('promtool', ['check', 'metrics'], metrics), { status: 0, text: '' })
  await service.app.close()
})

t.test('the rules are right, and fire when they should', async (t) => {
  for (const args of [
    ['check', 'rules', 'deploy/prometheus/rules.yml'],
    ['check', 'config', 'deploy/prometheus/prometheus.yml'],
    ['test', 'rules', 'deploy/prometheus/rules.test.yml'],
  ]) {
    const { status, text } = run('promtool', args)
    t.equal(status, 0, text)
  }
  const alerts = (file: string, pattern: RegExp) =>
    new Set([...readFileSync(file, 'utf8').matchAll(pattern)].map(([, name]) => name))
  const tested = alerts('deploy/prometheus/rules.test.yml', /alertname: (\w+)$/gm)
  t.same(tested, alerts('deploy/prometheus/rules.yml', /- alert: (\w+)/g), 'every alert is seen to fire')
})

t.test('a Prometheus scrapes the service, and understands every panel of the Grafana dashboard', async (t) => {
  const service = await startTrained({ run_metrics: true, data: t.testdir({ data: {} }), durability: 'journal' })
  const { url, child } = await startPrometheus(t.testdir({ prometheus: {} }), service)
  t.teardown(() => child.kill('SIGKILL'))
  const query = async (text: string) => {
    const answer = await fetch(`${url}/api/v1/query?query=${encodeURIComponent(text)}`)
    return (await answer.json()) as { status: string; error?: string; data: { result: { value: [number, string] }[] } }
  }
  const has = async (text: string) => ((await query(text)).data?.result.length ?? 0) > 0
  // A rate needs two scrapes with steps between them.
  const trainer = await openTrainer(service, 'scraped')
  while (!(await has('rate(muond_run_step{run="scraped"}[1m]) > 0'))) await trainer.step()
  t.equal((await query('up{job="muond"}')).data.result[0]?.value[1], '1')
  const { panels }: { panels: Panel[] } = JSON.parse(readFileSync('deploy/grafana/muond.json', 'utf8'))
  const names = new Set((await service.metrics.registry.getMetricsAsJSON()).map(({ name }) => name))
  for (const { title, targets = [] } of panels) {
    for (const { expr } of targets) {
      const asked = expr.replaceAll('$__rate_interval', '1m').replaceAll('$instance', '.*')
      const { status, error } = await query(asked)
      t.equal(status, 'success', `${title}: ${error ?? expr}`)
      for (const [name] of expr.matchAll(/muond_\w+/g))
        t.ok(names.has(name.replace(/_(bucket|sum|count)$/, '')), `${title}: ${name} is a metric`)
    }
  }
  child.kill('SIGTERM')
  await once(child, 'exit')
  await trainer.close()
  await service.app.close()
})

/** A service with a run that has done three steps. */
async function startTrained(settings: Parameters<typeof startService>[0]): Promise<Service> {
  const service = await startService({ lanes: 1, ...settings })
  const trainer = await openTrainer(service, 'observed')
  for (let i = 0; i < 3; i += 1) await trainer.step()
  await trainer.close()
  return service
}

/** A Prometheus that scrapes the service every second, once it answers queries. */
async function startPrometheus(folder: string, { http }: Service): Promise<{ url: string; child: ChildProcess }> {
  const config = readFileSync('deploy/prometheus/prometheus.yml', 'utf8')
    .replace('127.0.0.1:8787', new URL(http).host)
    .replace('15s', '1s')
    .replace('rules.yml', join(process.cwd(), 'deploy/prometheus/rules.yml'))
  writeFileSync(join(folder, 'prometheus.yml'), config)
  const address = `127.0.0.1:${await freePort()}`
  const flags = ['--config.file', join(folder, 'prometheus.yml'), '--storage.tsdb.path', join(folder, 'prometheus')]
  const child = spawn('prometheus', [...flags, '--web.listen-address', address], {
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  for await (const line of createInterface(child.stderr!)) if (line.includes('Server is ready')) break
  child.stderr!.resume()
  return { url: `http://${address}`, child }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  server.close()
  return typeof address === 'object' && address ? address.port : 0
}
