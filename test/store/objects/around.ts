import type { Objects } from '../../../src/store/objects/objects.js'

/** Objects whose every call does `before` first, and `after` when it was done. */
export function around(
  objects: Objects,
  { before, after }: { before?: (call: string) => unknown; after?: (call: string) => unknown },
) {
  return new Proxy(objects, {
    get: (target, name) => {
      const value = Reflect.get(target, name)
      if (typeof value !== 'function') return value
      if (name === 'list' || name === 'unfinished')
        return async function* (prefix: string) {
          for (let pass = 0; pass < 2; pass++) await before?.(name)
          for await (const item of value.call(target, prefix)) {
            yield item
            await before?.(name)
          }
        }
      return async (...of: unknown[]) => {
        await before?.(String(name))
        const answer = await value.apply(target, of)
        await after?.(String(name))
        return answer
      }
    },
  })
}
