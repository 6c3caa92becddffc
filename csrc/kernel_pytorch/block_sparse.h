// SPDX-License-Identifier: Apache-2.0
//
// Block-sparse attention on the CPU: the interface that Python calls by ctypes.
//
// A row list says for each block of queries which blocks of keys it attends to.
// The mask (causal, window, key_padding, documents) hides single keys inside
// those. Every array is in C order and complete unless strides are given for
// it.
#ifndef KERNEL_PYTORCH_BLOCK_SPARSE_H_
#define KERNEL_PYTORCH_BLOCK_SPARSE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes with every change of a struct here; native.py refuses another
// version.
#define KP_ABI 2

enum { KP_OK = 0, KP_BAD_ARGUMENT = 1, KP_NO_MEMORY = 2 };
enum { KP_FLOAT32 = 0, KP_BFLOAT16 = 1 };
enum { KP_AUTO = -1, KP_GENERIC = 0, KP_AVX2 = 1, KP_AVX512 = 2 };

typedef struct kp_args {
  // Inputs of `dtype`; strides in elements for batch, head and row, and the
  // last dimension has stride 1. q, dout: [batch, heads, q_len, dim]; k, v:
  // [batch, kv_heads, kv_len, dim].
  const void *q, *k, *v, *dout;
  int64_t q_stride[3], k_stride[3], v_stride[3], dout_stride[3];
  // The compressed remainder, or null: one key and value for each block of
  // keys, [batch, kv_heads, kv_blocks, dim], and what is added to its logits,
  // [kv_blocks].
  const void *extra_k, *extra_v;
  const float* extra_weight;
  // Results, complete: out like q, lse [batch, heads, q_len] (natural
  // logarithm); the backward pass reads both. dlse is like lse, or null.
  void* out;
  float* lse;
  const float* dlse;
  void *dq, *dk, *dv, *dextra_k, *dextra_v;
  // The row list: counts [index_batch, heads, q_blocks], blocks [..., width],
  // where index_batch is 1 or batch.
  const int32_t *counts, *blocks;
  int64_t index_batch, width, block;
  // The mask: key_padding [batch, kv_len], 0 = hidden, or null; documents
  // [batch, positions], at least as long as queries and keys, or null; window 0
  // = none.
  const uint8_t* key_padding;
  const int64_t* documents;
  int64_t positions, causal, window;
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
  double scale;
  int64_t dtype, isa, threads;
} kp_args;

// Fills out and lse. A query that sees no key gets out 0 and lse -inf.
int kp_bs_forward(const kp_args* a);

// Fills dq, dk, dv, and dextra_k, dextra_v where the remainder is given.
int kp_bs_backward(const kp_args* a);

// How blocks are chosen by content, and where the lists go.
typedef struct kp_choice {
  // Results: counts [batch, heads, q_blocks], blocks [..., width], ascending.
  int32_t *counts, *blocks;
  // Results [batch, heads, q_blocks]: the share of the examined queries'
  // softmax outside the chosen blocks.
  float* missed;
  // Added to the logarithm of the estimated mass, [batch, heads, q_blocks,
  // kv_blocks], or null.
  const float* logits;
  // Share of the admissible blocks to keep; or, if above 0, of the mass.
  double keep, coverage;
  int64_t remainder;  // dropped blocks will take part by their means
} kp_choice;

// Fills the lists of `c` for the q, k, mask, scale, block and width of `a`; of
// the other fields only sizes, dtype, isa and threads are read. Refuses a width
// that a row could exceed.
int kp_bs_select(const kp_args* a, const kp_choice* c);

// The widest KP_* instruction set that this machine and this build have.
int kp_best_isa(void);

// KP_ABI and the size of kp_args plus kp_choice, as the library was built.
int kp_abi(int64_t* size);

#ifdef __cplusplus
}
#endif

#endif  // KERNEL_PYTORCH_BLOCK_SPARSE_H_
