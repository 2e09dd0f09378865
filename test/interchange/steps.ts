// node steps.js URL RUN SPEC.json FIRST LAST OUT.safetensors: takes steps FIRST to LAST of a run with seeded
// gradients, and writes gradients and updates, which torch's are compared with. Creates the run by SPEC where there
// is none.
import { readFileSync, writeFileSync } from 'node:fs'
import { encodeHeader, type TensorEntry } from '../../src/store/safetensors.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { bytesOf, normal, RawClient } from '../service.js'

const [url, run, specPath, first, last, out] = process.argv.slice(2) as [string, string, string, string, string, string]
const spec: Pick<OpenFrame, 'groups' | 'parameters'> = JSON.parse(readFileSync(specPath, 'utf8'))
const parameters = spec.parameters!
const client = await RawClient.connect(`${url.replace('http', 'ws')}/v1/stream`)
await client.open({ run, ...spec, takeover: true })
const tensors: { entry: TensorEntry; data: Uint8Array }[] = []
const factors: Record<string, { scale: number; decay: number }> = {}
for (let step = Number(first); step <= Number(last); step++) {
  client.updates.clear()
  const gradients = parameters.map(({ shape }, i) =>
    normal(
      step * 1000 + i,
      shape.reduce((a, b) => a * b, 1),
    ),
  )
  await client.step(step, gradients)
  for (const [i, { name, shape }] of parameters.entries()) {
    const { data, scale, decay } = client.updates.get(i)!
    const add = (kind: string, bytes: Uint8Array) => {
      const entry: TensorEntry = {
        name: `${kind}.${step}.${name}`,
        dtype: 'F32',
        shape: [...shape],
        bytes: bytes.length,
      }
      tensors.push({ entry, data: bytes })
    }
    add('gradient', bytesOf(gradients[i]!))
    add('data', data)
    factors[`${step}.${name}`] = { scale, decay }
  }
}
const header = encodeHeader(
  tensors.map(({ entry }) => entry),
  { factors: JSON.stringify(factors) },
)
writeFileSync(out, Buffer.concat([header, ...tensors.map(({ data }) => data)]))
await client.close()
