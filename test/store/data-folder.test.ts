import { existsSync, mkdirSync, readdirSync, renameSync, statSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { DataFolder } from '../../src/store/folder/data-folder.js'
import { runFolder, start } from '../keep/data-folder.js'
import { train } from '../run/trainer.js'

t.test('a data folder that cannot be one is told at once', async (t) => {
  const folder = t.testdir({ file: '' })
  const cases: [string, RegExp][] = [
    [join(folder, 'file'), /ENOTDIR/],
    [join(folder, 'file', 'deeper'), /ENOTDIR/],
    ['/dev/null', /ENOTDIR/],
    // In /proc nothing can be made, and it says that there is no such folder.
    ...(existsSync('/proc/self') ? [['/proc/x', /ENOENT/] as [string, RegExp]] : []),
  ]
  for (const [path, reason] of cases)
    await t.rejects(DataFolder.open(path, 0), { name: 'ConfigError', message: reason }, path)
})

t.test('what a service writes is its own user’s alone', async (t) => {
  const data = join(t.testdir({}), 'deep', 'data')
  const service = await start(data, { durability: 'journal' })
  const { client } = await train(service, { last: 6 })
  await client.close()
  await service.app.close()
  const paths = readdirSync(data, { recursive: true, encoding: 'utf8' })
  t.ok(paths.some((path) => path.endsWith('.safetensors')) && paths.some((path) => path.endsWith('.journal')))
  for (const path of ['.', ...paths]) {
    const { mode } = statSync(join(data, path))
    t.equal(mode & 0o077, 0, `${path} has mode ${mode.toString(8)}`)
  }
})

t.test('two ways to one folder are not two runs', async (t) => {
  const data = join(t.testdir({}), 'data')
  const service = await start(data)
  const { client } = await train(service, { last: 1 })
  await client.close()
  await service.app.close()
  symlinkSync('r', runFolder(data, 'alias'))
  const again = await start(data)
  await again.restored
  t.match([...again.runs.stored], [['alias', /alias is a symbolic link/]])
  t.equal(again.runs.get('r').name, 'r')
  await again.app.close()
  mkdirSync(join(data, 'aside'))
  renameSync(runFolder(data, 'alias'), join(data, 'aside', 'alias'))
  renameSync(runFolder(data), runFolder(data, 'renamed'))
  const third = await start(data)
  await third.restored
  t.match([...third.runs.stored], [['renamed', /run is "r", expected 'renamed' as its folder is called/]])
  await third.app.close()
})
