import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { basename, dirname, join, resolve } from 'node:path'
import t from 'tap'

type Instruction = { name: string; value: string }
type Stage = { name: string; base: string; instructions: Instruction[] }

/** An image as a folder: what would be `/`, and what the instructions have said so far. */
type Image = {
  root: string
  workdir: string
  env: Record<string, string>
  user: string
  commands: Map<string, string[]>
}

const stages = parse(readFileSync('Dockerfile', 'utf8'))
const images = new Map<string, Image>()
const home = mkdtempSync(join(tmpdir(), 'muond-image-'))
t.teardown(() => rmSync(home, { recursive: true }))
t.setTimeout(600_000)

t.test('the build and the cpu image come out of their steps, and the service answers its health check', async (t) => {
  build('build')
  const image = build('cpu')
  t.notOk(existsSync(join(image.root, 'muond/node_modules/typescript')), 'no development dependency is in it')
  t.not(image.user, '', 'it does not run as root')
  const port = await freePort()
  const keyless = { ...process.env, ...image.env, MUOND_PORT: String(port) }
  const cwd = join(image.root, image.workdir)
  const [program, ...parameters] = image.commands.get('ENTRYPOINT')!
  const open = spawnSync(program!, parameters, { cwd, env: keyless, encoding: 'utf8' })
  const refusal = /^muond: host is '0\.0\.0\.0' and there are no keys: .*\nmuond: host is .* and there is no TLS: .*\n$/
  t.match(open, { status: 1, stdout: '', stderr: refusal })
  const [MUOND_TLS_CERT, MUOND_TLS_KEY] = ['server.pem', 'server.key'].map((name) => resolve('test/golden/tls', name))
  const mutual = { MUOND_TLS_CERT, MUOND_TLS_KEY, MUOND_TLS_CLIENT_CA: resolve('test/golden/tls/ca.pem') }
  const env = { ...keyless, MUOND_API_KEYS: 'sixteen-letters-1', ...mutual }
  const service = run(image.commands.get('ENTRYPOINT')!, { cwd, env })
  await once(service.stdout!, 'data')
  const healthy = () =>
    spawnSync(image.commands.get('HEALTHCHECK')![0]!, image.commands.get('HEALTHCHECK')!.slice(1), { cwd, env })
  t.equal(healthy().status, 0, 'the check needs no certificate of a client')
  service.kill('SIGTERM')
  t.same(await once(service, 'exit'), [0, null])
  t.equal(healthy().status, 1, 'nobody is there any more')
})

const python = spawnSync('python3', ['-m', 'pip', '--version']).status === 0
t.test(
  'the provider has its pinned version and checksum',
  { skip: !python && 'this machine has no Python with pip' },
  async (t) => {
    const image = build('provider')
    t.same(readdirSync(join(image.root, 'opt/onnxruntime')).sort(), [
      'libonnxruntime.so.1.30.0',
      'libonnxruntime_providers_cuda.so',
      'libonnxruntime_providers_shared.so',
    ])
    const manifest = JSON.parse(readFileSync('package.json', 'utf8'))
    t.equal(manifest.dependencies['onnxruntime-node'], '1.30.0', "npm's library is of the same version")
  },
)

t.test('the cuda image differs from the cpu image in its base, provider and settings only', async (t) => {
  const [cpu, cuda] = ['cpu', 'cuda'].map((name) => stages.find((stage) => stage.name === name)!)
  const shared = (stage: Stage) =>
    stage.instructions
      .filter(({ name, value }) => !/^(ENV|USER)$/.test(name) && !/onnxruntime|bin\/node/.test(value))
      .map(({ name, value }) => `${name} ${value.replace(/--start-period=\d+s/, '')}`)
  t.same(shared(cuda!), shared(cpu!))
  t.match(cuda!.base, /^nvidia\/cuda:13\.\d+\.\d+-runtime-/)
  t.match(cuda!.instructions.find(({ name }) => name === 'USER')?.value, /^1000/)
})

t.test('the images run the newest line of Node that package.json names', async (t) => {
  const [newest] = JSON.parse(readFileSync('package.json', 'utf8')).engines.node.match(/\d+(?=\.0\.0$)/)
  for (const name of ['build', 'cpu']) t.match(stages.find((stage) => stage.name === name)?.base, `node:${newest}-`)
})

/** Carries out a stage's instructions; throws where one fails. */
function build(name: string): Image {
  const stage = stages.find((candidate) => candidate.name === name)!
  const root = join(home, name)
  mkdirSync(root)
  const image: Image = { root, workdir: '/', env: {}, user: '', commands: new Map() }
  images.set(name, image)
  for (const instruction of stage.instructions) apply(image, instruction)
  return image
}

function apply(image: Image, { name, value }: Instruction): void {
  switch (name) {
    case 'WORKDIR':
      image.workdir = value
      mkdirSync(join(image.root, value), { recursive: true })
      return
    case 'ENV':
      for (const [, key, setting] of value.matchAll(/(\w+)=(\S+)/g)) {
        image.env[key!] = setting!.startsWith('/') ? join(image.root, setting!) : setting!
      }
      return
    case 'COPY':
      return copy(image, value)
    case 'RUN':
      return execute(image, value)
    case 'USER':
      image.user = value
      return
    case 'HEALTHCHECK':
    case 'ENTRYPOINT':
      image.commands.set(name, JSON.parse(value.slice(value.indexOf('['))))
      return
    case 'EXPOSE':
      return
    default:
      throw new Error(`the test does not know ${name}`)
  }
}

function copy(image: Image, value: string): void {
  const [, from, rest] = /^(?:--from=(\w+) )?(.*)$/.exec(value)!
  const words = rest!.split(' ')
  const to = words.at(-1)!
  const target = join(image.root, to.startsWith('/') ? '' : image.workdir, to)
  for (const word of words.slice(0, -1).flatMap((pattern) => matching(from ? images.get(from)!.root : '.', pattern))) {
    const source = join(from ? images.get(from)!.root : '.', word)
    if (!from && !sent(word)) throw new Error(`COPY ${word}: .dockerignore keeps it from the build`)
    const into = to.endsWith('/') && statSync(source).isFile() ? join(target, basename(source)) : target
    cpSync(source, into, { recursive: true, verbatimSymlinks: true })
  }
}

/** The files of a folder that a path means whose last part may have stars. */
function matching(root: string, pattern: string): string[] {
  const [folder, name] = [dirname(pattern), basename(pattern)]
  if (!name.includes('*')) return [pattern]
  const found = readdirSync(join(root, folder)).filter((entry) => matchesGlob(entry, name))
  if (found.length === 0) throw new Error(`COPY ${pattern} finds nothing`)
  return found.map((entry) => join(folder, entry))
}

function matchesGlob(name: string, glob: string): boolean {
  return new RegExp(`^${glob.replace(/[.]/g, '\\.').replace(/[*]/g, '.*')}$`).test(name)
}

/** Whether .dockerignore, which excludes all but what it lists, lets a path into the build. */
function sent(path: string): boolean {
  const [all, ...exceptions] = readFileSync('.dockerignore', 'utf8').trim().split('\n')
  if (all !== '**') throw new Error('the test knows a .dockerignore that begins with **')
  return exceptions.some((line) => path === line.slice(1) || path.startsWith(`${line.slice(1)}/`))
}

function execute({ root, workdir, env }: Image, command: string): void {
  const { status, stderr } = spawnSync('sh', ['-c', command], {
    cwd: join(root, workdir),
    env: { ...process.env, ...env },
    encoding: 'utf8',
  })
  if (status !== 0) throw new Error(`${command} ended with ${status}: ${stderr}`)
}

function run([program, ...parameters]: string[], options: { cwd: string; env: NodeJS.ProcessEnv }): ChildProcess {
  return spawn(program!, parameters, { ...options, stdio: ['ignore', 'pipe', 'inherit'] })
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  return port
}

function parse(text: string): Stage[] {
  const found: Stage[] = []
  for (const line of text.replace(/\\\n/g, '').split('\n')) {
    const [, name, value] = /^([A-Z]+) (.*)$/.exec(line) ?? []
    if (!name || !value) continue
    const [, base, stage] = name === 'FROM' ? (/^(\S+) AS (\w+)$/.exec(value) ?? []) : []
    if (base && stage) found.push({ name: stage, base, instructions: [] })
    else found.at(-1)!.instructions.push({ name, value })
  }
  return found
}
