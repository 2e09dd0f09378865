import type { Described } from '../../src/client/client.js'

const tensor = (name: string, ...shape: number[]): Described => ({ name, shape })
const repeat = (count: number, layer: (index: number) => Described[]) =>
  Array.from({ length: count }, (_, index) => layer(index)).flat()

/** GPT-2 as in its checkpoint (Hugging Face `gpt2`: 12 layers, width 768), whose Conv1D weights are [in, out]. */
export const GPT2: Described[] = [
  tensor('wte.weight', 50257, 768),
  tensor('wpe.weight', 1024, 768),
  ...repeat(12, (i) => [
    tensor(`h.${i}.ln_1.weight`, 768),
    tensor(`h.${i}.ln_1.bias`, 768),
    tensor(`h.${i}.attn.c_attn.weight`, 768, 2304),
    tensor(`h.${i}.attn.c_attn.bias`, 2304),
    tensor(`h.${i}.attn.c_proj.weight`, 768, 768),
    tensor(`h.${i}.attn.c_proj.bias`, 768),
    tensor(`h.${i}.ln_2.weight`, 768),
    tensor(`h.${i}.ln_2.bias`, 768),
    tensor(`h.${i}.mlp.c_fc.weight`, 768, 3072),
    tensor(`h.${i}.mlp.c_fc.bias`, 3072),
    tensor(`h.${i}.mlp.c_proj.weight`, 3072, 768),
    tensor(`h.${i}.mlp.c_proj.bias`, 768),
  ]),
  tensor('ln_f.weight', 768),
  tensor('ln_f.bias', 768),
]

/** Llama 3.2 1B: 16 layers, width 2048, 32 query and 8 key heads of 64; its head written out as a tensor of its own. */
export const LLAMA: Described[] = [
  tensor('model.embed_tokens.weight', 128256, 2048),
  ...repeat(16, (i) => [
    tensor(`model.layers.${i}.self_attn.q_proj.weight`, 2048, 2048),
    tensor(`model.layers.${i}.self_attn.k_proj.weight`, 512, 2048),
    tensor(`model.layers.${i}.self_attn.v_proj.weight`, 512, 2048),
    tensor(`model.layers.${i}.self_attn.o_proj.weight`, 2048, 2048),
    tensor(`model.layers.${i}.mlp.gate_proj.weight`, 8192, 2048),
    tensor(`model.layers.${i}.mlp.up_proj.weight`, 8192, 2048),
    tensor(`model.layers.${i}.mlp.down_proj.weight`, 2048, 8192),
    tensor(`model.layers.${i}.input_layernorm.weight`, 2048),
    tensor(`model.layers.${i}.post_attention_layernorm.weight`, 2048),
  ]),
  tensor('model.norm.weight', 2048),
  tensor('lm_head.weight', 128256, 2048),
]

/** Kimi K2's shapes (width 7168, 64 heads, 384 experts of 2048), with a dense and an expert layer, experts stacked. */
export const KIMI: Described[] = [
  tensor('model.embed_tokens.weight', 163840, 7168),
  ...repeat(2, (i) => [
    tensor(`model.layers.${i}.self_attn.q_a_proj.weight`, 1536, 7168),
    tensor(`model.layers.${i}.self_attn.q_a_layernorm.weight`, 1536),
    tensor(`model.layers.${i}.self_attn.q_b_proj.weight`, 12288, 1536),
    tensor(`model.layers.${i}.self_attn.kv_a_proj_with_mqa.weight`, 576, 7168),
    tensor(`model.layers.${i}.self_attn.kv_a_layernorm.weight`, 512),
    tensor(`model.layers.${i}.self_attn.kv_b_proj.weight`, 16384, 512),
    tensor(`model.layers.${i}.self_attn.o_proj.weight`, 7168, 8192),
    tensor(`model.layers.${i}.input_layernorm.weight`, 7168),
    tensor(`model.layers.${i}.post_attention_layernorm.weight`, 7168),
  ]),
  tensor('model.layers.0.mlp.gate_proj.weight', 18432, 7168),
  tensor('model.layers.0.mlp.up_proj.weight', 18432, 7168),
  tensor('model.layers.0.mlp.down_proj.weight', 7168, 18432),
  tensor('model.layers.1.mlp.gate.weight', 384, 7168),
  tensor('model.layers.1.mlp.gate.e_score_correction_bias', 384),
  tensor('model.layers.1.mlp.experts.gate_proj.weight', 384, 2048, 7168),
  tensor('model.layers.1.mlp.experts.up_proj.weight', 384, 2048, 7168),
  tensor('model.layers.1.mlp.experts.down_proj.weight', 384, 7168, 2048),
  tensor('model.layers.1.mlp.shared_experts.gate_proj.weight', 2048, 7168),
  tensor('model.layers.1.mlp.shared_experts.down_proj.weight', 7168, 2048),
  tensor('model.norm.weight', 7168),
  tensor('lm_head.weight', 163840, 7168),
]

/** A small convolutional network in the names of torchvision's ResNet. */
export const CONVNET: Described[] = [
  tensor('conv1.weight', 16, 3, 3, 3),
  tensor('bn1.weight', 16),
  tensor('bn1.bias', 16),
  tensor('layer1.0.conv1.weight', 16, 16, 3, 3),
  tensor('layer1.0.bn1.weight', 16),
  tensor('layer1.0.conv2.weight', 32, 16, 3, 3),
  tensor('layer1.0.downsample.0.weight', 32, 16, 1, 1),
  tensor('layer1.0.downsample.1.bias', 32),
  tensor('classify.hidden.weight', 64, 32),
  tensor('fc.weight', 10, 64),
  tensor('fc.bias', 10),
]
