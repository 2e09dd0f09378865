import { type Dtype, isBlockDtype, type WireDtype } from '../../../kernels/dtype.js'
import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { SafetensorsDtype } from '../../store/safetensors.js'

const NAMES: Readonly<Record<Dtype, SafetensorsDtype>> = { float32: 'F32', bfloat16: 'BF16', float16: 'F16' }

/** What safetensors calls the dtype of a parameter's tensor. Throws DTYPE_UNSUPPORTED for one in blocks. */
export function tensorDtype({ name, index }: Parameter, dtype: WireDtype): SafetensorsDtype {
  if (!isBlockDtype(dtype)) return NAMES[dtype]
  const message = `a tensor of parameter '${name}' is ${dtype}, which safetensors files do not have: use the stream`
  throw new ServiceError('DTYPE_UNSUPPORTED', message, { parameter: index })
}
