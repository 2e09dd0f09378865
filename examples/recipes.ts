import type { GroupSettings, Recipe } from './train.js'

const DECAY = 0.1

const adamw = (lr: number): GroupSettings => ({ algorithm: 'adamw', lr, betas: [0.9, 0.95], weight_decay: DECAY })
const adam = (lr: number): GroupSettings => ({ algorithm: 'adam', lr, betas: [0.9, 0.95] })
const sgd = (lr: number): GroupSettings => ({ algorithm: 'sgd', lr, momentum: 0.9 })
const muon = (lr: number): GroupSettings => ({
  algorithm: 'muon',
  lr,
  adjust_lr_fn: 'match_rms_adamw',
  weight_decay: DECAY,
})
const muonclip = (lr: number): GroupSettings => ({ algorithm: 'muonclip', lr, weight_decay: DECAY })

/**
 * The recipes that `efficiency` compares, each with one learning rate for the whole model: with match_rms_adamw Muon's
 * updates are as large as AdamW's, which trains the rest. Weight decay is on where it is decoupled, as in Moonlight and
 * Kimi K2.
 */
export const RECIPES = {
  sgd: (lr: number): Recipe => ({ title: 'SGD', hidden: sgd(lr), rest: sgd(lr) }),
  adam: (lr: number): Recipe => ({ title: 'Adam', hidden: adam(lr), rest: adam(lr) }),
  adamw: (lr: number): Recipe => ({ title: 'AdamW', hidden: adamw(lr), rest: adamw(lr) }),
  muon: (lr: number): Recipe => ({ title: 'Muon', hidden: muon(lr), rest: adamw(lr) }),
  muonclip: (lr: number): Recipe => ({ title: 'MuonClip', hidden: muonclip(lr), rest: adamw(lr), threshold: 100 }),
} as const

export type RecipeName = keyof typeof RECIPES

export const RECIPE_NAMES = ['sgd', 'adam', 'adamw', 'muon', 'muonclip'] as const satisfies readonly RecipeName[]

export const COLOURS: Readonly<Record<RecipeName, string>> = {
  sgd: '#8a8a8a',
  adam: '#d9a514',
  adamw: '#c2571a',
  muon: '#1f5fbf',
  muonclip: '#2f9e5b',
}
