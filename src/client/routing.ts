/** Which of the two optimizers a parameter gets. */
export type Route = 'muon' | 'adamw'

/** What is known of a parameter before it has a group. */
export type Described = {
  readonly name: string
  readonly shape: readonly number[]
  readonly split?: readonly number[]
  readonly heads?: number
  readonly matrices?: string
}

/**
 * Where a parameter goes and why, in a few words; `matrices` is the layout that Muon needs for more than two
 * dimensions.
 */
export type Routed = { readonly route: Route; readonly why: string; readonly matrices?: 'flatten' | 'batch' }

/** A name that decides. With Muon and more than two dimensions, `matrices` says how, else the shape decides that. */
export type NameRule = { readonly name: RegExp } & Routed

/**
 * The names that keep a parameter from Muon, whatever its shape. Words are whole parts of a name between dots or
 * underscores; the head is looked for at the end of the name, because `attention.output` is none.
 */
export const NAME_RULES: readonly NameRule[] = [
  { name: /(^|[._])(bias|biases|bias_table|relative_attention_bias\.weight)$/i, route: 'adamw', why: 'bias' },
  {
    name: /(^|[._])(emb|embd|embed|embeds|embeddings?|embed_tokens|wte|wpe|tok_embeddings|cls_token|patch_embed)([._\d]|$)/i,
    route: 'adamw',
    why: 'embedding',
  },
  { name: /^(model\.)?shared(\.weight)?$/i, route: 'adamw', why: 'embedding' },
  {
    name: /(^|\.)(lm_head|head|heads|embed_out|output_layer|unembed|unembedding|classifier|score|logits|qa_outputs)\.?\d*(\.weight)?$/i,
    route: 'adamw',
    why: 'head',
  },
  { name: /(^|\.)(classifier\.out_proj|(lm_head|predictions)\.decoder)(\.weight)?$/i, route: 'adamw', why: 'head' },
  {
    name: /^(model\.|transformer\.)?(output|fc|proj_out|output_projection)(\.weight)?$/i,
    route: 'adamw',
    why: 'head',
  },
  {
    name: /(^|[._])((\w*_)?(layer|rms|batch|group)?norms?|ln|bn)(_?(\d+|f|q|k|pre|post|final))?(\.weight)?$/i,
    route: 'adamw',
    why: 'norm',
  },
]

const CONVOLUTION = /(^|[._])(\w*conv\w*|downsample|stem)([._]|$)/i
const EXPERTS = /(^|[._])(experts?|moe)([._]|$)/i
/** Kernels are rarely wider than 15, and no side of a hidden matrix is as narrow. */
const WIDEST_KERNEL = 15
/** Pictures have one to four channels. */
const MOST_CHANNELS = 4

/**
 * Where each parameter goes. A layout that is given is a wish for Muon. Else the first rule whose name matches decides,
 * and then the rank: fewer than two dimensions above 1 go to AdamW, two are a matrix for Muon, and more are a
 * convolution (flatten) or matrices side by side (batch), by name, else by shape. A model that begins with a
 * convolution over at most four channels reads its input there, which makes it AdamW's.
 */
export function routeAll(parameters: readonly Described[], rules: readonly NameRule[]): Routed[] {
  const first = parameters.find(({ shape }) => shape.length >= 2)
  return parameters.map((parameter) => {
    if (hasLayout(parameter)) return { ...byShape(parameter), why: 'layout as given' }
    const rule = rules.find(({ name }) => parameter.name.search(name) >= 0)
    if (rule !== undefined) return fromRule(rule, parameter)
    const readsInput = parameter === first && isConvolution(parameter) && parameter.shape[1] <= MOST_CHANNELS
    return readsInput ? { route: 'adamw', why: 'first convolution' } : byShape(parameter)
  })
}

function fromRule({ route, why, matrices }: NameRule, parameter: Described): Routed {
  if (route === 'adamw' || !needsLayout(parameter)) return { route, why }
  return { route, why, matrices: matrices ?? layoutOf(parameter).matrices }
}

function byShape(parameter: Described): Routed {
  if (!hasLayout(parameter) && parameter.shape.filter((size) => size > 1).length < 2)
    return { route: 'adamw', why: 'below rank 2' }
  return needsLayout(parameter) ? { route: 'muon', ...layoutOf(parameter) } : { route: 'muon', why: 'matrix' }
}

function layoutOf(parameter: Described): { why: string; matrices: 'flatten' | 'batch' } {
  if (EXPERTS.test(parameter.name)) return { why: 'experts', matrices: 'batch' }
  if (isConvolution(parameter)) return { why: 'convolution', matrices: 'flatten' }
  return { why: 'matrices side by side', matrices: 'batch' }
}

function hasLayout({ split, heads, matrices }: Described): boolean {
  return split !== undefined || heads !== undefined || matrices !== undefined
}

function needsLayout({ shape, matrices }: Described): boolean {
  return shape.length > 2 && matrices === undefined
}

/** By its name, or because every dimension after the second is as narrow as a kernel. */
function isConvolution({ name, shape }: Described): boolean {
  return shape.length > 2 && (CONVOLUTION.test(name) || shape.slice(2).every((size) => size <= WIDEST_KERNEL))
}
