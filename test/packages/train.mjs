import { connect } from 'muond/client'

const client = await connect(process.argv[2])
const data = new Float32Array(32 * 16).fill(1)
const run = await client.open({
  run: 'node',
  groups: [{ name: 'all', algorithm: 'muon', lr: 0.1 }],
  parameters: [{ name: 'w', shape: [32, 16], group: 'all', data }],
})
const { step, applied } = await run.step({ w: Float32Array.from(data, (_, i) => Math.sin(i)) })
await client.close()
if (step !== 1 || applied !== 1 || data.every((value) => value === 1))
  throw new Error(`step ${step}, ${applied} applied`)
