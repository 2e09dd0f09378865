import { existsSync } from 'node:fs'
import type { Config } from '../../../config.js'
import { Device } from '../../../device/device.js'
import { errorText } from '../../../errors.js'
import { amount } from '../../amount.js'
import { type Finding, failure, ok, warning } from './finding.js'

/** The driver of NVIDIA makes this file for the first GPU. */
const GPU = '/dev/nvidia0'
/** As little memory as computing takes: a service may be at work on the same device. */
const SMALL = { lanes: 1, staging_bytes: 2 ** 20 }

/** Starts the device with one lane, has that compute, and closes it. */
export async function checkDevice(config: Config): Promise<Finding[]> {
  try {
    const device = await Device.start({ ...config, ...SMALL })
    try {
      return [computed(device), memory(device, config)]
    } finally {
      await device.close()
    }
  } catch (error) {
    const remedy = '--device auto takes the CPU where a GPU lacks something; --onnxruntime-dir names the library'
    return [failure('device', errorText(error), remedy)]
  }
}

function computed({ backend }: Device): Finding {
  const { kind, name, version, note } = backend
  const found = `${name} has computed with ONNX Runtime ${version}`
  if (note === '' || (kind === 'cpu' && !existsSync(GPU))) return ok('device', found)
  /* c8 ignore start -- needs a GPU */
  const remedy = kind === 'cpu' ? '--device cpu, if the GPU is not meant' : 'install NVRTC of CUDA 13 (libnvrtc.so.13)'
  return warning('device', `${found}; ${note}`, remedy)
  /* c8 ignore stop */
}

function memory(device: Device, { state_bytes_limit }: Config): Finding {
  const has = device.backend.units.reduce((sum, { stateBytes }) => sum + stateBytes, 0)
  const least = Math.min(...device.backend.units.map(({ stateBytes }) => stateBytes))
  const found = `${amount(device.stateBytesLimit, 'B')} for the state of runs`
  if (state_bytes_limit <= least) return ok('memory', found)
  const remedy = 'lower --state-bytes-limit, or leave it out'
  return warning('memory', `${found} are granted, ${amount(has, 'B')} are there`, remedy)
}
