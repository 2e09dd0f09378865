import assert from 'node:assert'
import { type Pointer, viewMemory } from './onnx/onnxruntime.js'

/** The host's memory, or that of the GPU that computes: a lane copies nothing from there or to it. */
export type Space = 'host' | 'gpu'

/** Memory that is allocated and freed as a whole. */
export type Allocation = { readonly pointer: Pointer; readonly bytes: number }

/**
 * A range of memory as plain data, which another thread can be sent. `owner` is the allocation that it is part of.
 * What is `shared` with another process may change at any moment: it is read once, by copying it.
 */
export type Span = Allocation & { readonly space: Space; readonly owner: Allocation; readonly shared: boolean }

/** All of an allocation. */
export function wholeOf({ pointer, bytes }: Allocation, space: Space, shared = false): Span {
  return { space, pointer, bytes, owner: { pointer, bytes }, shared }
}

/** One thread's views of host memory: one for each allocation, because making a view takes longer than a small job. */
export class Views {
  readonly #wholes = new Map<Pointer, Uint8Array<ArrayBuffer>>()

  /** The bytes of a range, without a copy. */
  of({ space, pointer, bytes, owner }: Span): Uint8Array<ArrayBuffer> {
    // The text is made where it is needed alone: making it takes longer than all else here.
    if (space !== 'host') assert.fail(`${bytes} bytes at ${pointer} lie on a GPU, the host cannot read them`)
    const start = Number(pointer - owner.pointer)
    return this.#whole(owner).subarray(start, start + bytes)
  }

  /** The allocation at this address is about to be freed. */
  forget(pointer: Pointer): void {
    this.#wholes.delete(pointer)
  }

  #whole({ pointer, bytes }: Allocation): Uint8Array<ArrayBuffer> {
    const known = this.#wholes.get(pointer)
    if (known !== undefined) return known
    const whole = viewMemory(pointer, bytes)
    this.#wholes.set(pointer, whole)
    return whole
  }
}

/**
 * A range of memory with counted references. It is made with one; whoever needs it beside its holder retains it, and
 * each reference is released once. The last release gives the memory back, and nobody may use the region any more. A
 * lane is sent the span alone, because structured clone leaves private fields behind.
 */
export class Region implements Span {
  readonly space: Space
  readonly pointer: Pointer
  readonly bytes: number
  readonly owner: Allocation
  readonly shared: boolean
  #references = 1
  #view: Uint8Array<ArrayBuffer> | undefined
  readonly #views: Views
  readonly #free: () => void

  /** `views` are those of the thread that holds the region; the last release calls `free`. */
  constructor({ space, pointer, bytes, owner, shared }: Span, views: Views, free: () => void) {
    this.space = space
    this.pointer = pointer
    this.bytes = bytes
    this.owner = owner
    this.shared = shared
    this.#views = views
    this.#free = free
  }

  /** The bytes, without a copy. They are good as long as the caller has a reference. */
  get view(): Uint8Array<ArrayBuffer> {
    this.#assertHeld()
    this.#view ??= this.#views.of(this)
    return this.#view
  }

  /** The view of `bytes` bytes from `offset` on. */
  chunk(offset: number, bytes: number): Uint8Array<ArrayBuffer> {
    this.#assertInside(offset, bytes)
    return this.view.subarray(offset, offset + bytes)
  }

  /** Makes a region of `bytes` bytes from `offset` on. For arenas, whose whole memory outlives what they deal out. */
  carve(offset: number, bytes: number, free: () => void): Region {
    this.#assertHeld()
    this.#assertInside(offset, bytes)
    const { space, owner, shared } = this
    return new Region({ space, pointer: this.pointer + BigInt(offset), bytes, owner, shared }, this.#views, free)
  }

  retain(): this {
    this.#assertHeld()
    this.#references += 1
    return this
  }

  release(): void {
    this.#assertHeld()
    this.#references -= 1
    if (this.#references === 0) this.#free()
  }

  #assertHeld(): void {
    if (this.#references > 0) return
    assert.fail(`the region of ${this.bytes} bytes at ${this.pointer} was released already`)
  }

  #assertInside(offset: number, bytes: number): void {
    if (offset >= 0 && bytes >= 0 && offset + bytes <= this.bytes) return
    assert.fail(`bytes ${offset} to ${offset + bytes} of a region of ${this.bytes} bytes`)
  }
}
