import { writeFileSync } from 'node:fs'
import { ASYNCAPI, asyncapi } from './asyncapi.js'

writeFileSync(ASYNCAPI, asyncapi())
