import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import t from 'tap'

/** An import goes down or sideways in this list, never up. */
const LAYERS = [
  'kernels',
  'src/plot',
  'src/wire',
  'src/optimizer',
  'src/device',
  'src/store',
  'src/access',
  'src/exchange',
  'src/run',
  'src/keep',
  'src/replay',
  'src/cluster',
  'src/link',
  'src/tracing.ts',
  'src/http',
  'src/app.ts',
  'src/commands',
  'src/server.ts',
]
/** Tables and settings that every layer may read. */
const SHARED = [
  'src/arguments.ts',
  'src/errors.ts',
  'src/config.ts',
  'src/metrics.ts',
  'src/contradictions.ts',
  'src/setting.ts',
  'src/text-table.ts',
]
/** Packages that only these files may know. */
const OWNERS: Record<string, (file: string) => boolean> = {
  koffi: (file) => /^src\/(device\/(onnx\/onnxruntime|cuda\/cuda)|store\/lock|wire\/shared-memory)\.ts$/.test(file),
  ws: (file) =>
    /^src\/(app|link\/(session|pauses|websocket\/(intake|sender|small-frames|socket))|client\/(steps\/)?\w+|commands\/conformance\/(link|stage))\.ts$/.test(
      file,
    ),
  fastify: (file) => /^src\/(app|http\/((pages|steps)\/)?[\w-]+|link\/session)\.ts$/.test(file),
  '@tensorflow/tfjs-core': (file) => file === 'src/client/tfjs.ts',
  '@kubernetes/client-node': (file) => file === 'src/cluster/coordinator/kubernetes/client.ts',
  'prom-client': (file) => file === 'src/metrics.ts',
  'env-schema': (file) => file === 'src/config.ts',
  '@aws-sdk/client-s3': (file) => file === 'src/store/objects/s3/s3-objects.ts',
}
const MAX_FUNCTION_LINES = 70
const MAX_FILE_LINES = 450
/** The formatter folds code at so many columns, and leaves comments alone. */
const MAX_COMMENT_COLUMNS = 120
const COMMENT = /^\s*(\/\/|\/?\*)/
/** A folder with more is cut by idea, not by kind. */
const MAX_FOLDER_FILES = 14

const files = ['kernels', 'src'].flatMap((folder) =>
  readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts') && !name.endsWith('.d.ts'))
    .map((name) => join(folder, name)),
)
const linesOf = (file: string) => readFileSync(file, 'utf8').split('\n')
const importsOf = (file: string) =>
  [...readFileSync(file, 'utf8').matchAll(/^(?:import|export)[^'"]*?from '([^']+)'/gms)].map(([, name]) => name!)
const layerOf = (file: string) => LAYERS.findIndex((layer) => file === layer || file.startsWith(`${layer}/`))

t.test('imports go down or sideways', async (t) => {
  for (const file of files) {
    for (const name of importsOf(file).filter((name) => name.startsWith('.'))) {
      const target = relative('.', join(dirname(file), name)).replace(/\.js$/, '.ts')
      if (SHARED.includes(target) || SHARED.includes(file)) continue
      if (file.startsWith('src/client/'))
        t.match(target, /^(src\/(client|wire)|kernels)\//, `${file} imports ${target}`)
      else t.ok(layerOf(target) <= layerOf(file), `${file} imports ${target}`)
    }
  }
})

t.test('no folder has more files than a reader can take in', async (t) => {
  for (const folder of new Set(files.map((file) => dirname(file)))) {
    const { length } = files.filter((file) => dirname(file) === folder)
    t.ok(length <= MAX_FOLDER_FILES, `${folder} has ${length} files, at most ${MAX_FOLDER_FILES} may be in one`)
  }
})

t.test('a comment is folded where code is', async (t) => {
  const long = files.flatMap((file) =>
    linesOf(file).flatMap((line, i) =>
      COMMENT.test(line) && line.length > MAX_COMMENT_COLUMNS ? [`${file}:${i + 1} has ${line.length} columns`] : [],
    ),
  )
  t.same(long, [], `a line of a comment has at most ${MAX_COMMENT_COLUMNS} columns`)
})

t.test('no file is longer than it may be', async (t) => {
  const long = files
    .map((file) => ({ file, lines: linesOf(file).length }))
    .filter(({ lines }) => lines > MAX_FILE_LINES)
  t.same(long, [], `a file has at most ${MAX_FILE_LINES} lines`)
})

t.test('a package is known to its owners only', async (t) => {
  for (const file of files) {
    for (const name of importsOf(file)) {
      const owns = OWNERS[name]
      if (owns) t.ok(owns(file), `${file} imports ${name}`)
    }
  }
})

t.test('kernels, wire and optimizer are pure: no async, no clock, no logger', async (t) => {
  for (const file of files.filter((file) => /^(kernels|src\/(wire|optimizer))\//.test(file))) {
    // A dot stands before the async of a PTX instruction.
    t.notMatch(readFileSync(file, 'utf8'), /(?<!\.)\basync\b|\bawait\b|Date\.now|performance\.now|setTimeout/, file)
  }
})

t.test('no file says any, and no function is longer than it may be', async (t) => {
  for (const file of files) {
    const text = readFileSync(file, 'utf8')
    t.notMatch(text, /: any\b|\bas any\b|as unknown as|@ts-/, file)
    const lines = text.split('\n')
    lines.forEach((line, start) => {
      if (!/^(export )?(default )?(async )?function |^ {2}(static |async |get |#)*\w+\(.*\{$/.test(line)) return
      const indent = line.search(/\S/)
      const end = lines.findIndex((other, i) => i > start && other === `${' '.repeat(indent)}}`)
      t.ok(end - start < MAX_FUNCTION_LINES, `${file}:${start + 1} has ${end - start} lines`)
    })
  }
})
